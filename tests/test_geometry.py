import pytest
import torch

from hf_flashprefill.geometry import PrefillGeometry
from tests.inputs import UGLY_CASES


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("case", UGLY_CASES, ids=str)
def test_query_blocks_cover_every_valid_query(case, block_size):
    ranges = None if case.ranges is None else torch.tensor(case.ranges)
    geometry = PrefillGeometry(case.batch, case.query_len, case.kv_len, case.offset, block_size, ranges)
    visible = geometry.visible_counts(torch.device("cpu"))
    assert visible.shape == (case.batch, geometry.query_blocks)
    for row, span in enumerate(geometry.row_spans()):
        # Counted token by token instead of by formula.
        blocks = sorted({position // block_size for position in range(span.query_begin, span.query_end)})
        assert visible[row][: len(blocks)].tolist() == [block + 1 for block in blocks]
        assert not visible[row][len(blocks) :].any()
        for tile, block in enumerate(blocks):
            assert block < geometry.visible_blocks_bound(tile)


def test_padding_does_not_move_a_row_on_its_grid():
    alone = PrefillGeometry(1, 300, 300, 0, 128).row_spans()[0]
    padded = PrefillGeometry(1, 400, 400, 0, 128, torch.tensor([[100, 400]])).row_spans()[0]
    assert padded[1:] == alone[1:]
    assert padded.start == 100


@pytest.mark.parametrize("query_len", [1, 300, 512])
def test_spans_without_padding_are_those_of_full_ranges(query_len):
    plain = PrefillGeometry(2, query_len, 512, 512 - query_len, 128)
    padded = PrefillGeometry(2, query_len, 512, 512 - query_len, 128, torch.tensor([[0, 512]] * 2))
    for ours, theirs in zip(plain.spans(torch.device("cpu")), padded.spans(torch.device("cpu")), strict=True):
        assert ours.dtype == theirs.dtype == torch.int64
        assert torch.equal(ours, theirs)


def test_a_row_that_ended_in_the_block_where_the_queries_begin_sees_no_blocks():
    geometry = PrefillGeometry(2, 64, 184, 120, 64, torch.tensor([[0, 100], [0, 184]]))
    assert geometry.visible_counts(torch.device("cpu")).tolist() == [[0, 0], [2, 3]]
