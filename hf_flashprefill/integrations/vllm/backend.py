"""Sparse prefill of long rows around any of vLLM's own attention backends, as three mixins.

The builder divides each batch once per step and asks the base for metadata of each run of other rows. The implementation
then hands those runs to the base and each long row to ``flash_prefill_attention``. A batch without long rows passes
through untouched. By the time an implementation runs, the step's keys and values are in the paged cache; ours reads them
from there alone.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from ...functional import flash_prefill_attention, lacks_kernel
from ...operator_arguments import DTYPES
from ...stats import record_dense, record_sparse
from .config import settings_from
from .gather import gather_row
from .planner import RowPlan, Run, plan_rows
from .stats import GROUPS

# vLLM's log shows only its own loggers.
logger = init_logger("vllm.plugins.flashprefill")

# Fields of CommonAttentionMetadata that a run of rows takes its part of.
PER_ROW_FIELDS = (
    *("seq_lens", "block_table_tensor", "is_prefilling", "seq_lens_cpu_upper_bound"),
    # Of vLLM 0.32 and 0.26 alone.
    *("req_idx", "_seq_lens_cpu", "_num_computed_tokens_cpu"),
)
PER_TOKEN_FIELDS = ("slot_mapping", "positions")
# Fields that are worked out anew for a run, or left to be.
COMPUTED_FIELDS = (
    "query_start_loc",
    "query_start_loc_cpu",
    "num_reqs",
    "num_actual_tokens",
    "max_query_len",
    "max_seq_len",
    "causal",
    "_num_computed_tokens_cache",
    "_token_to_req_indices_cache",
)
# Fields that change the attention itself. Any that is set keeps the batch dense.
FOREIGN_FIELDS = {
    "logits_indices_padded": "KV sharing fast prefill",
    "num_logits_indices": "KV sharing fast prefill",
    "max_logits_per_req": "KV sharing fast prefill",
    "encoder_seq_lens": "encoder attention",
    "encoder_seq_lens_cpu": "encoder attention",
    "dcp_local_seq_lens": "context parallelism",
    "dcp_local_seq_lens_cpu": "context parallelism",
    "dcp_local_seq_lens_cpu_upper_bound": "context parallelism",
    "mm_req_doc_ranges": "bidirectional image tokens",
    "rswa_prefix_lens": "R-SWA",
}
# By the class of a KV-cache group's spec, of which not every vLLM has all.
DENSE_GROUPS = {
    "SlidingWindowSpec": "sliding window",
    "ChunkedLocalAttentionSpec": "chunked local attention",
    "RSWASpec": "R-SWA",
}
SPLIT = "flashprefill_split"


@dataclass(frozen=True)
class BatchSplit:
    """What our builder leaves on the base's metadata of a batch with long rows.

    Attributes:
        plan: The division of the batch.
        run_metadata: The base's metadata of each of ``plan.runs``.
        block_table: Integers [rows, pages], page numbers of each row on the device.
    """

    plan: RowPlan
    run_metadata: list[Any]
    block_table: torch.Tensor


class SparsePrefillBackend:
    """To stand before an AttentionBackend: what the rows' division takes away from its abilities."""

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        # Which rows are long, and where each chunk's dense tail falls, depends on how requests share a step.
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        # Rows are divided by the host's query lengths.
        return False


class SparsePrefillBuilder:
    """To stand before an AttentionMetadataBuilder: divides each batch and builds the base's metadata of each run."""

    # The base would copy metadata together with the old block table's division.
    supports_update_block_table = False

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device, *args, **kwargs):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, *args, **kwargs)
        self._settings = _engine_settings(vllm_config)
        self._group_reason = _group_dense_reason(kv_cache_spec, vllm_config)
        self._passing_through = False
        self.dense_rows: Counter[str] = Counter()
        GROUPS.add(self)
        logger.info_once(f"Sparse prefill: min_query_len={self._settings.min_query_len}, {self._settings.prefill}")

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        # A captured mixed batch would replay the division of the batch it was captured with.
        base = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        return min(base, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False):
        """The base's metadata of the whole batch, with a BatchSplit on it if rows are long."""
        if self._passing_through:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        plan = plan_rows(
            common_attn_metadata.query_start_loc_cpu,
            common_attn_metadata.seq_lens_cpu_upper_bound,
            min_query_len=self._settings.min_query_len,
            min_seq_len=self._settings.min_seq_len,
            dense_reason=self._group_reason or batch_dense_reason(common_attn_metadata, common_prefix_len),
        )
        self.dense_rows.update(plan.dense_rows)
        if not plan.long_rows:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        # Several builds share the base's persistent buffers in one step; a fast build writes none of them.
        metadata = super().build(common_prefix_len, common_attn_metadata, True)
        runs = [super(SparsePrefillBuilder, self).build(0, run_part(common_attn_metadata, run), True) for run in plan.runs]
        setattr(metadata, SPLIT, BatchSplit(plan, runs, common_attn_metadata.block_table_tensor))
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata):
        return self._pass_through(super().build_for_cudagraph_capture, common_attn_metadata)

    def build_for_drafting(self, *args, **kwargs):
        # A draft model's attention decides how many drafts are accepted, not what the server answers.
        return self._pass_through(super().build_for_drafting, *args, **kwargs)

    def _pass_through(self, build: Callable, *args, **kwargs):
        self._passing_through = True
        try:
            return build(*args, **kwargs)
        finally:
            self._passing_through = False


class SparsePrefillImpl:
    """To stand before an AttentionImpl. A subclass gives ``pages``: (kv_cache, head_size) -> key and value pages."""

    pages: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]

    def __init__(self, *args, **kwargs):
        # Checked before the weights are loaded: the layers of the model are made first.
        self._settings = _engine_settings(get_current_vllm_config())
        given = inspect.signature(super().__init__).bind(*args, **kwargs).arguments
        traits = {
            "sliding window": given.get("sliding_window") is not None,
            "softcap": bool(given.get("logits_soft_cap")),
            "ALiBi": given.get("alibi_slopes") is not None,
            "attention sinks": given.get("sinks") is not None,
            "encoder attention": given.get("attn_type", "decoder") != "decoder",
            "KV sharing": given.get("kv_sharing_target_layer_name") is not None,
        }
        self._trait = next((reason for reason, holds in traits.items() if holds), None)
        super().__init__(*args, **kwargs)

    def forward(
        self,
        layer,
        query,
        key,
        value,
        kv_cache,
        attn_metadata,
        output,
        output_scale=None,
        output_block_scale=None,
    ):
        """Attention of one layer: query [tokens, Hq, D] and the paged cache -> ``output`` [tokens, Hq, D]."""
        split: BatchSplit | None = getattr(attn_metadata, SPLIT, None)
        reason = None
        if split is not None:
            fused = output_scale is not None or output_block_scale is not None
            reason = "fused output quantisation" if fused else self._dense_reason(layer, query, kv_cache)
        if split is None or reason is not None:
            if reason is not None:
                record_dense(layer, reason, calls=len(split.plan.long_rows))
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        for run, metadata in zip(split.plan.runs, split.run_metadata, strict=True):
            tokens = slice(run.first_token, run.end_token)
            new_key, new_value = (None if tensor is None else tensor[tokens] for tensor in (key, value))
            super().forward(layer, query[tokens], new_key, new_value, kv_cache, metadata, output[tokens])
        self._prefill(layer, query, kv_cache, split, output)
        return output

    def _prefill(self, layer, query, kv_cache, split: BatchSplit, output) -> None:
        key_pages, value_pages = type(self).pages(kv_cache, self.head_size)
        record = record_sparse(layer, len(split.plan.long_rows))
        for row in split.plan.long_rows:
            tokens = slice(row.first_token, row.end_token)
            result = flash_prefill_attention(
                query[tokens].transpose(0, 1)[None],
                *gather_row(key_pages, value_pages, split.block_table[row.row], row.seq_len),
                config=self._settings.prefill,
                scale=self.scale,
                on_index=record.add_index,
            )
            output[tokens].copy_(result[0].transpose(0, 1))

    def _dense_reason(self, layer, query: torch.Tensor, kv_cache: torch.Tensor) -> str | None:
        if self._trait is not None:
            return self._trait
        if self._settings.prefill.dense_layers and extract_layer_index(layer.layer_name) in self._settings.prefill.dense_layers:
            return "dense layer"
        if kv_cache.dtype != query.dtype:
            return "quantised KV cache"
        if query.dtype not in DTYPES:
            return "unsupported dtype"
        if lacks_kernel(self._settings.prefill.backend, query.device, query.dtype, self.head_size):
            return "no GPU kernel"
        return None


def batch_dense_reason(common: CommonAttentionMetadata, common_prefix_len: int) -> str | None:
    """Why the long rows of a batch stay dense, or None."""
    if common_prefix_len:
        return "cascade attention"
    if common.causal is not True:
        return "not causal"
    known = {*PER_ROW_FIELDS, *PER_TOKEN_FIELDS, *COMPUTED_FIELDS}
    for field in dataclasses.fields(common):
        if field.name in known:
            continue
        value = getattr(common, field.name)
        if value is not None and not (isinstance(value, dict) and not value):
            return FOREIGN_FIELDS.get(field.name, f"vLLM's {field.name} is set")
    return None


def run_part(common: CommonAttentionMetadata, run: Run) -> CommonAttentionMetadata:
    """The metadata of a run of rows as if they were a batch of their own."""
    rows, tokens = slice(run.first_row, run.end_row), slice(run.first_token, run.end_token)
    starts = common.query_start_loc_cpu[run.first_row : run.end_row + 1] - run.first_token
    changes = {
        "query_start_loc": common.query_start_loc[run.first_row : run.end_row + 1] - run.first_token,
        "query_start_loc_cpu": starts,
        "num_reqs": run.end_row - run.first_row,
        "num_actual_tokens": run.end_token - run.first_token,
        "max_query_len": int((starts[1:] - starts[:-1]).max()),
        "max_seq_len": int(common.seq_lens_cpu_upper_bound[rows].max()),
        "_num_computed_tokens_cache": None,
        "_token_to_req_indices_cache": None,
    }
    present = {field.name for field in dataclasses.fields(common)}
    for names, part in ((PER_ROW_FIELDS, rows), (PER_TOKEN_FIELDS, tokens)):
        for name in present.intersection(names):
            value = getattr(common, name)
            changes[name] = None if value is None else value[part]
    return dataclasses.replace(common, **{name: value for name, value in changes.items() if name in present})


def _engine_settings(vllm_config):
    speculative = vllm_config.speculative_config
    if speculative is not None:
        # A draft model's layers are numbered on from the model's.
        return settings_from(vllm_config.additional_config, speculative.num_speculative_tokens or 0)
    layers = getattr(vllm_config.model_config.hf_text_config, "num_hidden_layers", None)
    return settings_from(vllm_config.additional_config, layers=layers)


def _group_dense_reason(kv_cache_spec, vllm_config) -> str | None:
    # Subclasses of the spec are other kinds of attention (MLA, sinks kept in the cache, ...).
    if type(kv_cache_spec) is not FullAttentionSpec:
        kind = type(kv_cache_spec).__name__
        return DENSE_GROUPS.get(kind, f"KV cache of kind {kind}")
    if kv_cache_spec.attention_chunk_size is not None:
        return "chunked local attention"
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        return "context parallelism"
    return None
