"""The only place that says how close is close."""

import math

import torch

from hf_flashprefill import reference


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


def logit_rounding(
    queries: torch.Tensor, magnitudes: torch.Tensor, scale: float, terms: int, dtype: torch.dtype
) -> torch.Tensor:
    """How far base-2 logits of [..., R, D] queries and [..., P, D] keys may err in float32: [..., R, P].

    The bound of a sum in any order. ``magnitudes`` are the keys' absolute values, or means of these, and ``terms`` the keys
    in such a mean; with a half ``dtype`` the mean is rounded once more.
    """
    products = queries.double().abs() @ magnitudes.double().transpose(-1, -2) * (scale * math.log2(math.e))
    factor = (queries.shape[-1] + terms + 8) * torch.finfo(torch.float32).eps
    return products * (factor + (0 if dtype == torch.float32 else torch.finfo(dtype).eps))


def clear_winners(query: torch.Tensor, key: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of causal queries [H, S, D] over keys [S, D]: the key with the largest logit, int64 [H, S]; that logit, base 2, float64
    [H, S]; whether it is above all others by so much, rounding included, that it has all the weight, bool [H, S]."""
    logits = query.double() @ key.double().T * (scale * math.log2(math.e))
    logits.masked_fill_(~torch.ones_like(logits, dtype=torch.bool).tril(), -math.inf)
    rounding = logit_rounding(query, key.abs(), scale, 1, torch.float32).amax(-1)
    first, second = logits.topk(2).values.unbind(-1)
    return logits.argmax(-1), first, first - second > 2 * rounding + 60


def integer_rounding(queries: torch.Tensor, keys: torch.Tensor, scale: float, pool_size: int, block_size: int) -> torch.Tensor:
    """How far base-2 logits of [Hq, R, D] queries and pooled [Hkv, S, D] keys may err: [Hq, R].

    Their integers are multiplied exactly, but in one channel of a query and one of a pooled key the integer may be the next
    one, because rounding decides; and the factors err.
    """
    group = queries.shape[0] // keys.shape[0]
    _, query_steps = reference.integer_queries(queries.double())
    integers, _, steps = (part.repeat_interleave(group, 0) for part in reference.integer_keys(keys, pool_size, block_size))
    largest_step = steps.double().amax((1, 2))
    largest_key = integers.abs().amax((1, 2)) * largest_step
    off_by_one = query_steps[..., 0] * largest_key[:, None] + queries.double().abs().amax(-1) * largest_step[:, None]
    products = queries.double().abs().sum(-1) * largest_key[:, None]
    return (off_by_one + products * 4 * torch.finfo(torch.float32).eps) * (scale * math.log2(math.e))


def nearly_longest(queries: torch.Tensor, runs: torch.Tensor) -> torch.Tensor:
    """Runs in which float32's rounding decides which of the [Hq, R, D] queries is the longest: bool [Hq, R], by query.

    ``runs`` [R] are the queries' runs.
    """
    squares = queries.double().square().sum(-1)
    least, most = (((squares * factor).float().view(torch.int32) + 0x8000) >> 16 for factor in (1 - 3e-6, 1 + 3e-6))
    is_close = torch.zeros_like(squares, dtype=torch.bool)
    for number in runs.unique():
        members = runs == number
        is_rival = most[:, members] >= least[:, members].amax(1, keepdim=True)
        is_close[:, members] = (is_rival & (least != most)[:, members]).any(1, keepdim=True)
    return is_close


def attention_rounding(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> float:
    """How far attention of [..., R, D] queries over [..., S, D] keys and values may err: by its logits, weights and result."""
    logits = logit_rounding(query, key.abs(), scale, 1, torch.float32).max().item()
    own = torch.finfo(value.dtype).eps
    return value.double().abs().max().item() * (2 * logits + 4 * own + 64 * torch.finfo(torch.float32).eps)
