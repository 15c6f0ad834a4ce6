"""What only a GPU can show: bfloat16, real tiles of every head_dim, graphs, no waiting, one million tokens of offsets."""

import math
import time

import pytest
import torch
from transformers import Cache

from hf_flashprefill import (
    FlashPrefillConfig,
    flash_prefill_attention,
    patch_model,
    prefill_stats,
    reference,
    warmup,
)
from hf_flashprefill.audit import RowAudit
from hf_flashprefill.crossover.timing import median_ms
from hf_flashprefill.stats import LayerRecord
from hf_flashprefill.support.families import FAMILIES
from hf_flashprefill.support.matrix import SETTINGS, check_column
from hf_flashprefill.support.situations import prompt
from tests.inputs import Case, tiny_model
from tests.tolerance import assert_no_worse_than_eager, assert_same_output, integer_rounding, nearly_longest

pytestmark = pytest.mark.gpu

SHAPES = [
    Case(1, 4, 1, 1000, 1000, 64),
    Case(2, 4, 2, 300, 900, 80, strided=True),
    Case(2, 2, 2, 513, 513, 96, ranges=((100, 513), (0, 400))),
    Case(2, 8, 2, 700, 1500, 128, ranges=((100, 1500), (0, 1200)), strided=True),
    Case(2, 4, 2, 129, 640, 256, query_offset=400),
    Case(2, 4, 1, 300, 700, 512, ranges=((100, 700), (0, 600))),
    Case(1, 2, 1, 200, 500, 320, strided=True),
]


def skip_without_kernel(case: Case, backend: str) -> None:
    if backend == "triton" and case.head_dim > 256 and case.dtype == torch.float32:
        pytest.skip("wider heads have kernels for 16-bit numbers only")


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_errs_no_more_than_eager(shape, dtype, backend):
    case = Case(**{**vars(shape), "dtype": dtype})
    skip_without_kernel(case, backend)
    query, key, value, ranges = case.tensors(torch.device("cuda"))
    scale = case.head_dim**-0.5
    dropping = {"alpha": 0.5, "sink_blocks": 0, "window_blocks": 1, "dense_tail_blocks": 0, "correction": False}
    config = FlashPrefillConfig(backend=backend, **dropping)
    output, index = flash_prefill_attention(
        query, key, value, config=config, query_offset=case.query_offset, valid_ranges=ranges, return_index=True
    )
    index.validate()
    exact = reference.attend_blocks(query, key, value, index, scale=scale, dtype=torch.float64)
    eager = reference.attend_blocks(query, key, value, index, scale=scale, dtype=dtype)
    if dtype == torch.float32:
        # Both are exact to a few roundings; which of them errs less is chance.
        torch.testing.assert_close(output.double(), exact, atol=2e-5, rtol=1e-5)
    else:
        assert_no_worse_than_eager(output, eager, exact)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("terms", ["window", "sinks", "means"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_further_terms_err_no_more_than_eager(shape, terms, dtype, backend):
    case = Case(**{**vars(shape), "dtype": dtype})
    skip_without_kernel(case, backend)
    query, key, value, ranges = case.tensors(torch.device("cuda"))
    dropping = {"sink_blocks": 0, "window_blocks": 1, "dense_tail_blocks": 0}
    config = FlashPrefillConfig(alpha=0.5, correction=terms == "means", mean_blocks=2, backend=backend, **dropping)
    asked = {"sliding_window": 200} if terms == "window" else {}
    asked |= {"sinks": torch.linspace(-3, 6, case.heads, device="cuda")} if terms == "sinks" else {}
    placing = {"query_offset": case.query_offset, "valid_ranges": ranges}
    output, index = flash_prefill_attention(query, key, value, config=config, return_index=True, **placing, **asked)
    options = {"scale": case.head_dim**-0.5, "mean_blocks": config.mean_blocks if config.correction else None, **asked}
    exact = reference.attend_blocks(query, key, value, index, dtype=torch.float64, **options)
    eager = reference.attend_blocks(query, key, value, index, dtype=dtype, **options)
    if dtype == torch.float32:
        torch.testing.assert_close(output.double(), exact, atol=2e-5, rtol=1e-5)
    else:
        assert_no_worse_than_eager(output, eager, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [128, 512])
def test_selection_disagrees_only_within_rounding(head_dim, dtype):
    case = Case(1, 8, 2, 4096, 4096, head_dim, dtype=dtype)
    query, key, value, _ = case.tensors(torch.device("cuda"))
    for alpha in (0.4, 0.7):
        config = FlashPrefillConfig(
            alpha=alpha, selector="flashprefill", sink_blocks=0, window_blocks=1, dense_tail_blocks=0, backend="triton"
        )
        index = flash_prefill_attention(query, key, value, config=config, return_index=True).index
        energies = reference.block_energies(
            query[0],
            torch.arange(4096, device="cuda"),
            reference.pooled_keys(key[0], 128),
            4096,
            128,
            head_dim**-0.5,
            torch.float64,
        )
        margin = energies - energies.amax(-1, keepdim=True) - torch.tensor(alpha).log2()
        rule = {"alpha": alpha, "selector": "flashprefill"}
        expected = reference.kept_blocks(energies, 0, **rule, sink_blocks=0, window_blocks=1, dense_tail_blocks=0)
        wrong = index.to_mask()[0] != expected
        assert margin[wrong].abs().le(1e-3).all()
        assert 0.02 < expected.float().mean() < 0.5, "the threshold must have had something to decide"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("selector", "alpha"), [("share", 0.03), ("blend", 0.06), ("peak", 0.5)])
@pytest.mark.parametrize(
    "probe", [(8, 8, 128), (4, 8, 128), (4, 16, 128), (16, 4, 128), (32, 1, 128), (32, 32, 128), (4, 8, 512)], ids=str
)
def test_shares_disagree_only_within_rounding(selector, alpha, probe, dtype):
    pool_size, query_stride, head_dim = probe
    case = Case(1, 8, 2, 4000, 4096, head_dim, dtype=dtype)
    query, key, value, _ = case.tensors(torch.device("cuda"))
    forced = {"sink_blocks": 0, "window_blocks": 1, "dense_tail_blocks": 0}
    config = FlashPrefillConfig(
        alpha=alpha, selector=selector, pool_size=pool_size, query_stride=query_stride, backend="triton", **forced
    )
    index = flash_prefill_attention(query, key, value, config=config, return_index=True).index
    index.validate()
    positions = torch.arange(96, 4096, device="cuda")
    scale = head_dim**-0.5
    probed = reference.probe_logits(query[0], positions, key[0], pool_size, query_stride, 128, scale, torch.float64)
    first_block = (4096 - 4000) // 128
    scores = reference.PROBE_SCORES[selector](probed, first_block, 128, pool_size)
    expected = reference.kept_blocks(scores, first_block, selector=selector, alpha=alpha, **forced)
    margin = scores - (scores.amax(-1, keepdim=True) if selector == "peak" else 0.0) - torch.tensor(alpha).log2()
    rounding = integer_rounding(query[0], key[0], scale, pool_size, 128)
    if query_stride > 1:
        # Rounding may have chosen another query there.
        rounding = rounding.masked_fill(nearly_longest(query[0], positions // query_stride), math.inf)
    rounding = torch.nn.functional.pad(rounding, (96, 0)).view(8, -1, 128).amax(-1, keepdim=True)
    wrong = index.to_mask()[0] != expected
    assert (margin.abs() <= 2 * rounding + 1e-4)[wrong].all()
    assert 0.02 < expected.float().mean() < 0.6, "the threshold must have had something to decide"


def test_a_plain_prompt_never_waits_for_the_device():
    query, key, value, _ = Case(1, 8, 2, 2048, 4096, 128, dtype=torch.bfloat16).tensors(torch.device("cuda"))
    flash_prefill_attention(query, key, value)
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_prefill_attention(query, key, value)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_audit_never_waits_for_the_device_and_its_numbers_arrive():
    query, key, value, _ = Case(1, 8, 2, 2048, 4096, 128, dtype=torch.bfloat16).tensors(torch.device("cuda"))
    record = LayerRecord()

    def audited():
        audit = RowAudit(query, key, rows=16, scale=128**-0.5)
        flash_prefill_attention(query, key, value, on_index=audit.add_index)
        record.add_audit(audit.dropped(), limit=0.0)
        record.check_audit()

    audited()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.warns(UserWarning, match="above audit_limit=0"):
            audited()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert record.audit[1] == 2


def test_a_new_length_compiles_nothing():
    from hf_flashprefill.backends.triton.attend_hopper import _attend_hopper_kernel
    from hf_flashprefill.backends.triton.energies_hopper import _energies_hopper_kernel
    from hf_flashprefill.backends.triton.energy_lists import _list_energies_kernel
    from hf_flashprefill.backends.triton.pool import _pool_kernel
    from hf_flashprefill.backends.triton.probe_hopper import _probe_hopper_kernel
    from hf_flashprefill.backends.triton.shares import _list_shares_kernel

    kernels = (
        _attend_hopper_kernel,
        _energies_hopper_kernel,
        _list_energies_kernel,
        _list_shares_kernel,
        _pool_kernel,
        _probe_hopper_kernel,
    )

    def run(tokens: int) -> int:
        query = torch.randn(1, tokens, 8, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        key = torch.randn(1, 2, tokens, 128, device="cuda", dtype=torch.bfloat16)
        for selector in ("blend", "flashprefill"):
            flash_prefill_attention(query, key, key, config=FlashPrefillConfig(selector=selector))
        return sum(len(kernel.device_caches[0][0]) for kernel in kernels)

    before = run(4096)
    for tokens in (1, 16, 513, 4097, 8192, 300_000):
        assert run(tokens) == before, f"{tokens} tokens compiled a kernel"


@torch.no_grad()
def test_the_first_prompt_after_warmup_compiles_nothing(monkeypatch, tmp_path):
    from triton.runtime.jit import JITFunction

    monkeypatch.setenv("HF_FLASHPREFILL_CACHE", str(tmp_path))
    compiled, compile_kernel = [], JITFunction._do_compile

    def spy(kernel, *args, **kwargs):
        compiled.append(kernel.__name__)
        return compile_kernel(kernel, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "_do_compile", spy)
    # Heads that no other test has.
    model = tiny_model(head_dim=128, num_attention_heads=16, num_key_value_heads=2).to("cuda", torch.bfloat16)
    patch_model(model, min_seq_len=300)
    warmup(model)
    assert len(set(compiled)) >= 3
    compiled.clear()
    mask = torch.ones(2, 700, dtype=torch.long, device="cuda")
    mask[0, :200] = 0
    ids = torch.randint(3, 199, (2, 700), device="cuda")
    for rows, attention_mask in ((ids[:1, :333], None), (ids, None), (ids, mask)):
        model(rows, attention_mask=attention_mask)
    cache = model(ids[:, :300]).past_key_values
    model(ids[:, 300:], past_key_values=cache)
    assert prefill_stats(model).sparse_calls == 10
    assert compiled == []


def test_the_time_of_a_queued_run_is_the_gpus_own():
    """The launches of sixteen chunks took a host longer than any fixed number of clearings, and a slow host some later launches
    longer than the first."""
    tensor, device = torch.zeros(128, device="cuda"), torch.device("cuda")
    runs = []

    def launched_slowly():
        if len(runs) > 2:
            time.sleep(0.01)
        runs.append(tensor.add_(1))

    assert median_ms(launched_slowly, device, seconds=0.2)["median_ms"] > 9
    runs.clear()
    assert median_ms(launched_slowly, device, seconds=0.2, queued=True)["median_ms"] < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_a_bad_value_of_a_later_block_reaches_no_mean_before_it(bad, dtype):
    """The last run of blocks that a query block reads has later ones behind it."""
    query, key, value, _ = Case(1, 8, 2, 3000, 3000, 128, dtype=dtype).tensors(torch.device("cuda"))
    config = FlashPrefillConfig(alpha=1.0, sink_blocks=0, window_blocks=1, dense_tail_blocks=0, backend="triton")
    expected = flash_prefill_attention(query, key, value, config=config)
    block = 11
    value[0, :, block * 128 + 5] = bad
    output, index = flash_prefill_attention(query, key, value, config=config, return_index=True)
    assert not index.to_mask()[..., block + 1 :, block].all(), "the block must have been dropped somewhere"
    assert torch.equal(output[:, :, : block * 128], expected[:, :, : block * 128])
    assert not output[:, :, (block + 1) * 128 :].isfinite().any()


def test_graph_capture_replays_the_same_bits():
    query, key, value, _ = Case(1, 8, 2, 2048, 2048, 128, dtype=torch.bfloat16).tensors(torch.device("cuda"))
    expected = flash_prefill_attention(query, key, value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = flash_prefill_attention(query, key, value)
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)


def test_offsets_beyond_32_bits():
    """The last keys of a cache whose element offsets pass 2**31."""
    kv_len = 600_000
    key = torch.randn(1, kv_len, 8, 512, device="cuda", dtype=torch.bfloat16)[..., :128].transpose(1, 2)
    query = torch.randn(1, 8, 256, 128, device="cuda", dtype=torch.bfloat16)
    assert key.stride(2) * kv_len > 2**31
    config = FlashPrefillConfig(alpha=1.0, sink_blocks=0, dense_tail_blocks=0, correction=False, backend="triton")
    output, index = flash_prefill_attention(query, key, key, config=config, return_index=True)
    last = index.indices[0, 0, -1, : int(index.counts[0, 0, -1])].long()
    positions = (last[:, None] * 128 + torch.arange(128, device="cuda")).flatten()
    positions = positions[positions < kv_len]
    keys = key[0, 0, positions].double()
    weights = (query[0, 0, -1].double() @ keys.T * 128**-0.5).softmax(-1)
    torch.testing.assert_close(output[0, 0, -1].double(), weights @ keys, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("selector", ["blend", "flashprefill"])
def test_one_million_tokens(selector):
    """Within 1 GiB of scratch, rows whose answer stands in one far block agree with exact attention over all keys."""
    tokens, heads, key_heads, channels = 1 << 20, 32, 8, 128
    shape = {"device": "cuda", "dtype": torch.bfloat16}
    query = torch.randn(1, tokens, heads, channels, **shape).transpose(1, 2)
    key, value = (torch.randn(1, key_heads, tokens, channels, **shape) for _ in range(2))
    # The share selector asks the longest query of every eight; its pools of keys are no longer. A block's energy is its mean's.
    width = 8 if selector == "blend" else 128
    rows = [(0, tokens - 513, 512 * 200), (31, 700_031, 512 * 3), (13, 131_071, 512 * 7), (20, tokens - 1, 512 * 1000)]
    for head, row, needle in rows:
        # Longer than any other of its run.
        query[0, head, row] *= 1.5
        key[0, head // 4, needle : needle + width] = 2 * query[0, head, row]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept, visible = torch.zeros((), dtype=torch.int64, device="cuda"), 0

    def count(index):
        nonlocal visible
        kept.add_(index.counts.sum(dtype=torch.int64))
        visible += index.visible_total() * heads

    config = FlashPrefillConfig(selector=selector, alpha=0.005 if selector == "blend" else 1.0, backend="triton")
    output = flash_prefill_attention(query, key, value, config=config, on_index=count)
    scratch = torch.cuda.max_memory_allocated() - before - output.nbytes
    assert scratch <= 1 << 30, f"{scratch / 2**20:.0f} MiB of scratch"
    assert int(kept) < 0.1 * visible, "most blocks must have been dropped"
    for head, row, _ in rows:
        seen = slice(0, row + 1)
        weights = (key[0, head // 4, seen].double() @ query[0, head, row].double() * channels**-0.5).softmax(0)
        exact = weights @ value[0, head // 4, seen].double()
        # The rounding of weights and result; a million other keys weigh less than 1e-3 together.
        torch.testing.assert_close(output[0, head, row].double(), exact, atol=5e-3, rtol=1e-2)


@pytest.mark.parametrize("selector", ["peak", "flashprefill"])
@pytest.mark.parametrize(
    ("shape", "part"),
    [
        pytest.param((1, 32, 1 << 20, 128), (slice(None), slice(28, 32)), id="heads"),
        pytest.param((33, 32, 1 << 14, 128), (slice(32, 33), slice(None)), id="rows"),
    ],
)
def test_heads_and_rows_far_into_a_tensor(shape, part, selector):
    """Heads and batch rows that begin more than 2**31 numbers into a tensor get the results that they get alone."""
    batch, heads, tokens, channels = shape
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    query = torch.randn(shape, **kind)
    key, value = (torch.randn(batch, heads // 4, tokens, channels, **kind) for _ in range(2))
    config = FlashPrefillConfig(selector=selector, alpha=1.0, dense_tail_blocks=0, backend="triton")
    output = flash_prefill_attention(query, key, value, config=config)[part].clone()
    key_part = part if part[1] == slice(None) else (part[0], slice(28 // 4, 32 // 4))
    alone = flash_prefill_attention(query[part].clone(), key[key_part].clone(), value[key_part].clone(), config=config)
    # A probe of few programs splits the keys among more, and adds up what they find in another order.
    assert (output != alone).any(-1).float().mean() < 1e-3


@pytest.fixture
def waiting_fetches(monkeypatch):
    """transformers' offloaded caches without their race."""
    fetch = Cache.prefetch

    def fetch_what_has_arrived(*args, **kwargs):
        # transformers 5.17 fetches on a stream of its own, which does not wait for the copy to the host to end.
        torch.cuda.synchronize()
        return fetch(*args, **kwargs)

    monkeypatch.setattr(Cache, "prefetch", fetch_what_has_arrived)


@pytest.mark.parametrize("cache", [None, "static", "offloaded", "offloaded_static"])
@torch.no_grad()
def test_generate_gives_the_tokens_of_the_unpatched_model(cache, waiting_fetches):
    """A static cache compiles the decode steps, which must neither break nor be counted; an offloaded one needs a GPU."""
    model = tiny_model(head_dim=64).cuda()
    ids = torch.randint(3, 199, (2, 400), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :130] = 0
    settings = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": mask,
        "cache_implementation": cache,
        # torch 2.11 crashes where it compiles transformers' copies between streams, unpatched as well.
        "disable_compile": cache == "offloaded_static",
    }
    expected = model.generate(ids, **settings)
    patch_model(model, alpha=0, min_seq_len=64)
    assert torch.equal(model.generate(ids, **settings), expected)
    stats = prefill_stats(model)
    assert stats.sparse_calls == 2
    assert set(stats.dense_calls) <= {"decode"}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_offloaded_cache_answers_as_unpatched(family, waiting_fetches):
    """The support matrix's one row that no CPU can run: sparse where ``generate`` without it is."""
    with torch.device("cuda"):
        cells = check_column(family, "sdpa", ["generate", "generate_offloaded"])
    plain, offloaded = cells["generate"], cells["generate_offloaded"]
    print(family, plain.verdict, offloaded.verdict, offloaded.not_run)
    assert offloaded.wrong is None, offloaded.wrong
    if offloaded.not_run is None:
        assert offloaded.verdict == plain.verdict


@torch.no_grad()
def test_layers_that_no_kernel_takes_stay_dense():
    """In torch sparse prefill would be slower than they were."""
    model = tiny_model(head_dim=20).to("cuda")
    ids = prompt().to("cuda")
    expected = model(ids).logits
    patch_model(model, alpha=0, **SETTINGS)
    assert torch.equal(model(ids).logits, expected)
    assert prefill_stats(model).dense_calls == {"no GPU kernel": 2}
    assert warmup(model).layers == []
    patch_model(model, alpha=0, backend="torch", **SETTINGS)
    assert_same_output(model(ids).logits, expected)
    assert prefill_stats(model).sparse_calls == 2
