"""How many dropped tokens each mean of the Triton backend stands for."""

import math

import pytest
import torch

from hf_flashprefill import BlockIndex
from hf_flashprefill.geometry import PrefillGeometry


@pytest.mark.parametrize("mean_blocks", [1, 2, 7, 1000])
@pytest.mark.parametrize("key_blocks", [3, 129, 300])
def test_weights_end_at_a_multiple_of_their_tile(key_blocks, mean_blocks, device):
    """Runs are counted back from the own block; what is in front of the first weight stands for nothing."""
    from hf_flashprefill.backends.triton.means import WIDTH, weigh_means

    width = WIDTH.value
    geometry = PrefillGeometry(1, 3 * 128, key_blocks * 128, (key_blocks - 3) * 128, 128)
    generator = torch.Generator().manual_seed(key_blocks)
    own = torch.arange(key_blocks - 3, key_blocks)[:, None]
    block = torch.arange(key_blocks)[None]
    mask = ((torch.rand(1, 2, 3, key_blocks, generator=generator) < 0.3) | (block == own)) & (block <= own)
    counter = torch.full((1,), -1, dtype=torch.int32, device=device)
    weights = weigh_means(BlockIndex.from_mask(mask.to(device), geometry), mean_blocks, counter, 132).cpu()
    assert counter.item() == 132
    assert weights.shape[-1] % width == 0
    for head in range(2):
        for tile in range(3):
            own_block = int(own[tile])
            expected = []
            for end in range(own_block, 0, -mean_blocks):
                run = mask[0, head, tile, max(end - mean_blocks, 0) : end]
                dropped = int((~run).sum())
                expected.insert(0, math.log2(128 * dropped) if dropped else -math.inf)
            in_front = -len(expected) % width
            found = weights[0, head, tile, : in_front + len(expected)]
            torch.testing.assert_close(found, torch.tensor([-math.inf] * in_front + expected))
