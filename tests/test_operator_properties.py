"""Random calls of the operator against the reference in float64: ``pytest -m soak`` for thousands of them."""

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

from hf_flashprefill import BlockIndex, FlashPrefillConfig, flash_prefill_attention, reference
from hf_flashprefill.functional import selection_rule
from tests.inputs import exact_dense
from tests.strategies import Call, random_calls
from tests.tolerance import attention_rounding, integer_rounding, logit_rounding, nearly_longest

BACKENDS = ("torch", "triton")


@contextmanager
def poisoned_memory():
    """Whatever ``torch.empty`` hands out is full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def on_cpu(index: BlockIndex) -> BlockIndex:
    ranges = index.geometry.valid_ranges
    geometry = replace(index.geometry, valid_ranges=None if ranges is None else ranges.cpu())
    return replace(index, indices=index.indices.cpu(), counts=index.counts.cpu(), geometry=geometry)


def run(call: Call, backend: str, device: torch.device):
    """Tensors, scale, further terms of the softmax, output and index of a call, which must leave its inputs alone.

    All are returned on the CPU: what they are compared with is made of many small steps, each a launch on a GPU.
    """
    *tensors, ranges = call.tensors(device)
    copies = [tensor.clone() for tensor in tensors]
    offset = None if call.offset + call.query_len == call.kv_len else call.offset
    settings = {"config": call.config(backend), "scale": call.scale, "query_offset": offset, "valid_ranges": ranges}
    sinks = None if call.sinks is None else torch.tensor(call.sinks)
    terms = {"sliding_window": call.sliding_window, "sinks": sinks}
    settings |= terms | {"sinks": None if sinks is None else sinks.to(device)}
    with poisoned_memory():
        output, index = flash_prefill_attention(*tensors, return_index=True, **settings)
    assert output.shape == tensors[0].shape
    assert output.dtype == call.variant.dtype
    for tensor, copy in zip(tensors, copies, strict=True):
        torch.testing.assert_close(tensor, copy, equal_nan=True, atol=0, rtol=0)
    index = on_cpu(index)
    index.validate()
    tensors, ranges = [tensor.cpu() for tensor in tensors], None if ranges is None else ranges.cpu()
    return tensors, ranges, call.scale or call.variant.head_dim**-0.5, terms, output.cpu(), index


def valid_rows(index: BlockIndex, query, key, value):
    """(row, its queries' places in the call, positions, queries, keys, values) of rows that have queries; padding cut away."""
    geometry = index.geometry
    for row, span in enumerate(geometry.row_spans()):
        if span.query_end > span.query_begin:
            first = span.start + span.query_begin - geometry.query_offset
            places = slice(first, first + span.query_end - span.query_begin)
            keys, values = (tensor[row, :, span.start : span.start + span.key_end] for tensor in (key, value))
            positions = torch.arange(span.query_begin, span.query_end, device=query.device)
            yield row, places, positions, query[row, :, places], keys, values


def row_scores(variant, rule, scale, positions, queries, keys):
    """Scores of one row in float64, [Hq, M, N], and how far each query block's may err, [Hq, M, 1]."""
    pool, key_count = rule["pool_size"], keys.shape[1]
    if variant.selector == "flashprefill":
        means = reference.pooled_keys(keys, pool)
        scores = reference.block_energies(queries, positions, means, key_count, variant.block_size, scale, torch.float64)
        magnitudes = reference.pooled_keys(keys.abs(), pool).repeat_interleave(variant.group, 0)
        rounding = logit_rounding(queries, magnitudes, scale, pool, variant.dtype).amax(-1)
    else:
        stride, block_size = rule["query_stride"], variant.block_size
        probed = reference.probe_logits(queries, positions, keys, pool, stride, block_size, scale, torch.float64)
        score = reference.PROBE_SCORES[variant.selector]
        scores = score(probed, int(positions[0]) // block_size, block_size, pool)
        rounding = integer_rounding(queries, keys, scale, pool, block_size)
        if stride > 1:
            rounding = rounding.masked_fill(nearly_longest(queries, positions // stride), math.inf)
    blocks = positions // variant.block_size - positions[0] // variant.block_size
    per_block = torch.stack([rounding[:, blocks == block].amax(1) for block in range(scores.shape[1])], 1)
    return scores, 4 * per_block[..., None] + 5e-5


def check_lists(call: Call, config: FlashPrefillConfig, scale: float, index: BlockIndex, tensors) -> None:
    """A block is listed if and only if the rule keeps it, or its score is as close to the threshold as rounding goes."""
    variant, rule, kept = call.variant, selection_rule(config), index.to_mask()
    forced = {name: rule[name] for name in ("selector", "alpha", "sink_blocks", "window_blocks", "dense_tail_blocks")}
    for row, _, positions, queries, keys, _ in valid_rows(index, *tensors):
        scores, rounding = row_scores(variant, rule, scale, positions, queries, keys)
        first_block = int(positions[0]) // variant.block_size
        expected = reference.kept_blocks(scores, first_block, **forced)
        got = kept[row, :, : expected.shape[1], : expected.shape[2]]
        assert got.sum() == kept[row].sum(), "a block outside the row"
        margin = scores - (0.0 if variant.selector in ("share", "blend") else scores.amax(-1, keepdim=True))
        margin = (margin - math.log2(config.alpha)).abs() if config.alpha > 0 else torch.full_like(scores, math.inf)
        wrong = (got != expected) & ~(margin <= rounding)
        assert not wrong.any(), f"{wrong.sum()} blocks wrong in row {row}, {margin[wrong].min():.2e} from the threshold"


def check(call: Call, backend: str, device: torch.device) -> None:
    tensors, ranges, scale, terms, output, index = run(call, backend, device)
    config, group = call.config(backend), call.variant.group
    has_window = call.sliding_window is not None and call.sliding_window < call.kv_len
    if not has_window:
        check_lists(call, config, scale, index, tensors)
    mean_blocks = config.mean_blocks if config.correction and not has_window else None
    exact = reference.attend_blocks(*tensors, index, scale=scale, dtype=torch.float64, mean_blocks=mean_blocks, **terms)
    # A window keeps all it sees.
    is_exact = has_window or config.alpha == 0
    dense = exact_dense(*tensors, call.offset, ranges, scale, **terms) if is_exact else None
    is_padding = torch.ones(call.batch, call.query_len, dtype=torch.bool)
    for row, places, _, queries, keys, values in valid_rows(index, *tensors):
        is_padding[row, places] = False
        keys, values = (tensor.repeat_interleave(group, 0) for tensor in (keys, values))
        allowed = attention_rounding(queries, keys, values, scale)
        for name, wanted in (("what its lists say", exact), ("dense attention", dense)):
            if wanted is not None:
                error = (output[row, :, places].double() - wanted[row, :, places]).abs().max().item()
                assert error <= allowed, f"row {row} errs {error:.2e} against {name}, {allowed:.2e} allowed"
    assert not output.transpose(1, 2)[is_padding].any(), "padding must be zeros"
    if config.alpha == 0 and not has_window:
        assert index.density() == 1


QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize(("backend", "examples", "tokens"), [("torch", 100, 300), ("triton", 6, 150)], ids=BACKENDS)
def test_random_calls(backend, examples, tokens, device):
    @settings(max_examples=examples, derandomize=True, **QUIET)
    @given(random_calls(backend, device, tokens))
    def holds(call):
        check(call, backend, device)

    holds()


@pytest.mark.soak
@pytest.mark.parametrize("backend", BACKENDS)
def test_soak(backend, device, soak_cases, capsys):
    """Another --soak-seed gives other calls; a process for each --soak-variant does not compile what another does."""
    cases, number, variant = soak_cases
    done = 0

    @seed(number)
    @settings(max_examples=cases, **QUIET)
    @given(random_calls(backend, device, 160 if backend == "torch" else 80, variant, number))
    def holds(call):
        nonlocal done
        check(call, backend, device)
        done += 1
        if done % 20 == 0 or done == cases:
            with capsys.disabled():
                print(f"{backend} on {device}: {done} random calls of seed {number} hold", flush=True)

    holds()
    assert done >= cases
