"""What the time of a run goes to, kernel by kernel, as torch's profiler counts it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from eval import tables

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
    """What ``kernel_times`` found for several runs, by their names, side by side: launches and milliseconds."""
    longest: dict[str, float] = {}
    for rows in times.values():
        for row in rows:
            longest[row["kernel"]] = max(row["ms"], longest.get(row["kernel"], 0.0))
    kernels = sorted(longest, key=longest.__getitem__, reverse=True)
    groups = [(kernel[:NAME_WIDTH], {kernel}) for kernel in kernels[:SHOWN]]
    groups += [("others", set(kernels[SHOWN:])), ("together", set(kernels))]
    table = []
    for label, chosen in groups:
        cells = [label]
        for rows in times.values():
            found = [row for row in rows if row["kernel"] in chosen]
            sums = (f"{sum(row['launches'] for row in found):.0f}", f"{sum(row['ms'] for row in found):.3f}")
            cells += sums if found else ("", "")
        table.append(cells)
    return tables.format_table(["kernel", *(f"{name} {what}" for name in times for what in ("launches", "ms"))], table)
