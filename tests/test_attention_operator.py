"""flash_prefill_attention: every backend against float64, over shapes, paddings, offsets, strides and dtypes."""

import importlib
from dataclasses import replace

import pytest
import torch

from hf_flashprefill import FlashPrefillConfig, flash_prefill_attention, functional, reference
from hf_flashprefill.backends import triton as triton_backend
from hf_flashprefill.config import SELECTORS
from tests.inputs import UGLY_CASES, Case, exact_dense
from tests.tolerance import assert_no_worse_than_eager, assert_same_output


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("case", UGLY_CASES, ids=str)
def test_alpha_zero_is_dense_attention(backend, case, device):
    query, key, value, ranges = case.tensors(device)
    expected = exact_dense(query, key, value, case.offset, ranges, case.head_dim**-0.5)
    config = FlashPrefillConfig(alpha=0, block_size=64, backend=backend)
    output = flash_prefill_attention(query, key, value, config=config, query_offset=case.query_offset, valid_ranges=ranges)
    assert output.shape == query.shape
    assert_same_output(output, expected.float())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", UGLY_CASES, ids=str)
def test_attention_over_the_same_index(backend, case, device):
    query, key, value, ranges = case.tensors(device)
    dropping = {"alpha": 0.6, "sink_blocks": 0, "window_blocks": 1, "dense_tail_blocks": 0, "correction": False}
    config = FlashPrefillConfig(block_size=64, backend=backend, **dropping)
    output, index = flash_prefill_attention(
        query,
        key,
        value,
        config=config,
        query_offset=case.query_offset,
        valid_ranges=ranges,
        scale=0.2,
        return_index=True,
    )
    exact = reference.attend_blocks(query, key, value, index, scale=0.2, dtype=torch.float64)
    assert_same_output(output, exact.float())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ranges_and_sinks_have_any_strides(backend, dtype, device):
    case = Case(3, 2, 1, 100, 200, 64, ranges=((20, 200), (0, 130), (60, 190)))
    query, key, value, ranges = case.tensors(device)
    ranges, sinks = ranges.to(dtype), torch.tensor([1.0, -0.5], device=device)
    expected = exact_dense(query, key, value, case.offset, ranges, case.head_dim**-0.5, sinks=sinks).float()
    config = FlashPrefillConfig(alpha=0, block_size=64, backend=backend)

    def output(ranges, sinks):
        return flash_prefill_attention(query, key, value, config=config, valid_ranges=ranges, sinks=sinks)

    # Made of all starts and all ends, and a part of a wider table.
    assert_same_output(output(ranges.t().contiguous().t(), sinks), expected)
    assert_same_output(output(torch.cat([ranges, ranges], 1)[:, :2], sinks[:, None].expand(2, 3)[:, 1]), expected)
    assert_same_output(output(ranges, torch.stack([sinks, 9 * sinks], 1)[:, 0]), expected)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("selector", SELECTORS)
def test_autocast_changes_nothing(backend, selector, device):
    """It would round what the operator multiplies in float32."""
    query, key, value, _ = Case(1, 2, 1, 300, 300, 64).tensors(device)
    config = FlashPrefillConfig(0.1, selector, block_size=64, sink_blocks=0, window_blocks=1, dense_tail_blocks=0)
    config = replace(config, backend=backend)
    expected = flash_prefill_attention(query, key, value, config=config)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(flash_prefill_attention(query, key, value, config=config), expected)


@pytest.mark.parametrize(
    "terms", [{"correction": True}, {"correction": False, "sinks": torch.tensor([-torch.inf, 1.0])}], ids=str
)
def test_torch_multiplies_finite_float32_numbers_only(terms, monkeypatch):
    """A GPU multiplies float32 as sums of TF32 parts, and what minus infinity leaves behind its first part is NaN."""
    query, key, value, _ = Case(1, 2, 1, 300, 300, 64).tensors(torch.device("cpu"))
    sdpa, calls = torch.nn.functional.scaled_dot_product_attention, []
    torch_attend = importlib.import_module("hf_flashprefill.backends.torch.attend")

    def checked(*tensors, **options):
        calls.append(all(tensor.isfinite().all() for tensor in tensors))
        return sdpa(*tensors, **options)

    monkeypatch.setattr(torch_attend, "scaled_dot_product_attention", checked)
    # All blocks are kept, so every mean stands for nothing.
    config = FlashPrefillConfig(alpha=0, block_size=64, backend="torch", correction=terms["correction"])
    output = flash_prefill_attention(query, key, value, config=config, sinks=terms.get("sinks"))
    monkeypatch.undo()
    assert calls
    assert all(calls)
    assert_same_output(output, exact_dense(query, key, value, 0, None, 64**-0.5, sinks=terms.get("sinks")).float())


WINDOWS = [1, 65, 200]


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("case", UGLY_CASES[4:], ids=str)
def test_sliding_windows_are_exact(backend, window, case, device):
    query, key, value, ranges = case.tensors(device)
    expected = exact_dense(query, key, value, case.offset, ranges, case.head_dim**-0.5, sliding_window=window)
    config = FlashPrefillConfig(alpha=1, block_size=64, backend=backend)
    placing = {"query_offset": case.query_offset, "valid_ranges": ranges}
    output, index = flash_prefill_attention(
        query, key, value, config=config, sliding_window=window, return_index=True, **placing
    )
    index.validate()
    assert int(index.counts.max()) <= -(-window // 64) + 1, "the cost must follow from the window"
    assert_same_output(output, expected.float())


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_window_as_long_as_the_keys_changes_nothing(backend, device):
    query, key, value, _ = Case(1, 2, 1, 300, 300, 64).tensors(device)
    config = FlashPrefillConfig(alpha=0.5, block_size=64, backend=backend)
    plain = flash_prefill_attention(query, key, value, config=config)
    assert torch.equal(plain, flash_prefill_attention(query, key, value, config=config, sliding_window=300))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("case", UGLY_CASES[7:], ids=str)
def test_sinks_take_part_without_a_value(backend, window, case, device):
    query, key, value, ranges = case.tensors(device)
    sinks = torch.linspace(-3, 6, case.heads, device=device)
    scale = case.head_dim**-0.5
    expected = exact_dense(query, key, value, case.offset, ranges, scale, sliding_window=window, sinks=sinks)
    config = FlashPrefillConfig(alpha=0, block_size=64, backend=backend)
    placing = {"query_offset": case.query_offset, "valid_ranges": ranges}
    output = flash_prefill_attention(query, key, value, config=config, sliding_window=window, sinks=sinks, **placing)
    assert_same_output(output, expected.float())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", UGLY_CASES[7:], ids=str)
@pytest.mark.parametrize("mean_blocks", [1, 4])
def test_means_of_dropped_blocks_take_part(backend, case, mean_blocks, device):
    query, key, value, ranges = case.tensors(device)
    dropping = {"sink_blocks": 0, "window_blocks": 1, "dense_tail_blocks": 0}
    config = FlashPrefillConfig(alpha=0.6, block_size=64, correction=True, mean_blocks=mean_blocks, backend=backend, **dropping)
    placing = {"query_offset": case.query_offset, "valid_ranges": ranges}
    sinks = torch.linspace(-3, 6, case.heads, device=device)
    output, index = flash_prefill_attention(query, key, value, config=config, sinks=sinks, return_index=True, **placing)
    scale = case.head_dim**-0.5
    options = {"scale": scale, "sinks": sinks, "dtype": torch.float64}
    expected = reference.attend_blocks(query, key, value, index, mean_blocks=mean_blocks, **options)
    assert_same_output(output, expected.float())
    if index.density() < 1:
        assert not torch.allclose(output.double(), reference.attend_blocks(query, key, value, index, **options))


@pytest.mark.parametrize(("mean_blocks", "alike"), [(1, 64), (2, 512), (8, 512)])
def test_the_mean_of_equal_keys_is_as_good_as_the_keys(mean_blocks, alike):
    """What the correction adds is exact where the keys of a dropped run of blocks are all alike, whatever their values."""
    query, key, value, _ = Case(1, 2, 1, 512, 512, 64).tensors(torch.device("cpu"))
    key = key[:, :, ::alike].repeat_interleave(alike, 2)
    dropping = {"sink_blocks": 0, "window_blocks": 1, "dense_tail_blocks": 0}
    config = FlashPrefillConfig(alpha=1, block_size=64, correction=True, mean_blocks=mean_blocks, **dropping)
    output, index = flash_prefill_attention(query, key, value, config=config, return_index=True)
    assert index.density() < 0.5
    assert_same_output(output, exact_dense(query, key, value, 0, None, 64**-0.5).float())


def test_sparse_cases_drop_blocks():
    query, key, value, _ = Case(1, 7, 1, 700, 700, 64).tensors(torch.device("cpu"))
    config = FlashPrefillConfig(alpha=0.6, block_size=64, sink_blocks=0, window_blocks=1, dense_tail_blocks=0)
    assert flash_prefill_attention(query, key, value, config=config, return_index=True).index.density() < 0.7


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_half_precision_errs_no_more_than_eager(backend, correction, device):
    case = Case(1, 4, 2, 300, 500, 64, dtype=torch.float16)
    query, key, value, _ = case.tensors(device)
    config = FlashPrefillConfig(alpha=0.5, block_size=64, dense_tail_blocks=0, correction=correction, backend=backend)
    output, index = flash_prefill_attention(query, key, value, config=config, return_index=True)
    options = {"scale": case.head_dim**-0.5, "mean_blocks": config.mean_blocks if correction else None}
    exact = reference.attend_blocks(query, key, value, index, dtype=torch.float64, **options)
    eager = reference.attend_blocks(query, key, value, index, dtype=case.dtype, **options)
    assert_no_worse_than_eager(output, eager, exact)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rounds_of_query_blocks_change_nothing(backend, device, monkeypatch):
    case = Case(2, 2, 1, 400, 500, 64, ranges=((0, 500), (130, 480)))
    query, key, value, ranges = case.tensors(device)
    config = FlashPrefillConfig(alpha=0.5, block_size=64, dense_tail_blocks=1, backend=backend)
    whole = flash_prefill_attention(query, key, value, config=config, valid_ranges=ranges, return_index=True)
    monkeypatch.setattr(functional, "SCRATCH_BYTES", 1)
    seen = []
    parts = flash_prefill_attention(
        query, key, value, config=config, valid_ranges=ranges, return_index=True, on_index=seen.append
    )
    assert len(seen) == whole.index.query_blocks > 4
    assert torch.equal(parts.output, whole.output)
    assert torch.equal(parts.index.to_mask(), whole.index.to_mask())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_same_bits_on_every_run(backend, device):
    query, key, value, _ = Case(1, 2, 1, 400, 400, 64).tensors(device)
    config = FlashPrefillConfig(alpha=0.3, block_size=64, backend=backend)
    first = flash_prefill_attention(query, key, value, config=config)
    assert torch.equal(first, flash_prefill_attention(query, key, value, config=config))


def test_inputs_are_left_alone(device):
    tensors = Case(2, 2, 1, 200, 200, 64, ranges=((30, 200), (0, 150))).tensors(device)
    copies = [tensor.clone() for tensor in tensors]
    flash_prefill_attention(*tensors[:3], valid_ranges=tensors[3])
    for tensor, copy in zip(tensors, copies, strict=True):
        torch.testing.assert_close(tensor, copy, equal_nan=True, atol=0, rtol=0)


def shaped(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": "q"}, TypeError, "query"),
        ({"query": shaped(4, 200, 64)}, ValueError, "query must have 4 dimensions"),
        ({"query": shaped(1, 3, 200, 64)}, ValueError, "divides the query's 3"),
        ({"query": shaped(1, 4, 0, 64)}, ValueError, "at least one"),
        ({"query": shaped(1, 4, 200, 64, dtype=torch.float64)}, TypeError, "float64"),
        ({"key": shaped(1, 2, 200, 64, dtype=torch.float16)}, TypeError, "key must have the query's dtype"),
        ({"key": shaped(1, 2, 200, 32)}, ValueError, "head_dim 64"),
        ({"key": shaped(1, 2, 100, 64), "value": shaped(1, 2, 100, 64)}, ValueError, "at least the query's 200"),
        ({"key": torch.zeros(1, 2, 200, 64, device="meta")}, ValueError, "key must be on the query's device"),
        ({"value": shaped(1, 2, 200, 32)}, ValueError, "value must have the key's shape"),
        ({"query_offset": 1}, ValueError, "query_offset must be from 0 to 0"),
        ({"query_offset": 0.0}, TypeError, "query_offset"),
        ({"scale": 0.0}, ValueError, "scale"),
        ({"scale": "1"}, TypeError, "scale"),
        ({"valid_ranges": torch.zeros(1, 2)}, TypeError, "valid_ranges"),
        ({"valid_ranges": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, "valid_ranges"),
        ({"sliding_window": 0}, ValueError, "sliding_window must be >= 1, got 0"),
        ({"sliding_window": 8.0}, TypeError, "sliding_window"),
        ({"sinks": [0.0] * 4}, TypeError, "sinks"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks must have shape \(4,\)"),
        ({"config": {"alpha": 0.1}}, TypeError, "config"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    arguments = {"query": shaped(1, 4, 200, 64), "key": shaped(1, 2, 200, 64), "value": shaped(1, 2, 200, 64)}
    with pytest.raises(error, match=message):
        flash_prefill_attention(**(arguments | change))


@pytest.mark.parametrize("head_dim", [264, 512])
@pytest.mark.parametrize("correction", [False, True])
def test_wide_heads(head_dim, correction, device):
    """Their tiles are others. Gemma 4's layers without a window have head_dim 512."""
    case = Case(1, 2, 1, 140, 500, head_dim, dtype=torch.bfloat16 if device.type == "cuda" else torch.float16)
    query, key, value, _ = case.tensors(device)
    for rule in ({"alpha": 0.2}, {"alpha": 0.9, "selector": "flashprefill"}):
        dropping = {"sink_blocks": 0, "window_blocks": 1, "dense_tail_blocks": 0, "correction": correction, "mean_blocks": 2}
        config = FlashPrefillConfig(**rule, **dropping, block_size=64, backend="triton")
        output, index = flash_prefill_attention(query, key, value, config=config, return_index=True)
        assert 0.2 < index.density() < 0.9
        options = {"scale": head_dim**-0.5, "mean_blocks": 2 if correction else None}
        exact = reference.attend_blocks(query, key, value, index, dtype=torch.float64, **options)
        eager = reference.attend_blocks(query, key, value, index, dtype=case.dtype, **options)
        assert_no_worse_than_eager(output, eager, exact)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "capability", "obstacle"),
    [
        (512, torch.bfloat16, (9, 0), None),
        (512, torch.float16, (8, 0), None),
        (256, torch.float32, (12, 0), None),
        (512, torch.float32, (9, 0), "head_dim above 256 needs 16-bit numbers"),
        (264, torch.bfloat16, (8, 6), "and compute capability 8.0, 9.x or 10.x, got 264 in torch.bfloat16 on 8.6"),
        (520, torch.bfloat16, (9, 0), "head_dim must be a multiple of 8 up to 512, got 520"),
        (100, torch.bfloat16, (9, 0), "head_dim must be a multiple of 8"),
        (128, torch.bfloat16, (7, 5), "compute capability must be 8.0 or newer"),
    ],
)
def test_what_no_kernel_takes_on_a_gpu_runs_in_torch_or_stays_dense(head_dim, dtype, capability, obstacle, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    # As it would be with a GPU.
    monkeypatch.setattr(triton_backend, "InterpretedFunction", ())
    gpu = torch.device("cuda")
    found = functional.triton_obstacle(functional.TensorKind(gpu, dtype, (1, 1, 1, head_dim)))
    assert found is None if obstacle is None else obstacle in found
    assert functional.lacks_kernel("auto", gpu, dtype, head_dim) == (obstacle is not None)
    assert not functional.lacks_kernel("torch", gpu, dtype, head_dim)
    assert not functional.lacks_kernel("auto", torch.device("cpu"), dtype, head_dim)


def test_head_dim_without_a_kernel(device):
    query = torch.zeros(1, 1, 64, 520, device=device)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 8 up to 512, got 520"):
        flash_prefill_attention(query, query, query, config=FlashPrefillConfig(backend="triton"))
    # "auto" finds another way.
    assert flash_prefill_attention(query, query, query).shape == query.shape
