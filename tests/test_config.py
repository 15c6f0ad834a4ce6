import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from hf_flashprefill import FlashPrefillConfig


def test_defaults():
    assert asdict(FlashPrefillConfig()) == {
        "alpha": None,
        "selector": "blend",
        "pool_size": 4,
        "query_stride": 8,
        "block_size": 128,
        "sink_blocks": None,
        "window_blocks": None,
        "dense_tail_blocks": 2,
        "correction": None,
        "mean_blocks": 8,
        "min_seq_len": "auto",
        "dense_layers": (),
        "layer_alphas": None,
        "audit_rows": 0,
        "audit_limit": 0.05,
        "backend": "auto",
    }
    resolved = FlashPrefillConfig().resolved()
    assert (resolved.alpha, resolved.sink_blocks, resolved.window_blocks, resolved.correction) == (0.006, 1, 2, True)


def test_defaults_round_trip():
    config = FlashPrefillConfig(alpha=0.1, dense_layers=[0, 3])
    assert config.dense_layers == (0, 3)
    assert FlashPrefillConfig(**config.to_dict()) == config


def test_what_is_none_follows_the_selector():
    """The published rule has what the published method has, also where the selector is named last."""
    named = ("alpha", "sink_blocks", "window_blocks", "correction")
    config = FlashPrefillConfig()
    for selector, values in (
        ("share", (0.005, 1, 2, True)),
        ("blend", (0.006, 1, 2, True)),
        ("peak", (0.05, 1, 2, True)),
        ("flashprefill", (0.1, 2, 4, False)),
        ("topk", (0.875, 1, 2, True)),
        ("topp", (0.1, 1, 2, True)),
    ):
        resolved = replace(config, selector=selector).resolved()
        assert tuple(getattr(resolved, name) for name in named) == values
        assert replace(resolved, **dict.fromkeys(named)) == replace(config, selector=selector)
        assert resolved.resolved() is resolved
    given = FlashPrefillConfig(selector="flashprefill", alpha=0, sink_blocks=0, correction=True).resolved()
    assert tuple(getattr(given, name) for name in named) == (0, 0, 4, True)


def test_json_file_round_trip(tmp_path):
    path = tmp_path / "config.json"
    config = FlashPrefillConfig(layer_alphas=[0, 0.25], audit_rows=16, dense_layers=(1,))
    assert config.layer_alphas == (0.0, 0.25)
    config.to_json(path)
    assert json.loads(path.read_text())["layer_alphas"] == [0.0, 0.25]
    assert FlashPrefillConfig.from_json(path) == config
    path.write_text('{"alpha": 0.125}')
    assert FlashPrefillConfig.from_json(path) == FlashPrefillConfig(alpha=0.125)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "got list"),
        ('{"alphas": 1}', "got \\['alphas'\\]"),
        ('{"alpha": 2}', "alpha must be from 0"),
    ],
)
def test_bad_json_files_are_named(content, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        FlashPrefillConfig.from_json(path)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("alpha", -0.1, ValueError),
        ("alpha", 1.5, ValueError),
        ("alpha", math.nan, ValueError),
        ("alpha", "0.1", TypeError),
        ("alpha", True, TypeError),
        ("selector", "best", ValueError),
        ("backend", "cuda", ValueError),
        ("block_size", 0, ValueError),
        ("block_size", 100, ValueError),
        ("block_size", 128.0, TypeError),
        ("pool_size", "4", TypeError),
        ("sink_blocks", -1, ValueError),
        ("window_blocks", 0, ValueError),
        ("dense_tail_blocks", -2, ValueError),
        ("dense_tail_blocks", None, TypeError),
        ("correction", 1, TypeError),
        ("mean_blocks", 3, ValueError),
        ("mean_blocks", None, TypeError),
        ("min_seq_len", 1.5, TypeError),
        ("min_seq_len", True, TypeError),
        ("min_seq_len", None, TypeError),
        ("min_seq_len", -1, ValueError),
        ("min_seq_len", "automatic", ValueError),
        ("min_seq_len", "8192", ValueError),
        ("dense_layers", "01", TypeError),
        ("dense_layers", 3, TypeError),
        ("dense_layers", (-1,), ValueError),
        ("layer_alphas", 0.1, TypeError),
        ("layer_alphas", (), ValueError),
        ("layer_alphas", (0.1, 2), ValueError),
        ("layer_alphas", (True,), TypeError),
        ("audit_rows", -1, ValueError),
        ("audit_limit", 1.1, ValueError),
    ],
)
def test_bad_values_name_the_field(field, value, error):
    with pytest.raises(error, match=field):
        FlashPrefillConfig(**{field: value})


def test_a_bad_min_seq_len_names_its_range():
    with pytest.raises(ValueError, match="min_seq_len must be \"auto\" or a whole number >= 0, got 'automatic'"):
        FlashPrefillConfig(min_seq_len="automatic")
    with pytest.raises(ValueError, match="min_seq_len must be >= 0, got -1"):
        FlashPrefillConfig(min_seq_len=-1)
    assert FlashPrefillConfig(min_seq_len="auto") == FlashPrefillConfig()


def test_whole_numbers_of_any_kind_are_kept_as_plain_ones(tmp_path):
    """Triton and JSON know Python's own only."""
    numbers = np.arange(130)
    given = {"block_size": numbers[128], "min_seq_len": numbers[32], "dense_layers": numbers[1:2], "audit_rows": numbers[8]}
    config = FlashPrefillConfig(alpha=np.float32(0.5), sink_blocks=numbers[2], **given)
    assert config == FlashPrefillConfig(0.5, block_size=128, min_seq_len=32, dense_layers=(1,), audit_rows=8, sink_blocks=2)
    config.to_json(tmp_path / "config.json")
    assert FlashPrefillConfig.from_json(tmp_path / "config.json") == config


def test_is_frozen():
    with pytest.raises(AttributeError):
        FlashPrefillConfig().alpha = 0.5
