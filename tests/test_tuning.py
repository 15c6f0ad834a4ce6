import pytest

from hf_flashprefill.backends.triton.tuning import heads_per_program, probe_splits


@pytest.mark.parametrize(
    ("heads", "query_blocks", "is_even", "expected"),
    # 132 multiprocessors want 924 programs, or 1056 where all query blocks see about as much.
    [
        (32, 512, False, 4),
        (32, 116, False, 4),
        (32, 115, False, 2),
        (32, 58, False, 2),
        (32, 57, False, 1),
        (32, 132, True, 4),
        (32, 131, True, 2),
        (32, 65, True, 1),
        (6, 1000, False, 2),
        (7, 1000, False, 1),
        (1, 1, True, 1),
    ],
)
def test_programs_take_several_heads_where_enough_programs_remain(heads, query_blocks, is_even, expected):
    assert heads_per_program(heads, query_blocks, processors=132, is_even=is_even, query_stages=2) == expected
    assert heads % expected == 0


@pytest.mark.parametrize("is_even", [False, True])
def test_programs_with_one_buffer_of_queries_take_one_head(is_even):
    assert heads_per_program(32, 512, processors=132, is_even=is_even, query_stages=1) == 1


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
