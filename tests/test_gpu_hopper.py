"""The Gluon attention for Hopper GPUs against the portable one, which is compared with the reference everywhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_flashprefill import FlashPrefillConfig, flash_prefill_attention
from tests.inputs import Case
from tests.tolerance import clear_winners

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]


@pytest.mark.parametrize(
    "shape",
    [
        # Fewer turns than multiprocessors, one of a single query; more than ten times as many. From the 128th block on lists
        # are walked the other way.
        Case(1, 3, 1, 1, 700, 64),
        Case(1, 4, 4, 90, 90, 128),
        Case(1, 28, 4, 9000, 9000, 128),
        Case(1, 32, 4, 6000, 19_000, 128),
        Case(1, 16, 2, 9000, 9000, 64),
        Case(1, 16, 2, 2000, 17_000, 64),
        Case(1, 8, 2, 5000, 9000, 256),
        Case(1, 8, 2, 3000, 18_000, 256),
        # Rows without a query, with one, and with as many as there is room for: most turns drawn are empty.
        Case(4, 12, 2, 6000, 6000, 128, ranges=((0, 6000), (5999, 6000), (3000, 3000), (5000, 5700)), strided=True),
        Case(3, 32, 8, 3000, 5000, 64, ranges=((100, 5000), (0, 1500), (4990, 4991))),
        Case(3, 6, 6, 2000, 2000, 256, ranges=((1999, 2000), (0, 1), (0, 2000))),
    ],
    ids=str,
)
@pytest.mark.parametrize("keeps", ["own blocks only", "about half", "all blocks"])
@pytest.mark.parametrize(
    ("terms", "dtype"),
    [
        ("plain", torch.float16),
        ("plain", torch.bfloat16),
        ("means", torch.bfloat16),
        ("sinks", torch.bfloat16),
        ("means and sinks", torch.float16),
    ],
)
def test_both_attention_kernels_agree_whoever_takes_which_turn(shape, keeps, terms, dtype):
    """Both write the same rows, nearly the same numbers, and Hopper's the same bits again."""
    from hf_flashprefill.backends.triton import attend, attend_hopper, pool_keys_and_values, run_means

    query, key, value, ranges = Case(**{**vars(shape), "dtype": dtype}).tensors(torch.device("cuda"))
    alpha = {"own blocks only": 1.0, "about half": 0.05, "all blocks": 0.0}[keeps]
    forced = {"sink_blocks": 0, "window_blocks": 1, "dense_tail_blocks": 0}
    config = FlashPrefillConfig(selector="share", alpha=alpha, backend="triton", **forced)
    index = flash_prefill_attention(query, key, value, config=config, valid_ranges=ranges, return_index=True).index
    geometry = index.geometry
    assert attend_hopper.fits(query, key, value, geometry.block_size)
    means = sinks = None
    if "sinks" in terms:
        # One that takes no part, one above all logits, and what a head without sense has.
        sinks = torch.linspace(-3, 6, shape.heads, device="cuda")
        sinks[:4] = torch.tensor([-torch.inf, 300.0, torch.inf, torch.nan], device="cuda")[: shape.heads]
    if "means" in terms:
        pools = pool_keys_and_values(key, value, geometry, 4)
        # Of the longest shapes more means than one step or one tile of their weights holds.
        means = run_means(pools.key_blocks, pools.value_blocks, 1 if shape.kv_len > 16_500 else 2)
    outputs = []
    for kernel in (attend, attend_hopper, attend_hopper):
        outputs.append(torch.full_like(query, torch.nan))
        further = {"sinks": sinks, "means": means}
        kernel.attend_blocks(query, key, value, index, scale=shape.head_dim**-0.5, output=outputs[-1], **further)
    expected, found, again = outputs
    assert torch.equal(found.isnan(), expected.isnan())
    assert not found.isnan().all()
    assert torch.equal(found.nan_to_num(), again.nan_to_num())
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=2e-2, equal_nan=True)


@pytest.mark.parametrize(
    "shape",
    [
        Case(1, 16, 4, 9000, 9000, 128, dtype=torch.bfloat16),
        Case(3, 8, 1, 3000, 4000, 64, ranges=((700, 4000), (0, 2500), (2000, 3999)), dtype=torch.bfloat16),
        Case(1, 6, 3, 3000, 5000, 256, dtype=torch.bfloat16),
        Case(1, 4, 2, 3000, 3000, 128, dtype=torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("terms", ["plain", "means", "sinks"])
@pytest.mark.parametrize("overflows", ["weights", "results"])
@pytest.mark.parametrize("kernel", ["attend", "attend_hopper"])
def test_weights_far_above_those_of_the_own_block(shape, terms, overflows, kernel):
    """What float32 cannot hold relative to a query's own block is computed once more, relative to the largest logit."""
    from hf_flashprefill.backends import torch as torch_backend
    from hf_flashprefill.backends import triton as triton_backend

    query, key, value, ranges = _with_far_logits(shape, overflows)
    is_by_means = terms == "means"
    config = FlashPrefillConfig(
        selector="share",
        alpha=1.0 if is_by_means else 0.0,
        sink_blocks=0,
        window_blocks=1,
        dense_tail_blocks=0,
        backend="triton",
    )
    index = flash_prefill_attention(query, key, value, config=config, valid_ranges=ranges, return_index=True).index
    scale = shape.head_dim**-0.5
    means = sinks = None
    if is_by_means:
        pools = triton_backend.pool_keys_and_values(key, value, index.geometry, 4)
        means = triton_backend.run_means(pools.key_blocks, pools.value_blocks, 2)
    if terms == "sinks":
        sinks = torch.linspace(-3, 120, shape.heads, device="cuda")

    outputs = [torch.full_like(query, torch.nan) for _ in range(2)]
    attend = getattr(triton_backend, kernel)
    for output in outputs:
        attend.attend_blocks(query, key, value, index, scale=scale, output=output, sinks=sinks, means=means)
    expected = torch.full_like(query, torch.nan, dtype=torch.float32)
    exact_means = None if means is None else (means.key.float(), means.value.float())
    torch_backend.attend_blocks(
        query.float(), key.float(), value.float(), index, scale=scale, output=expected, sinks=sinks, means=exact_means
    )
    for row, (start, begin, end, _) in enumerate(index.geometry.row_spans()):
        rows = slice(start + begin - shape.offset, start + end - shape.offset)
        found = outputs[0][row, :, rows].float()
        assert expected[row, :, rows].isfinite().all()
        size = value[row, :, start : start + end].float().abs().max()
        torch.testing.assert_close(found / size, expected[row, :, rows] / size, atol=4e-3, rtol=2e-2)
    assert torch.equal(outputs[0].nan_to_num(), outputs[1].nan_to_num())
    # For some queries, not for all, float32 could not have held what is relative to the own block's largest logit.
    reached = _logits_above_the_own_block(query, key, index, scale)
    limit = 128 if overflows == "weights" else 128 - torch.tensor(1e30).log2()
    if shape.dtype == torch.bfloat16:
        assert 0.1 < (reached > limit).float().mean() < 0.9


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("dtype", "magnitude"), [(torch.float16, 3e4), (torch.bfloat16, 1e6)], ids=str)
@pytest.mark.parametrize("terms", ["plain", "means", "sinks"])
@pytest.mark.parametrize("kernel", ["attend", "attend_hopper"])
def test_huge_logits_pick_the_largest(head_dim, dtype, magnitude, terms, kernel):
    """Where the rounding of a logit is worth more than a weight can hold, its product with the scale is rounded but once."""
    from hf_flashprefill.backends import triton as triton_backend

    tokens, scale = 1000, head_dim**-0.5
    query, key, value, _ = Case(1, 2, 1, tokens, tokens, head_dim, dtype=dtype).tensors(torch.device("cuda"))
    largest = torch.finfo(dtype).max
    query, key = ((tensor.float() * magnitude).clamp(-largest, largest).to(dtype) for tensor in (query, key))
    winner, first, is_clear = clear_winners(query[0], key[0, 0], scale)
    assert is_clear.double().mean() > 0.8
    assert first.max() > 2**31

    config = FlashPrefillConfig(alpha=0.0, backend="triton")
    index = flash_prefill_attention(query, key, value, config=config, return_index=True).index
    assert index.density() == 1
    means = sinks = None
    if terms == "means":
        pools = triton_backend.pool_keys_and_values(key, value, index.geometry, 4)
        means = triton_backend.run_means(pools.key_blocks, pools.value_blocks, 2)
    if terms == "sinks":
        sinks = torch.tensor([-3.0, 120.0], device="cuda")
    output = torch.full_like(query, torch.nan)
    getattr(triton_backend, kernel).attend_blocks(
        query, key, value, index, scale=scale, output=output, sinks=sinks, means=means
    )
    expected = value[0, 0, winner]
    # A query whose logits are all far below the sink has nothing.
    expected = expected.where((first > 0)[..., None], 0) if terms == "sinks" else expected
    torch.testing.assert_close(output[0][is_clear], expected[is_clear], rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert output.isfinite().all()


def test_a_turn_taken_again_in_a_graph():
    """Which turns are taken again is decided on the device, anew in every replay."""
    config = FlashPrefillConfig(alpha=0.0, backend="triton")
    shape = Case(1, 16, 4, 3000, 3000, 128, dtype=torch.bfloat16)
    ordinary = shape.tensors(torch.device("cuda"))[:3]
    given = [tensor.clone() for tensor in ordinary]
    flash_prefill_attention(*given, config=config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = flash_prefill_attention(*given, config=config)
    for overflows in ("weights", "results"):
        far = _with_far_logits(shape, overflows)[:3]
        for tensor, other in zip(given, far, strict=True):
            tensor.copy_(other)
        expected, index = flash_prefill_attention(*given, config=config, return_index=True)
        limit = 128 if overflows == "weights" else 128 - torch.tensor(1e30).log2()
        assert (_logits_above_the_own_block(*given[:2], index, shape.head_dim**-0.5) > limit).any()
        assert expected.isfinite().all()
        for _ in range(2):
            output.zero_()
            graph.replay()
            assert torch.equal(output, expected)
    for tensor, other in zip(given, ordinary, strict=True):
        tensor.copy_(other)
    graph.replay()
    assert torch.equal(output, flash_prefill_attention(*given, config=config))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", ["key", "value"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("has_means", [False, True])
def test_a_bad_value_shows_for_the_queries_that_attend_to_it(head_dim, dtype, place, bad, has_means):
    """In every channel if a key has it, in its own if a value has it, then for the whole of the block that it lies in. Turns
    without one keep their bits; those with one are taken again."""
    from hf_flashprefill.backends.triton import attend_hopper, pool_keys_and_values, run_means

    query, key, value, _ = Case(1, 8, 2, 3000, 3000, head_dim, dtype=dtype).tensors(torch.device("cuda"))
    forced = {"sink_blocks": 0, "window_blocks": 2, "dense_tail_blocks": 0}
    config = FlashPrefillConfig(selector="share", alpha=1.0, backend="triton", **forced)
    index = flash_prefill_attention(query, key, value, config=config, return_index=True).index
    assert attend_hopper.fits(query, key, value, index.geometry.block_size)

    def attend():
        output, means = torch.empty_like(query), None
        if has_means:
            pools = pool_keys_and_values(key, value, index.geometry, 4)
            means = run_means(pools.key_blocks, pools.value_blocks, 2)
        attend_hopper.attend_blocks(query, key, value, index, scale=head_dim**-0.5, output=output, means=means)
        return output

    expected, token, channel = attend(), 11 * 128 + 77, head_dim // 2 + 3
    if place == "key":
        key[0, :, token] = bad
    else:
        value[0, :, token, channel] = bad
    position = torch.arange(3000, device="cuda")
    block = position // 128
    is_listed = index.to_mask()[0, :, block, 11]
    assert is_listed[:, block == 12].all()
    assert not is_listed[:, block > 12].all(), "the block must have been dropped somewhere"
    # Weight 0 times a later token's value is not 0 here, as in dense attention.
    is_after = position >= token if place == "key" else block >= 11
    is_reached = is_after & (is_listed | has_means & (block > 11))
    is_bad = is_reached[None, :, :, None].expand_as(query)
    if place == "value":
        is_bad = is_bad & (torch.arange(head_dim, device="cuda") == channel)
    output = attend()
    assert torch.equal(~output.isfinite(), is_bad)
    is_in_bad_turn = torch.stack([is_reached[:, block == b].any(1) for b in block.tolist()[::128]], 1)[None, :, block]
    assert torch.equal(output[~is_in_bad_turn], expected[~is_in_bad_turn])
    torch.testing.assert_close(output[~is_bad], expected[~is_bad], atol=1e-2, rtol=2e-2)


def _with_far_logits(shape, overflows):
    """Query, key, value and valid ranges of the case, so that float32 does not hold what ``overflows``, "weights" or "results",
    relative to the own block: logits of 144 or 61 for every third query against the first keys, near zero for all others."""
    query, key, value, ranges = shape.tensors(torch.device("cuda"))
    direction = torch.nn.functional.normalize(torch.randn(shape.head_dim, device="cuda"), dim=0)
    query, key = query / 8, key / 8
    length = 12 if overflows == "weights" else 7.8
    starts = [first for first, _ in shape.ranges or [(0, 0)]]
    for row, first in enumerate(starts):
        key[row, :, first : first + 1024] += (length * shape.head_dim**0.25 * direction).to(key.dtype)
    query[:, :, ::3] += (length * shape.head_dim**0.25 * direction).to(key.dtype)
    query[:, 1::4, shape.query_len // 2 :] /= 16
    if overflows == "results":
        value = value * (1e30 if shape.dtype == torch.bfloat16 else 1e3)
    return query, key, value, ranges


def _logits_above_the_own_block(query, key, index, scale):
    """By how many powers of two the largest logit of each query of the last row's first head exceeds the own block's."""
    start, begin, end, _ = index.geometry.row_spans()[-1]
    rows = query[-1, 0, start + begin - index.geometry.query_offset :].float()[: end - begin]
    keys = key[-1, 0, start : start + end].float()
    logits = rows @ keys.T * (scale * 1.4427)
    positions = torch.arange(begin, end, device=query.device)[:, None]
    keys_at = torch.arange(end, device=query.device)[None]
    logits = logits.masked_fill(keys_at > positions, -torch.inf)
    own = logits.masked_fill(keys_at // 128 != positions // 128, -torch.inf).amax(1)
    return logits.amax(1) - own


@pytest.mark.parametrize("shared", ["heads", "batch"])
def test_keys_that_several_heads_or_rows_share_in_memory(shared):
    """A stride of 0, which the copy engine must take."""
    query, key, value, _ = Case(2, 4, 2, 700, 700, 128, dtype=torch.bfloat16).tensors(torch.device("cuda"))
    first = (slice(None), slice(1)) if shared == "heads" else (slice(1),)
    key, value = (tensor[first].expand(2, 2, 700, 128) for tensor in (key, value))
    config = FlashPrefillConfig(alpha=0.1, backend="triton")
    found = flash_prefill_attention(query, key, value, config=config)
    assert torch.equal(found, flash_prefill_attention(query, key.contiguous(), value.contiguous(), config=config))


def test_processes_that_share_the_gpu_leave_results_alone():
    """A GPU puts a program's memory aside when another process has its turn. In one call of five, the float16 kernel's came
    back with the state of an unused barrier among results. And where turns are short, a later turn's queries came before the
    last of a turn's had been read, in one call of the kernel of seventy."""
    command = [sys.executable, "-m", "tests.repeated_calls", "3"]
    folder = Path(__file__).parent.parent
    running = [subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        answers = [[json.loads(line) for line in process.communicate(timeout=300)[0].splitlines()] for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running)
    for answer in answers:
        assert len(answer) == 10
        assert sum(call["blocks_a_list"] < 1.05 for call in answer) == 4
        for call in answer:
            assert call["runs"] >= 10, call
            assert call["changed"] == 0, call
