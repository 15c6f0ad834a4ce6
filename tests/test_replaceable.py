"""Which results a run may replace."""

import json
from dataclasses import replace

import pytest

from eval import commands, recording
from eval.schema import Result


@pytest.fixture
def finished(tmp_path):
    """A finished run with a row that says which it was, the settings it had, and what runs with any settings."""
    output = tmp_path / "x.json"
    place, model = {"time": "2026-01-02T03:04:05+00:00"}, {"name": "x", "dtype": "float32"}
    first = Result("needle", place, model, {"alpha": 0.5, "dense_layers": []}, {"lengths": (1, 2)}, [], [])

    def run(settings, row):
        recording.complete(settings, output, ["a"], lambda i: [{"row": row}], lambda rows: [])
        return Result.read(output).rows[0]["row"]

    assert run(first, 1) == 1
    return first, run, output


def test_a_finished_run_is_replaced_by_one_with_the_same_settings(finished):
    first, run, _ = finished
    assert run(replace(first, environment={"time": "later", "device": "another"}), 2) == 2


@pytest.mark.parametrize(
    "change",
    [{"harness": "recall"}, {"arguments": {"lengths": [1, 3]}}, {"model": {"name": "x"}}, {"config": {"alpha": 0.5}}],
    ids=lambda change: next(iter(change)),
)
def test_a_finished_run_is_not_replaced_by_another(change, finished):
    first, run, output = finished
    before = output.read_bytes()
    with pytest.raises(commands.UsageError) as refused:
        run(replace(first, **change), 2)
    time = json.loads(before)["environment"]["time"]
    assert str(refused.value) == f"--output {output} holds another run (needle of {time}); choose another name or remove it"
    assert not isinstance(refused.value, commands.WorkError)
    assert [output.read_bytes()] == [file.read_bytes() for file in output.parent.iterdir()]


def test_a_quick_look_is_replaced_by_what_asks_more_and_not_the_other_way(finished):
    first, run, output = finished
    output.unlink()
    asked = [replace(first, arguments=first.arguments | {"limit": limit}) for limit in (1, 3, None)]
    for row, more in enumerate(asked):
        assert run(more, row) == row
    for less in asked[:2]:
        with pytest.raises(commands.UsageError, match="holds another run"):
            run(less, 9)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"schema_version": 99}'])
def test_what_is_no_result_is_not_replaced(content, finished):
    first, run, output = finished
    output.write_bytes(content)
    with pytest.raises(commands.UsageError, match=r"x\.json is not a result; choose another name or remove it"):
        run(first, 2)
    assert output.read_bytes() == content
