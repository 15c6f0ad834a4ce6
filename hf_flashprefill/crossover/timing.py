"""Clocks: medians of functions that run in turns, by the GPU's clock where there is one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

FEWEST_RUNS = 5
# More than any cache holds. An H200 clears them 24 times in about 1.5 ms, in which its host launches one operator call; slow
# hosts need several times that. Where they are too few, waits count: .98 ms for the operator at 8192 tokens instead of .63.
QUEUE_BYTES = 256 << 20
FEWEST_CLEARINGS = 24
# A run that waits for the GPU itself can never be all in the queue.
MOST_CLEARINGS = 1024


def median_ms(
    run: Callable[[], object], device: torch.device, seconds: float, least: int = FEWEST_RUNS, queued: bool = False
) -> dict[str, float]:
    """``medians_ms`` of one function."""
    return medians_ms({"run": run}, device, seconds, least, queued)["run"]


def medians_ms(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    least: int = FEWEST_RUNS,
    queued: bool = False,
) -> dict[str, dict[str, float]]:
    """Median and quartiles of every one of ``runs`` in milliseconds, after an unmeasured run of each; by the GPU's clock
    where there is one.

    They run in turns, so that a clock which falls as the GPU warms up is the same for all, for ``seconds`` each on average and
    at least ``least`` times, two or more. ``queued``: the GPU is kept busy with clearing memory until all of a run is in its
    queue, however long the host takes, as it is in a model, whose host runs ahead; what counts is the GPU's own time, with
    nothing of the tensors in its cache. Otherwise an idle GPU waits for every launch.
    """
    cleared = torch.empty(QUEUE_BYTES, dtype=torch.int8, device=device) if queued and device.type == "cuda" else None
    for run in runs.values():
        run()
    clearings = dict.fromkeys(runs, FEWEST_CLEARINGS)
    times: dict[str, list[float]] = {name: [] for name in runs}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    until = time.perf_counter() + seconds * len(runs)
    rounds = 0
    while rounds < least or (time.perf_counter() < until and rounds < 200):
        for name, run in runs.items():
            if cleared is None:
                elapsed_ms = _time_ms(run, device)
            else:
                elapsed_ms, clearings[name] = _queued_ms(run, cleared, clearings[name])
            times[name].append(elapsed_ms)
        rounds += 1
    return {name: _quartiles(of_run) for name, of_run in times.items()}


def _time_ms(run: Callable[[], object], device: torch.device) -> float:
    """One run's milliseconds."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _queued_ms(run: Callable[[], object], cleared: torch.Tensor, clearings: int) -> tuple[float, int]:
    """One run's milliseconds after so many clearings, or a power of two times as many if the GPU was through with them before
    all of the run was in its queue; and how many it took."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    while True:
        for _ in range(clearings):
            cleared.zero_()
        begin.record()
        run()
        end.record()
        has_waited = begin.query()
        end.synchronize()
        if not has_waited or clearings >= MOST_CLEARINGS:
            return begin.elapsed_time(end), clearings
        clearings *= 2


def _quartiles(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4)
    return {"median_ms": median, "quartile_low_ms": low, "quartile_high_ms": high, "runs": len(times)}
