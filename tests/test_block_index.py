import dataclasses

import pytest
import torch

from hf_flashprefill import BlockIndex
from hf_flashprefill.geometry import PrefillGeometry


def random_mask(geometry: PrefillGeometry, heads: int) -> torch.Tensor:
    visible = geometry.visible_counts(torch.device("cpu"))[:, None, :, None]
    number = torch.arange(geometry.key_blocks)
    chosen = torch.rand(geometry.batch, heads, geometry.query_blocks, geometry.key_blocks) < 0.4
    return (chosen & (number < visible)) | (number == visible - 1)


@pytest.mark.parametrize("ranges", [None, [[64, 500], [0, 130]]])
def test_mask_round_trip_and_density(ranges):
    ranges = None if ranges is None else torch.tensor(ranges)
    geometry = PrefillGeometry(2, 500, 500, 0, 64, ranges)
    mask = random_mask(geometry, 3)
    index = BlockIndex.from_mask(mask, geometry)
    index.validate()
    assert torch.equal(index.to_mask(), mask)
    visible = geometry.visible_counts(torch.device("cpu")).sum() * 3
    assert index.density() == pytest.approx(mask.sum().item() / visible.item())


def test_parts_join_to_the_whole():
    geometry = PrefillGeometry(1, 640, 640, 0, 64)
    mask = random_mask(geometry, 2)
    first = BlockIndex.from_mask(mask[:, :, :4, :4], geometry)
    rest = BlockIndex.from_mask(mask[:, :, 4:], geometry, first_query_block=4)
    whole = BlockIndex.concatenate([first, rest])
    whole.validate()
    assert torch.equal(whole.to_mask(), mask)
    assert rest.visible_total() == sum(range(5, 11))


def test_parts_join_to_a_part():
    geometry = PrefillGeometry(1, 640, 640, 0, 64)
    mask = torch.ones(10, 10, dtype=torch.bool).tril()[None, None]
    parts = [BlockIndex.from_mask(mask[:, :, first : first + 2], geometry, first) for first in (4, 6)]
    joined = BlockIndex.concatenate(parts)
    joined.validate()
    assert joined.first_query_block == 4
    assert joined.density() == 1


LENGTHS = "counts must lie between 0 and the number of causally visible blocks, all of them in indices"
ORDER = "indices must be ascending block numbers >= 0 without repeats"
LAST = "each list must end with the query block's own block and hold none after it"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("future", LAST),
        ("own missing", LAST),
        ("unsorted", ORDER),
        ("repeated", ORDER),
        ("negative block", ORDER),
        ("too long", LENGTHS),
        ("negative length", LENGTHS),
        ("longer than its room", LENGTHS),
        ("empty", "counts must be 0 exactly where a query block holds no valid query"),
    ],
)
def test_validate_finds(fault, message):
    geometry = PrefillGeometry(1, 256, 256, 0, 64)
    index = BlockIndex.from_mask(torch.ones(4, 4, dtype=torch.bool).tril()[None, None], geometry)
    indices, counts = index.indices.clone(), index.counts.clone()
    if fault == "future":
        indices[0, 0, 0, 0] = 1
    elif fault == "unsorted":
        indices[0, 0, 2, :2] = torch.tensor([1, 0])
    elif fault == "repeated":
        indices[0, 0, 2, :2] = 1
    elif fault == "negative block":
        indices[0, 0, 2, 0] = -1
    elif fault == "own missing":
        counts[0, 0, 3] = 2
    elif fault == "too long":
        counts[0, 0, 0] = 2
    elif fault == "negative length":
        counts[0, 0, 1] = -1
    elif fault == "longer than its room":
        # What is beyond would be read from the next list.
        indices = torch.cat([indices[..., :1], indices[..., 3:]], -1)
        indices[0, 0, 3] = torch.tensor([0, 3])
        indices[0, 0, 2] = torch.tensor([0, 2])
        counts[0, 0] = torch.tensor([1, 2, 3, 2])
    else:
        counts[0, 0, 1] = 0
    faulty = dataclasses.replace(index, indices=indices, counts=counts)
    with pytest.raises(ValueError, match=f"^{message}$"):
        faulty.validate()
