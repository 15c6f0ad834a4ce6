"""Run a harness's tasks, prompts or timings: split over processes, with a progress bar, and kept on disk as they finish.

Rows of finished tasks go to `NAME.KEY.RANK.partial.jsonl` beside the output `NAME.json`, where KEY is a hash of everything that
decides their results. The same command takes them up again after an interruption, whatever the number of processes unless
the results are times; when the output is written they are removed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm


def process_rank() -> int:
    """Number of this process among those that `accelerate launch` started."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """How many processes `accelerate launch` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def settings_key(settings: dict[str, Any]) -> str:
    """A hash of plain values, for names of files that belong to them alone."""
    content = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


class PartialRun:
    """Tasks of one run and the rows of those that are finished.

    Args:
        output: JSON file that the run will write.
        settings: Plain values that decide the rows. Other settings neither see nor disturb this run's files.
    """

    def __init__(self, output: Path, settings: dict[str, Any]):
        self._output, self._key = output, settings_key(settings)

    def path(self, rank: int) -> Path:
        return self._output.with_name(f"{self._output.stem}.{self._key}.{rank}.partial.jsonl")

    def _paths(self) -> list[Path]:
        return sorted(self._output.parent.glob(f"{glob.escape(self._output.stem)}.{self._key}.*.partial.jsonl"))

    def finished(self) -> dict[str, list[dict]]:
        """Rows by task name, of all processes of this and of interrupted runs."""
        rows = {}
        for path in self._paths():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    # The process was killed while it wrote its last line.
                    continue
                rows[entry["task"]] = entry["rows"]
        return rows

    def run(
        self, names: Sequence[str], work: Callable[[int], list[dict]], description: str, unit: str = "prompt"
    ) -> list[dict] | None:
        """Do what is not finished yet.

        Args:
            names: One per task, all different.
            work: Makes the rows of task ``i``, plain values only.
            description: Of the progress bar.
            unit: What a task is called there.

        Returns:
            The rows of all tasks in their order; None in processes other than the first.
        """
        rank, count = process_rank(), process_count()
        finished = self.finished()
        # Whose task it is must not depend on what is finished: another process may be reading at another moment.
        mine = range(rank, len(names), count)
        todo = [i for i in mine if names[i] not in finished]
        done = {names[i]: finished[names[i]] for i in mine if names[i] in finished}
        bar = tqdm(todo, initial=len(mine) - len(todo), total=len(mine), desc=description, unit=unit, disable=rank > 0)
        try:
            for i in bar:
                # Through JSON, so that a resumed run's rows are the same objects as an uninterrupted one's.
                line = json.dumps({"task": names[i], "rows": work(i)}, allow_nan=False)
                self._append(rank, line)
                done[names[i]] = json.loads(line)["rows"]
        except KeyboardInterrupt:
            bar.write(f"{len(done)} of {len(mine)} {unit}s are kept; the same command goes on from there")
            raise
        if count > 1:
            done = _gathered(done)
        return [row for name in names for row in done[name]] if rank == 0 else None

    def _append(self, rank: int, line: str) -> None:
        """Add a line to this process's file, which is made when the first task is finished."""
        path = self.path(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # The process was killed while it wrote its last line.
                line = line if file.read() == b"\n" else "\n" + line
            file.write(line.encode() + b"\n")

    def remove(self) -> None:
        """Delete the files of finished tasks."""
        for path in self._paths():
            path.unlink()


def _gathered(done: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The rows of all processes."""
    from accelerate.utils import gather_object

    return {name: rows for part in gather_object([done]) for name, rows in part.items()}
