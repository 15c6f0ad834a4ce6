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
    ("programs", "shortest", "longest", "expected"),
    [
        # Even: the last of the turns would be short of programs.
        (176, 192, 256, 3),
        (132, 252, 256, 1),
        (264, 192, 256, 1),
        # One turn, in which the shortest wait for the longest; a second would cost more than it evens out.
        (128, 1, 16, 1),
        (128, 49, 64, 1),
        # Idle multiprocessors.
        (16, 255, 256, 8),
        (32, 125, 128, 4),
        (64, 121, 128, 2),
        (64, 1, 8, 2),
        (1, 1000, 1000, 8),
        # Nothing to cut.
        (131, 1, 1, 1),
        # Short ones fill the gaps.
        (192, 1, 24, 1),
        (256, 1, 32, 1),
    ],
)
def test_few_programs_are_cut_along_the_keys(programs, shortest, longest, expected):
    assert probe_splits(programs, at_once=132, shortest=shortest, longest=longest) == expected
