"""Chunks that hand their pools on give the bits of chunks that pool everything, and pool only what is new."""

from dataclasses import replace

import pytest
import torch

from hf_flashprefill import FlashPrefillConfig, KeptPools, flash_prefill_attention
from hf_flashprefill.backends import torch as torch_backend
from hf_flashprefill.functional import resolve_backend
from tests.inputs import Case

CASE = Case(1, 2, 1, 800, 800, 64, strided=True)
# A first chunk of less than a block, then whole and broken blocks.
CHUNKS = (100, 28, 512, 1, 159)
CONFIG = FlashPrefillConfig(alpha=0.3, sink_blocks=1, window_blocks=1, dense_tail_blocks=0, pool_size=4)


def counted_tokens(monkeypatch, backend) -> list[int]:
    """How many tokens each call of the backend's pooling got."""
    tokens = []
    for name in ("pool_keys", "pool_keys_and_values"):
        made = getattr(backend, name)

        def counted(key, *args, made=made):
            tokens.append(key.shape[2])
            return made(key, *args)

        monkeypatch.setattr(backend, name, counted)
    return tokens


def chunks_of(query, key, value, config, kept_pools, chunks=CHUNKS, first=0, **options):
    """(output, lists) of each chunk of a prompt, from token ``first`` on."""
    for chunk in chunks:
        end = first + chunk
        yield flash_prefill_attention(
            query[:, :, first:end], key[:, :, :end], value[:, :, :end], config=config, kept_pools=kept_pools,
            return_index=True, **options,
        )  # fmt: skip
        first = end


def same(some, others, backend) -> bool:
    """Bit by bit; torch's sums on a GPU depend on how many there are."""
    error = 1e-5 if backend == "torch" and torch.cuda.is_available() else 0.0
    return all(
        (one.output - other.output).abs().max() <= error and torch.equal(one.index.to_mask(), other.index.to_mask())
        for one, other in zip(some, others, strict=True)
    )


@pytest.fixture(params=["torch", "triton"])
def backend(request, device):
    if request.param == "triton" and device.type != "cuda":
        pytest.skip("minutes in the interpreter")
    return request.param


@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        ("torch", {}),
        ("torch", {"block_size": 64, "selector": "share"}),
        ("torch", {"correction": False}),
        ("torch", {"selector": "flashprefill", "alpha": 0.8}),
        ("torch", {"selector": "topk", "alpha": 0.4}),
        ("triton", {}),
        ("triton", {"block_size": 64, "selector": "share", "correction": False}),
        ("triton", {"selector": "flashprefill", "alpha": 0.8}),
        ("triton", {"selector": "topk", "alpha": 0.4}),
    ],
    ids=str,
)
def test_chunks_have_the_same_bits(backend, settings, device, monkeypatch):
    query, key, value, _ = CASE.tensors(device)
    config = replace(CONFIG, backend=backend, **settings)
    expected = list(chunks_of(query, key, value, config, None))
    assert 0 < min(found.index.density() for found in expected) < 0.9, "the lists must have had something to drop"
    tokens = counted_tokens(monkeypatch, resolve_backend(backend, query))
    pools = KeptPools()
    assert same(chunks_of(query, key, value, config, pools), expected, backend)
    assert pools.tokens == CASE.query_len
    # Each call pools its own tokens and fewer than a tile's before them.
    together = 512 if backend == "triton" and settings.get("selector", "share") == "share" else 128
    calls = len(tokens) // len(CHUNKS)
    for chunk, pooled in zip(CHUNKS, tokens[::calls], strict=True):
        assert chunk <= pooled < chunk + together
    assert sum(tokens[::calls]) < sum(sum(CHUNKS[: i + 1]) for i in range(len(CHUNKS)))


def test_a_gpus_own_kernels_have_the_same_bits(device):
    if device.type != "cuda":
        pytest.skip("bfloat16 kernels need a GPU")
    query, key, value, _ = replace(CASE, head_dim=128, dtype=torch.bfloat16).tensors(device)
    for selector in ("blend", "flashprefill"):
        config = replace(CONFIG, backend="triton", selector=selector)
        expected = list(chunks_of(query, key, value, config, None))
        assert same(chunks_of(query, key, value, config, KeptPools()), expected, "triton")


def test_a_cache_may_be_cropped_and_grow_again(backend, device):
    """What stands from a call's first query on is never taken from earlier calls."""
    query, key, value, _ = CASE.tensors(device)
    config, pools = replace(CONFIG, backend=backend), KeptPools()
    list(chunks_of(query, key, value, config, pools))
    others = [tensor.clone() for tensor in (query, key, value)]
    for tensor in others:
        tensor[:, :, 600:].normal_()
    expected = list(chunks_of(*others, config, None, (60, 140), first=600))
    assert same(chunks_of(*others, config, pools, (60, 140), first=600), expected, backend)


@pytest.mark.parametrize("between", [{"sliding_window": 50}, {"backend": "reference"}], ids=str)
def test_a_call_that_pools_nothing_counts_as_well(between, device):
    """After a crop it fills the cache anew, and what was pooled there before must not come back."""
    query, key, value, _ = CASE.tensors(device)
    config, pools = replace(CONFIG, backend="torch"), KeptPools()
    list(chunks_of(query, key, value, config, pools))
    others = [tensor.clone() for tensor in (query, key, value)]
    for tensor in others:
        tensor[:, :, 500:].normal_()
    window = {name: size for name, size in between.items() if name == "sliding_window"}
    other = replace(config, backend=between.get("backend", "torch"))
    list(chunks_of(*others, other, pools, (200,), first=500, **window))
    expected = list(chunks_of(*others, config, None, (100,), first=700))
    assert same(chunks_of(*others, config, pools, (100,), first=700), expected, "torch")


def test_what_stands_behind_the_last_query_is_not_kept(backend, device):
    """As in a static cache, whose buffer is handed over whole."""
    query, key, value, _ = CASE.tensors(device)
    config, pools = replace(CONFIG, backend=backend), KeptPools()
    for first, end in ((0, 600), (600, 800)):
        filled = [tensor.clone() for tensor in (key, value)]
        for tensor in filled:
            tensor[:, :, end:].normal_()
        options = {"config": config, "query_offset": first}
        found = flash_prefill_attention(query[:, :, first:end], *filled, kept_pools=pools, **options)
        assert torch.equal(found, flash_prefill_attention(query[:, :, first:end], *filled, **options))


def test_kept_pools_are_what_is_used(device):
    """A caller who breaks the promise gets the blocks that the old keys would have had."""
    query, key, value, _ = CASE.tensors(device)
    config, pools = replace(CONFIG, backend="torch"), KeptPools()
    list(chunks_of(query, key, value, config, pools, (700,)))
    changed = key.clone()
    changed[:, :, :650].normal_()
    [found] = chunks_of(query, changed, value, config, pools, (100,), first=700)
    assert not torch.equal(found.output, list(chunks_of(query, changed, value, config, None, (100,), first=700))[0].output)


def test_the_reference_and_windows_pool_nothing(device):
    query, key, value, _ = (None if tensor is None else tensor[:, :, :300] for tensor in CASE.tensors(device))
    for options in ({"config": replace(CONFIG, backend="reference")}, {"config": CONFIG, "sliding_window": 50}):
        pools = KeptPools()
        found = flash_prefill_attention(query, key, value, kept_pools=pools, **options)
        assert torch.equal(found, flash_prefill_attention(query, key, value, **options))
        assert pools.tokens == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": {"pool_size": 8}}, "pool_size: pooled with 4, got 8"),
        ({"settings": {"block_size": 64}}, "block_size: pooled with 128, got 64"),
        ({"settings": {"correction": False}}, "correction: pooled with True, got False"),
        ({"settings": {"selector": "flashprefill"}}, "pool_size: pooled with 4, got 128"),
        ({"rows": 2}, "batch: pooled with 1, got 2"),
        ({"dtype": torch.float16}, "dtype: pooled with torch.float32, got torch.float16"),
    ],
    ids=str,
)
def test_pools_of_something_else_are_refused(change, named, device, monkeypatch):
    query, key, value, _ = CASE.tensors(device)
    config, pools = replace(CONFIG, backend="torch"), KeptPools()
    list(chunks_of(query, key, value, config, pools, (700,)))
    tokens = counted_tokens(monkeypatch, torch_backend)
    others = [
        tensor.repeat(change.get("rows", 1), 1, 1, 1).to(change.get("dtype", tensor.dtype)) for tensor in (query, key, value)
    ]
    with pytest.raises(ValueError, match=f"kept_pools must be new for another {named}"):
        flash_prefill_attention(*others, config=replace(config, **change.get("settings", {})), kept_pools=pools)
    assert not tokens, "refused before any work"
    assert pools.tokens == 700


def test_pools_of_another_backend_are_refused(device):
    query, key, value, _ = CASE.tensors(device)
    pools = KeptPools()
    list(chunks_of(query, key, value, replace(CONFIG, backend="torch"), pools, (700,)))
    with pytest.raises(ValueError, match="kept_pools must be new for another backend: pooled with torch, got triton"):
        flash_prefill_attention(query, key, value, config=replace(CONFIG, backend="triton"), kept_pools=pools)


def test_wrong_arguments_are_refused(device):
    query, key, value, ranges = Case(2, 2, 2, 200, 200, 64, ranges=((0, 200), (7, 200))).tensors(device)
    with pytest.raises(TypeError, match="kept_pools must be KeptPools or None, got dict"):
        flash_prefill_attention(query, key, value, kept_pools={})
    with pytest.raises(ValueError, match="kept_pools must be None with valid_ranges"):
        flash_prefill_attention(query, key, value, valid_ranges=ranges, kept_pools=KeptPools())
