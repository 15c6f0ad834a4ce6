"""The notebooks run from top to bottom, draw what they promise, and are stored without outputs."""

import os
import re
from pathlib import Path

import pytest

from tests.parsers import parser_of

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))
PICTURES = {"01_quickstart.ipynb": 0, "02_see_the_blocks.ipynb": 3, "03_alpha_and_quality.ipynb": 1}


def test_the_notebooks_are_these():
    assert list(PICTURES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_stored_without_outputs_and_links_lead_somewhere(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
        else:
            for link in re.findall(r"\]\(([^)]+)\)", cell.source):
                assert (FOLDER / link).exists(), link
            for command in re.findall(r"python -m (eval\.\w+)", cell.source):
                assert parser_of(command), command


@pytest.mark.parametrize("name", NAMES)
def test_runs(name, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # Progress bars of loading weights would be the largest output.
    monkeypatch.setenv("TQDM_DISABLE", "1")
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, startup_timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES[name]
    assert all(len(output["data"]["image/png"]) < 700_000 for output in outputs if "image/png" in output.get("data", {}))
    text = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    if name.startswith("01"):
        # Unpatched, patched and in the unpatched block.
        assert text.count("'481923'") == 3
        assert "dense because: " in text
    if name.startswith("03"):
        for selector in ("flashprefill", "blend"):
            densities = [float(value) for value in re.findall(rf"{selector} +alpha \S+ +density (\d\.\d+)", text)]
            assert len(densities) >= 2
            assert densities == sorted(densities, reverse=True)
        assert re.search(r"alpha 0 +density 1\.00 +recall +\+0\.0 points .* perplexity [+-]0\.00%", text)
        mass, density = re.search(r"held out: (\S+) of the attention at density (\S+)", text).groups()
        assert float(mass) > 0.95
        assert float(density) < 0.9
        assert int(re.search(r"(\d+) of 96 questions right at density", text)[1]) > 90
