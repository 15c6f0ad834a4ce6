"""Planning and gathering, without vLLM: which rows go where, and what is read for them."""

import importlib.util
import json
import logging
import random
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import hf_flashprefill.integrations.vllm as plugin
from hf_flashprefill import FlashPrefillConfig
from hf_flashprefill.integrations.vllm import BACKEND_PATH
from hf_flashprefill.integrations.vllm.config import AUTO_MIN_SEQ_LEN, KEY, RowSettings, settings_from
from hf_flashprefill.integrations.vllm.gather import cpu_pages, flash_pages, gather_row
from hf_flashprefill.integrations.vllm.planner import LongRow, Run, plan_rows

ROOT = Path(__file__).parents[2]


def plan(query_lens, seq_lens, **changes):
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    lengths = None if seq_lens is None else torch.tensor(seq_lens, dtype=torch.int32)
    return plan_rows(starts, lengths, **({"min_query_len": 100, "min_seq_len": 1000} | changes))


def test_long_rows_between_runs():
    divided = plan([1, 1, 300, 40, 1, 200, 120], [50, 9000, 300, 40, 7, 1200, 5000])
    assert divided.long_rows == [LongRow(5, 343, 200, 1200), LongRow(6, 543, 120, 5000)]
    assert divided.runs == [Run(0, 5, 0, 343)]
    assert divided.dense_rows == {"decode": 3, "shorter than min_query_len": 1, "shorter than min_seq_len": 1}


def test_rows_as_runner_v1_orders_them():
    divided = plan([684, 132], [3500, 1540])
    assert [row[0] for row in divided.long_rows] == [0, 1]
    assert divided.runs == []


@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "reasons"),
    [
        ([1, 1, 1], [1, 5000, 9], {"decode": 3}),
        ([4, 4], [5000, 5000], {"shorter than min_query_len": 2}),
        ([100], [999], {"shorter than min_seq_len": 1}),
        ([99], [1000], {"shorter than min_query_len": 1}),
        ([1, 0, 0], [9, 0, 0], {"decode": 1}),
        ([500, 1], None, {"sequence lengths unknown to the host": 1, "decode": 1}),
        ([5001, 1], [5000, 9], {"more queries than tokens": 1, "decode": 1}),
    ],
    ids=["decode", "verification", "short-sequence", "short-query", "padding", "no-host-lengths", "draft"],
)
def test_batches_without_long_rows_stay_whole(query_lens, seq_lens, reasons):
    divided = plan(query_lens, seq_lens)
    assert (divided.long_rows, divided.runs) == ([], [])
    assert divided.dense_rows == reasons


def test_padding_rows_make_no_run_of_their_own():
    divided = plan([150, 0, 0], [2000, 0, 0])
    assert divided.long_rows == [LongRow(0, 0, 150, 2000)]
    assert divided.runs == []
    assert divided.dense_rows == {}


def test_a_reason_keeps_the_batch_dense_and_counts_long_rows_only():
    divided = plan([1, 150, 20], [10, 2000, 20], dense_reason="not causal")
    assert (divided.long_rows, divided.runs) == ([], [])
    assert divided.dense_rows == {"decode": 1, "not causal": 1, "shorter than min_query_len": 1}


def test_every_query_goes_to_exactly_one_place():
    draw = random.Random(0)
    for _ in range(200):
        query_lens = [draw.choice([0, 1, 1, 5, 99, 100, 180]) for _ in range(draw.randint(1, 9))]
        seq_lens = [length + draw.choice([0, 3, 950, 4000]) for length in query_lens]
        divided = plan(query_lens, seq_lens)
        is_long = [q >= 100 and s >= 1000 for q, s in zip(query_lens, seq_lens, strict=True)]
        assert [row.row for row in divided.long_rows] == [row for row, long in enumerate(is_long) if long]
        assert sum(divided.dense_rows.values()) == sum(q > 0 and not w for q, w in zip(query_lens, is_long, strict=True))
        parts = [(row.first_token, row.end_token) for row in divided.long_rows]
        parts += [(run.first_token, run.end_token) for run in divided.runs]
        tokens = [token for first, end in sorted(parts) for token in range(first, end)]
        assert tokens == (list(range(sum(query_lens))) if any(is_long) else [])
        for run in divided.runs:
            assert run.end_token - run.first_token == sum(query_lens[run.first_row : run.end_row])
            assert not any(is_long[run.first_row : run.end_row])


PAGES, HEADS, TOKENS, SIZE = 12, 3, 16, 8


def flash_cache(order: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A cache [P, H, N, 2D] in an order of memory, and the keys and values [P, N, H, D] it was filled with."""
    keys, values = torch.randn(2, PAGES, TOKENS, HEADS, SIZE)
    packed = torch.cat([keys, values], -1)
    if order == "head-major":
        return packed.transpose(1, 2).contiguous(), keys, values
    if order == "token-major":
        return packed.transpose(1, 2), keys, values
    # One layer's slice of memory that all layers share.
    shared = torch.full((PAGES, 5, TOKENS, HEADS, 2 * SIZE), float("nan"))
    shared[:, 3] = packed
    return shared[:, 3].transpose(1, 2), keys, values


def cpu_cache() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same as vLLM's CPU kernels lay it out: in a page and head D x N transposed keys, then N x D values."""
    keys, values = torch.randn(2, PAGES, TOKENS, HEADS, SIZE)
    cache = torch.empty(PAGES, HEADS, TOKENS, 2 * SIZE)
    for page in range(PAGES):
        for head in range(HEADS):
            halves = [keys[page, :, head].T.flatten(), values[page, :, head].flatten()]
            cache[page, head] = torch.cat(halves).view(TOKENS, 2 * SIZE)
    return cache, keys, values


CACHES = {order: lambda order=order: flash_cache(order) for order in ("head-major", "token-major", "shared")}


@pytest.mark.parametrize("layout", [*CACHES, "cpu"])
@pytest.mark.parametrize("seq_len", [1, 15, 16, 17, 75])
def test_gather_reads_exactly_the_row(layout, seq_len):
    cache, keys, values = cpu_cache() if layout == "cpu" else CACHES[layout]()
    views = (cpu_pages if layout == "cpu" else flash_pages)(cache, SIZE)
    order = torch.randperm(PAGES).to(torch.int32)
    unused = order[-(-seq_len // TOKENS) :].long()
    for view, filled in zip(views, (keys, values), strict=True):
        assert view.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
        torch.testing.assert_close(view, filled, rtol=0, atol=0)
        view[unused] = float("nan")
    for gathered, filled in zip(gather_row(*views, order, seq_len), (keys, values), strict=True):
        expected = torch.stack([filled[order[t // TOKENS], t % TOKENS] for t in range(seq_len)], 1)[None]
        torch.testing.assert_close(gathered, expected, rtol=0, atol=0)


def test_settings_are_read():
    given = {"alpha": 0.25, "window_blocks": 2, "min_seq_len": 900, "min_query_len": 300}
    settings = settings_from({KEY: given, "of someone else": 1})
    assert settings == RowSettings(FlashPrefillConfig(alpha=0.25, window_blocks=2, min_seq_len=900), 300)
    assert settings.min_seq_len == 900
    assert settings_from({}) == settings_from(object()) == RowSettings(FlashPrefillConfig())


def test_the_documented_settings_are_good():
    page = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    (given,) = re.findall(r"--additional-config '(.*)'", page)
    assert settings_from(json.loads(given)) != settings_from({})
    assert (
        f"`min_query_len` | tokens a row must bring to the step to run sparsely; default {RowSettings.min_query_len} |" in page
    )
    for module, name in re.findall(r"(hf_flashprefill[\w.]+)\.(\w+)", page):
        assert hasattr(import_module(module), name)


def test_a_length_left_to_us():
    assert RowSettings(FlashPrefillConfig(min_seq_len="auto")).min_seq_len == AUTO_MIN_SEQ_LEN
    assert settings_from({KEY: {"min_seq_len": "auto"}}).min_seq_len == AUTO_MIN_SEQ_LEN


@pytest.mark.parametrize(
    ("given", "drafts", "named"),
    [
        ({"alhpa": 0.1}, 0, "alhpa"),
        ({"alpha": 2}, 0, "alpha must be from 0 to 1, got 2"),
        ({"alpha": "high"}, 0, "alpha"),
        ([], 0, r"must be an object of settings, got \[\]"),
        ({"min_query_len": 1}, 0, "min_query_len must be a whole number >= 2, got 1"),
        ({"min_query_len": 7}, 3, "min_query_len must be a whole number >= 8, got 7"),
        ({"min_query_len": True}, 0, "min_query_len"),
        ({"min_seq_len": -1}, 0, "min_seq_len must be >= 0, got -1"),
        ({"dense_layers": [0, 4]}, 0, r"dense_layers must lie from 0 to 3, got \(0, 4\)"),
    ],
)
def test_bad_settings_are_named_in_one_line(given, drafts, named):
    with pytest.raises(ValueError, match=named) as caught:
        settings_from({KEY: given}, drafts, layers=4)
    message = str(caught.value)
    assert message.startswith('additional_config["flashprefill"]')
    assert "\n" not in message


WITHOUT_VLLM = """
import sys
sys.modules["vllm"] = None
import hf_flashprefill.integrations.vllm as plugin
from hf_flashprefill.integrations.vllm import config, gather, planner, stats
assert not plugin.register()
"""


def test_none_of_this_needs_vllm():
    done = subprocess.run([sys.executable, "-c", WITHOUT_VLLM], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "No sparse prefill: this vLLM takes no attention backend from plugins" in done.stderr


@pytest.fixture
def custom(monkeypatch):
    """vLLM's registry as far as the plugin asks it: what CUSTOM names, and how often it was named."""

    class Custom:
        path, named = None, 0

        def is_overridden(self):
            return self.path is not None

        def get_path(self):
            return self.path

    def register_backend(backend, path):
        backend.path, backend.named = path, backend.named + 1

    # vLLM's own root logger hands nothing on.
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    member, name = Custom(), "vllm.v1.attention.backends.registry"
    parts = name.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(parts[i - 1]))
    registry = ModuleType(name)
    registry.AttentionBackendEnum, registry.register_backend = SimpleNamespace(CUSTOM=member), register_backend
    monkeypatch.setitem(sys.modules, name, registry)
    return member


def test_the_backend_is_named_any_number_of_times(custom, caplog):
    assert plugin.register()
    assert plugin.register()
    assert custom.path == BACKEND_PATH
    assert not caplog.records


def test_the_backend_of_another_plugin_stays(custom, caplog):
    custom.path = "other.Backend"
    assert not plugin.register()
    assert (custom.path, custom.named) == ("other.Backend", 0)
    (record,) = caplog.records
    assert f"CUSTOM is other.Backend already, not {BACKEND_PATH}" in record.getMessage()


@pytest.mark.parametrize("lacks", ["the module", "register_backend", "CUSTOM"])
def test_a_vllm_without_the_registry_starts(lacks, custom, caplog, monkeypatch):
    name = "vllm.v1.attention.backends.registry"
    if lacks == "the module":
        monkeypatch.setitem(sys.modules, name, None)
    elif lacks == "CUSTOM":
        sys.modules[name].AttentionBackendEnum = SimpleNamespace()
    else:
        del sys.modules[name].register_backend
    assert not plugin.register()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "this vLLM takes no attention backend from plugins" in record.getMessage()


def test_the_package_names_the_plugin():
    # tomllib came with Python 3.11; the lines are plain enough to be read as text.
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.split('[project.entry-points."vllm.general_plugins"]')[1].split("[")[0]
    module, function = section.split('"')[1].split(":")
    assert callable(getattr(import_module(module), function))
    assert importlib.util.find_spec(BACKEND_PATH.rpartition(".")[0]) is not None
