"""One step of the Hopper probe: a warpgroup's products with a tile of pooled keys, and what it keeps of them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ...probe_constants import NORMALISER_GROUP
from .pool import TILE
from .probe import UNSEEN

# Probing queries of a warpgroup.
ROWS = gl.constexpr(64)
# Tiles of pooled keys in shared memory.
BUFFERS = gl.constexpr(8)
_TILE = gl.constexpr(TILE)
_UNSEEN = gl.constexpr(UNSEEN)
_NORMALISER_GROUP = gl.constexpr(NORMALISER_GROUP)


@gluon.jit
def largest_of_groups(products, PER_BLOCK: gl.constexpr):
    """The largest product of every few neighbours: [rows, columns] -> [rows, blocks / 4, groups of a block, 4], see
    ``pool.tile_column``."""
    GROUP: gl.constexpr = min(_NORMALISER_GROUP, PER_BLOCK)
    by_pair = products.reshape([ROWS, _TILE // PER_BLOCK // 4, PER_BLOCK // GROUP, GROUP // 2, 4, 2])
    # One reduction over all of a group: the compiler then sees twice as many of the maxima of three numbers that Hopper takes
    # at once as where it finds the largest of each pair's largest.
    by_group = by_pair.permute([0, 1, 2, 4, 3, 5]).reshape([ROWS, _TILE // PER_BLOCK // 4, PER_BLOCK // GROUP, 4, GROUP])
    return gl.max(by_group, 4)


@gluon.jit
def sums_of_bytes(products):
    """What a product with the two rows of bytes of every block's mean gives for the means, int32 [rows, blocks / 4, 4]."""
    high, low = gl.split(products.reshape([ROWS, products.shape[1] // 8, 4, 2]))
    return high * 256 + low


@gluon.jit
def _multiply(integers, rows, zeros):
    """Begin to multiply queries with the rows of a buffer."""
    return warpgroup_mma(integers, rows.permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.jit
def next_products(
    centre_products,
    integers,
    number,
    buffers,
    barriers,
    steps_ptrs,
    zeros,
    centre_zeros,
    TILE_BLOCKS: gl.constexpr,
    CENTRE_TILES: gl.constexpr,
):
    """The products with the means of a few tiles' blocks, those with the ``number``-th tile, and the steps of its blocks."""
    _, tiles, centres = buffers
    full, _ = barriers
    stage = number // CENTRE_TILES % centres.shape[0]
    if number % CENTRE_TILES == 0:
        mbarrier.wait(full.index(stage), (number // BUFFERS) & 1)
        in_work = _multiply(integers, centres.index(stage), centre_zeros)
        centre_products = sums_of_bytes(warpgroup_mma_wait(0, deps=[in_work]))
        # Again, or the compiler begins the next product before it has added up the means' bytes, and spills.
        mbarrier.wait(full.index(stage), (number // BUFFERS) & 1)
    in_work = _multiply(integers, tiles.index(number % BUFFERS), zeros)
    steps = gl.load(steps_ptrs + number * TILE_BLOCKS)
    return centre_products, warpgroup_mma_wait(0, deps=[in_work]), steps


@gluon.jit
def release(empty, number, CENTRE_TILES: gl.constexpr):
    """After the last of the tiles that were loaded together: others may take their place."""
    if number % CENTRE_TILES == CENTRE_TILES - 1:
        mbarrier.arrive(empty.index(number // CENTRE_TILES % (BUFFERS // CENTRE_TILES)), count=1)


@gluon.jit
def _of_tile(centre_products, number, FOURS: gl.constexpr, layout: gl.constexpr):
    """The products with the means of the blocks of a tile, ``number`` of those that stand together."""
    TILES: gl.constexpr = centre_products.shape[1] // FOURS
    if TILES == 1:
        return gl.convert_layout(centre_products, layout)
    by_tile = centre_products.reshape([ROWS, TILES, FOURS, 4])
    tiles: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, by_tile.type.layout)))
    is_tile = (gl.arange(0, TILES, layout=tiles) == number)[None, :, None, None]
    return gl.convert_layout(gl.sum(gl.where(is_tile, by_tile, 0), 1), layout)


@gluon.jit
def reduce_tile(
    products,
    centre_products,
    of_centre,
    running_max,
    running_sum,
    steps,
    targets,
    factors,
    bounds,
    number,
    IS_WHOLE: gl.constexpr,
    BLOCK: gl.constexpr,
    POOL: gl.constexpr,
):
    """Reduce the products with a program's ``number``-th tile as ``probe._reduce`` does, the ``of_centre``-th of those whose
    blocks' means are multiplied together. ``bounds``: where the last pooled key that a query sees begins, where keys end."""
    PER_BLOCK: gl.constexpr = BLOCK // POOL
    TILE_BLOCKS: gl.constexpr = _TILE // PER_BLOCK
    block_layout: gl.constexpr = running_max.type.layout.parent
    if not IS_WHOLE:
        last_seen, key_end = bounds
        first_of_tile = number * (TILE_BLOCKS * BLOCK)
        # Both sides of comparisons less what a thread adds to all of its columns: the left ones are constants then.
        column = gl.arange(0, _TILE, layout=gl.SliceLayout(0, products.type.layout))
        first_token = column // (4 * PER_BLOCK) * (4 * BLOCK) + (column // 8 % (PER_BLOCK // 2) * 2 + column % 2) * POOL
        last_first = (last_seen - first_of_tile)[:, None] - (column // 2 % 4 * BLOCK)[None, :]
        products = gl.where(first_token[None, :] <= last_first, products, _UNSEEN)
    groups = largest_of_groups(products, PER_BLOCK)
    largest = gl.max(groups, 2)
    of_tile = _of_tile(centre_products, of_centre, TILE_BLOCKS // 4, block_layout)
    factors = factors[:, None, None] * steps[None, :, :]
    peaks = (largest + of_tile).to(gl.float32) * factors
    if not IS_WHOLE:
        peaks = gl.where(largest == _UNSEEN, float("-inf"), peaks)
    new_max = gl.maximum(running_max, gl.max(peaks, 1))
    centres = of_tile.to(gl.float32) * factors - new_max[:, None, :]
    exponents = groups.to(gl.float32) * factors[:, :, None, :] + centres[:, :, None, :]
    if not IS_WHOLE:
        exponents = gl.where(groups == _UNSEEN, float("-inf"), exponents)
        fours = gl.arange(0, TILE_BLOCKS // 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, block_layout)))
        slot = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, block_layout)))
        seen_tokens = gl.convert_layout(last_seen, gl.SliceLayout(1, gl.SliceLayout(2, block_layout))) - first_of_tile + POOL
        seen_tokens = gl.minimum(seen_tokens, key_end - first_of_tile)
        last_end = seen_tokens[:, None, None] - (slot * BLOCK)[None, None, :]
        is_full = ((fours * 4 + 1) * BLOCK)[None, :, None] <= last_end
        centres = gl.where(is_full, centres, float("-inf"))
    terms = gl.sum(gl.exp2(exponents), 2) + (PER_BLOCK - groups.shape[2]) * gl.exp2(centres)
    running_sum = running_sum * gl.exp2(running_max - new_max) + gl.sum(terms, 1)
    gl.store(targets + number * (ROWS * TILE_BLOCKS), peaks)
    return new_max, running_sum
