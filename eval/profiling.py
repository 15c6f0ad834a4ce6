"""What the time of a run goes to, kernel by kernel, as torch's profiler counts it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from eval import common

# Kernels of a table; the others are added up. Names of templates can be a page long.
SHOWN = 12
NAME_WIDTH = 60


def kernel_times(run: Callable[[], object], device: torch.device, runs: int = 5) -> list[dict]:
    """Launches and milliseconds of each kernel in one of ``runs`` runs, on average, those that take longest first.

    Kernels of one template are one kernel here, unless their names are mangled. On a CPU torch's operators take the kernels'
    place. The first run of something compiles: let there have been one.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(runs):
            run()
        if on_gpu:
            torch.cuda.synchronize(device)
    kept = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found: dict[str, dict] = {}
    for event in profiler.key_averages():
        if event.device_type != kept:
            continue
        kernel = event.key.removeprefix("void ").partition("<")[0]
        row = found.setdefault(kernel, {"kernel": kernel, "launches": 0.0, "ms": 0.0})
        row["launches"] += event.count / runs
        row["ms"] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / runs / 1e3
    return sorted(found.values(), key=lambda row: -row["ms"])


def kernel_table(times: dict[str, list[dict]]) -> str:
    """The kernels of several runs, by their names, side by side."""
    by_run = {name: {row["kernel"]: row for row in rows} for name, rows in times.items()}
    kernels = sorted({kernel for rows in by_run.values() for kernel in rows}, key=lambda kernel: -_most(by_run, kernel))

    def cells(name: str, chosen: list[str]) -> list[str]:
        rows = [by_run[name][kernel] for kernel in chosen if kernel in by_run[name]]
        return [f"{sum(row['launches'] for row in rows):.0f}", f"{sum(row['ms'] for row in rows):.3f}"] if rows else ["", ""]

    groups = [(kernel[:NAME_WIDTH], [kernel]) for kernel in kernels[:SHOWN]]
    groups += [("others", kernels[SHOWN:]), ("together", kernels)]
    header = ["kernel", *(f"{name} {what}" for name in times for what in ("launches", "ms"))]
    return common.format_table(header, [[label, *sum((cells(n, chosen) for n in times), [])] for label, chosen in groups])


def _most(by_run: dict[str, dict[str, dict]], kernel: str) -> float:
    return max(rows[kernel]["ms"] for rows in by_run.values() if kernel in rows)
