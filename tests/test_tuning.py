import pytest

from hf_flashprefill.backends.triton.tuning import energy_heads, probe_splits


@pytest.mark.parametrize(
    ("heads", "programs", "expected"),
    # 132 multiprocessors want 198 programs.
    [(32, 1024, 16), (32, 99, 16), (32, 98, 8), (32, 25, 4), (32, 12, 1), (28, 1000, 4), (7, 1000, 1)],
)
def test_programs_of_the_published_rule_take_many_heads(heads, programs, expected):
    assert energy_heads(heads, programs, processors=132) == expected


@pytest.mark.parametrize(
    ("programs", "tiles", "is_even", "expected"),
    [
        (176, 256, True, 3),
        (176, 256, False, 1),
        (264, 256, True, 1),
        (48, 256, True, 8),
        (132, 256, True, 1),
        (131, 1, True, 1),
        (1, 1000, True, 8),
    ],
)
def test_few_programs_of_equal_length_are_cut_along_the_keys(programs, tiles, is_even, expected):
    assert probe_splits(programs, at_once=132, tiles=tiles, is_even=is_even) == expected
