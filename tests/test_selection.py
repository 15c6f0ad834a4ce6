"""The published rule, evaluated a second time in float64 straight from the paper's formulas."""

import math

import numpy as np
import pytest
import torch

from hf_flashprefill import FlashPrefillConfig, flash_prefill_attention, reference
from hf_flashprefill.backends import torch as torch_backend
from hf_flashprefill.backends.torch import select as torch_select
from hf_flashprefill.backends.triton import shares
from hf_flashprefill.backends.triton.longest import longest_queries
from hf_flashprefill.functional import selection_rule
from hf_flashprefill.geometry import PrefillGeometry
from tests.inputs import UGLY_CASES, Case

RULE = {"sink_blocks": 1, "window_blocks": 1, "dense_tail_blocks": 0}
PUBLISHED = {"selector": "flashprefill", **RULE}


def paper_energies(query: np.ndarray, key: np.ndarray, offset: int, block_size: int, scale: float) -> np.ndarray:
    """Energies relative to each query block's largest, [M, N] for one head, in float64 loops.

    Mean keys; softmax numerators of every query row against them, one exponent reference per query block; a row counts
    for a key block once that block lies wholly in its past; summed over the rows (arXiv 2603.06199, section 3).
    """
    query, key = query.astype(np.float64), key.astype(np.float64)
    key_blocks = [key[i : i + block_size] for i in range(0, len(key), block_size)]
    ends = np.cumsum([len(block) for block in key_blocks]) - 1
    positions = offset + np.arange(len(query))
    first = positions[0] // block_size
    energies = np.zeros((positions[-1] // block_size - first + 1, len(key_blocks)))
    for tile in range(len(energies)):
        rows = positions // block_size == first + tile
        logits = np.array([scale * (query[rows] @ block.mean(0)) for block in key_blocks])
        seen = ends[:, None] <= positions[rows][None, :]
        reference_logit = logits[seen].max()
        energies[tile] = (np.exp(logits - reference_logit) * seen).sum(1)
    return energies / energies.max(1, keepdims=True)


def disagreements(kept: np.ndarray, energies: np.ndarray, alpha: float, first: int) -> list[float]:
    """Distances from the threshold, in log2, of the blocks on which ``kept`` and the formula disagree."""
    tile = first + np.arange(len(energies))[:, None]
    block = np.arange(energies.shape[1])[None, :]
    forced = (block < RULE["sink_blocks"]) | (tile - block < RULE["window_blocks"])
    expected = ((energies >= alpha) | forced) & (block <= tile)
    with np.errstate(divide="ignore"):
        return np.abs(np.log2(energies[kept != expected] / alpha)).tolist()


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("block_size", [64, 128])
def test_selection_follows_the_papers_formula(backend, block_size, device):
    decided = 0
    for case in (Case(1, 2, 1, 900, 900, 64), Case(1, 2, 2, 300, 1000, 80), Case(1, 1, 1, 129, 640, 64)):
        query, key, value, _ = case.tensors(device)
        # The interpreter needs seconds a call; its kernel has one threshold for all.
        for alpha in (0.3,) if backend == "triton" and device.type == "cpu" else (0.02, 0.3, 1.0):
            config = FlashPrefillConfig(alpha=alpha, block_size=block_size, backend=backend, **PUBLISHED)
            index = flash_prefill_attention(query, key, value, config=config, return_index=True).index
            kept = index.to_mask().cpu().numpy()
            for head in range(case.heads):
                head_key = key[0, head // (case.heads // case.key_heads)].cpu().numpy()
                energies = paper_energies(query[0, head].cpu().numpy(), head_key, case.offset, block_size, case.head_dim**-0.5)
                wrong = disagreements(kept[0, head], energies, alpha, case.offset // block_size)
                assert all(distance < 1e-4 for distance in wrong), wrong
                decided += int((energies < alpha).sum())
    assert decided > 20, "the thresholds must have had something to decide"


PROBES = [
    {"selector": "flashprefill", "alpha": 0.4, "block_size": 64},
    {"selector": "flashprefill", "alpha": 0.4, "block_size": 128},
    {"selector": "share", "alpha": 0.02, "block_size": 128},
    {"selector": "share", "alpha": 0.03, "block_size": 64, "pool_size": 32, "query_stride": 2},
    {"selector": "blend", "alpha": 0.05, "block_size": 128},
    {"selector": "blend", "alpha": 0.4, "block_size": 64, "pool_size": 32, "query_stride": 2},
    {"selector": "peak", "alpha": 0.4, "block_size": 128, "pool_size": 4, "query_stride": 16},
    {"selector": "peak", "alpha": 0.3, "block_size": 64, "pool_size": 16, "query_stride": 64},
]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: "-".join(map(str, probe.values())))
@pytest.mark.parametrize("case", UGLY_CASES, ids=str)
def test_backends_select_what_the_reference_selects(backend, probe, case, device):
    query, key, value, ranges = case.tensors(device)
    index = {}
    for name in ("reference", backend):
        config = FlashPrefillConfig(backend=name, **probe, **RULE)
        index[name] = flash_prefill_attention(
            query, key, value, config=config, query_offset=case.offset, valid_ranges=ranges, return_index=True
        ).index
        index[name].validate()
    assert torch.equal(index[backend].to_mask(), index["reference"].to_mask())


@pytest.mark.parametrize(("selector", "splits"), [("blend", 5), ("peak", 2)])
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 4, 2, 200, 900, 64),
        Case(2, 4, 4, 300, 900, 64, ranges=((100, 900), (0, 700))),
        Case(3, 2, 1, 200, 800, 64, ranges=((790, 800), (0, 680), (7, 7))),
    ],
    ids=str,
)
def test_a_probe_in_splits_of_the_keys_selects_the_same(selector, case, splits, device, monkeypatch):
    query, key, value, ranges = case.tensors(device)
    index, asked = {}, []
    monkeypatch.setattr(shares, "probe_splits", lambda *_: asked.append(1) or splits)
    for name in ("reference", "triton"):
        probe = {"selector": selector, "alpha": 0.4 if selector == "peak" else 0.12, "block_size": 64, "pool_size": 8}
        config = FlashPrefillConfig(backend=name, **probe, **RULE)
        placing = {"query_offset": case.offset, "valid_ranges": ranges}
        index[name] = flash_prefill_attention(query, key, value, config=config, return_index=True, **placing).index
    assert asked
    assert 0.1 < index["reference"].density() < 0.95
    assert torch.equal(index["triton"].to_mask(), index["reference"].to_mask())


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("probe", [{"selector": "topk", "alpha": 0.6}, {"selector": "topp", "alpha": 0.1}], ids=str)
@pytest.mark.parametrize("case", UGLY_CASES, ids=str)
def test_sorting_baselines_select_what_the_reference_selects(backend, probe, case, device):
    query, key, value, ranges = case.tensors(device)
    placing = {"query_offset": case.offset, "valid_ranges": ranges}
    index = {}
    for name in ("reference", backend):
        config = FlashPrefillConfig(backend=name, block_size=64, **probe, **RULE)
        index[name] = flash_prefill_attention(query, key, value, config=config, return_index=True, **placing).index
        index[name].validate()
    assert torch.equal(index[backend].to_mask(), index["reference"].to_mask())


def test_sorting_baselines_drop_what_they_are_told_to():
    case = Case(1, 2, 1, 1024, 1024, 64)
    query, key, value, _ = case.tensors(torch.device("cpu"))
    free = {"sink_blocks": 0, "window_blocks": 1, "dense_tail_blocks": 0, "block_size": 64, "pool_size": 4, "query_stride": 1}
    visible = np.arange(1, 17)
    config = FlashPrefillConfig(selector="topk", alpha=0.75, **free)
    counts = flash_prefill_attention(query, key, value, config=config, return_index=True).index.counts[0]
    # The query block's own is kept in any case, and need not be among the largest.
    assert ((counts.numpy() == np.ceil(visible / 4)) | (counts.numpy() == np.ceil(visible / 4) + 1)).all()
    config = FlashPrefillConfig(selector="topp", alpha=0.2, **free)
    index = flash_prefill_attention(query, key, value, config=config, return_index=True).index
    assert index.density() < 0.9
    # With pools of four tokens the estimate is close to the true mass, of which a fifth may be lost.
    for head, kept in enumerate(index.to_mask()[0]):
        logits = query[0, head].double() @ key[0, 0].double().T / 8
        weights = logits.masked_fill(~torch.ones(1024, 1024, dtype=torch.bool).tril(), -math.inf).softmax(-1)
        mass = weights.view(16, 64, 16, 64).sum(3).mean(1)
        assert ((mass * kept).sum(-1) > 0.7).all()
    for selector in ("topk", "topp"):
        config = FlashPrefillConfig(selector=selector, alpha=0, **free)
        assert flash_prefill_attention(query, key, value, config=config, return_index=True).index.density() == 1


def float64_scores(
    query: np.ndarray, key: np.ndarray, offset: int, block_size: int, pool: int, stride: int
) -> dict[str, np.ndarray]:
    """Scores of the finer probes by selector, [M, N] each for one head, in float64 loops over queries and pools."""
    query, key = query.astype(np.float64), key.astype(np.float64)
    integers, centres, steps = [], [], []
    for first in range(0, len(key), block_size):
        block = key[first : first + block_size]
        pools = np.array([block[i : i + pool].mean(0) for i in range(0, len(block), pool)])
        step = max(np.abs(pools - block.mean(0)).max() / 126, np.abs(block.mean(0)).max() / 32000)
        centre = np.round(block.mean(0) / step)
        difference = np.round(pools / step - centre)
        assert np.abs(difference).max() < 128
        integers += list(centre + difference)
        centres.append(centre)
        steps.append(step)
    last_token = [min(i + pool, len(key)) - 1 for i in range(0, len(key), pool)]
    tiles = (offset + len(query) - 1) // block_size - offset // block_size + 1
    blocks = -(-len(key) // block_size)
    shares, total = np.zeros((tiles, blocks)), np.zeros((tiles, blocks))
    asked = np.zeros((tiles, 1))
    # A bfloat16's precision, rounded to the nearest.
    lengths = (np.square(query).sum(1).astype(np.float32).view(np.int32) + 0x8000) >> 16
    for row in range(len(query)):
        position = offset + row
        run = [other for other in range(len(query)) if (offset + other) // stride == position // stride]
        if row != max(run, key=lambda other: (lengths[other], other)):
            continue
        seen = [i for i, last in enumerate(last_token) if last <= position]
        if not seen:
            continue
        step = np.abs(query[row]).max() / 127
        probing = np.round(query[row] / step)
        peaks, groups = np.full(blocks, -np.inf), np.full((blocks, block_size // pool // 4), -np.inf)
        for i in seen:
            block, group = i * pool // block_size, i * pool % block_size // pool // 4
            logit = step * steps[block] * (probing @ integers[i]) * query.shape[1] ** -0.5
            peaks[block], groups[block, group] = max(peaks[block], logit), max(groups[block, group], logit)
        normaliser = np.exp(groups - peaks.max()).sum()
        for block in range(min(position + 1, len(key)) // block_size):
            logit = step * steps[block] * (probing @ centres[block]) * query.shape[1] ** -0.5
            normaliser += 3 * groups.shape[1] * np.exp(logit - peaks.max())
        tile, given = position // block_size - offset // block_size, np.exp(peaks - peaks.max()) / normaliser
        shares[tile] = np.maximum(shares[tile], given)
        with np.errstate(divide="ignore"):
            total[tile] += np.log(given)
        asked[tile] += 1
    blend = np.maximum(shares, 16 * np.exp(total / np.maximum(asked, 1)) * (asked > 0))
    return {"share": shares, "blend": blend, "peak": shares / shares.max(1, keepdims=True)}


def test_every_backend_asks_the_longest_query_and_the_last_of_equals(device):
    """Also among queries that are NaN, infinite or all alike, and in runs that are cut off at both ends."""
    query = torch.randn(1, 2, 150, 24, device=device)
    query[:, 0, 43:51] = 1.0
    query[:, 0, 52, 3], query[:, 0, 54, 3] = math.inf, math.nan
    query[:, 1, 90] *= 10
    geometry = PrefillGeometry(1, 150, 235, 85, 64)
    positions = torch.arange(85, 235, device=device)
    # Shorter by what a rotation rounds, as the same token may be elsewhere in a first layer.
    query[:, 1, 99:107] = 1 - 1e-6 * torch.arange(8, device=device)[:, None]
    expected = positions[reference.longest_queries(query[0], positions, 8)]
    assert expected[1, 184 // 8 - 10] == 191
    assert expected[0, 128 // 8 - 10] == 135
    assert expected[0, 137 // 8 - 10] == 139
    assert expected[1, 175 // 8 - 10] == 175

    rows, places = torch_select.blocked_queries(query, geometry)
    rows, places = torch_select._longest_queries(rows, places[:, None], 8)
    used = places >= 0
    assert torch.equal(places[used].view(2, -1), expected)
    chosen = torch.take_along_dim(query[0], expected[..., None] - 85, 1)
    torch.testing.assert_close(rows[used].view(2, -1, 24), chosen, equal_nan=True, atol=0, rtol=0)
    assert torch.equal(longest_queries(query, geometry, 8, 0, geometry.query_blocks), places.int())


def test_pools_of_keys_that_hardly_differ_have_the_references_steps():
    """Where a block's mean is large, its two bytes decide the step."""
    key = torch.randn(1, 2, 300, 64) * 0.01
    key[..., 3] += 500.0
    pools, centres = torch_backend.pool_keys(key, PrefillGeometry(1, 300, 300, 0, 64), 4)
    integers, whole, steps = reference.integer_keys(key[0], 4, 64)
    assert whole.abs().max() == 32000
    torch.testing.assert_close(centres[0], whole * steps, rtol=1e-6, atol=0)
    of_pools = steps.repeat_interleave(16, 1)[:, : integers.shape[1]]
    torch.testing.assert_close(pools[0, :, : integers.shape[1]], integers * of_pools, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("selector", ["share", "blend", "peak"])
def test_finer_probes_follow_their_definition(backend, selector, device):
    decided = 0
    for case in (Case(1, 2, 1, 900, 900, 64), Case(1, 3, 1, 301, 1000, 80), Case(1, 1, 1, 129, 640, 64)):
        query, key, value, _ = case.tensors(device)
        alpha = {"share": 0.05, "blend": 0.1, "peak": 0.3}[selector]
        config = FlashPrefillConfig(alpha=alpha, selector=selector, backend=backend, **RULE)
        index = flash_prefill_attention(query, key, value, config=config, return_index=True).index
        kept = index.to_mask().cpu().numpy()
        for head in range(case.heads):
            tensors = query[0, head].cpu().numpy(), key[0, 0].cpu().numpy()
            scores = float64_scores(*tensors, case.offset, 128, config.pool_size, config.query_stride)[selector]
            wrong = disagreements(kept[0, head], scores, alpha, case.offset // 128)
            assert all(distance < 1e-4 for distance in wrong), wrong
            decided += int((scores < alpha).sum())
    assert decided > 20, "the thresholds must have had something to decide"


def test_real_queries_and_keys_follow_the_papers_formula(recall_states):
    """The bundled model's own queries and keys, where sinks and outliers make scores uneven."""
    decided = 0
    for query, key in recall_states:
        geometry = PrefillGeometry(1, query.shape[2], key.shape[2], 0, 128)
        scale = query.shape[-1] ** -0.5
        for alpha in (0.02, 0.1):
            rule = selection_rule(FlashPrefillConfig(alpha=alpha, **PUBLISHED))
            kept = reference.select_blocks(query, key, geometry, scale=scale, **rule).to_mask().numpy()
            for head in range(query.shape[1]):
                head_key = key[0, head // (query.shape[1] // key.shape[1])].numpy()
                energies = paper_energies(query[0, head].numpy(), head_key, 0, 128, scale)
                wrong = disagreements(kept[0, head], energies, alpha, 0)
                assert all(distance < 1e-3 for distance in wrong), wrong
                decided += int((energies < alpha).sum())
    assert decided > 100


def test_forced_blocks_are_kept():
    query, key, value, _ = Case(1, 2, 1, 1024, 1024, 64).tensors(torch.device("cpu"))
    config = FlashPrefillConfig(alpha=1.0, block_size=64, sink_blocks=2, window_blocks=3, dense_tail_blocks=2)
    index = flash_prefill_attention(query, key, value, config=config, return_index=True).index
    mask = index.to_mask()[0]
    block = torch.arange(16)
    assert mask[:, :, 0].all()
    assert mask[:, 1:, 1].all()
    for distance in range(3):
        assert mask[:, block[distance:], block[distance:] - distance].all()
    assert (mask[:, -2:] == (block <= block[-2:, None])).all()
    assert index.density() < 0.8


def test_a_padded_row_is_selected_as_it_would_be_alone():
    alone = Case(1, 2, 1, 500, 500, 64)
    query, key, value, _ = alone.tensors(torch.device("cpu"))
    config = FlashPrefillConfig(alpha=0.5, block_size=64)
    expected = flash_prefill_attention(query, key, value, config=config, return_index=True)
    pad = (0, 0, 77, 0)
    padded = [torch.nn.functional.pad(tensor, pad, value=math.nan) for tensor in (query, key, value)]
    got = flash_prefill_attention(*padded, config=config, valid_ranges=torch.tensor([[77, 577]]), return_index=True)
    # The sums of means are those of another product of matrices.
    torch.testing.assert_close(got.output[:, :, 77:], expected.output, rtol=0, atol=1e-6)
    assert not got.output[:, :, :77].any()
    tiles, blocks = expected.index.to_mask().shape[2:]
    assert torch.equal(got.index.to_mask()[:, :, :tiles, :blocks], expected.index.to_mask())


def test_chunks_of_whole_blocks_select_as_the_whole_prompt_does():
    query, key, value, _ = Case(1, 2, 1, 768, 768, 64).tensors(torch.device("cpu"))
    config = FlashPrefillConfig(alpha=0.5, block_size=128, dense_tail_blocks=0)
    whole = flash_prefill_attention(query, key, value, config=config)
    for begin in (0, 256, 512):
        end = begin + 256
        part = flash_prefill_attention(query[:, :, begin:end], key[:, :, :end], value[:, :, :end], config=config)
        torch.testing.assert_close(part, whole[:, :, begin:end], atol=1e-6, rtol=1e-6)
