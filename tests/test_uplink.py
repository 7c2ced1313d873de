"""The upload limit and the measured uplink: what a peer sends in bulk, on virtual links and on loopback."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest
from transport_world import ANYBODY, ROOM, Note, Run, echo, play_run

from shoal.protocol import virtual_time
from shoal.protocol.errors import ShoalError, StreamEnded, UsageError
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.limits import KIB, LEAST_FRAME_BYTES, LEAST_UPLOAD_BYTES_PER_S, MIB
from shoal.protocol.memory_transport import Link, MemoryNetwork, MemoryTransport
from shoal.protocol.transport import Channel, Stream, call
from shoal.protocol.uplink import BURST_S, DECAY, WINDOW_S, Place, Uplink

ME = PeerId("me")
MBIT = 1e6 / 8
QUICK = Link(latency_s=0.01, bytes_per_s=1e9)


def now() -> float:
    return asyncio.get_running_loop().time()


async def swallow(stream: Stream) -> None:
    """Takes everything."""
    while True:
        try:
            await stream.receive(Note, max_payload_bytes=ROOM)
        except StreamEnded:
            return


async def pour(stream: Stream) -> None:
    """Answers with as many bytes as it is asked for."""
    size = (await stream.receive(Note)).header.number
    await stream.send(Note(0), bytes(size))


class World:
    """This peer, with or without a limit, and others that take what it sends."""

    def __init__(self, limit_bytes_per_s: float | None = None, others: int = 3, link: Link = QUICK) -> None:
        self.network = MemoryNetwork(1, link)
        self.me = self.network.transport(ME, frozenset({Role.TRAINER}), upload_bytes_per_s=limit_bytes_per_s)
        self.others = [self.network.transport(PeerId(f"other{n}")) for n in range(others)]
        self.troubles: list[ShoalError] = []
        self.frames: list[tuple[float, PeerId, int]] = []  # (loop time, receiver, bytes) sent
        self.network.tamper = self._note
        for transport in (self.me, *self.others):
            transport.on_trouble = lambda _, error: self.troubles.append(error)
            for method, handler in (("swallow", swallow), ("echo", echo), ("tell", pour)):
                transport.serve(method, handler, ANYBODY)
            transport.serve("pour", pour, ANYBODY, Channel.BULK)

    def _note(self, sender: PeerId, receiver: PeerId, method: str, frame: bytes) -> bytes:
        if sender == ME and receiver != ME:
            self.frames.append((now(), receiver, len(frame)))
        return frame

    async def send(
        self, to: MemoryTransport, message_bytes: int, count: int = 1, channel: Channel = Channel.BULK
    ) -> float:
        """Messages one after the other on a stream of their own; returns when the last was taken."""
        async with self.me.open(to.me, "swallow", channel) as stream:
            for number in range(count):
                await stream.send(Note(number), bytes(message_bytes))
            return now()

    async def ask(self, to: MemoryTransport, channel: Channel) -> float:
        """Seconds for a small question and its answer."""
        begun_s = now()
        await call(self.me, to.me, "echo", Note(1), Note, timeout_s=999, channel=channel)
        return now() - begun_s

    def sent_bytes(self, receiver: PeerId | None = None, until_s: float = math.inf) -> int:
        return sum(n for at_s, peer, n in self.frames if receiver in (None, peer) and at_s <= until_s)

    def most_in_window(self, window_s: float = 10.0) -> int:
        """The most bytes that left within any window of that length."""
        most = first = inside = 0
        for at_s, _, size in self.frames:
            inside += size
            while self.frames[first][0] < at_s - window_s:
                inside -= self.frames[first][2]
                first += 1
            most = max(most, inside)
        return most


def play(world: World, scene: Callable[[], Coroutine[None, None, None]]) -> None:
    async def staged() -> None:
        for transport in (world.me, *world.others):
            await transport.start()
        await scene()
        for transport in (world.me, *world.others):
            await transport.close()

    virtual_time.run(staged())


@pytest.mark.parametrize("limit_bytes_per_s", [LEAST_UPLOAD_BYTES_PER_S, 2 * MBIT, 100 * MBIT])
def test_no_ten_seconds_carry_more_than_the_limit_and_none_of_it_is_wasted(limit_bytes_per_s: float) -> None:
    world = World(limit_bytes_per_s)

    async def scene() -> None:
        await asyncio.sleep(60.0)  # time that was not used is not made up for
        total = int(25 * limit_bytes_per_s)
        sizes = (total // 20, 50 * KIB, 9 * KIB)  # long, short and tiny messages, a stream each to everybody
        begun_s = now()
        async with asyncio.TaskGroup() as tasks:
            for to in world.others:
                for size in sizes:
                    tasks.create_task(world.send(to, size, max(1, total // 9 // size)))
        assert world.most_in_window() <= 1.05 * 10.0 * limit_bytes_per_s
        assert world.sent_bytes() >= 0.95 * limit_bytes_per_s * (now() - begun_s)
        assert not world.troubles

    play(world, scene)


def test_many_paced_streams_never_look_silent() -> None:
    """At the lowest limit a stream's fair share of 13 would be a frame every six seconds."""
    world = World(LEAST_UPLOAD_BYTES_PER_S, others=13)

    async def scene() -> None:
        async with asyncio.TaskGroup() as tasks:
            for to in world.others[:-1]:
                tasks.create_task(world.send(to, 8 * LEAST_FRAME_BYTES))
            for _ in range(8):  # messages of one frame go in between
                tasks.create_task(world.send(world.others[-1], LEAST_FRAME_BYTES, 10))
        assert not world.troubles
        assert world.sent_bytes() > 12 * 8 * LEAST_FRAME_BYTES

    play(world, scene)


def test_streams_share_the_limit_alike_and_a_small_message_waits_for_no_long_one() -> None:
    world = World(2 * MBIT)

    async def scene() -> None:
        one, two, three = world.others
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(world.send(one, 4 * MIB))
            tasks.create_task(world.send(two, 4 * MIB))
            await asyncio.sleep(5.0)
            assert await world.ask(three, Channel.BULK) < 1.0
        for at_s in range(2, 30):
            assert abs(world.sent_bytes(one.me, at_s) - world.sent_bytes(two.me, at_s)) < 40 * KIB

    play(world, scene)


def test_control_is_never_delayed_and_bulk_pays_for_it() -> None:
    world = World(2 * MBIT)

    async def scene() -> None:
        one, two, three = world.others
        await world.ask(three, Channel.CONTROL)  # the handshake
        alone_s = await world.ask(three, Channel.CONTROL)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(world.send(one, 4 * MIB))
            tasks.create_task(world.send(two, 4 * MIB))
            for _ in range(20):
                assert await world.ask(three, Channel.CONTROL) == pytest.approx(alone_s)
                await world.send(three, 20 * KIB, channel=Channel.CONTROL)
                await asyncio.sleep(0.3)
        assert world.sent_bytes(three.me) > 400 * KIB
        assert world.most_in_window() <= 1.05 * 10.0 * 2 * MBIT

    play(world, scene)


def test_answers_of_bulk_methods_are_paced_whatever_channel_the_caller_names() -> None:
    world = World(2 * MBIT)

    async def fetched_s(by: MemoryTransport, method: str, channel: Channel) -> float:
        begun_s, size = now(), 2 * MIB
        await call(
            *(by, ME, method, Note(size), Note), timeout_s=999, max_payload_bytes=size, channel=channel
        )
        return now() - begun_s

    async def scene() -> None:
        assert await fetched_s(world.me, "pour", Channel.BULK) < 1.0, "to oneself nothing is"
        for channel in Channel:
            assert await fetched_s(world.others[0], "tell", channel) < 1.0
            took_s = await fetched_s(world.others[0], "pour", channel)
            assert took_s == pytest.approx(2 * MIB / (2 * MBIT), rel=0.2)
            await asyncio.sleep(60.0)

    play(world, scene)


def test_a_cancelled_wait_costs_nobody_a_turn() -> None:
    async def scene() -> None:
        pacer = Uplink(MBIT).pacer
        assert pacer is not None
        async with asyncio.TaskGroup() as tasks:
            waits = [tasks.create_task(pacer.turn(int(MBIT), place)) for place in (*Place, *Place)]
            await asyncio.sleep(0.5)
            for wait in waits[1:-1]:
                wait.cancel()
        assert now() == pytest.approx(1.0, abs=BURST_S)

    virtual_time.run(scene)


@pytest.mark.parametrize("limit_bytes_per_s", [16_000.0, LEAST_UPLOAD_BYTES_PER_S - 1])
def test_a_limit_at_which_a_peer_would_look_dead_is_refused_by_name(limit_bytes_per_s: float) -> None:
    with pytest.raises(UsageError, match="--upload 600kbit"):
        Uplink(limit_bytes_per_s)
    Uplink(LEAST_UPLOAD_BYTES_PER_S)


# --- the measure


async def _busy(world: World, seconds: float, bytes_per_s: float) -> None:
    await world.send(world.others[0], int(bytes_per_s), int(seconds))


def test_the_uplink_is_what_the_link_carried_and_nothing_before() -> None:
    world = World(link=Link(0.01, 3e6))

    async def scene() -> None:
        assert world.me.uplink_bytes_per_s() is None
        await world.send(world.others[0], MIB)
        await asyncio.sleep(2 * WINDOW_S)
        assert world.me.uplink_bytes_per_s() is None, "a third of a second says too little"
        await _busy(world, 15.0, 3e6)
        assert world.me.uplink_bytes_per_s() == pytest.approx(3e6, rel=0.05)
        await asyncio.sleep(3600.0)
        await world.send(world.others[0], MIB)
        assert world.me.uplink_bytes_per_s() == pytest.approx(3e6, rel=0.05), "idle time says nothing"

    play(world, scene)


def test_the_limit_caps_what_is_measured() -> None:
    world = World(2 * MBIT)

    async def scene() -> None:
        await _busy(world, 25.0, 2 * MBIT)
        assert world.me.uplink_bytes_per_s() == pytest.approx(2 * MBIT, rel=0.02)
        assert (world.me.uplink_bytes_per_s() or 0.0) <= 2 * MBIT

    play(world, scene)


def test_a_faster_link_counts_at_once_and_a_slower_one_bit_by_bit() -> None:
    world = World(link=Link(0.01, 1e6))
    other = world.others[0].me

    async def scene() -> None:
        await _busy(world, 15.0, 1e6)
        world.network.set_link(ME, other, Link(0.01, 4e6))
        await _busy(world, 25.0, 4e6)
        assert world.me.uplink_bytes_per_s() == pytest.approx(4e6, rel=0.05)
        world.network.set_link(ME, other, Link(0.01, 1e6))
        await _busy(world, 10.5, 1e6)
        falling = world.me.uplink_bytes_per_s()
        assert falling is not None
        assert 4e6 - 3e6 * 2.5 * DECAY < falling < 4e6
        await _busy(world, 60 * WINDOW_S, 1e6)
        assert world.me.uplink_bytes_per_s() == pytest.approx(1e6, rel=0.1)

    play(world, scene)


def test_a_receiver_that_stands_still_is_not_held_against_the_uplink() -> None:
    world = World(link=Link(0.01, 1e6))
    other = world.others[0]

    async def scene() -> None:
        for _ in range(5):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(world.send(other, 3 * MIB))
                await asyncio.sleep(1.0)
                world.network.freeze(other.me)
                await asyncio.sleep(4.0)
                world.network.thaw(other.me)
            await asyncio.sleep(WINDOW_S)
            assert world.me.uplink_bytes_per_s() == pytest.approx(1e6, rel=0.1)

    play(world, scene)


# --- on loopback


def test_on_real_sockets_questions_and_answers_keep_to_the_limit(tmp_path: Path) -> None:
    limit_bytes_per_s, size = 1.0e6, 600_000

    async def scene(run: Run) -> None:
        paced = run.transport(upload_bytes_per_s=limit_bytes_per_s)
        for transport in (paced, other := run.transport()):
            transport.serve("swallow", swallow, ANYBODY)
            transport.serve("pour", pour, ANYBODY, Channel.BULK)
            transport.serve("tell", pour, ANYBODY)
            await transport.start()
            run.learn(transport)
        begun_s = now()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(
                call(
                    *(other, paced.me, "pour", Note(size), Note),
                    timeout_s=60,
                    max_payload_bytes=size,
                    channel=Channel.CONTROL,  # as it says
                )
            )
            async with paced.open(other.me, "swallow", Channel.BULK) as stream:
                await stream.send(Note(1), bytes(size))
        allowed_bytes = limit_bytes_per_s * (now() - begun_s + BURST_S) + 2 * LEAST_FRAME_BYTES
        assert 2 * size < sum(paced.counters().bytes_out.values()) <= allowed_bytes
        begun_s = now()
        await call(
            *(other, paced.me, "tell", Note(8 * size), Note),
            timeout_s=60,
            max_payload_bytes=8 * size,
            channel=Channel.CONTROL,
        )
        assert now() - begun_s < 8 * size / limit_bytes_per_s, "control does not wait"

    play_run(scene, tmp_path)
