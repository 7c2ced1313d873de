"""What only the memory twin can show: exact times, partitions, frozen peers, damaged frames, traces."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest
import uvloop
from transport_world import ANYBODY, ROOM, Note, echo

from shoal.protocol import virtual_time
from shoal.protocol.errors import (
    FrameInvalid,
    PeerSilent,
    PeerUnreachable,
    ShoalError,
    StreamBroken,
    UsageError,
)
from shoal.protocol.framing import FrameKind, kind_of
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.limits import ABORT_AFTER_S, CONNECT_S, KEEPALIVE_ANSWER_S, KEEPALIVE_S, SUSPECT_AFTER_S
from shoal.protocol.memory_transport import Link, MemoryNetwork, MemoryTransport
from shoal.protocol.transport import Channel, Stream, call

ALICE, BOB, CAROL = PeerId("alice"), PeerId("bob"), PeerId("carol")
TRAINER = frozenset({Role.TRAINER})


def now() -> float:
    return asyncio.get_running_loop().time()


class World:
    """Alice, Bob and Carol, who all echo; `silence` answers nothing and `stream` sends 64 MiB."""

    def __init__(self, link: Link | None = None, seed: int = 1) -> None:
        self.network = MemoryNetwork(seed, link)
        self.alice, self.bob, self.carol = (self.peer(peer) for peer in (ALICE, BOB, CAROL))
        self.troubles: list[tuple[float, PeerId, type[ShoalError]]] = []
        self.alice.on_trouble = lambda peer, error: self.troubles.append((now(), peer, type(error)))

    def peer(self, peer: PeerId) -> MemoryTransport:
        transport = self.network.transport(peer, TRAINER)
        for method, handler in (("echo", echo), ("silence", silence), ("stream", pour)):
            transport.serve(method, handler, ANYBODY)
        return transport

    async def __aenter__(self) -> World:
        for transport in (self.alice, self.bob, self.carol):
            await transport.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        for transport in (self.alice, self.bob, self.carol):
            await transport.close()


async def silence(stream: Stream) -> None:
    await asyncio.Event().wait()


async def pour(stream: Stream) -> None:
    await stream.send(Note(1), bytes(ROOM))


async def ask(world: World, peer: PeerId = BOB, timeout_s: float = 1000.0) -> None:
    await call(world.alice, peer, "echo", Note(1), Note, timeout_s=timeout_s)


async def drain(world: World, method: str = "stream") -> None:
    async with world.alice.open(BOB, method, Channel.BULK) as stream:
        await stream.receive(Note, max_payload_bytes=ROOM)


async def flood(world: World, method: str = "silence") -> None:
    async with world.alice.open(BOB, method, Channel.BULK) as stream:
        await stream.send(Note(1), bytes(ROOM))


def test_latency_and_bandwidth_are_what_the_link_says() -> None:
    async def main() -> None:
        async with World(Link(latency_s=0.05, bytes_per_s=1e6)) as world:
            await ask(world)  # the handshake
            begun = now()
            await ask(world)
            assert now() - begun == pytest.approx(0.1, abs=0.005)
            begun = now()
            await call(
                world.alice,
                BOB,
                "echo",
                Note(1),
                Note,
                timeout_s=99,
                payload=bytes(2_000_000),
                max_payload_bytes=ROOM,
            )
            assert now() - begun == pytest.approx(4.1, abs=0.6)  # windows cost some round trips
            world.network.set_link(ALICE, BOB, Link(latency_s=1.0))
            begun = now()
            await ask(world)
            assert now() - begun == pytest.approx(2.0, abs=0.1)

    virtual_time.run(main)


def test_it_runs_on_uvloop() -> None:
    """Its timers are rounded to milliseconds, and may fire before their time."""

    async def main() -> None:
        async with World(Link(latency_s=0.0002, bytes_per_s=2e7)) as world, asyncio.timeout(10):
            for size in range(4096, 40_000, 1000):  # on the wire for 0.2 to 2 ms
                await call(
                    world.alice,
                    BOB,
                    "echo",
                    Note(1),
                    Note,
                    timeout_s=5,
                    payload=bytes(size),
                    max_payload_bytes=ROOM,
                )

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_loss_delays_and_loses_nothing() -> None:
    async def main() -> None:
        async with World(Link(latency_s=0.01, loss=0.3)) as world:
            async with world.alice.open(BOB, "echo") as stream:
                for number in range(100):
                    await stream.send(Note(number))
                for number in range(100):
                    assert (await stream.receive(Note)).header.number == number
            assert now() > 1.0

    virtual_time.run(main)


def test_a_slow_link_is_not_silent() -> None:
    """1 Mbit/s: 16 MiB take two minutes; frames shrink, so that bytes keep moving."""

    async def main() -> None:
        async with World(Link(latency_s=0.05, bytes_per_s=125_000)) as world:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(4):
                    tasks.create_task(
                        call(
                            *(world.alice, BOB, "echo", Note(1), Note),
                            timeout_s=2000,
                            payload=bytes(4 << 20),
                            max_payload_bytes=ROOM,
                            channel=Channel.BULK,
                        )
                    )
            assert now() > 120
            assert not world.troubles

    virtual_time.run(main)


def test_killed_peers_break_streams_at_once_on_both_sides() -> None:
    async def main() -> None:
        async with World() as world:
            loop = asyncio.get_running_loop()
            for victim, action in ((BOB, drain), (BOB, flood)):
                loop.call_later(0.02, world.network.kill, victim)
                begun = now()
                with pytest.raises(StreamBroken):
                    await action(world)
                assert now() - begun < 0.1
                with pytest.raises(PeerUnreachable, match="refused"):
                    await ask(world)
                world.bob = world.peer(BOB)
                await world.bob.start()
                await ask(world)
            cancelled = asyncio.Event()

            async def handler(stream: Stream) -> None:
                try:
                    await stream.receive(Note)
                finally:
                    cancelled.set()

            world.carol.serve("wait", handler, ANYBODY)
            async with world.bob.open(CAROL, "wait") as stream:
                await asyncio.sleep(1)
                world.network.kill(BOB)
                with pytest.raises(StreamBroken):
                    await stream.receive(Note)
            await cancelled.wait()

    virtual_time.run(main)


async def flood_echo(world: World) -> None:
    """Sends to somebody who does take it."""
    await flood(world, "echo")


@pytest.mark.parametrize("action", [drain, flood_echo])
@pytest.mark.parametrize(
    "fault", [lambda network: network.cut(ALICE, BOB), lambda network: network.freeze(BOB)]
)
def test_silence_inside_a_message_is_noticed_and_then_given_up(
    fault: Callable[[MemoryNetwork], None], action: Callable[[World], Awaitable[None]]
) -> None:
    async def main() -> None:
        async with World(Link(latency_s=0.01, bytes_per_s=1e7)) as world:
            asyncio.get_running_loop().call_later(0.5, fault, world.network)
            with pytest.raises(PeerSilent):
                await action(world)
            suspected, given_up = world.troubles
            assert suspected[1:] == given_up[1:] == (BOB, PeerSilent)
            assert 0.5 <= suspected[0] <= 0.5 + SUSPECT_AFTER_S + 0.5
            assert given_up[0] - suspected[0] == pytest.approx(ABORT_AFTER_S - SUSPECT_AFTER_S)

    virtual_time.run(main)


def test_a_cut_that_heals_in_time_costs_only_time() -> None:
    async def main() -> None:
        async with World(Link(latency_s=0.01, bytes_per_s=1e7)) as world:
            loop = asyncio.get_running_loop()
            loop.call_later(0.5, world.network.cut, ALICE, BOB)
            loop.call_later(3.5, world.network.heal, ALICE, BOB)
            await drain(world)
            assert [error for _, _, error in world.troubles] == [PeerSilent]  # suspected, not given up
            await ask(world, CAROL)

    virtual_time.run(main)


def test_idle_streams_over_a_cut_are_broken_by_keepalive() -> None:
    async def main() -> None:
        async with World() as world:
            async with world.alice.open(BOB, "silence") as stream:
                await asyncio.sleep(0.1)
                begun = now()
                world.network.freeze(BOB)
                with pytest.raises(StreamBroken, match="keepalive"):
                    await stream.receive(Note)
                assert now() - begun == KEEPALIVE_S + KEEPALIVE_ANSWER_S
            world.network.thaw(BOB)
            await ask(world)

    virtual_time.run(main)


def test_nobody_can_dial_across_a_cut_and_all_can_after_it() -> None:
    async def main() -> None:
        async with World() as world:
            world.network.cut(ALICE, BOB)
            with pytest.raises(PeerUnreachable, match="no answer"):
                await ask(world)
            assert now() == CONNECT_S
            await ask(world, CAROL)
            world.network.heal(ALICE, BOB)
            await ask(world)
            world.network.cut(BOB, ALICE, one_way=True)
            with pytest.raises(PeerSilent):
                await ask(world, timeout_s=3.0)

    virtual_time.run(main)


@pytest.mark.parametrize(
    ("kind", "damage", "error"),
    [
        (FrameKind.DATA, lambda frame: frame[:-1] + bytes((frame[-1] ^ 1,)), FrameInvalid),
        (FrameKind.DATA, lambda frame: frame[:-1], FrameInvalid),
        (FrameKind.DATA, lambda frame: None, FrameInvalid),
        (FrameKind.HEAD, lambda frame: b"", FrameInvalid),
        (FrameKind.END, lambda frame: None, StreamBroken),
    ],
)
def test_damaged_and_lost_frames_are_never_taken_for_whole_messages(
    kind: FrameKind, damage: Callable[[bytes], bytes | None], error: type[ShoalError]
) -> None:
    async def main() -> None:
        async with World() as world:

            def tamper(sender: PeerId, receiver: PeerId, method: str, frame: bytes) -> bytes | None:
                return damage(frame) if sender == BOB and kind_of(frame) is kind else frame

            world.network.tamper = tamper
            async with world.alice.open(BOB, "stream") as stream:
                if kind is FrameKind.END:
                    await stream.receive(Note, max_payload_bytes=ROOM)
                with pytest.raises(error):
                    await stream.receive(Note, max_payload_bytes=ROOM)
            assert [raised for _, _, raised in world.troubles] == [error]

    virtual_time.run(main)


def test_what_nobody_reads_is_bounded() -> None:
    async def main() -> None:
        async with World() as world:
            with pytest.raises(PeerSilent):
                await flood(world)
            assert world.alice.counters().bytes_out["silence"] < 3 << 20

    virtual_time.run(main)


def test_a_name_is_on_the_network_once() -> None:
    async def main() -> None:
        async with World() as world:
            with pytest.raises(UsageError):
                world.network.transport(BOB)
            await world.bob.close()
            world.bob = world.peer(BOB)
            await world.bob.start()
            await ask(world)

    virtual_time.run(main)


async def churn(world: World, rng: random.Random) -> None:
    """Calls, floods and faults by chance."""

    async def caller(number: int) -> None:
        for _ in range(10):
            await asyncio.sleep(rng.random())
            with contextlib.suppress(ShoalError):
                size = rng.randrange(3 << 20)
                peer = rng.choice((BOB, CAROL))
                await call(
                    *(world.alice, peer, "echo", Note(number), Note),
                    timeout_s=3 * rng.random(),
                    payload=bytes(size),
                    max_payload_bytes=ROOM,
                )

    async def vandal() -> None:
        for _ in range(10):
            await asyncio.sleep(rng.random())
            freeze = rng.random() < 0.5
            if freeze:
                world.network.freeze(CAROL)
            else:
                world.network.cut(ALICE, BOB)
            await asyncio.sleep(rng.random())
            if freeze:
                world.network.thaw(CAROL)
            else:
                world.network.heal(ALICE, BOB)

    async with asyncio.TaskGroup() as tasks:
        for number in range(5):
            tasks.create_task(caller(number))
        tasks.create_task(vandal())


def trace(seed: int) -> str:
    async def main() -> str:
        async with World(Link(latency_s=0.02, bytes_per_s=1e7, loss=0.02), seed) as world:
            await churn(world, random.Random(seed))
            return world.network.trace_digest()

    return virtual_time.run(main)


def test_the_same_seed_gives_the_same_trace_in_every_process() -> None:
    seed = 7
    print("seed", seed)
    program = f"import test_memory_transport as t; print(t.trace({seed}))"
    digests = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.path.dirname(__file__)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    ]
    assert digests == [trace(seed)] * 2
    assert trace(seed + 1) != digests[0]
