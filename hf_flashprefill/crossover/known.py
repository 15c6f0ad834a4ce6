"""What is known of the crossover: measurements of this machine in a JSON file of the user's cache folder, and a table.

A measurement holds for one kind of device, layer shape and rule and for the versions it was made with; any other
combination has none. The file is read once per process, at the first question.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import warnings
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import AUTO, FlashPrefillConfig

# Tokens. With "auto" a chunk of fewer queries stays dense however many keys it sees: its last two query blocks list them all.
# One H200, 32 query and 8 key-value heads, head_dim 128, bfloat16, defaults: chunks of 1024 to 8192 queries that count as 12288
# tokens or more took at most .4 of the dense time (benchmarks/results/chunks-2026-11-29-h200.txt). On two CPU cores, 8
# and 2 heads, head_dim 64, float32: 512 queries of 65536 keys, which count as 8176 tokens, 1.11 times the dense time; chunks of
# 1024 to 4096 queries that count as 8192 tokens or more .26 to .74 (chunks-2026-11-29-cpu.txt).
LEAST_CHUNK = 1024
# Lengths in a row at which sparse must win.
WINS = 3
# More tokens than any prompt has.
NEVER = 1 << 40
# What a measurement leaves out, it holds for; these settings decide what the operator costs.
RULE_FIELDS = ("selector", "pool_size", "query_stride", "block_size", "correction", "mean_blocks", "backend")

# Tokens. One H200, 32 query and 8 key-value heads, head_dim 128, bfloat16, default settings, a GPU that waits for each launch:
# .92 times as fast as dense attention at 8192 tokens, 1.51 times at 12288 (benchmarks/results/crossover-2026-11-26-h200.txt).
MEASURED_DEFAULTS = {9: 12288}
MEASURED_WIDTH = 32 * 128
# Not measured: GPUs of other generations, and layers that fill a GPU less or compute in float32. A guess to the safe side.
UNMEASURED_GPU = 16384
# Not measured either.
UNMEASURED_CPU = 8192


class LayerShape(NamedTuple):
    """One attention layer: query heads, key-value heads, channels per head, and dtype of its query."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"heads {self.heads}, kv_heads {self.kv_heads}, head_dim {self.head_dim}, {dtype}"


@dataclass(frozen=True)
class Crossover:
    """One measurement.

    Attributes:
        tokens: The shortest prompt that sparse prefill makes faster, in tokens; None if it made none faster.
        longest: The longest prompt timed, in tokens.
        exhausted: Whether ``longest`` is as long as any measurement goes, so that no ``tokens`` means never.
        timings: [tokens, dense milliseconds, sparse milliseconds] of each length timed.
    """

    tokens: int | None
    longest: int
    exhausted: bool
    timings: list[list[float]] = field(default_factory=list)

    @property
    def is_lasting(self) -> bool:
        """Whether so many lengths were faster in a row that longer prompts change nothing; one could be a matter of noise."""
        return self.tokens is not None and sum(timing[0] >= self.tokens for timing in self.timings) >= WINS

    def min_seq_len(self, unmeasured: int) -> int:
        """Tokens from which on to run sparse; ``unmeasured`` is the table's answer where this has none."""
        if self.tokens is not None:
            return self.tokens
        return NEVER if self.exhausted else max(unmeasured, self.longest + 1)


def min_seq_len_for(config: FlashPrefillConfig, shape: LayerShape, device: torch.device) -> int:
    """Tokens of a call of such a layer from which on it runs sparse: what the config says, else what was measured on this
    machine, else the table. Never waits for the device."""
    if config.min_seq_len != AUTO:
        return config.min_seq_len
    return _resolved_constant(rule_of(config), *shape, device)


def is_long_enough(config: FlashPrefillConfig, min_seq_len: int, query_len: int, key_len: int) -> bool:
    """Whether a call runs sparse as far as its length decides.

    A number in the config is compared with the queries. With ``"auto"`` a chunk counts as the whole prompt whose queries see as
    many keys, query_len * (key_len - query_len / 2): dense attention takes as long for both, and the chunk, whose queries see
    more keys each, is likely to be sparser. In a compiled graph, which should not depend on how the two lengths are related, it
    counts as a prompt of its queries.

    Args:
        config: The settings.
        min_seq_len: Tokens, what ``min_seq_len_for`` says.
        query_len: Tokens.
        key_len: Tokens up to the last query, those of a cache included.
    """
    if query_len >= min_seq_len:
        return True
    if config.min_seq_len != AUTO or query_len < LEAST_CHUNK or torch.compiler.is_compiling():
        return False
    return query_len * (2 * key_len - query_len) >= min_seq_len**2


def min_seq_len_of_model(config: FlashPrefillConfig, model_config: Any, dtype: torch.dtype, device: torch.device) -> int:
    """No more than ``min_seq_len_for`` of any layer of a model, for when its tensors are not there yet.

    Args:
        config: The settings of the sparse prefill.
        model_config: The model's own; 0 tokens is the answer if it does not tell the shape of its layers.
        dtype: Of the hidden states.
        device: Of the hidden states.
    """
    if config.min_seq_len != AUTO:
        return config.min_seq_len
    try:
        heads = getattr(model_config, "num_attention_heads", None)
        kv_heads = getattr(model_config, "num_key_value_heads", None) or heads
        head_dim = getattr(model_config, "head_dim", None)
    except RuntimeError:
        # It differs between layers, as Gemma 4's head_dim.
        return 0
    if head_dim is None and isinstance(heads, int):
        head_dim = getattr(model_config, "hidden_size", 0) // heads
    if not all(isinstance(number, int) for number in (heads, kv_heads, head_dim)):
        return 0
    return _least_of_shards_constant(rule_of(config), heads, kv_heads, head_dim, dtype, device)


def rule_of(config: FlashPrefillConfig) -> tuple:
    """The settings that a measurement depends on."""
    config = config.resolved()
    return tuple(getattr(config, name) for name in RULE_FIELDS)


# A graph takes the number in; it could not follow how it is found.
@torch.compiler.assume_constant_result
def _resolved_constant(rule, heads, kv_heads, head_dim, dtype, device) -> int:
    return _resolved(rule, LayerShape(heads, kv_heads, head_dim, dtype), device)


@torch.compiler.assume_constant_result
def _least_of_shards_constant(rule, heads, kv_heads, head_dim, dtype, device) -> int:
    return _least_of_shards(rule, LayerShape(heads, kv_heads, head_dim, dtype), device)


@functools.cache
def _resolved(rule: tuple, shape: LayerShape, device: torch.device) -> int:
    found, unmeasured = known_crossover(rule, shape, device), default_min_seq_len(shape, device)
    return unmeasured if found is None else found.min_seq_len(unmeasured)


@functools.cache
def _least_of_shards(rule: tuple, shape: LayerShape, device: torch.device) -> int:
    """Of the layer, and of its parts in tensor parallelism as far as they were measured."""
    counts = [n for n in range(2, shape.kv_heads + 1) if shape.kv_heads % n == 0 and shape.heads % n == 0]
    parts = [shape._replace(heads=shape.heads // n, kv_heads=shape.kv_heads // n) for n in counts]
    known = [part for part in parts if known_crossover(rule, part, device) is not None]
    return min(_resolved(rule, part, device) for part in [shape, *known])


def default_min_seq_len(shape: LayerShape, device: torch.device) -> int:
    """The table: tokens for devices nobody measured."""
    if device.type == "cpu":
        return UNMEASURED_CPU
    fills = shape.heads * shape.head_dim >= MEASURED_WIDTH and shape.dtype != torch.float32
    if device.type != "cuda" or torch.version.hip is not None or not fills:
        return UNMEASURED_GPU
    return MEASURED_DEFAULTS.get(torch.cuda.get_device_capability(device)[0], UNMEASURED_GPU)


def cache_file() -> Path:
    """Where measurements are kept: ``$HF_FLASHPREFILL_CACHE/crossover.json``, by default
    ``$XDG_CACHE_HOME/hf_flashprefill/crossover.json`` or that in ``~/.cache``."""
    folder = os.environ.get("HF_FLASHPREFILL_CACHE")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "hf_flashprefill")
    return Path(folder) / "crossover.json"


def known_crossover(rule: tuple, shape: LayerShape, device: torch.device) -> Crossover | None:
    """What was measured on this machine, or None."""
    return _measurements().get(measurement_key(rule, shape, device))


def remember(rule: tuple, shape: LayerShape, device: torch.device, measured: Crossover) -> None:
    """Keep a measurement, in this process and in the cache file.

    Processes that measure at the same time may lose each other's additions to the file, never the file. If it cannot be
    written, that is said once.
    """
    with _LOCK:
        known = _measurements()
        known[measurement_key(rule, shape, device)] = measured
        _forget_answers()
        try:
            # With what other processes have added since it was read, other versions of this package among them.
            _write(cache_file(), _load(cache_file()) | {key: asdict(entry) for key, entry in known.items()})
        except OSError as error:
            _warn_once(f"measurements of min_seq_len cannot be kept in {cache_file()} ({error}); this process uses them")


def reload() -> None:
    """Read the cache file anew at the next question."""
    _measurements.cache_clear()
    _forget_answers()


def measurement_key(rule: tuple, shape: LayerShape, device: torch.device) -> str:
    """What a measurement holds for, readable and without anything that changes from run to run."""
    settings = ", ".join(f"{name} {value}" for name, value in zip(RULE_FIELDS, rule, strict=True))
    return f"{_machine(device, torch.get_num_threads())}; {shape}; {settings}"


@functools.cache
def _machine(device: torch.device, threads: int) -> str:
    from .. import __version__

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} {torch.backends.cpu.get_cpu_capability()} {threads} threads"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return f"{name}; torch {torch.__version__}, triton {triton}, hf_flashprefill {__version__}"


_LOCK = threading.Lock()


@functools.cache
def _measurements() -> dict[str, Crossover]:
    try:
        return _entries(_load(cache_file()))
    except OSError as error:
        _warn_once(f"measurements of min_seq_len cannot be read from {cache_file()} ({error})")
        return {}


def _forget_answers() -> None:
    _resolved.cache_clear()
    _least_of_shards.cache_clear()


def _load(path: Path) -> dict[str, Any]:
    """What the file holds, by key; nothing if it is not there, and nothing and one warning if it holds something else.

    Raises:
        OSError: It cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"a {type(content).__name__}")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, TypeError, RecursionError) as error:
        _warn_once(f"{path} is not a file of measurements of min_seq_len ({error}); it is ignored")
        return {}
    return content


def _entries(content: dict[str, Any]) -> dict[str, Crossover]:
    """The measurements among what a file holds; one warning if there is anything else."""
    entries = {}
    for key, entry in content.items():
        try:
            entries[key] = _checked(Crossover(**entry))
        except (ValueError, TypeError) as error:
            _warn_once(f"{cache_file()} is not a file of measurements of min_seq_len alone ({error}); the rest is ignored")
    return entries


def _checked(entry: Crossover) -> Crossover:
    numbers = [entry.longest] if entry.tokens is None else [entry.longest, entry.tokens]
    if any(isinstance(number, bool) or not isinstance(number, int) or number < 1 for number in numbers):
        raise ValueError(f"tokens and longest must be whole numbers >= 1, got {entry.tokens!r} and {entry.longest!r}")
    if not isinstance(entry.exhausted, bool) or not isinstance(entry.timings, list):
        raise TypeError(f"exhausted must be true or false and timings a list, got {entry.exhausted!r} and {entry.timings!r}")
    return entry


def _write(path: Path, content: dict[str, Any]) -> None:
    """Replace the file at once, so that nobody ever reads half of it. Others may read it as far as the umask lets them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in sorted(content.items()))
    part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        part.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=2)
