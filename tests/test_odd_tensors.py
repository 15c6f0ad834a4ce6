"""What the operator makes of tensors, numbers and settings of torch that are unlike those of a model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_flashprefill import FlashPrefillConfig, flash_prefill_attention, functional
from hf_flashprefill.backends import triton as triton_backend
from hf_flashprefill.functional import TensorKind
from hf_flashprefill.geometry import PrefillGeometry
from tests.inputs import Case, exact_dense

CPU = torch.device("cpu")
CASE = Case(1, 2, 1, 130, 130, 16)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_default_dtype_changes_nothing(backend, dtype, device):
    query, key, value, _ = CASE.tensors(device)
    config = FlashPrefillConfig(alpha=0.5, sink_blocks=0, window_blocks=1, dense_tail_blocks=0, block_size=64, backend=backend)
    sinks = torch.tensor([-1.0, 2.0], device=device)
    expected = flash_prefill_attention(query, key, value, config=config, sinks=sinks)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        output = flash_prefill_attention(query, key, value, config=config, sinks=sinks)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize(("sink", "scale"), [(9000.0, 0.125), (700.0, 0.01), (1e29, 0.125), (-1e29, 0.125)])
def test_a_huge_sink_takes_all_there_is(backend, sink, scale, device):
    query, key, value, _ = replace(CASE, dtype=torch.float16).tensors(device)
    sinks = torch.full((2,), sink, device=device)
    output = flash_prefill_attention(query, key, value, config=FlashPrefillConfig(backend=backend), scale=scale, sinks=sinks)
    expected = exact_dense(query, key, value, 0, None, scale, sinks=sinks)
    torch.testing.assert_close(output.double(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [replace(CASE, head_dim=dim, dtype=torch.bfloat16) for dim in (32, 64, 128, 256)], ids=str)
@pytest.mark.parametrize("sink", [1e6, 1e12, 1e29, -1e29])
def test_a_huge_sink_survives_fused_products(case, sink, device):
    """Base 2, a sink of 1e29 less its own rounded self is 4e21 where the product is not rounded first: 0 / 0."""
    query, key, value, _ = case.tensors(device)
    sinks = torch.full((2,), sink, device=device)
    expected = exact_dense(query, key, value, 0, None, case.head_dim**-0.5, sinks=sinks)
    output = flash_prefill_attention(query, key, value, sinks=sinks)
    torch.testing.assert_close(output.double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_tensors_without_memory_of_their_own_are_refused(name):
    tensors = dict(zip(("query", "key", "value"), CASE.tensors(CPU), strict=False))
    tensors[name] = TwoTensor(tensors[name], tensors[name])
    with pytest.raises(TypeError, match=f"{name} must be a plain tensor, got TwoTensor; of a DTensor pass to_local"):
        flash_prefill_attention(**tensors)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_tensors_that_stand_for_their_negatives(backend, device):
    query, key, value, _ = CASE.tensors(device)
    negative = [torch._neg_view(-tensor) for tensor in (query, key, value)]
    assert all(tensor.is_neg() for tensor in negative)
    config = FlashPrefillConfig(backend=backend)
    assert torch.equal(
        flash_prefill_attention(*negative, config=config), flash_prefill_attention(query, key, value, config=config)
    )


def test_numbers_of_numpy_are_numbers():
    query, key, value, _ = CASE.tensors(CPU)
    given = {"scale": np.float32(0.125), "query_offset": np.int64(0), "sliding_window": np.int64(100)}
    plain = {"scale": 0.125, "query_offset": 0, "sliding_window": 100}
    assert torch.equal(flash_prefill_attention(query, key, value, **given), flash_prefill_attention(query, key, value, **plain))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("selector", ["blend", "flashprefill"])
def test_more_blocks_than_32_bits_count(backend, selector, device):
    query, key, value, _ = CASE.tensors(device)
    for name in ("sink_blocks", "window_blocks", "dense_tail_blocks"):
        config = FlashPrefillConfig(alpha=1, selector=selector, backend=backend, block_size=64, **{name: 2**40})
        _, index = flash_prefill_attention(query, key, value, config=config, return_index=True)
        assert index.density() == 1, name


class Copies(TorchDispatchMode):
    """Counts copies of as many numbers as a tensor has, or more."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.count = least, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.clone.default and result.numel() >= self.least:
            self.count += 1
        return result


def test_what_has_its_channels_apart_is_copied_once(device, monkeypatch):
    tensors = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in CASE.tensors(device)[:3]]
    monkeypatch.setattr(functional, "SCRATCH_BYTES", 1)
    lists = []
    with Copies(tensors[1].numel()) as copies:
        flash_prefill_attention(*tensors, config=FlashPrefillConfig(backend="triton", block_size=64), on_index=lists.append)
    assert len(lists) == 3
    assert copies.count == 3


def test_lists_of_a_window_need_no_rounds_until_a_grid_is_full():
    geometry = PrefillGeometry(1, 1 << 20, 1 << 20, 0, 128)
    assert functional._rounds(geometry, 64, geometry.window_width(128)) == [(0, 8192)]
    assert len(functional._rounds(geometry, 64, geometry.key_blocks)) == 128
    geometry = PrefillGeometry(1, 1 << 21, 1 << 21, 0, 64)
    assert functional._rounds(geometry, 1, 1) == [(first, 8192) for first in range(0, 32768, 8192)]


def test_batches_that_no_grid_holds_are_not_for_the_kernels(device):
    assert triton_backend.obstacle(torch.empty(32768, 1, 1, 64, device=device)) == "batch must be at most 32767, got 32768"
    for kind in (torch.empty(32767, 1, 1, 64, device=device), TensorKind(device, torch.float32, (64,))):
        assert triton_backend.obstacle(kind) is None


@pytest.mark.gpu
def test_more_heads_than_the_second_dimension_of_a_grid_holds(device):
    case = Case(4096, 16, 16, 130, 130, 64, dtype=torch.bfloat16)
    query, key, value, _ = case.tensors(device)
    config = FlashPrefillConfig(alpha=1, sink_blocks=0, window_blocks=1, dense_tail_blocks=0, mean_blocks=1)
    output = flash_prefill_attention(query, key, value, config=config)
    last = [tensor[-1:] for tensor in (query, key, value)]
    assert torch.equal(output[-1:], flash_prefill_attention(*last, config=config))


def test_a_graph_does_not_follow_the_operator():
    query, key, value, _ = CASE.tensors(CPU)
    config = FlashPrefillConfig(backend="torch")
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def layer(query, key, value):
        return flash_prefill_attention(query + 0, key, value, config=config) * 2

    torch._dynamo.reset()
    output = torch.compile(layer, backend=count)(query, key, value)
    assert torch.equal(output, layer(query, key, value))
    assert len(graphs) == 2
