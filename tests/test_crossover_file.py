"""How measurements of the crossover are kept: in a file of the user's, which other processes and versions write, too."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch

import hf_flashprefill
from hf_flashprefill import FlashPrefillConfig
from hf_flashprefill.crossover import Crossover, known
from tests.crossovers import CPU, LLAMA, RULE, SHAPE, answer, measured

pytestmark = pytest.mark.usefixtures("cache")


def test_measurements_outlive_the_process(cache):
    known.remember(RULE, SHAPE, CPU, Crossover(3072, 6144, True, [[1024, 1.5, 2.5]]))
    known.remember(RULE, LLAMA, CPU, measured(None))
    (first, second), content = known._measurements().values(), json.loads(cache.read_text())
    assert len(content) == 2
    known.reload()
    assert known.known_crossover(RULE, SHAPE, CPU) == first
    assert known.known_crossover(RULE, LLAMA, CPU) == second
    assert list(cache.parent.iterdir()) == [cache]


def test_what_another_process_added_is_kept(cache):
    known.remember(RULE, SHAPE, CPU, measured(3072))
    others = json.loads(cache.read_text()) | {"another machine": {"tokens": 1, "longest": 2, "exhausted": True, "timings": []}}
    cache.write_text(json.dumps(others))
    known.remember(RULE, LLAMA, CPU, measured(4096))
    assert len(json.loads(cache.read_text())) == 3


def test_a_file_that_cannot_be_read_is_left_alone(cache, monkeypatch):
    """Not by root, who may read everything: the error is made."""
    known.remember(RULE, SHAPE, CPU, measured(3072))
    before, read = cache.read_bytes(), Path.read_text
    known.reload()

    def refused(path, **options):
        if path == cache:
            raise PermissionError(13, "Permission denied")
        return read(path, **options)

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.warns(UserWarning, match="cannot be read from .*crossover.json"):
        assert answer() == 8192
    with pytest.warns(UserWarning, match="cannot be kept in .*crossover.json"):
        known.remember(RULE, LLAMA, CPU, measured(4096))
    assert cache.read_bytes() == before
    assert list(cache.parent.iterdir()) == [cache]


def test_entries_of_other_versions_are_kept(cache):
    known.remember(RULE, SHAPE, CPU, measured(3072))
    content = json.loads(cache.read_text())
    content["later"] = {"tokens": 3, "longest": 9, "exhausted": True, "timings": [], "batch": 4}
    cache.write_text(json.dumps(content))
    known.reload()
    with pytest.warns(UserWarning, match="the rest is ignored"):
        assert answer() == 3072
    known.remember(RULE, LLAMA, CPU, measured(4096))
    assert json.loads(cache.read_text())["later"] == content["later"]


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"3", b"\xff\xfe", b'{"a": 3}', b'{"a": {"tokens": 3}}', b"[" * 100_000]
    + [b'{"a": {"tokens": %s, "longest": 9, "exhausted": true}}' % tokens for tokens in (b'"4"', b"0", b"true", b"1.5")]
    + [b'{"a": {"tokens": null, "longest": 9, "exhausted": "false"}}'],
    ids=range(12),
)
def test_a_corrupt_file_is_ignored_with_one_warning_and_replaced(content, cache):
    cache.parent.mkdir()
    cache.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{cache.name} is not a file of measurements"):
        assert answer() == 8192
    known.reload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer() == 8192
        known.remember(RULE, SHAPE, CPU, measured(3000))
    known.reload()
    assert answer() == 3000


def test_where_nothing_can_be_written_the_process_still_knows(cache):
    cache.parent.write_text("a file where the folder should be")
    assert answer() == 8192
    with pytest.warns(UserWarning, match="cannot be kept in .*crossover.json"):
        known.remember(RULE, SHAPE, CPU, measured(3000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known.remember(RULE, SHAPE, CPU, measured(3001))
    assert answer() == 3001


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("victim", ["replace", "write"])
def test_the_file_is_replaced_at_once_or_not_at_all(error, victim, cache, monkeypatch):
    known.remember(RULE, SHAPE, CPU, measured(3000))
    before = cache.read_bytes()

    def fails(*args):
        raise error

    if victim == "replace":
        monkeypatch.setattr(os, "replace", fails)
    else:
        monkeypatch.setattr(known, "asdict", fails)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                known.remember(RULE, LLAMA, CPU, measured(4000))
        else:
            known.remember(RULE, LLAMA, CPU, measured(4000))
    assert cache.read_bytes() == before
    assert list(cache.parent.iterdir()) == [cache]


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_FLASHPREFILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert known.cache_file() == tmp_path / "hf_flashprefill" / "crossover.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert known.cache_file() == tmp_path / ".cache" / "hf_flashprefill" / "crossover.json"


def test_keys_tell_apart_whatever_changes_the_time(monkeypatch):
    rules = [{"selector": "peak"}, {"pool_size": 16}, {"query_stride": 4}, {"block_size": 128}, {"correction": False}]
    rules += [{"mean_blocks": 1}, {"backend": "torch"}, {}]
    shapes = [SHAPE._replace(**change) for change in ({"heads": 8}, {"kv_heads": 4}, {"head_dim": 64})]
    keys = [known.measurement_key(known.rule_of(FlashPrefillConfig(**{"block_size": 64} | rule)), SHAPE, CPU) for rule in rules]
    keys += [known.measurement_key(RULE, shape, CPU) for shape in (*shapes, SHAPE._replace(dtype=torch.float16))]
    for module, name in ((torch, "__version__"), (hf_flashprefill, "__version__")):
        with monkeypatch.context() as changed:
            changed.setattr(module, name, "99")
            known._machine.cache_clear()
            keys.append(known.measurement_key(RULE, SHAPE, CPU))
    known._machine.cache_clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    keys.append(known.measurement_key(RULE, SHAPE, CPU))
    known._machine.cache_clear()
    assert len(set(keys)) == len(keys) == 15
    # What does not change the time does not make it measure again.
    assert known.rule_of(FlashPrefillConfig(alpha=0.3, dense_layers=[1], min_seq_len=5, block_size=64)) == RULE
