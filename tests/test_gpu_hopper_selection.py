"""The Gluon kernels for Hopper GPUs that choose blocks against the portable ones, which are compared with the reference."""

import pytest
import torch

from hf_flashprefill import FlashPrefillConfig, flash_prefill_attention
from hf_flashprefill.geometry import PrefillGeometry
from tests.inputs import Case, with_one_huge_block

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        (Case(1, 8, 2, 5000, 5000, 128), {}),
        (Case(2, 4, 4, 3000, 3000, 64), {"pool_size": 16, "query_stride": 4}),
        (Case(2, 6, 2, 1111, 4000, 128, ranges=((100, 4000), (0, 3500)), strided=True), {"pool_size": 8}),
        (Case(1, 16, 1, 2000, 2000, 64), {"query_stride": 2, "block_size": 64}),
    ],
    ids=str,
)
@pytest.mark.parametrize(("selector", "splits"), [("blend", 1), ("blend", 3), ("share", 8), ("peak", 2)])
def test_both_probes_find_the_same_blocks(shape, settings, selector, splits, monkeypatch):
    """Only sums in another order may part them."""
    from hf_flashprefill.backends.triton import shares

    query, key, value, ranges = Case(**{**vars(shape), "dtype": torch.bfloat16}).tensors(torch.device("cuda"))
    config = FlashPrefillConfig(selector=selector, alpha=0.6 if selector == "peak" else 0.12, backend="triton", **settings)
    calls, probe_parts = [], shares.probe_hopper.probe_parts

    def counted(*args):
        calls.append(1)
        probe_parts(*args)

    def lists():
        index = flash_prefill_attention(query, key, value, config=config, valid_ranges=ranges, return_index=True).index
        index.validate()
        assert 0.2 < index.density() < 0.95
        return index.to_mask()

    monkeypatch.setattr(shares.probe_hopper, "probe_parts", counted)
    monkeypatch.setattr(shares, "probe_splits", lambda *_: splits)
    found = lists()
    assert calls, "the Hopper kernel did not run"
    calls.clear()
    monkeypatch.setattr(shares, "probe_hopper", None)
    monkeypatch.setattr(shares, "probe_splits", lambda *_: 1)
    expected = lists()
    assert not calls
    assert (found != expected).sum() <= 2e-4 * expected.numel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Case(1, 8, 2, 5000, 5000, 128),
        Case(1, 28, 4, 700, 20_001, 128),
        Case(1, 16, 16, 1, 300, 64),
        Case(3, 12, 2, 1513, 9000, 64, ranges=((0, 9000), (7000, 8900), (8990, 9000)), strided=True),
        Case(2, 32, 8, 9000, 9000, 128, ranges=((100, 9000), (5000, 5128))),
    ],
    ids=str,
)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_both_kernels_of_the_published_rule_find_the_same_energies(shape, heads, dtype, monkeypatch):
    """Only sums in another order may part them."""
    from hf_flashprefill.backends.triton import energies, energies_hopper, energy_lists, pool_keys

    query, key, _, ranges = Case(**{**vars(shape), "dtype": dtype}).tensors(torch.device("cuda"))
    key[0, :, shape.kv_len - 200] = torch.nan
    ranges = None if ranges is None else ranges.int()
    geometry = PrefillGeometry(shape.batch, shape.query_len, shape.kv_len, shape.offset, 128, ranges)
    (means,) = pool_keys(key, geometry, 128)
    monkeypatch.setattr(energies_hopper, "energy_heads", lambda *_: heads)
    assert energy_lists._scoring(query, 128) is energies_hopper
    for first in range(min(3, geometry.query_blocks)):
        tiles, found = geometry.query_blocks - first, []
        for kernel in (energies, energies_hopper):
            scores = query.new_full((*query.shape[:2], tiles, geometry.key_blocks), -77, dtype=torch.float32)
            kernel.find_energies(energies.EnergyCall(query, means, geometry, scores, first, 0.1))
            found.append(scores)
        assert torch.equal(found[0] == -77, found[1] == -77), "one has written where the other has not"
        torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("selector", ["share", "blend", "peak", "flashprefill"])
@pytest.mark.parametrize("size", [20, 28, 31, 34, 44])
@pytest.mark.parametrize("is_portable", [False, True], ids=["hopper", "portable"])
def test_the_one_block_of_huge_logits_is_kept(selector, size, is_portable, monkeypatch):
    """Of logits around 2^size only the size survives rounding; it must not decide which queries have a say."""
    from hf_flashprefill.backends.triton import energy_lists, shares

    tensors = Case(1, 4, 2, 3000, 3000, 128, dtype=torch.bfloat16).tensors(torch.device("cuda"))[:3]
    query, key, value, huge = with_one_huge_block(*tensors, 128, size)
    if is_portable:
        monkeypatch.setattr(shares, "probe_hopper", None)
        monkeypatch.setattr(energy_lists, "energies_hopper", None)
    forced = {"sink_blocks": 0, "window_blocks": 1, "dense_tail_blocks": 0}
    config = FlashPrefillConfig(selector=selector, alpha=0.5, backend="triton", **forced)
    output, index = flash_prefill_attention(query, key, value, config=config, return_index=True)
    index.validate()
    is_kept = index.to_mask()[0, :, huge + 1 :]
    assert is_kept[..., huge].all()
    assert is_kept[..., :huge].float().mean() < 0.1
    assert output.isfinite().all()
