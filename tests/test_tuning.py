import pytest

from hf_flashprefill.backends.triton.tuning import heads_per_program


@pytest.mark.parametrize(
    ("heads", "query_blocks", "expected"),
    # 132 multiprocessors want 1056 programs.
    [(32, 512, 4), (32, 132, 4), (32, 131, 2), (32, 66, 2), (32, 65, 1), (6, 1000, 2), (7, 1000, 1), (1, 1, 1)],
)
def test_programs_take_several_heads_where_enough_programs_remain(heads, query_blocks, expected):
    assert heads_per_program(heads, query_blocks, processors=132) == expected
    assert heads % expected == 0
