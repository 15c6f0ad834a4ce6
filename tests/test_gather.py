"""The kernel that copies a row out of vLLM's pages, against indexing."""

from types import SimpleNamespace

import pytest
import torch

from hf_flashprefill import FlashPrefillConfig, flash_prefill_attention
from hf_flashprefill.backends.triton.gather import gather_pages
from hf_flashprefill.functional import TensorKind
from hf_flashprefill.integrations.vllm import gather
from hf_flashprefill.integrations.vllm.gather import flash_pages, gather_row

ORDERS = ("head-major", "token-major", "shared")


def filled_cache(order: str, pages: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
    """Views of the keys and values of a cache [P, Hkv, N, 2 * D] in an order of memory."""
    packed = torch.randn(pages, tokens, heads, 2 * head_dim, device=device).to(dtype)
    if order == "head-major":
        cache = packed.transpose(1, 2).contiguous()
    elif order == "token-major":
        cache = packed.transpose(1, 2)
    else:
        # One layer's part of memory that all layers share, a page with the room of another kind of layer.
        shared = torch.full((pages, 3, tokens + 1, heads, 2 * head_dim), float("nan"), dtype=dtype, device=device)
        shared[:, 1, :tokens] = packed
        cache = shared[:, 1, :tokens].transpose(1, 2)
    return flash_pages(cache, head_dim)


def indexed(pages: torch.Tensor, table: torch.Tensor, seq_len: int) -> torch.Tensor:
    token = torch.arange(seq_len, device=pages.device)
    return pages[table.long()[token // pages.shape[1]], token % pages.shape[1]].transpose(0, 1)[None]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("seq_len", "page", "heads", "head_dim", "dtype"),
    [
        (1, 16, 2, 64, torch.float32),
        (63, 16, 1, 128, torch.float16),
        (64, 16, 3, 128, torch.bfloat16),
        (161, 32, 2, 80, torch.float16),
        (200, 48, 2, 8, torch.bfloat16),
        (33, 16, 2, 256, torch.float16),
    ],
)
def test_the_kernel_copies_what_indexing_takes(order, seq_len, page, heads, head_dim, dtype, device):
    count = -(-seq_len // page)
    views = filled_cache(order, count + 5, page, heads, head_dim, dtype, device)
    table = torch.randperm(count + 5, device=device).to(torch.int32)
    expected = [indexed(view, table, seq_len) for view in views]
    for view in views:
        # Pages of other rows, and what a finished row left in the last page.
        view[table[count:].long()] = float("nan")
        view[table[count - 1].long(), (seq_len - 1) % page + 1 :] = float("nan")
    gathered = gather_pages(*views, table, seq_len)
    for got, wanted in zip(gathered, expected, strict=True):
        assert torch.equal(got, wanted)
        assert got.is_contiguous()
    if not views[0].is_cuda:
        for got, wanted in zip(gather_row(*views, table, seq_len), expected, strict=True):
            assert torch.equal(got, wanted)


def test_a_wide_table_of_another_type(device):
    views = filled_cache("token-major", 12, 16, 2, 64, torch.float16, device)
    table = torch.randperm(24, device=device)[::2] // 2
    for got, view in zip(gather_pages(*views, table, 100), views, strict=True):
        assert torch.equal(got, indexed(view, table, 100))


def test_pages_are_not_taken_for_a_batch(monkeypatch):
    """The kernels take no batch above 32767, but any number of pages."""
    from hf_flashprefill.backends.triton import gather as kernel

    asked = []
    monkeypatch.setattr(gather, "triton_obstacle", asked.append)
    monkeypatch.setattr(kernel, "gather_pages", lambda *args: "by the kernel")
    device, dtype = torch.device("cuda"), torch.bfloat16
    pages = SimpleNamespace(is_cuda=True, device=device, dtype=dtype, shape=(70_000, 16, 8, 128), stride=lambda _: 1)
    assert gather_row(pages, pages, None, 100) == "by the kernel"
    assert asked == [TensorKind(device, dtype, (128,))]


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["head-major", "token-major"])
def test_a_long_row_on_a_gpu(order, monkeypatch, capsys):
    """128K tokens of a cache whose offsets pass 2**31, without waiting; prints what it costs beside the row's attention."""
    from triton.testing import do_bench

    from hf_flashprefill.backends.triton import gather as kernel

    calls, launch = [], kernel.gather_pages
    monkeypatch.setattr(kernel, "gather_pages", lambda *args: calls.append(args[-1]) or launch(*args))
    device, page, heads, head_dim, seq_len = torch.device("cuda"), 16, 8, 128, 131_072 - 3
    memory = torch.empty(70_000, heads * page * 2 * head_dim, dtype=torch.bfloat16, device=device).normal_()
    shape = (heads, page) if order == "head-major" else (page, heads)
    cache = memory.unflatten(1, (*shape, 2 * head_dim))
    views = flash_pages(cache if order == "head-major" else cache.transpose(1, 2), head_dim)
    table = torch.randperm(70_000, device=device).to(torch.int32)
    assert int(table[: seq_len // page].max()) * memory.stride(0) > 2**31
    torch.cuda.set_sync_debug_mode("error")
    try:
        key, value = gather_row(*views, table, seq_len)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert calls == [seq_len]
    for got, view in zip((key, value), views, strict=True):
        assert torch.equal(got, indexed(view, table, seq_len))
    query = torch.randn(1, 32, seq_len, head_dim, dtype=torch.bfloat16, device=device)
    config = FlashPrefillConfig(backend="triton")
    copy_ms = do_bench(lambda: gather_row(*views, table, seq_len))
    monkeypatch.setattr(gather, "triton_obstacle", lambda _: "to compare")
    index_ms = do_bench(lambda: gather_row(*views, table, seq_len))
    attention_ms = do_bench(lambda: flash_prefill_attention(query, key, value, config=config))
    times = f"kernel {copy_ms:.3f} ms, index_select {index_ms:.3f} ms, attention of random tensors {attention_ms:.2f} ms"
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}, {order}, {seq_len} tokens: {times}, share {copy_ms / attention_ms:.3f}")


@pytest.mark.gpu
def test_a_new_length_compiles_no_gather():
    from hf_flashprefill.backends.triton.gather import _gather_pages_kernel

    views = filled_cache("token-major", 300, 16, 8, 128, torch.bfloat16, torch.device("cuda"))
    table = torch.randperm(300, device="cuda").to(torch.int32)

    def variants(seq_len: int) -> int:
        gather_row(*views, table[: -(-seq_len // 16)], seq_len)
        return len(_gather_pages_kernel.device_caches[0][0])

    before = variants(4096)
    for seq_len in (1, 16, 17, 1000, 4800):
        assert variants(seq_len) == before
