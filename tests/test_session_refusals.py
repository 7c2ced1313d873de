"""What a server of sessions refuses, with a typed error and nothing left behind; and what a client does."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest
from serving_world import GREEDY, PROMPT, World, reference, serving_spec

from shoal.protocol.errors import (
    Busy,
    MessageInvalid,
    MessageTooLarge,
    NotHere,
    ShoalError,
    Stale,
    StreamEnded,
    TokenRevoked,
    VersionRetired,
    WrongRole,
)
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.transport import Stream, Transport
from shoal.protocol.virtual_time import run
from shoal.training.methods import at_stage
from shoal.training.serving.admission import SESSIONS
from shoal.training.serving.messages import (
    ROWS,
    SESSION,
    OpenSession,
    RowsAttach,
    RowsChunk,
    RowsHave,
    SamplingOptions,
    SessionCut,
    SessionDraft,
    SessionOpened,
    SessionPulse,
    SessionRoute,
    SessionShow,
    SessionShown,
    SessionToken,
    TokenBias,
)
from shoal.training.serving.rows import CHUNK_ROWS

NAME = b"s" * 16
Said = Sequence[tuple[object, bytes]]
HEARD = (SessionOpened, SessionPulse, SessionToken, SessionCut, RowsHave)


def ids(*tokens: int) -> bytes:
    return np.array(tokens, np.int32).tobytes()


def hidden(count: int, value: float = 0.5, width: int = 16, tokens: Sequence[int] = PROMPT) -> bytes:
    """Positions from the prompt's begin on: tokens, and hidden states that are all the same number."""
    states = np.full((count, width), value, np.float32)
    return ids(*tokens[:count], *[1] * (count - len(tokens))) + states.tobytes()


def opening(**changes: object) -> OpenSession:
    fields: dict[str, object] = {"session": NAME, "stage": 0, "capacity": 64, "version": b"", **changes}
    return OpenSession(**fields)  # type: ignore[arg-type]


async def told(transport: Transport, peer: PeerId, method: str, said: Said) -> ShoalError:
    """How a stream on which these were said ends."""
    try:
        async with asyncio.timeout(5), transport.open(peer, method) as stream:
            for header, payload in said:
                await stream.send(header, payload)
            while True:
                await stream.receive(*HEARD)
    except TimeoutError:
        return StreamEnded("nothing was refused")
    except ShoalError as error:
        return error


OPENINGS: tuple[tuple[OpenSession, bytes, type[ShoalError], str], ...] = (
    (opening(stage=1), ids(*PROMPT), Stale, "this peer holds stage 0"),
    (opening(capacity=129), ids(*PROMPT), MessageInvalid, "this model takes 128"),
    (opening(), b"", MessageInvalid, "0 bytes are no tokens"),
    (opening(), ids(1, 2)[:-1], MessageInvalid, "7 bytes are no tokens"),
    (opening(), ids(1, 257), MessageInvalid, "outside the vocabulary"),
    (opening(), ids(1, -1), MessageInvalid, "outside the vocabulary"),
    (opening(capacity=5), ids(*PROMPT), MessageInvalid, "5 tokens come with a session of 5"),
    (opening(), bytes(4 * 129), MessageTooLarge, "are allowed"),
    (opening(version=b"x" * 32), ids(*PROMPT), VersionRetired, "is not kept here"),
    (
        opening(sampling=SamplingOptions(bias=(TokenBias(257, 1.0),))),
        ids(*PROMPT),
        MessageInvalid,
        "a bias lies outside",
    ),
)


SAID_LATER: tuple[tuple[object, str], ...] = (
    (SessionRoute(1, 0, PeerId("12D3KooWs0r0".ljust(52, "1"))), "after stage 0 comes not stage 0"),
    (
        SessionRoute(1, 0, PeerId("12D3KooWs0r0".ljust(52, "1")), beside=True),
        "after stage 0 comes not stage 0",
    ),
    (SessionDraft(4, ()), "a draft is empty"),
    (SessionDraft(4, (50, 257)), "outside the vocabulary"),
    (SessionDraft(60, (1, 2, 3, 4, 5)), "up to 65 leaves a session of 64"),
    (SessionDraft(1 << 20, (1,)), "leaves a session of 64"),
    (SessionShow((), 1), "0 positions are asked for"),
    (SessionShow((3, 64), 1), "2 positions are asked for, of 64"),
)


def test_sessions_that_do_not_fit_are_refused_and_leave_nothing() -> None:
    async def main() -> None:
        async with World(serving_spec(2), 1) as world:
            first = world.peers[0]
            for request, payload, kind, words in OPENINGS:
                error = await told(world.client, first.name, at_stage(0, SESSION), [(request, payload)])
                assert type(error) is kind, error
                assert words in str(error)
            for said, words in SAID_LATER:
                begun = (opening(), ids(*PROMPT))
                error = await told(world.client, first.name, at_stage(0, SESSION), [begun, (said, b"")])
                assert type(error) is MessageInvalid
                assert words in str(error)
            begun, draft = (opening(stage=1), ids(*PROMPT)), (SessionDraft(4, (50, 1)), b"")
            error = await told(world.client, world.peers[1].name, at_stage(1, SESSION), [begun, draft])
            assert type(error) is MessageInvalid
            assert "drafts are for the first stage" in str(error)
            assert not first.server.sessions
            assert first.server.status()["charged_bytes"] == 0
            assert await world.text() == reference(world)

    run(main, limit_s=60)


def test_sessions_are_for_those_who_may_infer_and_rows_for_those_who_serve() -> None:
    async def main() -> None:
        async with World(serving_spec(2), 1) as world:
            observer = world.network.transport(PeerId("observer"), frozenset({Role.OBSERVER}))
            await observer.start()
            server = world.peers[0].name
            for caller, method in (
                (observer, at_stage(0, SESSION)),
                (observer, at_stage(0, ROWS)),
                (world.client, at_stage(0, ROWS)),
            ):
                error = await told(caller, server, method, [])
                assert type(error) is WrongRole, error

    run(main, limit_s=60)


def test_a_name_that_is_taken_is_refused() -> None:
    async def main() -> None:
        async with (
            World(serving_spec(2), 1) as world,
            world.client.open(world.peers[0].name, at_stage(0, SESSION)) as stream,
        ):
            await stream.send(opening(), ids(*PROMPT))
            await stream.receive(SessionOpened)
            error = await told(
                world.client, world.peers[0].name, at_stage(0, SESSION), [(opening(), ids(*PROMPT))]
            )
            assert type(error) is Busy
            assert len(world.peers[0].server.sessions) == 1

    run(main, limit_s=60)


ATTACH = RowsAttach(NAME, 3, 1)
FEEDINGS: tuple[tuple[Said, type[ShoalError], str], ...] = (
    ([(RowsAttach(b"t" * 16, 3, 1), b"")], NotHere, "no such session"),
    ([(RowsAttach(NAME, 3, 0), b"")], NotHere, "no such session is open here at stage 0"),
    ([(RowsAttach(NAME, 2, 1), b"")], Stale, "fed by epoch 3, you come with 2"),
    ([(ATTACH, b""), (RowsChunk(1, 1), hidden(1))], MessageInvalid, "positions 1 to 2 do not fit"),
    ([(ATTACH, b""), (RowsChunk(0, 65), hidden(65))], MessageInvalid, "0 of 64 positions are here"),
    ([(ATTACH, b""), (RowsChunk(0, 2), hidden(2)[:-1])], MessageInvalid, "hidden states take"),
    ([(ATTACH, b""), (RowsChunk(0, 1), hidden(1, float("nan")))], MessageInvalid, "NaN"),
    ([(ATTACH, b""), (RowsChunk(0, 1000), hidden(CHUNK_ROWS + 1))], MessageTooLarge, "are allowed"),
)


def test_rows_that_do_not_fit_are_refused_and_change_nothing() -> None:
    async def main() -> None:
        async with World(serving_spec(2), 1) as world:
            feeder, fed = world.peers[0].transport, world.peers[1]
            async with world.client.open(fed.name, at_stage(1, SESSION)) as stream:
                await stream.send(opening(stage=1, sampling=GREEDY), ids(*PROMPT))
                await stream.receive(SessionOpened)
                async with feeder.open(fed.name, at_stage(1, ROWS)) as good:
                    await good.send(ATTACH)
                    assert (await good.receive(RowsHave)).header == RowsHave(0)
                    for said, kind, words in FEEDINGS:
                        error = await told(feeder, fed.name, at_stage(1, ROWS), said)
                        assert type(error) is kind, error
                        assert words in str(error)
                    (session,) = fed.server.sessions.values()
                    assert session.received == 0
                    await good.send(RowsChunk(0, 5), hidden(5))
                    message = await stream.receive(SessionToken, SessionPulse)
                    while not isinstance(message.header, SessionToken):
                        message = await stream.receive(SessionToken, SessionPulse)
                    assert message.header.position == 5
                    await good.send(RowsChunk(3, 2), hidden(2, tokens=PROMPT[3:]))  # here already
                    await asyncio.sleep(1)
                    assert session.received == 5

    run(main, limit_s=60)


Lie = Callable[[Stream], Awaitable[None]]


async def _far_token(stream: Stream) -> None:
    await stream.send(SessionToken(99, 1))


async def _foreign_token(stream: Stream) -> None:
    await stream.send(SessionToken(len(PROMPT), 300))


async def _rubbish(stream: Stream) -> None:
    await stream.send(RowsHave(1))


async def _shown_unasked(stream: Stream) -> None:
    await stream.send(SessionShown((3,)), bytes(72))


@pytest.mark.parametrize("lie", [_far_token, _foreign_token, _rubbish, _shown_unasked])
def test_a_server_that_breaks_the_protocol_is_replaced_and_suspected(lie: Lie) -> None:
    async def main() -> None:
        async with World(serving_spec(2), 1) as world:
            liar = world.network.transport(PeerId("liar".ljust(52, "1")), frozenset({Role.TRAINER}))

            async def handler(stream: Stream) -> None:
                await stream.receive(OpenSession, max_payload_bytes=1 << 20)
                await stream.send(SessionOpened(b"v1".ljust(32)))
                await lie(stream)
                await asyncio.sleep(60)

            liar.serve(at_stage(1, SESSION), handler, frozenset(Role))
            await liar.start()
            honest = world.peers[1].name
            world.strangers = {1: [liar.me]}
            world.hidden = {honest}
            text: list[int] = []
            asyncio.get_running_loop().call_later(1, world.hidden.clear)
            async with world.generation(count=20) as generation:
                text = [token async for token in generation]
            assert text == reference(world, PROMPT, 20)
            assert liar.me in {peer for peer, _ in world.suspected}

    run(main, limit_s=60)


def test_a_server_without_access_costs_no_text_while_another_serves() -> None:
    async def main() -> None:
        async with World(serving_spec(2), 1) as world:
            revoked = world.network.transport(PeerId("revoked".ljust(52, "1")), frozenset({Role.TRAINER}))
            asked = 0

            async def handler(stream: Stream) -> None:
                nonlocal asked
                asked += 1
                raise TokenRevoked("the token of this peer is revoked")

            revoked.serve(at_stage(1, SESSION), handler, frozenset(Role))
            await revoked.start()
            world.strangers = {1: [revoked.me]}
            for seed in range(6):
                assert await world.text(PROMPT, 10, seed=seed) == reference(world, PROMPT, 10)
            assert asked
            world.hidden = {world.peers[1].name}
            with pytest.raises(TokenRevoked):
                await world.text()

    run(main, limit_s=60)


def test_a_thousand_streams_that_only_open_are_bounded_and_hurt_nobody() -> None:
    async def main() -> None:
        async with World(serving_spec(2), 1) as world:
            server = world.peers[0]
            crowd = [
                world.network.transport(PeerId(f"crowd{n:02}x".ljust(52, "1")), frozenset({Role.INFERENCE}))
                for n in range(20)
            ]
            for transport in crowd:
                await transport.start()
            rng = random.Random(1)

            async def open_one(transport: Transport) -> ShoalError | None:
                request = opening(session=rng.randbytes(16))
                return await told(transport, server.name, at_stage(0, SESSION), [(request, ids(*PROMPT))])

            errors = await asyncio.gather(*(open_one(crowd[n % 20]) for n in range(1000)))
            refused = [error for error in errors if isinstance(error, Busy)]
            assert len(refused) == 1000 - SESSIONS
            await asyncio.sleep(1)
            assert not server.server.sessions
            assert await world.text() == reference(world)

    run(main, limit_s=120)
