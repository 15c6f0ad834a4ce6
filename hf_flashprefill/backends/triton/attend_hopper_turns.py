"""Which work a program of the Hopper attend kernel does next: turns, each a query block of one head against its list.

Every multiprocessor has one program. Its loading warp draws the number of the next turn from a counter as soon as the buffers
are full with the last one's, so that the answer is there before it is needed, and announces it to the computing warpgroups with
where it stands: worked out by these as well, that took registers which their results need
(benchmarks/results/attend-turns-2026-11-29-h200.txt).

Turns whose result a warpgroup could not keep are taken again by the program that took them, after its last one. Each warpgroup
chains such turns up: in its column of ``retakes`` [turns, 2] stands behind a turn the one noted before it, or -1.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .hopper_primitives import row_span

BLOCK = gl.constexpr(128)
# Announcements kept. While a warpgroup is at turn t, that of t + 3 may have been made, but no later one: before it the queries
# of t + 3 want the buffer, one of two at most, that those of t + 1 are still to be read from.
ANNOUNCEMENTS = gl.constexpr(4)
_SHARED_NUMBER = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
# How much is said of a turn, in the order of ``announce``, by which it is read.
_FACTS = gl.constexpr(9)
# Announced after the last turn.
_NO_TURN = gl.constexpr(-1)
# Query blocks at the end of a call are usually attended in full.
_LONG_TILES = gl.constexpr(2)
# About as many as there are multiprocessors, so that most of what runs together walks its lists the same way; not their exact
# number, nor the turn's, so that a query block's bits depend on neither.
_BLOCKS_OF_A_DIRECTION = gl.constexpr(128)


@gluon.jit
def make_announcements():
    """Room for what is said of turns, int32 [ANNOUNCEMENTS * _FACTS, 1]."""
    return gl.allocate_shared_memory(gl.int32, [ANNOUNCEMENTS * _FACTS, 1], _SHARED_NUMBER)


@gluon.jit
def announce(announcements, turn_full, turn, number, listed, mean_steps, turn_place):
    """By the loading warp: the program's turn ``turn``, counted from 0, is ``number``, stands at ``turn_place`` (``place_of``)
    and has ``listed`` blocks in its list and ``mean_steps`` steps of means."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    place, block, span = turn_place
    batch, head, _ = place
    own, first_row = block
    _, query_begin, query_end, key_end = span
    first_token = own * BLOCK
    asked_first = (number, listed, mean_steps, key_end - first_token)
    asked_last = (batch, head, first_row, query_begin - first_token, query_end - first_token)
    facts = asked_first + asked_last
    slot = turn % ANNOUNCEMENTS
    for fact in gl.static_range(_FACTS):
        announcements.index(slot * _FACTS + fact).store(gl.zeros([1], gl.int32, layout) + facts[fact])
    mbarrier.arrive(turn_full.index(slot), count=1)


@gluon.jit
def _read(announcements, turn, FACT: gl.constexpr):
    """By a computing warpgroup: the FACT-th that was said of a turn."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(announcements.index(turn % ANNOUNCEMENTS * _FACTS + FACT).load(layout), 0)


@gluon.jit
def await_turn(announcements, turn_full, turn):
    """The number of the program's turn ``turn``, for a computing warpgroup; negative if there is none."""
    mbarrier.wait(turn_full.index(turn % ANNOUNCEMENTS), (turn // ANNOUNCEMENTS) & 1)
    return _read(announcements, turn, 0)


@gluon.jit
def steps_of(announcements, turn):
    """(blocks in its list, steps of means, keys from the query block's own key block on) of a turn that was awaited."""
    return _read(announcements, turn, 1), _read(announcements, turn, 2), _read(announcements, turn, 3)


@gluon.jit
def target_of(announcements, turn):
    """(number, batch row, head, buffer row of the query block's first query, its first row that is a query, the one after its
    last) of a turn that was awaited."""
    place = (_read(announcements, turn, 0), _read(announcements, turn, 4), _read(announcements, turn, 5))
    return place + (_read(announcements, turn, 6), _read(announcements, turn, 7), _read(announcements, turn, 8))


@gluon.jit
def turns_of(shape):
    """How many turns a call has."""
    return shape[1] * shape[2]


@gluon.jit
def place_of(number, shape, ranges_ptr, HAS_RANGES: gl.constexpr):
    """Where turn ``number`` stands: (batch row, head, query block of the call), (the query block's own key block, the buffer
    row of its first query), and the batch row's ``row_span``.

    Turns of one head run together, so that what they read stays in the L2 cache; the longest first, or the last to start
    would run alone.
    """
    heads, batch_heads, tiles, first_query_block, query_offset, query_end, kv_len = shape
    # Numbers of no turn stand where the nearest does: what is loaded for them must exist.
    number = gl.minimum(gl.maximum(number, 0), batch_heads * tiles - 1)
    long_tiles = gl.minimum(tiles, _LONG_TILES)
    is_long = number < long_tiles * batch_heads
    skipped = gl.where(is_long, 0, long_tiles)
    number -= skipped * batch_heads
    of_head = gl.where(is_long, long_tiles, tiles - long_tiles)
    row_head = number // of_head
    tile = tiles - 1 - skipped - (number - row_head * of_head)
    batch = row_head // heads
    # The host adds the offset to the length: their sum, worked out once per program, was spilled.
    span = row_span(ranges_ptr, batch, query_offset, query_end - query_offset, kv_len, HAS_RANGES)
    start, query_begin, _, _ = span
    own = query_begin // BLOCK + first_query_block + tile
    return (batch, row_head - batch * heads, tile), (own, start - query_offset + own * BLOCK), span


@gluon.jit
def direction_of(own, listed):
    """(first, step): of the list of the query block with the key block ``own`` the entries but the last, which is loaded before
    them, are loaded from entry ``first`` on, ``step`` apart, which is 1 or -1.

    Every 128 query blocks the direction turns, so that a list begins where the one before it ended, with keys that are still in
    the L2 cache. Turning took .99 of the time of rising lists at 128K tokens, .98 and 1.00 on two GPUs at 256K (H200, 32 query
    and 8 key-value heads, head_dim 128, bfloat16, published densities, one process each). Up to 64K all keys of a head fit the
    cache. Longest lists first among turns that run together kept these closer in step, but cost a kernel: with it .98 at 256K,
    1.01 with means up to 32K.
    """
    is_rising = (own // _BLOCKS_OF_A_DIRECTION) % 2 == 0
    return gl.where(is_rising, 0, listed - 2), gl.where(is_rising, 1, -1)


@gluon.jit
def _is_empty(number, shape, ranges_ptr):
    """Whether turn ``number`` is one, but has no queries, as behind the end of a padded row."""
    _, block, span = place_of(number, shape, ranges_ptr, True)
    _, query_begin, query_end, _ = span
    return (number < turns_of(shape)) & ((block[0] * BLOCK >= query_end) | (query_end <= query_begin))


@gluon.jit
def _after_empty(number, shape, ranges_ptr):
    """The first turn after ``number``, which is empty, that may have queries. A head's empty turns run together; drawn one by
    one they took 1 % of the attention of a row of 64K tokens behind as much padding (H200, 32 query and 8 key-value heads,
    head_dim 128, bfloat16, published density)."""
    tiles = shape[2]
    place, block, span = place_of(number, shape, ranges_ptr, True)
    tile = place[2]
    _, query_begin, query_end, _ = span
    first_own = block[0] - tile
    used = gl.where(query_end > query_begin, gl.cdiv(query_end, BLOCK) - first_own, 0)
    long_tiles = gl.minimum(tiles, _LONG_TILES)
    # The head's last turn in this part of the order, that of the long or that of the other turns.
    last_tile = gl.where(tile >= tiles - long_tiles, tiles - long_tiles, 0)
    return number + tile + 1 - gl.maximum(used, last_tile)


@gluon.jit
def _list_length(number, shape, ranges_ptr, counts_ptr, HAS_RANGES: gl.constexpr):
    heads, _, tiles, _, _, _, _ = shape
    place, _, _ = place_of(number, shape, ranges_ptr, HAS_RANGES)
    batch, head, tile = place
    return gl.load(counts_ptr + (batch * heads + head) * tiles + tile, mask=number >= 0, other=0)


@gluon.jit
def draw_turn(number, shape, ranges_ptr, next_turn_ptr, counts_ptr, HAS_RANGES: gl.constexpr):
    """The first turn with queries, ``number`` itself or one drawn after it, and the length of its list; or -1 and 0."""
    if HAS_RANGES:
        while _is_empty(number, shape, ranges_ptr):
            gl.atomic_max(next_turn_ptr, _after_empty(number, shape, ranges_ptr), sem="relaxed")
            number = next_number(next_turn_ptr)
    number = gl.where(number < turns_of(shape), number, _NO_TURN)
    return number, _list_length(number, shape, ranges_ptr, counts_ptr, HAS_RANGES)


@gluon.jit
def first_turn(shape, ranges_ptr, next_turn_ptr, counts_ptr, HAS_RANGES: gl.constexpr):
    """A program's first turn with queries and the length of its list, or -1 and 0. There are no more programs than turns."""
    number = gl.program_id(0)
    if HAS_RANGES:
        number, listed = draw_turn(number, shape, ranges_ptr, next_turn_ptr, counts_ptr, HAS_RANGES)
    else:
        listed = _list_length(number, shape, ranges_ptr, counts_ptr, HAS_RANGES)
    return number, listed


@gluon.jit
def next_number(next_turn_ptr):
    """Of all turns that nobody has drawn, the first."""
    return gl.atomic_add(next_turn_ptr, 1, sem="relaxed")


@gluon.jit
def make_noted():
    """Room for the turn that each computing warpgroup noted last, int32 [2, 1], none yet."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    noted = gl.allocate_shared_memory(gl.int32, [2, 1], _SHARED_NUMBER)
    for warpgroup in gl.static_range(2):
        noted.index(warpgroup).store(gl.full([1], -1, gl.int32, layout))
    return noted


@gluon.jit
def note_retake(retakes_ptr, noted, warpgroup, number, is_kept):
    """By a computing warpgroup: turn ``number`` is to be taken again unless ``is_kept``."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    if is_kept == 0:
        last = noted.index(warpgroup)
        gl.store(retakes_ptr + 2 * number + warpgroup, gl.max(last.load(layout), 0))
        last.store(gl.zeros([1], gl.int32, layout) + number)


@gluon.jit
def await_noted(noted, pass_done):
    """By the loading warp, when both warpgroups have taken their last turn: the one each noted last, or -1."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.wait(pass_done.index(0), 0)
    return gl.max(noted.index(0).load(layout), 0), gl.max(noted.index(1).load(layout), 0)


@gluon.jit
def draw_retake(noted, shape, ranges_ptr, retakes_ptr, counts_ptr, HAS_RANGES: gl.constexpr):
    """The next turn to be taken again and the length of its list, or -1 and 0; and what is left of the noted ones. A program's
    turns rise in number and each warpgroup's come back latest first, so that one that both noted comes up in both at once."""
    first, second = noted
    number = gl.maximum(first, second)
    before_first = gl.load(retakes_ptr + 2 * number, mask=(number >= 0) & (first == number), other=_NO_TURN)
    before_second = gl.load(retakes_ptr + 2 * number + 1, mask=(number >= 0) & (second == number), other=_NO_TURN)
    noted = (gl.where(first == number, before_first, first), gl.where(second == number, before_second, second))
    return number, _list_length(number, shape, ranges_ptr, counts_ptr, HAS_RANGES), noted
