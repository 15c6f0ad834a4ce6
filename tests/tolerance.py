"""The only place that says how close is close."""

import torch


def assert_no_worse_than_eager(actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """``actual`` errs no more against the float64 ``exact`` than eager attention in its own precision does.

    Three roundings of the result are allowed on top: the order of summation differs.
    """
    assert actual.dtype == eager.dtype
    error = (actual.double() - exact).abs().max().item()
    allowed = (eager.double() - exact).abs().max().item() + 3 * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert error <= allowed, f"error {error:.2e} against float64, eager in {actual.dtype} errs {allowed:.2e}"


def assert_same_output(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Float32 results of two exact methods: they differ by the order of summation only."""
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)
