"""What ptxas made of a compiled kernel: its machine code, disassembled, and what it said itself."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from typing import Any

from triton.backends.nvidia.compiler import get_ptxas


def _matrix_loops(listing: str) -> list[list[str]]:
    """The innermost loops of a disassembly that multiply matrices."""
    lines = listing.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\.L_x_\d+):", line))}
    jumps = [(labels.get(m[1], i), i) for i, line in enumerate(lines) if (m := re.search(r"BRA.*`\((\.L_x_\d+)\)", line))]
    loops = [(first, last) for first, last in jumps if first < last]
    bodies = [lines[a:b] for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return [body for body in bodies if any("HGMMA" in line or "HMMA" in line for line in body)]


def _spills_in_loops(listing: str) -> int:
    """Loads and stores of spilled registers in these loops."""
    return sum(bool(re.search(r"\b(STL|LDL)\b", line)) for body in _matrix_loops(listing) for line in body)


def _loops_without_maxima(listing: str) -> int:
    """Those that take exponentials relative to what is known before them."""
    loops = ["\n".join(body) for body in _matrix_loops(listing)]
    return sum("MUFU.EX2" in body and "FMNMX" not in body for body in loops)


def _late_exponentials(listing: str) -> int:
    """Exponentials that no product runs beside: those after the last barrier that is asked before all products are waited for.

    The attend kernel for Hopper asks for the next keys between its exponentials and that wait, so that ptxas keeps them apart.
    Asked unconditionally, the barrier moved in front of the exponentials: H200, means of two blocks each, one process, such a
    kernel took 4 to 5 % longer at head dim 128 and 16K, 32K and 256K tokens, but 3 % less at head dim 64 and 32K.
    """
    late = 0
    for body in _matrix_loops(listing):
        waits = [i for i, line in enumerate(body) if re.search(r"DEPBAR\.LE gsb0, 0x0", line)]
        asked = [i for i, line in enumerate(body[: waits[-1]]) if "SYNCS.PHASECHK" in line] if waits else []
        late += sum("MUFU.EX2" in line for line in body[asked[-1] :]) if asked else 0
    return late


def _repacked_pairs(listing: str) -> int:
    """Instructions in these loops that take pairs of 16-bit numbers apart or put them together, or move registers; the most of
    any.

    Weights that came to the list's loop from that of the means were unpacked and packed anew in every step, by 64 instructions
    beside 321: with every block of 16K tokens listed means added 10 % to the attention, without these 1 % (H200, head dim 128).
    """
    loops = ["\n".join(body) for body in _matrix_loops(listing)]
    return max((len(re.findall(r"\b(?:PRMT|MOV|IMAD\.MOV)\b", body)) for body in loops), default=0)


def _barriers_span(ptx: str) -> int:
    """Bytes of shared memory between a program's first barrier and its last. One that the compiler takes for unused has been
    found among the results, whose memory it shared; one that shared the memory of something small would not be seen."""
    offsets = {name: int(offset) for name, offset in re.findall(r"add\.s32\s+(%r\d+), %r\d+, (\d+);", ptx)}
    barriers = [offsets.get(name) for name in re.findall(r"mbarrier\.init\S*\s+\[(%r\d+)\]", ptx)]
    if None in barriers:
        raise RuntimeError("a barrier stands at no fixed address: read the code anew")
    return max(barriers) - min(barriers) if barriers else 0


def unfenced_loads(listing: str) -> int:
    """Releases of buffers to the copy engine, in the order of the code, after loads from shared memory without what orders
    these before what the copy engine writes next: a fence of each thread, then the warpgroup's barrier.

    Loads are two or more, of more than four bytes a thread each, as all of the copy engine's data are read, and between them
    and the release no barrier is asked and nothing stored in global memory, as is after those of results on their way out.
    """
    unfenced = loads = 0
    is_fenced = is_ordered = False
    for line in listing.splitlines():
        if re.search(r"\b(LDSM|LDS\.(64|128))\b", line):
            loads += 1
            is_fenced = is_ordered = False
        elif "FENCE.VIEW.ASYNC" in line:
            is_fenced = True
        elif "BAR.SYNC" in line:
            is_ordered |= is_fenced
        elif "SYNCS.PHASECHK" in line or "STG.E.128" in line:
            loads = 0
        elif "SYNCS.ARRIVE.TRANS64.A1T0" in line:
            unfenced += loads > 1 and not is_ordered
            loads = 0
    return unfenced


def scattered_reductions(ttgir: str) -> int:
    """Reductions along an axis whose elements are in threads that do not stand side by side, as where lane bits 0, 3 and 4 tell
    them apart: triton 3.6 then exchanges by bits 0, 1 and 2. Layouts given as slices of such are not looked at."""
    layouts = dict(re.findall(r"^(#linear\d*) = #ttg\.linear<.*?lane = (\[.*?\]), warp", ttgir, re.MULTILINE))
    found = re.findall(
        r'"tt\.(?:reduce|scan)"\([^)]*\) <\{axis = (\d+)[^}]*\}> \(\{.*?\}\) : \(tensor<[^,]*, (#\w+)>', ttgir, re.DOTALL
    )
    scattered = 0
    for axis, layout in found:
        steps = [step[int(axis)] for step in json.loads(layouts.get(layout, "[]"))]
        lanes = [lane for lane, step in enumerate(steps) if step]
        scattered += lanes != list(range(min(lanes, default=0), max(lanes, default=-1) + 1))
    return scattered


def verdict(kernel: Any, capability: int, said: str) -> dict[str, Any]:
    """Bytes spilled, registers, exponentials with no product beside them, loops that take no maxima, pairs of numbers that
    loops pack anew, bytes over which barriers are spread, releases after loads without a fence, how many releases and fences
    there are, ptxas's warnings about serialised matrix products (C75xx), strides of 32 bits, 16-byte loads and stores,
    reductions over scattered threads, and products that ptxas may not fuse with a sum. ``said`` is ptxas's answer."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        disassemble = [get_ptxas(capability).path.replace("ptxas-blackwell", "ptxas").removesuffix("ptxas") + "nvdisasm", "-c"]
        listing = subprocess.run([*disassemble, file.name], capture_output=True, text=True, check=True).stdout
    return {
        "spilled_in_loops": _spills_in_loops(listing),
        "late_exponentials": _late_exponentials(listing),
        "loops_without_maxima": _loops_without_maxima(listing),
        "repacked_pairs": _repacked_pairs(listing),
        "barriers_span": _barriers_span(kernel.asm["ptx"]),
        "unfenced_loads": unfenced_loads(listing),
        "releases": listing.count("SYNCS.ARRIVE.TRANS64.A1T0"),
        # Those asked for: ptxas adds some where barriers are made, with triton 3.6 a dozen.
        "fences": kernel.asm["ptx"].count("fence.proxy.async"),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill stores", said))),
        "registers": int(re.findall(r"Used (\d+) registers", said)[-1]),
        "warnings": re.findall(r"C75\d\d", said),
        "shared_memory": kernel.metadata.shared,
        "narrow_strides": len(re.findall(r"%stride_\w+: i32", kernel.asm.get("ttir") or kernel.asm["ttgir"])),
        "scattered_reductions": scattered_reductions(kernel.asm["ttgir"]),
        "rounded_products": kernel.asm["ptx"].count("mul.rn.f32"),
        "vector_accesses": len(re.findall(r"(?:ld|st)\.global\.v4\.b32", kernel.asm["ptx"])),
    }
