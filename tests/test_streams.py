"""Data streams whose driver is gone are adopted; by the log's positions nothing is read twice or skipped."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
import torch
from trainer_world import RandomFeed, Replica, TrainerWorld, round_spec

from shoal.dht.beats import Beat
from shoal.dht.liveness import Liveness
from shoal.dht.view import Member, SwarmView
from shoal.protocol import virtual_time
from shoal.protocol.identity import PeerId
from shoal.training.data.stream_book import Drawn, StreamBook
from shoal.training.streams import (
    ORPHAN_S,
    STREAMS_MOST,
    Reader,
    Streams,
    heir,
    orphans,
    own_stream,
    readers,
    unmet,
)

SLOWER = 10.0


class NotedFeed(RandomFeed):
    """Remembers what was drawn."""

    def __init__(self, world: TrainerWorld, number: int) -> None:
        super().__init__(world.spec, number)
        self.drawn: list[Drawn] = []

    async def next_batch(self) -> Drawn:
        batch = await super().next_batch()
        self.drawn.append(batch)
        return batch

    def starts(self, stream: int) -> list[int]:
        return [batch.start for batch in self.drawn if batch.stream == stream]


async def until_reads(feed: NotedFeed, stream: int, limit_s: float = 60.0) -> None:
    async with asyncio.timeout(limit_s):
        while not feed.starts(stream):
            await asyncio.sleep(0.1)


async def until_logged(replica: Replica, stream: int, beyond: int) -> None:
    async with asyncio.timeout(60.0):
        while replica.trainer.outer.positions()[stream] <= beyond:
            await asyncio.sleep(0.1)


def assert_tiled(world: TrainerWorld, dead: NotedFeed, adopter: NotedFeed, stream: int, logged: int) -> None:
    """What the dead one read up to the log's position, and the adopter from there on: all, and once."""
    each = world.spec.inner.micro_batch_sequences
    before = [start for start in dead.starts(stream) if start < logged]
    starts = before + adopter.starts(stream)
    assert sorted(starts) == list(range(0, each * len(starts), each))


def test_joiners_adopt_the_streams_of_the_dead_each_another_where_the_log_stands() -> None:
    async def main() -> None:
        async with TrainerWorld(round_spec(1), slower=SLOWER) as world:
            feeds = {number: NotedFeed(world, number) for number in range(5)}
            for number in range(3):
                await world.add(number, 0, feeds[number])
            await world.heights(4)
            await world.kill(1)
            await world.kill(2)
            survivor = world.replicas[0]
            await asyncio.sleep(3.0)
            logged = survivor.trainer.outer.positions()
            assert logged[1] > 0
            await asyncio.gather(world.add(3, 0, feeds[3]), world.add(4, 0, feeds[4]))
            await asyncio.gather(
                *(world.replicas[n].reach(survivor.trainer.outer.height + 6) for n in (3, 4))
            )
            taken = {next(iter(feeds[number].reads())): number for number in (3, 4)}
            assert taken.keys() == {1, 2}, "each another one"
            for stream, number in taken.items():
                assert_tiled(world, feeds[stream], feeds[number], stream, logged[stream])
                await until_logged(survivor, stream, logged[stream])
            assert feeds[0].reads().keys() == {0}

    virtual_time.run(main)


def test_a_survivor_reads_the_stream_of_a_dead_driver_in_turns_with_its_own() -> None:
    async def main() -> None:
        async with TrainerWorld(round_spec(1), slower=SLOWER) as world:
            feeds = [NotedFeed(world, number) for number in range(2)]
            for number, feed in enumerate(feeds):
                await world.add(number, 0, feed)
            await world.heights(3)
            await world.kill(1)
            survivor = world.replicas[0]
            await asyncio.sleep(3.0)
            logged = survivor.trainer.outer.positions()[1]
            await until_reads(feeds[0], 1)
            await until_logged(survivor, 1, logged)
            assert_tiled(world, feeds[1], feeds[0], 1, logged)
            assert feeds[0].reads().keys() == {0, 1}
            await asyncio.sleep(ORPHAN_S)
            returned = NotedFeed(world, 1)
            await world.add(1, 0, returned)
            await asyncio.sleep(10.0)
            assert returned.reads().keys().isdisjoint({0, 1}), "it finds its stream taken, and begins another"

    virtual_time.run(main)


# --- positions


def batch(stream: int, start: int) -> Drawn:
    return Drawn(torch.zeros(2, 3, dtype=torch.int64), stream, start, 2)


def test_a_position_is_up_to_where_all_samples_are_in_steps() -> None:
    book = StreamBook()
    book.read({7: 10})
    first, second, third = (batch(7, start) for start in (10, 12, 14))
    for drawn in (first, second, third):
        book.draw(drawn)
    assert book.at(0) == ((7, 10),)
    book.add(second.tokens, stepped=True)
    assert book.at(1) == ((7, 10),), "the first is still under way"
    book.add(first.tokens, stepped=False)
    assert book.at(1) == ((7, 10),), "in the gradient, in no step"
    book.add(third.tokens, stepped=True)
    assert book.at(2) == ((7, 16),)
    assert book.at(1) == ((7, 10),), "as of an earlier step"
    book.read({7: 0, 8: 4})
    assert book.at(2) == ((7, 16), (8, 4))


# --- who reads what


def test_streams_of_the_silent_are_theirs_until_they_are_given_up() -> None:
    def member(name: str, stream: int, **changes: object) -> Member:
        known = {"peer": PeerId(name), "stages": (0,), "beat": Beat(streams=(stream,)), **changes}
        return Member(**known)  # type: ignore[arg-type]

    silent = {"liveness": Liveness.GONE, "gone_s": 10.0, "heard_s": 5.0}
    view = SwarmView(
        PeerId("me"),
        20.0,
        (member("a", 1, heard_s=19.0), member("b", 2, **silent), member("c", 3, departed=True, **silent)),
    )
    logged = {1: 10, 2: 20, 3: 30, 4: 40}
    assert orphans(logged, readers(view, {}), ()) == [3, 4]
    later = SwarmView(PeerId("me"), 200.0, (member("a", 1, heard_s=199.0), *view.members[1:]))
    assert orphans(logged, readers(later, {}), (4,)) == [2, 3]


def test_who_is_no_neighbour_reads_what_it_read_in_the_log() -> None:
    """What was: it had no beat here, so its stream was taken for an orphan, and read twice."""
    logged_by = {n: PeerId(name) for n, name in enumerate(["known", "stale", "moved", "stranger", "dead"], 1)}
    stale = Member(peer=PeerId("stale"), stages=(0,), beat=Beat(streams=(9,)), heard_s=50.0)
    dead = Member(peer=PeerId("dead"), stages=(0,), liveness=Liveness.GONE, gone_s=90.0, departed=True)
    known, moved = Member(peer=PeerId("known"), stages=(0,)), Member(peer=PeerId("moved"), stages=(1,))
    logged = dict.fromkeys(range(1, 6), 10)
    view = SwarmView(PeerId("me"), 100.0, (dead, known, moved, stale))
    assert orphans(logged, readers(view, logged_by, list(logged_by.values())), ()) == [3, 4, 5]
    sampled = SwarmView(PeerId("me"), 100.0, view.members, {0: 300.0}, sampled=True)
    assert orphans(logged, readers(sampled, logged_by, list(logged_by.values())), ()) == [3, 5]


def test_an_unheard_driver_that_falls_silent_may_thaw_as_well() -> None:
    """What was: one whose record lapsed, or whom a call did not reach, lost its streams at once."""
    logged_by = {1: PeerId("known"), 2: PeerId("stale")}
    known = Member(peer=PeerId("known"), stages=(0,), liveness=Liveness.GONE, gone_s=90.0)
    stale = dataclasses.replace(known, peer=PeerId("stale"), beat=Beat(streams=(9,)), heard_s=5.0)
    for now_s, left in ((200.0, []), (220.0, [1, 2])):
        view = SwarmView(PeerId("me"), now_s, (known, stale))
        assert orphans({1: 10, 2: 10}, readers(view, logged_by), ()) == left


def test_a_newcomer_leaves_it_to_those_it_meets_whose_streams_are_orphaned() -> None:
    """What was: who joined one side of a cut took a stream that the other side went on to read."""
    logged_by = {1: PeerId("here"), 2: PeerId("there"), 3: PeerId("dead")}
    dead = Member(peer=PeerId("dead"), stages=(0,), liveness=Liveness.GONE, gone_s=90.0, departed=True)
    here = Member(peer=PeerId("here"), stages=(0,), heard_s=99.0, beat=Beat(streams=(1,)))
    view = SwarmView(PeerId("me"), 100.0, (dead, here))
    last = list(logged_by.values())
    assert unmet(view, logged_by, last) == {"there"}
    assert orphans(dict.fromkeys(logged_by, 9), readers(view, logged_by, last, {PeerId("there")}), ()) == [3]
    alone = SwarmView(PeerId("me"), 100.0, (dead,))
    assert not unmet(alone, logged_by, last), "nobody else would take them"


def test_an_orphan_has_one_heir_and_nobody_reads_more_than_an_entry_can_name() -> None:
    a, b = Reader(PeerId("a"), (1, 2)), Reader(PeerId("b"), (3,))
    assert heir(9, [a, b]) == heir(9, [b, a]) == "b"
    full = Reader(PeerId("b"), tuple(range(STREAMS_MOST)))
    assert heir(9, [a, full]) == "a"
    assert not heir(9, [full])
    own = own_stream(PeerId("a"), {})
    assert own_stream(PeerId("a"), {own: 1}) != own


@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_who_moved_an_orphan_last_takes_it_back(name: str) -> None:
    """A driver that had adopted a stream comes back and claims its own. What was: another one was the heir,
    one that does not hear it and so took it for the reader still, and nobody read the stream."""
    me, claimed = PeerId(name), list[tuple[int, ...]]()

    async def main() -> None:
        streams = Streams(
            me,
            1,
            lambda: [Reader(PeerId(other), (number,)) for number, other in enumerate("wxyz", 10)],
            lambda: {1: 100, 2: 50},
            lambda: {1: me, 2: me},
            lambda positions: claimed.append(tuple(positions)),
            lambda kind, data: None,
        )
        streams.begin()
        task = asyncio.create_task(streams.run())
        await asyncio.sleep(ORPHAN_S + 10.0)
        task.cancel()

    virtual_time.run(main)
    assert claimed == [(1,), (1, 2)]
