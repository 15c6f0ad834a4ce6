"""The JSON file that a harness writes: one run, what it ran on, and every measured row.

| field | holds |
|---|---|
| `schema_version` | 1; a change that old readers would misread raises it |
| `harness` | `needle`, `recall`, `selection`, `calibrate`, `perplexity`, `ruler`, `lm_eval`, `vllm_ttft` or another command |
| `environment` | time (UTC), device, threads (CPU only), processes, commit, and versions of Python and the libraries |
| `model` | name, parameters, dtype, and the attention implementation that dense calls go to |
| `config` | the FlashPrefillConfig of the patched state, every field; null is what suits each curve's selector |
| `arguments` | the command's options, without those that only say where things are |
| `summary` | what the printed table says, one record a line |
| `rows` | one record per prompt or question, in an order that follows from the arguments; fields in each harness's row class |

Shares are from 0 to 1, lengths and positions in tokens, losses in nats per token, and times in the unit that is the last word
of their field: `seconds`, `s` or `ms`. A `density` is that of what ran sparse, null if nothing did; the `dense` beside it in a
summary is how many of its prompts or questions did not. Two runs with the same arguments differ only in `environment`, in
times, and in what the harnesses of speed work out from theirs (ratios, rates, how often something was timed), up to what the
device's arithmetic allows; a run that was interrupted and resumed differs from one that was not in nothing else. A command
replaces a file only if harness, arguments, model and config are the same, or its ``limit`` is higher or none.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

SCHEMA_VERSION = 1
# The last word of a field that holds a time.
TIME_UNITS = ("seconds", "s", "ms")


class ModelRecord(TypedDict):
    """The model of a run."""

    name: str
    parameters: int
    dtype: str
    base_implementation: str


@dataclass(frozen=True)
class Result:
    """One run of a harness; the fields are those of the JSON file."""

    harness: str
    environment: dict[str, Any]
    model: ModelRecord
    config: dict[str, Any]
    arguments: dict[str, Any]
    summary: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    schema_version: int = SCHEMA_VERSION

    def write(self, path: Path) -> None:
        """Write the JSON file, whole or not at all."""
        record = asdict(self)
        ordered = {"schema_version": record.pop("schema_version"), **record}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".writing")
        # NaN is not JSON: a harness that has no value writes null.
        unfinished.write_text(json.dumps(ordered, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        unfinished.replace(path)

    @classmethod
    def read(cls, path: Path) -> Result:
        """The run in a JSON file.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is not such a file, or of a later schema than this code knows.
        """
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record.get("schema_version") if isinstance(record, dict) else None
        if not isinstance(version, int):
            raise ValueError(f"{path} is not a result with a schema_version")
        if version > SCHEMA_VERSION:
            raise ValueError(f"{path} has schema_version {version}, this code knows versions up to {SCHEMA_VERSION}")
        expected, found = set(cls.__dataclass_fields__), set(record)
        if expected != found:
            raise ValueError(f"{path} has fields {sorted(found)}, schema version {version} has {sorted(expected)}")
        return cls(**record)


def timeless(value: Any) -> Any:
    """A result's content without the environment and without all times, which differ between two runs of the same command;
    what a harness of speed works out from times stays."""
    if isinstance(value, dict):
        kept = (name for name in value if name != "environment" and name.rpartition("_")[2] not in TIME_UNITS)
        return {name: timeless(value[name]) for name in kept}
    if isinstance(value, list):
        return [timeless(entry) for entry in value]
    return value
