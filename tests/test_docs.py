"""The README's Python blocks are run in order, in one namespace, and its links point at something."""

import re
from pathlib import Path

import pytest

from hf_flashprefill.compiled_counts import DENSE_REASONS

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
    for link in links:
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


COMMANDS = {command for page in PAGES for command in re.findall(r"python -m (eval\.\w+)", page.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_commands_exist(command):
    path = ROOT / command.replace(".", "/")
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


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
