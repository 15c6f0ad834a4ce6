"""The README's Python blocks are run in order, in one namespace, and its links point at something."""

import re
import shlex
from pathlib import Path

import pytest

from hf_flashprefill.compiled_counts import DENSE_REASONS
from tests.parsers import parser_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
        # The answer that the block itself names, from a sparse prefill.
        if "# 481923" in block:
            assert capsys.readouterr().out.splitlines()[0] == "481923"
            assert namespace["prefill_stats"](namespace["model"]).sparse_calls > 0


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "results" / "README.md"]


def headings(page: Path) -> set[str]:
    """A page's headings as links name them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    # The support table is written by a command and has none.
    assert links or page.name == "support.md"
    for link in links:
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


# Of a command that stands in a sentence or in a block of shell.
COMMAND = re.compile(r"python -m ((?:eval|hf_flashprefill)\.[a-z_]+)(.*)")
BLOCK = re.compile(r"^```.*?^```|^    .*?$", flags=re.DOTALL | re.MULTILINE)


def documented_commands(page: Path) -> list[tuple[str, str]]:
    """Module and arguments of every command on a page."""
    text = page.read_text(encoding="utf-8")
    blocks, prose = re.findall(BLOCK, text), re.sub(BLOCK, "", text)
    # Code in a sentence may go on in the next line.
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    return [match.groups() for line in lines for match in COMMAND.finditer(line)]


COMMANDS = sorted({command for page in PAGES for command in documented_commands(page)})


def test_commands_are_found():
    """All that are there: in blocks, in tables, and in sentences over two lines."""
    mentioned = re.compile(r"python\s+-m\s+(?:eval|hf_flashprefill)\.[a-z]")
    for page in PAGES:
        assert len(documented_commands(page)) == len(mentioned.findall(page.read_text(encoding="utf-8"))), page.name
    assert len(COMMANDS) > 20


@pytest.mark.parametrize(("module", "arguments"), COMMANDS, ids=lambda text: text.strip())
def test_commands_parse(module, arguments):
    parser = parser_of(module)
    assert parser is not None
    words = shlex.split(arguments, comments=True)
    # A command without any is only named: some have options that must be there.
    if words and "..." not in arguments:
        # Words in capitals stand for something of the reader's; 1 is a name as well as a number.
        parser.parse_args(["1" if re.fullmatch("[A-Z]+", word) else word for word in words])


def test_every_dense_reason_is_explained():
    page = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    explained = {
        reason for row in re.findall(r"^\| (\".*?) \|", page, flags=re.MULTILINE) for reason in re.findall(r'"(.*?)"', row)
    }
    assert explained == {"decode", *DENSE_REASONS}


def test_public_names_have_docstrings():
    import hf_flashprefill

    for name in hf_flashprefill.__all__:
        assert getattr(hf_flashprefill, name).__doc__, name
