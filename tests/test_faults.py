"""Fault points: what an armed point does to a message and its stream, what may be armed, and by whom."""

from __future__ import annotations

import ast
import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from transport_world import ANYBODY, Note, OtherNote

import shoal.dht
import shoal.node
import shoal.protocol
import shoal.training
from shoal.protocol import faults, wire
from shoal.protocol.errors import StreamBroken, StreamEnded, UsageError
from shoal.protocol.faults import Action, Arming, Faults
from shoal.protocol.faulty_transport import FaultyTransport, corrupted, point
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.memory_transport import MemoryNetwork
from shoal.protocol.transport import Stream, Transport
from shoal.protocol.virtual_time import run
from shoal.training.outer.messages import Commit, Done, Tick

ALICE, BOB = PeerId("alice"), PeerId("bob")
STEP = faults.define("test.step")
MODULES = ("faults", "faulty_transport")


class World:
    """Alice sends, Bob takes it all down; both are wrapped."""

    def __init__(self, **blows: faults.Blow) -> None:
        self.faults = Faults(**blows)  # type: ignore[arg-type]
        network = MemoryNetwork(1)
        self.alice, self.bob = (
            FaultyTransport(network.transport(p, frozenset({Role.TRAINER})), self.faults)
            for p in (ALICE, BOB)
        )
        self.taken: list[tuple[int, bytes, float]] = []
        self.end: Exception | None = None
        self.over = asyncio.Event()
        self.bob.serve("take", self._take, ANYBODY)

    async def _take(self, stream: Stream) -> None:
        try:
            while True:
                message = await stream.receive(Note, max_payload_bytes=1000)
                now_s = asyncio.get_running_loop().time()
                self.taken.append((message.header.number, bytes(message.payload), round(now_s, 1)))
        except (StreamEnded, StreamBroken) as end:
            self.end = end
            raise
        finally:
            self.over.set()

    async def send(self, count: int = 3) -> None:
        """That many notes, and END."""
        await self.bob.start()
        async with self.alice.open(BOB, "take") as stream:
            for number in range(count):
                await stream.send(Note(number), bytes([number]) * 9)
            await asyncio.sleep(1.0)  # what is on its way when a stream breaks may be lost with it
        await self.over.wait()

    @property
    def numbers(self) -> list[int]:
        return [number for number, _, _ in self.taken]


def play(arming: str | None, scene: Callable[[World], Awaitable[None]], **blows: faults.Blow) -> World:
    """Run a scene with something armed."""

    async def main() -> World:
        world = World(**blows)
        if arming is not None:
            world.faults.arm(Arming.parse(arming))
        await scene(world)
        return world

    return run(main)


def test_nothing_happens_unless_armed() -> None:
    world = play(None, World.send)
    assert world.numbers == [0, 1, 2]
    assert isinstance(world.end, StreamEnded)
    assert not world.faults.struck


@pytest.mark.parametrize(
    ("arming", "passed"),
    [
        ("Note.sending kill", []),
        ("Note.sent kill", [0]),
        ("Note.received kill nth=2", [0]),
        ("Note.sending kill nth=3 who=alice remote=bob", [0, 1]),
    ],
)
def test_a_blow_strikes_at_its_point_and_once(arming: str, passed: list[int]) -> None:
    blown: list[PeerId] = []

    async def blow(peer: PeerId) -> None:
        blown.append(peer)
        await asyncio.sleep(1.0)  # everything sent before has arrived
        assert world_of[0].numbers == passed

    world_of: list[World] = []

    async def scene(world: World) -> None:
        world_of.append(world)
        await world.send()

    world = play(arming, scene, kill=blow)
    assert blown == [BOB if "received" in arming else ALICE]
    assert world.numbers == [0, 1, 2]
    assert [str(arming) for arming, _ in world.faults.struck] == [arming]


def test_an_arming_for_another_peer_is_not_counted() -> None:
    world = play("Note.sending drop who=bob", World.send)
    assert world.numbers == [0, 1, 2]


@pytest.mark.parametrize("place", faults.PLACES)
def test_a_delay_holds_the_message_and_its_followers(place: str) -> None:
    world = play(f"Note.{place} delay seconds=3.0 nth=2", World.send)
    assert world.numbers == [0, 1, 2]
    times = [at_s for _, _, at_s in world.taken]
    assert times == ([0.0, 0.0, 3.0] if place == "sent" else [0.0, 3.0, 3.0])


def test_a_receive_cancelled_in_a_delay_loses_nothing() -> None:
    async def main() -> None:
        world = World()
        world.faults.arm(Arming("Note.received", Action.DELAY, seconds=3.0))
        got = []

        async def take(stream: Stream) -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.0):
                    await stream.receive(Note, max_payload_bytes=10)
            got.append((await stream.receive(Note, max_payload_bytes=10)).header.number)
            world.over.set()

        world.bob.serve("patient", take, ANYBODY)
        await world.bob.start()
        async with world.alice.open(BOB, "patient") as stream:
            await stream.send(Note(7))
            await world.over.wait()
        assert got == [7]

    run(main)


@pytest.mark.parametrize(("place", "before"), [("sending", [0]), ("sent", [0, 1])])
def test_what_follows_a_lost_message_is_lost_too_and_the_stream_breaks(place: str, before: list[int]) -> None:
    async def scene(world: World) -> None:
        with pytest.raises(StreamBroken, match="lost on the way"):
            await world.send()
        await world.over.wait()

    world = play(f"Note.{place} drop nth=2", scene)
    assert world.numbers == before
    assert not isinstance(world.end, StreamEnded)


def test_a_message_lost_on_arrival_leaves_its_receiver_waiting() -> None:
    async def scene(world: World) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60.0):
                await world.send()

    world = play("Note.received drop nth=2", scene)
    assert world.numbers == [0]


def test_a_handler_that_lost_something_breaks_its_stream() -> None:
    async def main() -> None:
        world = World()
        world.faults.arm(Arming.parse("OtherNote.sending drop"))

        async def answer(stream: Stream) -> None:
            await stream.send(OtherNote(1))

        world.bob.serve("answer", answer, ANYBODY)
        await world.bob.start()
        async with world.alice.open(BOB, "answer") as stream:
            with pytest.raises(StreamBroken):
                await stream.receive(OtherNote)

    run(main)


@pytest.mark.parametrize("place", ["sending", "received"])
def test_a_corrupt_payload_passes_the_checksums_and_is_another(place: str) -> None:
    world = play(f"Note.{place} corrupt nth=2", World.send)
    assert world.numbers == [0, 1, 2]
    payloads = [payload for _, payload, _ in world.taken]
    assert payloads[0] == b"\0" * 9 and payloads[2] == b"\2" * 9
    assert payloads[1] != b"\1" * 9 and len(payloads[1]) <= 9


@pytest.mark.parametrize("seed", range(20))
def test_corruption_changes_something_that_can_be_sent_and_follows_its_seed(seed: int) -> None:
    whole: list[tuple[object, bytes]] = [
        *((Note(3, "x"), b"12345678"), (Commit(), b"abcdefg")),
        *((Note(3, "x"), b""), (Done(5, bytes(32)), b""), (Tick(), b"")),
    ]
    for header, payload in whole:
        damaged = corrupted(header, payload, random.Random(seed))
        assert (damaged[0], bytes(damaged[1])) != (header, payload)
        assert damaged == corrupted(header, payload, random.Random(seed))
        wire.encode(damaged[0])


@pytest.mark.parametrize(
    "text",
    [
        *("", "Note.sending", "Note.sending explode", "kill", "Nobody.sending kill", "Note.after kill"),
        *("Note kill", "Note.sending.sent kill", "no.step kill", "Seat kill"),
        *("Note.sending kill nth=0", "Note.sending kill nth=x", "Note.sending kill nth=-1"),
        *("Note.sending kill nth=1 nth=2", "Note.sending kill often=1", "Note.sending kill who="),
        *("Note.sending delay", "Note.sending delay seconds=0", "Note.sending delay seconds=nan"),
        *("Note.sending delay seconds=601", "Note.sending kill seconds=1", "Note.sending delay seconds=inf"),
        *("Note.sent corrupt", f"{STEP} drop", f"{STEP} corrupt", "Note.sending kill nth"),
        "Note.sending kill nth=99999999",
    ],
)
def test_what_is_no_arming_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Arming.parse(text)


@pytest.mark.parametrize(
    "arming",
    [
        Arming("Note.sending", Action.KILL),
        Arming("Note.received", Action.DELAY, 3, 0.25, ALICE, BOB),
        Arming(STEP, Action.FREEZE, 1_000_000),
    ],
)
def test_an_arming_is_what_its_text_says(arming: Arming) -> None:
    assert Arming.parse(str(arming)) == arming


def test_a_step_strikes_only_at_a_wrapped_transport() -> None:
    struck: list[PeerId] = []

    async def blow(peer: PeerId) -> None:
        struck.append(peer)

    async def main() -> None:
        armed = Faults(kill=blow)
        armed.arm(Arming.parse(f"{STEP} kill"))
        bare: Transport = MemoryNetwork(1).transport(BOB)
        await point(bare, STEP)
        assert not struck
        await point(FaultyTransport(bare, armed), STEP)
        assert struck == [BOB]

    run(main)


def test_a_blow_is_told_before_it_strikes_and_needs_a_permit() -> None:
    story: list[str] = []

    async def blow(peer: PeerId) -> None:
        story.append(f"struck {peer}")

    async def main() -> None:
        armed = Faults(
            kill=blow,
            permit=lambda arming: arming.nth > 1,
            tell=lambda arming, peer: story.append(f"told {arming.nth}"),
        )
        for nth in (1, 2):
            armed.arm(Arming(STEP, Action.KILL, nth))
        await armed.passing(STEP, ALICE)
        await armed.passing(STEP, ALICE)

    run(main)
    assert story == ["told 2", "struck alice"]


@pytest.mark.parametrize("name", ["step", "Step.done", "a.b.c", "a b.c", "entry.Applied"])
def test_steps_have_names_that_no_message_has(name: str) -> None:
    with pytest.raises(UsageError):
        faults.define(name)


def test_nothing_in_shoal_can_be_armed() -> None:
    """Outside tests only the names of steps and the calls at them exist: no daemon wraps its transport."""
    allowed = {"define", "point"}
    folders = [Path(next(iter(p.__path__))) for p in (shoal.protocol, shoal.dht, shoal.training, shoal.node)]
    used = set()
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        if path.stem in MODULES:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.ImportFrom(module="shoal.protocol.faults" | "shoal.protocol.faulty_transport"):
                    used |= {alias.name for alias in node.names}
                case ast.ImportFrom() | ast.Import():
                    used |= {a.name for a in node.names if a.name.rpartition(".")[2] in MODULES}
    assert used <= allowed


def test_damaged_headers_stay_within_their_bounds() -> None:
    for seed in range(200):
        header, _ = corrupted(Note(2**53, "y"), b"", random.Random(seed))
        wire.encode(header)
