import pytest

from hf_flashprefill.backends.triton.tuning import heads_per_program, probe_spans


@pytest.mark.parametrize(
    ("heads", "query_blocks", "expected"),
    # 132 multiprocessors want 924 programs.
    [(32, 512, 4), (32, 116, 4), (32, 115, 2), (32, 58, 2), (32, 57, 1), (6, 1000, 2), (7, 1000, 1), (1, 1, 1)],
)
def test_programs_take_several_heads_where_enough_programs_remain(heads, query_blocks, expected):
    assert heads_per_program(heads, query_blocks, processors=132, is_even=False, query_stages=2) == expected
    assert heads % expected == 0


@pytest.mark.parametrize(
    ("heads", "query_blocks", "expected"),
    # Turns of 132 programs: 512 programs of four heads are four, 544 of four would be five where 2176 of one are 17.
    [(32, 64, 4), (32, 68, 1), (32, 16, 4), (32, 1, 1), (7, 1000, 1), (6, 64, 1), (32, 512, 4)],
)
def test_programs_of_equal_length_take_as_many_heads_as_fill_their_last_turn(heads, query_blocks, expected):
    assert heads_per_program(heads, query_blocks, processors=132, is_even=True, query_stages=2) == expected


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
    assert probe_spans(programs, at_once=132, tiles=tiles, is_even=is_even) == expected
