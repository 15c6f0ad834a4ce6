"""The support matrix as Markdown."""

from __future__ import annotations

import string
from collections.abc import Mapping

import torch
import transformers

from .matrix import Cell, Column
from .situations import SITUATIONS

Matrix = Mapping[tuple[str, str], Column]

HEAD = """# Support matrix
Written by `python -m hf_flashprefill.support --output docs/support.md` with transformers {transformers}, torch {torch}.
{checked} cells ran, patched with `alpha=0` and unpatched: tiny random models in float32 on the CPU, {verdict}.

- **sparse**: every layer that calls attention had a sparse call and no long call stayed dense. **part**: some layers or calls
  stayed dense. **dense**: all did. The letter gives the reason as `prefill_stats` counts it.
- **n/a**: the unpatched model cannot run it, or `patch_model` refuses the model; the number says how. Empty: not tried.
- Steps of one token and calls shorter than `min_seq_len` are dense in every cell and not shown.
- The families' windows: 64 tokens in every layer of mistral, 64 tokens in one layer of two in gemma2, gemma3, gemma4,
  cohere2 and gpt_oss, chunks of 64 in one layer of two in llama4, 262144 tokens in phi3. Prompts have 160 tokens.
"""


class _Notes:
    """Marks for footnotes, in order of first use."""

    def __init__(self, marks: list[str]):
        self.marks, self.texts = marks, []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return self.marks[self.texts.index(text)]

    def lines(self) -> list[str]:
        return [f"- {mark}: {text}" for mark, text in zip(self.marks, self.texts, strict=False)]


def render(matrix: Matrix) -> str:
    """Markdown: sdpa (eager where a family refuses it) in a table, the other implementations where they differ from it."""
    reasons, errors = _Notes(list(string.ascii_lowercase)), _Notes([str(number) for number in range(1, 1000)])

    def text(cell: Cell | None) -> str:
        if cell is None:
            return ""
        if cell.verdict == "n/a":
            return f"n/a {errors.mark(_escaped(cell.not_run))}"
        if cell.verdict == "WRONG":
            return f"**WRONG** {errors.mark(_escaped(cell.wrong))}"
        return " ".join([cell.verdict.split()[0], *(reasons.mark(reason) for reason in cell.reasons)])

    families = list(dict.fromkeys(family for family, _ in matrix))
    shown = {family: _shown_base(matrix, family) for family in families}
    titles = [family if shown[family] in (None, "sdpa") else f"{family} ({shown[family]})" for family in families]
    body = [_row(["", *titles]), _row(["---"] * (len(families) + 1))]
    for name, situation in SITUATIONS.items():
        cells = [matrix.get((family, shown[family]), {}).get(name) for family in families]
        if any(cells):
            body.append(_row([situation.title, *map(text, cells)]))
    others = []
    for base in dict.fromkeys(base for _, base in matrix if base != "sdpa"):
        compared, different = _differences(matrix, shown, base, text)
        others += [f"## {base}", f"The same as the table in {compared - len(different)} of {compared} other cells.", ""]
        others += [*different, ""] if different else []
    cells = [cell for column in matrix.values() for cell in column.values()]
    wrong = sum(cell.verdict == "WRONG" for cell in cells)
    head = HEAD.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        checked=sum(cell.verdict != "n/a" for cell in cells),
        verdict=f"{wrong} cells DIFFER" if wrong else "each gave the same numbers up to the order of summation",
    )
    sections = [
        head,
        *body,
        "",
        "## Reasons",
        *reasons.lines(),
        "",
        *others,
        "## Errors",
        *errors.lines(),
    ]
    return "\n".join(sections) + "\n"


def _shown_base(matrix: Matrix, family: str) -> str | None:
    """sdpa, or the next implementation that runs at all."""
    bases = [base for name, base in matrix if name == family]
    runs = [base for base in bases if any(cell.verdict != "n/a" for cell in matrix[family, base].values())]
    return (runs or bases or [None])[0]


def _differences(matrix: Matrix, shown: dict[str, str | None], base: str, text) -> tuple[int, list[str]]:
    """How many cells of ``base`` are not in the table already, and a line for each that differs from it."""
    compared, lines = 0, []
    for (family, column_base), column in matrix.items():
        if column_base != base or shown[family] == base:
            continue
        for name, cell in column.items():
            compared += 1
            usual = matrix[family, shown[family]].get(name)
            if usual is None or (cell.verdict, cell.reasons) != (usual.verdict, usual.reasons):
                lines.append(f"- {family}, {SITUATIONS[name].title}: {text(cell)}")
    return compared, lines


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str | None) -> str:
    return (text or "").replace("|", "\\|")
