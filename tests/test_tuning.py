import pytest

from hf_flashprefill.backends.triton.tuning import energy_heads, heads_per_program, probe_splits


@pytest.mark.parametrize(
    ("heads", "query_blocks", "expected"),
    # 132 multiprocessors want 924 programs.
    [(32, 512, 4), (32, 116, 4), (32, 115, 2), (32, 58, 2), (32, 57, 1), (32, 0, 1), (6, 1000, 2), (7, 1000, 1), (1, 1, 1)],
)
def test_programs_take_several_heads_where_enough_programs_remain(heads, query_blocks, expected):
    assert heads_per_program(heads, query_blocks, processors=132, query_stages=2) == expected
    assert heads % expected == 0


def test_programs_with_one_buffer_of_queries_take_one_head():
    assert heads_per_program(32, 512, processors=132, query_stages=1) == 1


@pytest.mark.parametrize(
    ("heads", "pairs", "expected"),
    # 132 multiprocessors want 119 programs.
    [(32, 1024, 16), (32, 60, 16), (32, 59, 8), (32, 16, 4), (32, 7, 1), (28, 1000, 4), (7, 1000, 1)],
)
def test_programs_of_the_published_rule_take_many_heads(heads, pairs, expected):
    assert energy_heads(heads, pairs, processors=132) == expected


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
