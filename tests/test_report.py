"""The report on real results: the numbers and pictures of every kind are in the page, and the page needs nothing else."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.pyplot import imread

from eval import commands, pictures, recall, report

ROOT = Path(__file__).parent.parent
# A trained model's log lies beside its card and is no harness's result.
MEASURED = sorted(p for p in (ROOT / "benchmarks" / "results").rglob("*.json") if p.name != "training.json")


def paired(rise, error=0.001):
    return {"tokens": 10, "unpatched_nll": 2.0, "patched_nll": 2.0, "rise": rise, "rise_standard_error": error}


RUN = {"model": {"name": "small"}, "environment": {"device": "CPU"}, "config": {"selector": "flashprefill", "alpha": 0.25}}
MADE = {
    "perplexity": {
        "rows": [{"length": 100, "head_density": [[0.2, 0.4], []]}, {"length": 100, "head_density": [[0.4, 0.6], []]}],
        "summary": [
            {
                "length": 100,
                "documents": 2,
                "density": 0.4,
                "prefill": paired(0.0123),
                "continuation": paired(0.0456, None),
                "by_position": [{"start": 0, "end": 50, **paired(0.01)}, {"start": 50, "end": 100, **paired(0.02)}],
            }
        ],
    },
    "ruler": {
        "rows": [{"length": 4096}],
        "summary": [
            {"task": name, "length": n, "unpatched": 0.875, "patched": 0.625, "density": 0.5}
            for name in ("vt", "average")
            for n in (4096, 8192)
        ],
    },
    "lm_eval": {
        "rows": [
            {"task": "t", "metric": "acc", "samples": 4, "unpatched": 0.75, "patched": 0.5, "change": -0.25}
            | {"change_standard_error": 0.125}
        ],
        "summary": [{"tasks": ["t"], "density": 0.5}],
    },
    "selection": {
        "rows": [{"prompt": "0"}],
        "summary": [
            {"length": 4096, "selector": s, "alpha": a, "density": 0.5 - a, "recall": 1 - a, "perplexity_rise": a / 10}
            | {"recall_change": -a, "recall_change_low": -2 * a, "recall_change_high": a, "kept_mass": 1 - a / 2}
            | {"perplexity_rise_standard_error": 0.001, "index_seconds": a / 1e3, "operator_seconds": a / 100}
            for s in ("flashprefill", "peak")
            for a in (0.125, 0.25)
        ],
    },
    "calibrate": {
        "rows": [
            {"layer": 0, "alpha": 0.0625, "density": 0.25, "mass": 0.9925, "lowest_head_mass": 0.9825}
            | {"held_out_density": held_out, "held_out_mass": held_out and 0.9915}
            for held_out in (0.26, None)
        ]
    },
    "layout_speed": {
        "rows": [{"length": 2048, "layout": "chunked", "density": 0.3, "blocks": 360, "median_ms": 2.5, "overhead": 0.0625}],
    },
    "ttft": {
        "rows": [
            {"length": n, "density": 0.1, "speedup": 2.0}
            | {state: {"median_s": n / t} for state, t in (("unpatched", 1000), ("patched", 2000), ("free_attention", 4000))}
            for n in (4096, 8192)
        ]
    },
}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    paths = list(MEASURED)
    for name, content in MADE.items():
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps({"harness": name, **RUN, **content}))
    text = folder / "text.txt"
    text.write_text("import os\nimport sys\n" * 3000)
    paths.append(folder / "recall.json")
    options = ["--lengths", "700", "--prompts", "1", "--facts", "3", "--questions", "6", "--dataset", str(text)]
    assert recall.main([*options, "--device", "cpu", "--output", str(paths[-1])]) == 0
    assert report.main([*map(str, paths), "--output", str(folder / "report.html")]) == 0
    return folder / "report.html"


def test_every_kind_is_there_with_its_numbers(page):
    text = page.read_text()
    for kind in report.KINDS.values():
        assert f">{kind.title}</h2>" in text
    for number in (
        "+1.23% ± 0.10%",
        "+4.56%",
        "87.5",
        "62.5",
        "0.375",
        "0.9375",
        "+2.50% ± 0.10%",
        "-0.2500 ± 0.1250",
        "0.9915",
        "0.062",
    ):
        assert number in text, number
    measured = [json.loads(path.read_text()) for path in MEASURED]
    for record in measured:
        if record["harness"] == "operator_speed":
            for row in record["rows"]:
                assert f"{row['attend']['median_ms']:.3f}" in text
    assert "small · CPU · selector flashprefill, alpha 0.25 · perplexity.json" in text


def test_the_page_needs_nothing_else_and_its_pictures_are_not_blank(page):
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,|#)', text)
    embedded = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", text)]
    files = sorted(page.with_suffix("").iterdir())
    # Tables alone have no picture; whatever recorded densities by head has one of those besides its own.
    records = [json.loads(path.read_text()) for path in [*MEASURED, *page.parent.glob("*.json")]]
    pictured = sum(record["harness"] not in ("lm_eval", "calibrate", "layout_speed", "vllm_ttft") for record in records)
    of_density = sum(
        record["harness"] in ("recall", "perplexity") and any("head_density" in row for row in record["rows"])
        for record in records
    )
    assert len(embedded) == len(files) == pictured + of_density
    assert {file.read_bytes() for file in files} == set(embedded)
    for data in embedded:
        picture = imread(io.BytesIO(data))[..., :3]
        ink = (picture.min(-1) < 0.9).mean()
        # Something is drawn, and not in one flat colour; a map of many dark cells may well cover the picture.
        assert ink > 0.005
        assert picture.std() > 0.05


def test_density_pictures_average_the_prompts():
    record = {"rows": [*MADE["perplexity"]["rows"], {"length": 50, "head_density": [[1.0, 1.0], []]}]}
    (picture,) = report.density_picture(record)
    assert [text.get_text() for text in picture.figure.axes[0].texts] == ["0.30", "0.50"]
    assert report.density_picture({"rows": [{"length": 1}]}) == []


def test_lines_hold_the_values_of_the_rows():
    summary = MADE["selection"]["summary"]
    figure = pictures.draw_selection(summary)
    assert [line.get_label() for line in figure.axes[0].lines] == ["flashprefill", "peak"]
    # In the order of density, so that a line does not run back.
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0.25, 0.75], [0.375, 0.875]]
    assert figure.axes[1].lines[1].get_xydata().tolist() == [[0.25, 0.025], [0.375, 0.0125]]
    assert figure.axes[3].lines[1].get_xydata().tolist() == [[0.25, 2.5], [0.375, 1.25]]
    many = [summary[0] | {"selector": f"selector {number}"} for number in range(24)]
    lines = pictures.draw_selection(many).axes[0].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 24, "each line must be told from every other"
    # What was not measured has no panel; every length has a line of them.
    untimed = [row | {"operator_seconds": None, "length": n} for row in summary for n in (4096, 8192)]
    assert len(pictures.draw_selection(untimed).axes) == 6
    rows = [{"length": n, "head_dim": d, "batch": 1, "speedup_over_sdpa": n / d} for d in (64, 128) for n in (2048, 1024)]
    figure = pictures.draw_operator(rows)
    # A line per shape, from short to long; the last line is the one at 1.
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[16, 32], [8, 16], [1, 1]]
    figure = pictures.draw_ttft(MADE["ttft"]["rows"])
    assert [line.get_label() for line in figure.axes[0].lines] == ["unpatched", "patched", "free attention"]
    assert [line.get_ydata().tolist() for line in figure.axes[1].lines] == [[1, 1], [2, 2], [4, 4]]


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "No such file"),
        ("{", [], "Expecting"),
        ('{"harness": "speed"}', [], "harness must be one of needle"),
        ("[]", [], "harness must be one of"),
        ('{"harness": "recall", "rows": []}', [], "there are no rows"),
        ('{"harness": "recall", "rows": [{}], "summary": [{}]}', [], "not a result of eval.recall"),
        ('{"harness": "ruler", "rows": [{}], "summary": []}', [], "not a result of eval.ruler"),
        ('{"harness": "ttft", "rows": [1]}', [], "not a result of eval.ttft"),
        ("{}", ["--output", "report.pdf"], "--output must end in .html"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(content, arguments, message, tmp_path, monkeypatch, capsys):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["report", str(path), "--output", str(tmp_path / "report.html"), *arguments])
    assert commands.run_command(report.main) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_a_bad_file_after_a_good_one_leaves_nothing(tmp_path):
    """Those of ttft are rendered after those of ruler."""
    for name, content in (("ruler", MADE["ruler"]), ("ttft", {"rows": [{}]})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"harness": name, **RUN, **content}))
    results = [str(tmp_path / "ruler.json"), str(tmp_path / "ttft.json")]
    with pytest.raises(commands.UsageError, match=r"ttft.json: not a result of eval\.ttft"):
        report.main([*results, "--output", str(tmp_path / "report.html")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ruler.json", "ttft.json"]


def test_every_section_has_an_anchor_of_its_own(tmp_path):
    paths = [tmp_path / name for name in ("a/x.json", "b/x.json", "x-2.json", "c/x.json")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"harness": "ttft", **RUN, **MADE["ttft"]}))
    text, files = report.page(paths)
    anchors = re.findall('<h2 id="([^"]+)"', text)
    assert anchors[:2] == ["ttft-x", "ttft-x-2"]
    assert len(set(anchors)) == len(files) == 4
    assert re.findall('href="#([^"]+)"', text) == anchors


def test_a_browser_shows_it(page, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium to render the page with")
    shot = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,2000"]
    command = [browser, *options, f"--user-data-dir={tmp_path}/profile", f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    picture = imread(shot)[..., :3]
    assert picture.shape[:2] == (2000, 1100)
    # The needle heat map comes first; no part of the page is much inked, and the margins hold nothing.
    assert 0.01 < (picture.min(-1) < 0.9).mean() < 0.3
    assert (picture[:, -20:] > 0.99).all()


def test_a_prefill_in_chunks_says_so():
    rows = MADE["ttft"]["rows"]
    assert "in chunks of" not in report.ttft_table({"rows": [row | {"chunk": None} for row in rows]})
    header, *lines = report.ttft_table({"rows": [row | {"chunk": 8192} for row in rows]}).splitlines()
    assert "in chunks of" in header
    assert all(line.split()[1] == "8192" for line in lines)
