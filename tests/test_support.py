"""The support matrix: every cell gives the unpatched model's numbers, and docs/support.md says what the cells do."""

import os
import pickle
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers.utils import logging

from hf_flashprefill import UnsupportedModelError
from hf_flashprefill.support.__main__ import main
from hf_flashprefill.support.families import FAMILIES, tiny_model
from hf_flashprefill.support.matrix import Cell, Column, check, check_column, columns
from hf_flashprefill.support.situations import SITUATIONS
from hf_flashprefill.support.table import render

TABLE = Path(__file__).parent.parent / "docs" / "support.md"


@pytest.fixture(autouse=True)
def _one_thread():
    """The models are so small that a second thread costs more than it does; and the log is not what is tested."""
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="session")
def column(tmp_path_factory):
    """(family, base) -> its cells, worked out once by all processes of pytest-xdist together: all of them take minutes."""
    # Theirs lie side by side in one folder.
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "support"
    folder.mkdir(exist_ok=True)

    def cells(family: str, base: str) -> Column:
        path = folder / f"{family}-{base}.pickle"
        if not path.exists():
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.write_bytes(pickle.dumps(check_column(family, base)))
            unfinished.replace(path)
        return pickle.loads(path.read_bytes())

    return cells


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "base"), list(columns()))
def test_patched_equals_unpatched(family, base, column):
    cells = column(family, base)
    assert {name: cell.wrong for name, cell in cells.items() if cell.wrong is not None} == {}
    for name, cell in cells.items():
        # A dense cell without a reason is a silent one.
        assert cell.verdict != "dense" or cell.reasons, name


@pytest.mark.filterwarnings("ignore")
def test_the_written_table_is_true(column):
    written = TABLE.read_text(encoding="utf-8")
    version = re.search(r"transformers ([\d.]+)", written).group(1)
    if version != transformers.__version__:
        pytest.skip(f"docs/support.md was written with transformers {version}")
    assert _claims(render({pair: column(*pair) for pair in columns()})) == _claims(written)


def _claims(text: str) -> list[str]:
    """The table's rows without what depends on optional packages and on the torch version."""
    rows = [line for line in text.splitlines() if line.startswith("|") and "quantised" not in line]
    return [re.sub(r"n/a \d+", "n/a", row) for row in rows]


def test_every_plain_family_is_sparse_somewhere(column):
    """The matrix must not agree because nothing of ours ran."""
    never = {"gemma2", "deepseek_v3"}
    for family in FAMILIES:
        verdicts = {cell.verdict for pair in columns([family]) for cell in column(*pair).values()}
        assert bool(verdicts & {"sparse", "part sparse"}) == (family not in never), family


@torch.no_grad()
def test_a_wrong_answer_is_found(monkeypatch):
    import hf_flashprefill.attention as seam

    operator = seam.flash_prefill_attention
    monkeypatch.setattr(seam, "flash_prefill_attention", lambda *args, **kwargs: 1.001 * operator(*args, **kwargs))
    model = tiny_model()
    assert "off by" in check(model, SITUATIONS["plain"]).wrong
    assert "off by" in check(model, SITUATIONS["generate"]).wrong
    assert check(model, SITUATIONS["user_mask"]).wrong is None


def test_an_uncounted_call_is_found(monkeypatch):
    import hf_flashprefill.attention as seam

    monkeypatch.setattr(seam, "record_dense", lambda *_: None)
    assert "counted {}" in check(tiny_model(), SITUATIONS["user_mask"]).wrong


def test_command_prints_a_table_and_says_when_something_differs(capsys, monkeypatch):
    import hf_flashprefill.support.__main__ as command

    arguments = ["--families", "llama", "--bases", "sdpa", "--situations", "plain", "user_mask"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| forward | sparse |" in printed
    assert "| 4-D mask | dense a |" in printed
    assert "- a: mask is not plain causal" in printed
    monkeypatch.setattr(command, "check_column", lambda *_: {"plain": Cell(wrong="off")})
    assert main(arguments) == 1
    assert "| forward | **WRONG** 1 |" in capsys.readouterr().out


def test_command_writes_to_folders_that_are_not_there_yet(monkeypatch, tmp_path):
    import hf_flashprefill.support.__main__ as command

    monkeypatch.setattr(command, "check_column", lambda *_: {"plain": Cell(wrong="off")})
    output = tmp_path / "new" / "folder" / "table.md"
    assert main(["--families", "llama", "--bases", "sdpa", "--situations", "plain", "--output", str(output)]) == 1
    assert "**WRONG**" in output.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "."], "--output .: it is a folder"),
        (["--output", "file/table.md"], "--output file/table.md: {folder}/file is no folder"),
        (["--output", "file/new/table.md"], "--output file/new/table.md: {folder}/file is no folder"),
        (["--output", "/proc/table.md"], "--output /proc/table.md: "),
        (["--families", "nope"], "argument --families: "),
    ],
)
def test_mistakes_end_in_one_line_before_any_work(arguments, message, capsys, monkeypatch, tmp_path):
    import hf_flashprefill.support.__main__ as command

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(command, "check_column", lambda *_: pytest.fail("work began"))
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message.format(folder=tmp_path)}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_refused_families_are_named():
    from hf_flashprefill import patch_model

    with pytest.raises(UnsupportedModelError, match="FalconForCausalLM"):
        patch_model(tiny_model("falcon", num_kv_heads=2))
