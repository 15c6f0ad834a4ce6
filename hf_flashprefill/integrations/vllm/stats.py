"""What the rows of a running engine did: a worker extension that answers ``collective_rpc``."""

from __future__ import annotations

from collections import Counter
from weakref import WeakSet

from ...stats import PrefillStats, layer_stats, reset_layer

# Our metadata builders of this process; each counts the dense rows of the layers it serves.
GROUPS: WeakSet = WeakSet()


class StatsExtension:
    """Start the server with ``--worker-extension-cls hf_flashprefill.integrations.vllm.stats.StatsExtension``."""

    def flashprefill_stats(self) -> dict:
        """``PrefillStats.to_dict()`` of this worker's layers since the start or the last reset.

        A call is one row: one request's part of one engine step. Waits for the device.
        """
        return engine_stats(self.vllm_config).to_dict()

    def flashprefill_reset(self) -> None:
        """Start counting anew."""
        for builder in _groups(self.vllm_config):
            builder.dense_rows.clear()
            for name in builder.layer_names:
                reset_layer(_layer(self.vllm_config, name))


def engine_stats(vllm_config) -> PrefillStats:
    """The counts of all attention layers that one engine's worker runs on our backend, in the model's order."""
    from vllm.model_executor.models.utils import extract_layer_index

    dense_rows: dict[str, Counter] = {}
    for builder in _groups(vllm_config):
        for name in builder.layer_names:
            dense_rows.setdefault(name, Counter()).update(builder.dense_rows)
    layers = [layer_stats(_layer(vllm_config, name), extract_layer_index(name), dense) for name, dense in dense_rows.items()]
    return PrefillStats(sorted(layers, key=lambda layer: layer.layer))


def _groups(vllm_config) -> list:
    return [builder for builder in GROUPS if builder.vllm_config is vllm_config]


def _layer(vllm_config, name: str):
    return vllm_config.compilation_config.static_forward_context[name]
