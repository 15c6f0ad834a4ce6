import math

import pytest

from hf_flashprefill import FlashPrefillConfig


def test_defaults_round_trip():
    config = FlashPrefillConfig(alpha=0.1, dense_layers=[0, 3])
    assert config.dense_layers == (0, 3)
    assert FlashPrefillConfig(**config.to_dict()) == config


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
        ("sink_blocks", -1, ValueError),
        ("window_blocks", 0, ValueError),
        ("dense_tail_blocks", -2, ValueError),
        ("min_seq_len", 1.5, TypeError),
        ("min_seq_len", True, TypeError),
        ("min_seq_len", None, TypeError),
        ("min_seq_len", -1, ValueError),
        ("min_seq_len", "automatic", ValueError),
        ("min_seq_len", "8192", ValueError),
        ("dense_layers", "01", TypeError),
        ("dense_layers", 3, TypeError),
        ("dense_layers", (-1,), ValueError),
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


def test_is_frozen():
    with pytest.raises(AttributeError):
        FlashPrefillConfig().alpha = 0.5
