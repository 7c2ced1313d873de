"""The log: canonical entries, a chain, and step intervals that tile (P4)."""

from __future__ import annotations

import dataclasses

import pytest

from shoal.protocol.errors import MessageInvalid, Stale
from shoal.protocol.identity import PeerId
from shoal.training.outer.entry import (
    SKIP,
    Contributor,
    Entry,
    Seat,
    StreamPosition,
    bitmap,
    entry_hash,
    parse,
    seats_in,
)
from shoal.training.outer.log import Log, genesis_state
from shoal.training.outer.parts import cut

A, B = (PeerId(name.ljust(52, "1")) for name in ("12D3KooWa", "12D3KooWb"))
PARTS = 3
FRAGMENTS = cut(PARTS * 256, 1024, 256)


def log() -> Log:
    return Log(genesis_state(bytes(32), 2), FRAGMENTS)


def row(seat: int, first: int, last: int, tokens: int = 10) -> Contributor:
    return Contributor(seat, first, last, tokens, 1.0, 1.0, (StreamPosition(seat, last),))


def entry(chain: Log, *rows: Contributor, skip: int | None = None) -> Entry:
    draft = Entry(
        stage=2,
        height=chain.height + 1,
        previous=chain.head,
        ballot=1,
        leader=A,
        revision=0,
        fragment=0,
        roster=(Seat(A, 7, 1.0, True), Seat(B, 8, 1.0, True)),
        contributors=rows,
        first_stage_head=b"",
        contribution="int8/256",
        published="int8/256",
    )
    listed = bitmap({r.seat for r in rows}, 2)
    results = [None if part == skip else (bytes([part + 1]) * 32, listed) for part in range(PARTS)]
    return draft.finish(results, chain.tokens)


def test_entries_chain_and_add_up() -> None:
    chain = log()
    for step in (2, 4, 9):
        previous = chain.head
        done = entry(
            chain, row(0, chain.end_of(A, 7)[0], step), row(1, chain.end_of(B, 8)[0], step + 1), skip=1
        )
        data = done.encode()
        assert parse(data) == done
        chain.append(data)
        assert chain.head == entry_hash(data) != previous
    assert (chain.height, chain.tokens, chain.quorum) == (3, 60, (A, B))
    assert chain.end_of(A, 7) == (9, 30)
    assert chain.end_of(B, 8) == (10, 30)
    assert chain.end_of(B, 9) == (0, 0), "a new process begins at nought"
    assert chain.positions() == {0: 9, 1: 10}
    assert done.digest(1) == SKIP


def test_a_state_carries_on_where_the_log_was() -> None:
    chain = log()
    chain.append(entry(chain, row(0, 0, 2)).encode())
    again = Log(chain.state(), FRAGMENTS)
    following = entry(chain, row(0, 2, 5), row(1, 0, 1)).encode()
    chain.append(following)
    again.append(following)
    assert again.state() == chain.state()


def test_a_state_that_tells_no_readers_stays_what_it_was() -> None:
    """Of a checkpoint, or of an older snapshot. What was: names without letters for all of its streams came
    in, and so the state of the same log had another root."""
    state = dataclasses.replace(genesis_state(bytes(32), 2), positions=(StreamPosition(4, 9),))
    assert Log(state, FRAGMENTS).state() == state
    chain = Log(state, FRAGMENTS)
    chain.append(entry(chain, row(0, 0, 2), row(1, 0, 1)).encode())
    assert chain.state().readers == ("", A, B)
    assert Log(chain.state(), FRAGMENTS).state() == chain.state()


@pytest.mark.parametrize(("first", "word"), [(1, "overlap"), (3, "gap"), (0, "overlap")])
def test_intervals_must_tile(first: int, word: str) -> None:
    chain = log()
    chain.append(entry(chain, row(0, 0, 2)).encode())
    with pytest.raises(MessageInvalid, match=word):
        chain.append(entry(chain, row(0, first, 6)).encode())
    assert chain.height == 1


def test_what_does_not_continue_the_chain_is_stale() -> None:
    chain = log()
    first = entry(chain, row(0, 0, 2))
    chain.append(first.encode())
    for other in (first, dataclasses.replace(entry(chain, row(0, 2, 4)), previous=bytes(32))):
        with pytest.raises(Stale):
            chain.append(other.encode())


def test_contributors_without_a_listed_part_do_not_appear() -> None:
    chain = log()
    draft = dataclasses.replace(entry(chain, row(0, 0, 2), row(1, 0, 2)), digests=b"", listed=b"", tokens=0)
    only_a = [(bytes([1]) * 32, bitmap({0}, 2)), None, None]
    done = draft.finish(only_a, 0)
    assert [r.seat for r in done.contributors] == [0]
    assert done.tokens == 10
    chain.append(done.encode())
    assert chain.end_of(B, 8) == (0, 0)


@pytest.mark.parametrize(
    "broken",
    [
        {"tokens": 11},
        {"stage": 1},
        {"digests": bytes(96)},  # SKIP, but listed
        {"listed": bytes(3)},  # a digest of nothing
        {"digests": bytes([9]) * 64, "listed": bytes([1, 1])},  # a part too few
    ],
)
def test_entries_that_contradict_themselves_are_refused(broken: dict[str, object]) -> None:
    chain = log()
    good = entry(chain, row(0, 0, 2))
    with pytest.raises(MessageInvalid):
        chain.append(dataclasses.replace(good, **broken).encode())  # type: ignore[arg-type]
    chain.append(good.encode())


@pytest.mark.parametrize("listed", [0b11, 0b10000001], ids=["who contributes nothing", "nobody's seat"])
def test_a_part_that_lists_whom_the_entry_does_not_is_refused_at_the_border(listed: int) -> None:
    """What was: entries of a rival chain are gone through before a log checks them, and a seat beyond the
    roster ended the replica."""
    good = entry(log(), row(0, 0, 2))
    forged = good.encode().replace(good.listed, bytes([listed] * 3))
    assert len(forged) == len(good.encode()) and parse(good.encode()) == good
    with pytest.raises(MessageInvalid):
        parse(forged)


def test_bytes_that_are_not_canonical_are_refused() -> None:
    data = entry(log(), row(0, 0, 2)).encode()
    with pytest.raises(MessageInvalid):
        parse(data + b"\xf8\x07\x01")  # a field that this version does not know


@pytest.mark.parametrize(
    "change",
    [
        {"roster": ()},
        {"leader": PeerId("12D3KooWz".ljust(52, "1"))},
        {"contributors": (row(1, 0, 1), row(0, 0, 1))},
    ],
)
def test_rosters_and_rows_out_of_order_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"roster|leader|contributors"):
        dataclasses.replace(entry(log(), row(0, 0, 2)), **change)  # type: ignore[arg-type]


def test_bitmaps_name_seats() -> None:
    assert seats_in(bitmap({0, 9, 1023}, 1024)) == {0, 9, 1023}
    assert len(bitmap(set(), 9)) == 2
