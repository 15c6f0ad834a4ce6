"""Tensors at the edges of what floats can hold: each call answers as dense attention does in float64."""

import math

import pytest
import torch

from hf_flashprefill import FlashPrefillConfig, flash_prefill_attention
from hf_flashprefill.backends import torch as torch_backend
from hf_flashprefill.geometry import PrefillGeometry
from tests.inputs import exact_dense, with_one_huge_block
from tests.tolerance import attention_rounding, clear_winners

BACKENDS = ("reference", "torch", "triton")
TOKENS, HEAD_DIM, BLOCK = 140, 64, 64
PROBES = {"share": 0.05, "blend": 0.1, "peak": 0.5, "flashprefill": 0.5}


def tensors(device, dtype=torch.float32, magnitude=1.0, heads=1, tokens=TOKENS):
    largest = torch.finfo(dtype).max
    normal = torch.randn(3, 1, heads, tokens, HEAD_DIM, dtype=torch.float64) * magnitude
    return normal.clamp(-largest, largest).to(device, dtype).unbind()


def run(backend, query, key, value, *, alpha=0.0, selector="share", correction=True, **arguments):
    config = FlashPrefillConfig(
        alpha,
        selector,
        block_size=BLOCK,
        sink_blocks=0,
        window_blocks=1,
        dense_tail_blocks=0,
        correction=correction,
        backend=backend,
    )
    return flash_prefill_attention(query, key, value, config=config, return_index=True, **arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("selector", "dtype", "magnitude", "scale"),
    [
        ("share", torch.float32, 1e4, None),
        ("flashprefill", torch.float32, 1e4, 1e4),
        ("peak", torch.float16, 3e4, None),
        ("flashprefill", torch.float16, 3e4, None),
        ("share", torch.float32, 1.0, 1e8),
    ],
    ids=str,
)
def test_huge_logits_pick_the_largest(backend, selector, dtype, magnitude, scale, device):
    """Attention of huge logits is the value at the largest; alpha = 0 keeps every block however the scores overflow."""
    query, key, value = tensors(device, dtype, magnitude)
    scale = scale or HEAD_DIM**-0.5
    winner, _, is_clear = clear_winners(query[0], key[0, 0], scale)
    winner, is_clear = winner[0], is_clear[0]
    assert is_clear.sum() > TOKENS * 0.8
    output, index = run(backend, query, key, value, selector=selector, scale=scale)
    assert index.density() == 1
    expected = value[0, 0, winner]
    torch.testing.assert_close(output[0, 0, is_clear], expected[is_clear], rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert output.isfinite().all()
    sparse, index = run(backend, query, key, value, alpha=PROBES[selector], selector=selector, scale=scale)
    index.validate()
    assert sparse.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("selector", PROBES)
@pytest.mark.parametrize("size", [20, 28, 31, 34, 44])
def test_the_one_block_of_huge_logits_is_kept(backend, selector, size, device):
    """Of logits around 2^size only the size survives rounding; it must not decide which queries have a say."""
    query, key, value, huge = with_one_huge_block(*tensors(device, tokens=400), BLOCK, size)
    output, index = run(backend, query, key, value, alpha=PROBES[selector], selector=selector)
    index.validate()
    is_kept = index.to_mask()[0, :, huge + 1 :]
    assert is_kept[..., huge].all()
    assert not is_kept[..., :huge].any()
    assert output.isfinite().all()


def test_a_score_that_rounding_lost_keeps_its_block(device, monkeypatch):
    """A GPU's fused multiply-adds may leave nothing of a huge logit's energy, which is minus infinity then."""
    from hf_flashprefill.backends.triton import energies

    find_energies = energies.find_energies

    def losing(call):
        find_energies(call)
        call.energies[:, :, 1:, 0] = -math.inf

    query, key, value = tensors(device)
    config = {"alpha": 1.0, "selector": "flashprefill"}
    _, index = run("triton", query, key, value, **config)
    assert not index.to_mask()[0, 0, 1:, 0].all()
    monkeypatch.setattr(energies, "find_energies", losing)
    _, index = run("triton", query, key, value, **config)
    index.validate()
    assert index.to_mask()[0, 0, 1:, 0].all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 130])
@pytest.mark.parametrize(("logit", "size"), [(144, 1.0), (61, 1e30)], ids=["weights overflow", "results overflow"])
def test_logits_far_above_those_of_the_own_block(backend, has_sinks, window, logit, size, device):
    """Relative to the largest weight of a query's own block float32 holds neither e^144 nor e^61 times a value of 1e30."""
    query, key, value = tensors(device, magnitude=0.1, heads=2)
    value = value.sign() * size
    # Every third of the second block's queries sees such keys, with the window as well, at whose edge they do not lie.
    far = slice(BLOCK - 9, BLOCK)
    query[:, :, ::3, 0] = key[:, :, far, 0] = (logit * HEAD_DIM**0.5) ** 0.5
    scale = HEAD_DIM**-0.5
    # Both are above the own block's logits; the second is above those of 61, too.
    sinks = torch.tensor([30.0, 120.0], device=device) if has_sinks else None
    highest = query[:, :, BLOCK : 2 * BLOCK].float() @ key[:, :, far].float().mT * (scale * math.log2(math.e))
    assert (highest.amax(-1) + math.log2(size) > 128).float().mean() > 0.3
    expected = exact_dense(query, key, value, 0, None, scale, sliding_window=window, sinks=sinks)
    output, index = run(backend, query, key, value, scale=scale, sliding_window=window, sinks=sinks)
    assert (output.double() - expected).abs().max() <= attention_rounding(query, key, value, scale)
    if backend == "reference" or window is not None:
        return
    assert index.density() == 1
    # The third block drops both others, and their mean is such a key.
    key[:, :, : 2 * BLOCK, 0] = (logit * HEAD_DIM**0.5) ** 0.5
    output, index = run(backend, query, key, value, scale=scale, sinks=sinks, alpha=1.0)
    assert index.density() < 1
    expected = run("reference", query, key, value, scale=scale, sinks=sinks, alpha=1.0).output
    assert (output - expected).abs().max() <= attention_rounding(query, key, value, scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("magnitude", "scale"),
    [(1.0, 1e-30), (1.0, 1e-300), (1e-40, None), (1e-40, 1e30), (1e-20, None), (0.0, None)],
    ids=str,
)
def test_vanishing_logits_average(backend, magnitude, scale, device):
    """Also where everything is a denormal number, which a device may flush to zero."""
    query, key, value = tensors(device, magnitude=magnitude)
    scale = scale or HEAD_DIM**-0.5
    expected = exact_dense(query, key, value, 0, None, scale)
    output, index = run(backend, query, key, value, scale=scale)
    assert index.density() == 1
    allowed = attention_rounding(query, key, value, scale) + torch.finfo(torch.float32).tiny
    assert (output.double() - expected).abs().max() <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("selector", ["peak", "flashprefill"])
def test_equal_keys_tie(backend, selector, device):
    """No block may win by rounding: of equal scores all are kept, or at alpha = 1 at least those that are exactly equal."""
    query, key, value = tensors(device)
    key = key[:, :, :1].expand_as(key)
    output, index = run(backend, query, key, value, alpha=0.9, selector=selector)
    assert index.density() == 1
    expected = exact_dense(query, key, value, 0, None, HEAD_DIM**-0.5)
    assert (output.double() - expected).abs().max() <= attention_rounding(query, key, value, HEAD_DIM**-0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("selector", PROBES)
def test_one_token_and_rows_of_none(backend, selector, device):
    query, key, value = tensors(device, tokens=1)
    # A GPU multiplies torch's float32 in parts.
    rounding = {"rtol": 4 * torch.finfo(value.dtype).eps, "atol": 0}
    torch.testing.assert_close(run(backend, query, key, value, alpha=1.0, selector=selector).output, value, **rounding)
    buffer = [torch.full((4, 1, 130, HEAD_DIM), bad, device=device) for bad in (math.nan, math.inf, -math.inf)]
    for tensor, alone in zip(buffer, (query, key, value), strict=True):
        tensor[2, :, 77] = alone[0, :, 0]
    ranges = torch.tensor([[0, 0], [130, 130], [77, 78], [64, 64]], device=device)
    output, index = run(backend, *buffer, alpha=1.0, selector=selector, valid_ranges=ranges)
    expected = torch.zeros_like(output)
    expected[2, :, 77] = value[0, :, 0]
    torch.testing.assert_close(output, expected, **rounding)
    assert index.counts.sum() == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("selector", PROBES)
@pytest.mark.parametrize(
    ("alpha", "bad", "place", "token"),
    [
        (0.0, math.nan, "key", 30),
        (1.0, math.nan, "key", 127),
        (1.0, math.inf, "key", 30),
        (1.0, -math.inf, "key", 30),
        (0.0, math.nan, "query", 30),
        (1.0, math.inf, "query", 127),
    ],
    ids=str,
)
def test_what_is_not_finite_is_never_hidden(backend, selector, alpha, bad, place, token, device):
    """NaN and infinity in a valid query or key show wherever dense attention shows them, and at no earlier block's queries."""
    query, key, value = tensors(device)
    (query if place == "query" else key)[0, 0, token, 5] = bad
    logits = query[0, 0].double() @ key[0, 0].double().T * HEAD_DIM**-0.5
    exact = torch.stack([logits[i, : i + 1].softmax(-1) @ value[0, 0, : i + 1].double() for i in range(TOKENS)])
    is_nan = exact.isnan().any(-1)
    assert is_nan.any()
    output, index = run(backend, query, key, value, alpha=alpha, selector=selector)
    index.validate()
    shown = output[0, 0].isnan().any(-1)
    assert not (is_nan & ~shown).any()
    # A NaN key that a mask removes from an earlier query of its own block may still reach it.
    assert not shown[: token // BLOCK * BLOCK].any()
    if place == "query":
        assert shown.sum() == 1
    if alpha == 0:
        torch.testing.assert_close(output[0, 0, ~shown].double(), exact[~shown], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_bad_value_shows_where_its_block_is_attended(backend, bad, device):
    """At alpha = 0, and for a block's own later queries, it always shows; where its block is dropped, in the block's mean."""
    query, key, value = tensors(device)
    value[0, 0, 30, 5] = bad
    output, _ = run(backend, query, key, value)
    assert not output[0, 0, 30:, 5].isfinite().any()
    others = torch.arange(HEAD_DIM, device=device) != 5
    assert output[0, 0, :, others].isfinite().all()
    for correction in (False, True):
        output, index = run(backend, query, key, value, alpha=1.0, correction=correction)
        assert not output[0, 0, 30:BLOCK, 5].isfinite().any()
        is_dropped = ~index.to_mask()[0, 0, :, 0].repeat_interleave(BLOCK)[:TOKENS]
        assert is_dropped.any()
        assert output[0, 0, BLOCK:, others].isfinite().all()
        # Without means nobody reads the values of a dropped block.
        assert (output[0, 0, is_dropped, 5].isfinite() == (not correction)).all()


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_means_of_later_blocks_do_not_reach_back(backend, device):
    query, key, value = tensors(device)
    expected, _ = run(backend, query, key, value, alpha=1.0)
    key[0, 0, BLOCK + 3], value[0, 0, BLOCK + 3] = math.nan, math.inf
    output, _ = run(backend, query, key, value, alpha=1.0)
    assert torch.equal(output[:, :, :BLOCK], expected[:, :, :BLOCK])
    assert not output[:, :, 2 * BLOCK :].isfinite().any()


@pytest.mark.parametrize("pool_size", [4, BLOCK])
def test_sums_of_half_precision_do_not_overflow(pool_size):
    """The largest float16 is 65504."""
    key = torch.full((1, 1, 1024, HEAD_DIM), 3e4, dtype=torch.float16)
    geometry = PrefillGeometry(1, 1024, 1024, 0, BLOCK)
    pools, key_blocks, value_blocks = torch_backend.pool_keys_and_values(key, key, geometry, pool_size)
    for means in (*pools, key_blocks, value_blocks, *torch_backend.run_means(key_blocks, value_blocks, 8)):
        torch.testing.assert_close(means.float(), torch.full_like(means.float(), 3e4), rtol=1e-3, atol=0)
