"""The README's Python blocks are run in order, in one namespace, and its links point at something."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python -m (eval\.\w+)", README))))
def test_commands_exist(command):
    assert (ROOT / (command.replace(".", "/") + ".py")).exists()


def test_public_names_have_docstrings():
    import hf_flashprefill

    for name in hf_flashprefill.__all__:
        assert getattr(hf_flashprefill, name).__doc__, name
