"""The order in which the Hopper attend kernel's programs take their turns.

Gluon has no interpreter. What only calculates with numbers is plain Python but for its ``gl``, and is run as such.
"""

import inspect
import textwrap
from types import SimpleNamespace

import pytest
import torch

from hf_flashprefill.geometry import PrefillGeometry

turns = pytest.importorskip("hf_flashprefill.backends.triton.attend_hopper_turns")


def as_python(function, **names):
    """A Gluon function's body with ``names`` as its globals."""
    source = textwrap.dedent(inspect.getsource(function.fn))
    namespace = {"gl": GL, **names}
    exec(source.replace("@gluon.jit\n", "").replace(": gl.constexpr", ""), namespace)
    return namespace[function.fn.__name__]


GL = SimpleNamespace(maximum=max, minimum=min, where=lambda condition, yes, no: yes if condition else no)
# What these do with tensors of one number.
OF_TENSORS = {
    "zeros": lambda *_: 0,
    "max": lambda number, axis: number,
    "static_range": range,
    "int32": int,
    "BlockedLayout": lambda *_: None,
}
CONSTANTS = {
    name: getattr(turns, name).value
    for name in ("BLOCK", "_BLOCKS_OF_A_DIRECTION", "_LONG_TILES", "_NO_TURN", "ANNOUNCEMENTS", "_FACTS")
}


def place_of(geometry: PrefillGeometry, heads: int, number: int):
    """``attend_hopper_turns.place_of`` of a call's turn."""

    def row_span(ranges_ptr, batch, query_offset, query_len, kv_len, has_ranges):
        return geometry.row_spans()[batch]

    shape = (
        heads,
        geometry.batch * heads,
        geometry.query_blocks,
        0,
        geometry.query_offset,
        geometry.query_offset + geometry.query_len,
        geometry.kv_len,
    )
    place = as_python(turns.place_of, row_span=row_span, **CONSTANTS)
    return place(number, shape, None, geometry.valid_ranges is not None)


class Shared:
    """Numbers in shared memory, or one of them."""

    def __init__(self, numbers, place=0):
        self.numbers, self.place = numbers, place

    def index(self, place):
        return Shared(self.numbers, place)

    def load(self, layout):
        return self.numbers[self.place]

    def store(self, value):
        self.numbers[self.place] = value


class TurnCounter:
    """The number of the next turn, in global memory, and how often it was asked for."""

    def __init__(self):
        self.number, self.drawn = 0, 0

    def next(self):
        self.number, self.drawn = self.number + 1, self.drawn + 1
        return self.number - 1

    def pass_over(self, number, sem):
        self.number = max(self.number, number)


@pytest.mark.parametrize(
    ("batch", "heads", "query_len", "kv_len", "ranges"),
    [
        (1, 1, 1, 1, None),
        (1, 3, 129, 129, None),
        (2, 4, 1000, 1000, None),
        (1, 7, 513, 4096 + 77, None),
        (3, 2, 700, 900, [[100, 900], [0, 450], [899, 900]]),
    ],
)
def test_every_query_block_of_every_head_has_one_turn(batch, heads, query_len, kv_len, ranges):
    ranges = None if ranges is None else torch.tensor(ranges, dtype=torch.int32)
    geometry = PrefillGeometry(batch, query_len, kv_len, kv_len - query_len, 128, ranges)
    tiles = geometry.query_blocks
    places = [place_of(geometry, heads, number) for number in range(batch * heads * tiles)]
    assert {place for place, _, _ in places} == {(b, h, t) for b in range(batch) for h in range(heads) for t in range(tiles)}
    # The last query blocks, usually in full, begin; then head after head, the longest lists first.
    long = min(2, tiles)
    rows = [b * heads + h for (b, h, _), _, _ in places]
    assert all(tile >= tiles - long for (_, _, tile), _, _ in places[: batch * heads * long])
    assert rows[batch * heads * long :] == sorted(rows[batch * heads * long :])
    rest = [tile for (_, _, tile), _, _ in places[batch * heads * long :]]
    assert rest == list(range(tiles - long - 1, -1, -1)) * (batch * heads)
    for (row, _, tile), (own, first_row), span in places:
        assert span == geometry.row_spans()[row]
        assert own == span.query_begin // 128 + tile
        # The buffer row of the first query, which stands ``own`` blocks behind the batch row's first token.
        assert first_row + geometry.query_offset == span.start + own * 128


def test_turns_without_queries_are_passed_over():
    """Each turn with queries is drawn once, by whichever program asks; then there are no more. Of a head's empty turns hardly
    more than the first is drawn."""
    heads, ranges = 2, torch.tensor([[100, 900], [0, 150], [300, 300]], dtype=torch.int32)
    geometry = PrefillGeometry(3, 700, 900, 200, 128, ranges)
    tiles = geometry.query_blocks
    shape = (heads, 3 * heads, tiles, 0, 200, 900, 900)
    counter = TurnCounter()
    counts = {(row * heads + head) * tiles + tile: 1 for row in range(3) for head in range(heads) for tile in range(tiles)}

    def place(number, *_):
        return place_of(geometry, heads, number)

    turns_of = as_python(turns.turns_of)
    is_empty = as_python(turns._is_empty, place_of=place, turns_of=turns_of, **CONSTANTS)
    gl = SimpleNamespace(**vars(GL), load=lambda row, mask, other: counts[row] if mask else other)
    length = as_python(turns._list_length, gl=gl, place_of=place)
    gl.cdiv, gl.atomic_max = lambda a, b: -(-a // b), TurnCounter.pass_over
    after_empty = as_python(turns._after_empty, gl=gl, place_of=place, **CONSTANTS)
    draw = as_python(
        turns.draw_turn, gl=gl, _list_length=length, _is_empty=is_empty, _after_empty=after_empty, turns_of=turns_of,
        next_number=TurnCounter.next, **CONSTANTS,
    )  # fmt: skip
    drawn = []
    while (found := draw(counter.next(), shape, None, counter, 0, True)) != (-1, 0):
        assert found[1] == 1
        drawn.append(place(found[0])[0])
    visible = geometry.visible_counts(torch.device("cpu"))
    expected = [(b, h, t) for b in range(3) for h in range(heads) for t in range(tiles) if visible[b, t] > 0]
    assert 0 < len(expected) < 3 * heads * tiles
    assert sorted(drawn) == expected
    # A head's turns are two runs, of the long ones and of the others, and each has at most one run of empty ones.
    assert counter.drawn <= len(expected) + 2 * 3 * heads + 1
    assert 2 * 3 * heads < 3 * heads * tiles - len(expected)
    # A program that asks long after the last turn must not read behind the row spans.
    assert draw(999, shape, None, counter, 0, True) == (-1, 0)


def test_what_is_announced_of_a_turn_is_what_is_read():
    ranges = torch.tensor([[100, 900], [0, 450]], dtype=torch.int32)
    geometry = PrefillGeometry(2, 700, 900, 200, 128, ranges)
    opened = []
    mbarrier = SimpleNamespace(arrive=lambda barrier, count: opened.append(barrier.place), wait=lambda *_: None)
    names = {**CONSTANTS, "gl": SimpleNamespace(**vars(GL), **OF_TENSORS), "mbarrier": mbarrier}
    names["_read"] = as_python(turns._read, **names)
    announce, await_turn, steps_of, target_of = (
        as_python(function, **names) for function in (turns.announce, turns.await_turn, turns.steps_of, turns.target_of)
    )
    announcements = Shared([None] * CONSTANTS["ANNOUNCEMENTS"] * CONSTANTS["_FACTS"])
    turn_full = Shared([None] * CONSTANTS["ANNOUNCEMENTS"])
    of_turns = {turn: place_of(geometry, 3, 7 * turn) for turn in range(4)}
    for turn, place in of_turns.items():
        announce(announcements, turn_full, turn, 7 * turn, 10 + turn, 20 + turn, place)
    assert opened == [0, 1, 2, 3]
    for turn, ((row, head, _), (own, first_row), span) in of_turns.items():
        assert await_turn(announcements, turn_full, turn) == 7 * turn
        assert steps_of(announcements, turn) == (10 + turn, 20 + turn, span.key_end - own * 128)
        first_query, end_query = span.query_begin - own * 128, span.query_end - own * 128
        assert target_of(announcements, turn) == (7 * turn, row, head, first_row, first_query, end_query)


@pytest.mark.parametrize("listed", [1, 2, 7])
def test_lists_are_walked_up_and_down_in_turn(listed):
    """Every entry but the last, which is computed first, once; down in every other run of 128 query blocks."""
    direction_of = as_python(turns.direction_of, **CONSTANTS)
    for own in (0, 127, 128, 255, 256, 1000):
        first, step = direction_of(own, listed)
        entries = [first + i * step for i in range(listed - 1)]
        assert entries == sorted(range(listed - 1), reverse=own // 128 % 2 == 1)


def test_turns_noted_by_either_warpgroup_are_drawn_again():
    """Latest first, one that both noted once; what nobody noted is never read."""
    heads, tiles = 3, 7
    shape = (heads, heads, tiles, 0, 0, 896, 896)
    retakes = {}

    def load(address, mask, other):
        table, place = address
        return table[place] if mask else other

    class Pointer:
        def __init__(self, table, place=0):
            self.table, self.place = table, place

        def __add__(self, places):
            return Pointer(self.table, self.place + places)

        def __iter__(self):
            return iter((self.table, self.place))

    def store(pointer, value):
        pointer.table[pointer.place] = value

    gl = SimpleNamespace(**vars(GL), load=load, store=store, **OF_TENSORS)
    note = as_python(turns.note_retake, gl=gl)
    length = as_python(
        turns._list_length, gl=gl, place_of=lambda number, *_: ((0, number // tiles, number % tiles), None, None)
    )
    draw = as_python(turns.draw_retake, gl=gl, _list_length=length, **CONSTANTS)
    taken, unkept = [0, 4, 5, 11, 20], ({4, 0, 5}, {20, 5})
    noted = [-1, -1]
    for number in taken:
        for warpgroup in range(2):
            is_kept = int(number not in unkept[warpgroup])
            note(Pointer(retakes), Shared(noted), warpgroup, number, is_kept)
    counts = Pointer(dict(enumerate(range(100, 100 + heads * tiles))))
    drawn, noted = [], tuple(noted)
    while True:
        number, listed, noted = draw(noted, shape, None, Pointer(retakes), counts, False)
        if number < 0:
            assert listed == 0
            break
        assert listed == 100 + number
        drawn.append(number)
    assert drawn == [20, 5, 4, 0]
