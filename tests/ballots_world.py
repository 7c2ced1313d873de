"""A leader that a test speaks for, line by line."""

from __future__ import annotations

from outer_world import Node, World

from shoal.protocol.identity import PeerId, Role
from shoal.protocol.transport import Stream, Transport
from shoal.training.outer.entry import ENTRY_BYTES, Entry, Seat, parse
from shoal.training.outer.line import LEADER_SILENCE_S, lifeline
from shoal.training.outer.messages import Answer, Commit, Go, Gone, Prepare, Tick

FIRST, SECOND = (PeerId(name.ljust(52, "z")) for name in ("12D3KooWleaderA", "12D3KooWleaderB"))


async def leader(world: World, name: PeerId) -> Transport:
    transport = world.network.transport(name, frozenset({Role.TRAINER}))
    await transport.start()
    return transport


async def mute(stream: Stream) -> None:
    """A member's end of a round: it answers, ticks, and sends nothing else."""
    async with lifeline(stream, LEADER_SILENCE_S) as line:
        offer = parse(bytes((await line.receive(Prepare, max_payload_bytes=ENTRY_BYTES)).payload))
        line.post(Answer(offer.height - 1, 0, 0, 0, 0.0, ()), b"")
        while True:
            await line.receive(Go, Gone, Commit, max_payload_bytes=ENTRY_BYTES)


async def ask(transport: Transport, node: Node, ballot: int) -> Answer:
    """A PREPARE for the member's next height; hangs up once it is answered."""
    async with transport.open(node.name, "outer.0.round") as stream:
        return await prepare(stream, transport.me, node, ballot)


async def prepare(stream: Stream, leader: PeerId, node: Node, ballot: int) -> Answer:
    """The same on a stream of the caller's."""
    offer = offer_of(leader, node, ballot)
    await stream.send(Prepare(offer.height, offer.previous, ballot), offer.encode())
    while True:
        answer = (await stream.receive(Answer, Tick, max_payload_bytes=2 * ENTRY_BYTES)).header
        if isinstance(answer, Answer):
            return answer


def offer_of(leader: PeerId, node: Node, ballot: int) -> Entry:
    """What it carries."""
    seats = Seat(node.name, node.incarnation, 1.0), Seat(leader, 1, 1.0)
    return Entry(
        stage=0,
        height=node.outer.height + 1,
        previous=node.outer.head,
        ballot=ballot,
        leader=leader,
        revision=0,
        fragment=0,
        roster=tuple(sorted(seats, key=lambda seat: seat.peer)),
        contributors=(),
        first_stage_head=b"",
        contribution="float32",
        published="float32",
    )
