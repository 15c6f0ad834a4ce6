"""The memory of results: zeros where a padded row has no query, and nothing where it has one."""

from importlib import import_module

import pytest
import torch

from hf_flashprefill.geometry import PrefillGeometry


@pytest.mark.parametrize(("backend", "module"), [("torch", "torch.attend"), ("triton", "triton.output")])
@pytest.mark.parametrize(
    ("query_len", "kv_len", "offset", "ranges"),
    [
        (70, 70, 0, ((0, 70), (33, 70), (0, 5), (16, 32))),
        (70, 200, 130, ((0, 200), (150, 200), (100, 140), (0, 120), (199, 200))),
        (64, 200, 40, ((0, 200), (50, 50), (104, 200), (90, 103))),
        (1, 9, 8, ((0, 9), (0, 8))),
    ],
)
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 8), (17, 128)])
def test_zeros_where_no_query_is(backend, module, query_len, kv_len, offset, ranges, heads, head_dim, device, monkeypatch):
    query = torch.randn(len(ranges), heads, query_len, head_dim, device=device)
    geometry = PrefillGeometry(
        len(ranges), query_len, kv_len, offset, 128, torch.tensor(ranges, dtype=torch.int32, device=device)
    )
    written = import_module(f"hf_flashprefill.backends.{module}")
    for name in ("empty", "zeros"):
        made = getattr(torch, name)
        fill = torch.nan if name == "empty" else 0.0
        monkeypatch.setattr(torch, name, lambda *args, made=made, fill=fill, **options: made(*args, **options).fill_(fill))
    output = written.new_output(query, geometry)
    monkeypatch.undo()
    assert output.shape == query.shape
    assert output.transpose(1, 2).is_contiguous()
    position = offset + torch.arange(query_len, device=device)
    begin, end = geometry.valid_ranges.T[..., None]
    is_padding = ((position < begin) | (position >= end))[:, None, :, None].expand_as(output)
    assert is_padding.any()
    assert (output[is_padding] == 0).all()
    if backend == "triton":
        assert output[~is_padding].isnan().all(), "what is to be written need not be cleared"


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_is_written_without_padding(backend, device, monkeypatch):
    written = import_module(f"hf_flashprefill.backends.{backend}")
    monkeypatch.setattr(torch, "zeros", None)
    query = torch.randn(2, 3, 5, 8, device=device)
    assert written.new_output(query, PrefillGeometry(2, 5, 5, 0, 128)).shape == query.shape
