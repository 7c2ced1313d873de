"""The promises of the Transport interface, kept alike by both twins: gRPC on loopback and memory."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from pathlib import Path

import pytest
from transport_world import ANYBODY, ROOM, TWINS, Note, OtherNote, Peers, echo, play

from shoal.protocol import service
from shoal.protocol.errors import (
    Busy,
    MessageInvalid,
    MessageTooLarge,
    NotHere,
    NotServed,
    PeerSilent,
    PeerUnreachable,
    ShoalError,
    StreamBroken,
    StreamEnded,
    UsageError,
    WrongRole,
)
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.limits import FIRST_FRAME_BYTES, FRAME_BYTES, LEAST_FRAME_BYTES
from shoal.protocol.transport import Channel, Stream, call

pytestmark = pytest.mark.parametrize("twin", TWINS)
SIZES = (0, 1, LEAST_FRAME_BYTES, FIRST_FRAME_BYTES - 1, FIRST_FRAME_BYTES + 1, FRAME_BYTES, 3 * FRAME_BYTES)


def pattern(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def test_a_stream_that_ended_well_is_freed_without_the_garbage_collector(twin: str, tmp_path: Path) -> None:
    served: list[weakref.ref[Stream]] = []

    async def swallow(stream: Stream) -> None:
        served.append(weakref.ref(stream))
        with contextlib.suppress(StreamEnded):
            while True:
                await stream.receive(Note, max_payload_bytes=ROOM)

    async def scene(peers: Peers) -> None:
        peers.serve("swallow", swallow)
        await peers.start()
        for _ in range(2):
            async with peers.alice.open(peers.bob.me, "swallow") as stream:
                await stream.send(Note(1), bytes(1000))
        while peers.bob.counters().streams_in:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        assert [stream() for stream in served[:1]] == [None]

    gc.disable()
    try:
        play(twin, scene, tmp_path)
    finally:
        gc.enable()


async def flood(peers: Peers, method: str) -> None:
    """Alice sends Bob 100 MiB and receives nothing."""
    async with peers.alice.open(peers.bob.me, method, Channel.BULK) as stream:
        for number in range(100):
            await stream.send(Note(number), bytes(FRAME_BYTES))


def test_messages_of_all_sizes_come_back_whole_and_in_order(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        peers.serve("echo", echo)
        await peers.start()
        for channel in Channel:
            async with peers.alice.open(peers.bob.me, "echo", channel) as stream:
                assert stream.remote.peer == peers.bob.me
                for number, size in enumerate(SIZES):
                    await stream.send(Note(number, "text"), pattern(size))
                    message = await stream.receive(Note, max_payload_bytes=ROOM)
                    assert message.header == Note(number, "text")
                    assert message.payload == pattern(size)

    play(twin, scene, tmp_path)


def test_what_is_sent_before_anything_is_received_is_kept_in_order(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        peers.serve("echo", echo)
        await peers.start()
        async with peers.alice.open(peers.bob.me, "echo") as stream:
            for number in range(50):
                await stream.send(Note(number))
            await stream.end()
            numbers = [(await stream.receive(Note)).header.number for _ in range(50)]
            assert numbers == list(range(50))
            for _ in range(2):
                with pytest.raises(StreamEnded):
                    await stream.receive(Note)
            with pytest.raises(UsageError):
                await stream.send(Note(1))

    play(twin, scene, tmp_path)


def test_a_handler_sees_the_callers_end_and_finishes_after_the_caller_left(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        left, finished = asyncio.Event(), asyncio.Event()

        async def handler(stream: Stream) -> None:
            await stream.receive(Note)
            with pytest.raises(StreamEnded):
                await stream.receive(Note)
            await left.wait()
            finished.set()

        peers.serve("work", handler)
        await peers.start()
        async with peers.alice.open(peers.bob.me, "work") as stream:
            await stream.send(Note(1))
        left.set()
        await finished.wait()

    play(twin, scene, tmp_path)


def test_a_handler_may_say_end_and_go_on_receiving(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        numbers: list[int] = []
        done = asyncio.Event()

        async def handler(stream: Stream) -> None:
            await stream.end()
            with contextlib.suppress(StreamEnded):
                while True:
                    numbers.append((await stream.receive(Note)).header.number)
            done.set()

        peers.serve("listen", handler)
        await peers.start()
        async with peers.alice.open(peers.bob.me, "listen") as stream:
            with pytest.raises(StreamEnded):
                await stream.receive(Note)
            for number in range(20):
                await stream.send(Note(number))
        await done.wait()
        assert numbers == list(range(20))

    play(twin, scene, tmp_path)


def test_a_caller_notices_that_the_handler_has_left(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        async def handler(stream: Stream) -> None:
            await stream.receive(Note, max_payload_bytes=ROOM)

        peers.serve("one", handler)
        await peers.start()
        with pytest.raises(StreamBroken, match="without taking all"):
            await flood(peers, "one")
        assert not peers.troubles

    play(twin, scene, tmp_path)


def test_a_caller_that_fails_cancels_the_handler(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        started, cancelled = asyncio.Event(), asyncio.Event()

        async def handler(stream: Stream) -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise

        peers.serve("work", handler)
        await peers.start()

        async def fail() -> None:
            async with peers.alice.open(peers.bob.me, "work"):
                await started.wait()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        await cancelled.wait()
        assert not peers.troubles

    play(twin, scene, tmp_path)


def test_a_handlers_error_arrives_as_its_own_class(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        errors: list[Exception] = [NotHere("part 7"), Busy("full", 2.5), ValueError("secret")]

        async def handler(stream: Stream) -> None:
            raise errors[(await stream.receive(Note)).header.number]

        peers.serve("fail", handler)
        await peers.start()
        with pytest.raises(NotHere, match="part 7"):
            await call(peers.alice, peers.bob.me, "fail", Note(0), Note, timeout_s=30)
        with pytest.raises(Busy, match="full") as busy:
            await call(peers.alice, peers.bob.me, "fail", Note(1), Note, timeout_s=30)
        assert busy.value.retry_after_s == 2.5
        with pytest.raises(ShoalError, match="internal error") as hidden:
            await call(peers.alice, peers.bob.me, "fail", Note(2), Note, timeout_s=30)
        assert "secret" not in str(hidden.value)
        assert not peers.troubles

    play(twin, scene, tmp_path)


def test_a_refusal_reaches_a_caller_that_is_still_sending(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        async def handler(stream: Stream) -> None:
            raise Busy("no room", 1.0)

        peers.serve("full", handler)
        await peers.start()
        with pytest.raises(Busy, match="no room"):
            await flood(peers, "full")

    play(twin, scene, tmp_path)


def test_a_method_is_for_its_roles_only(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        async def handler(stream: Stream) -> None:
            raise AssertionError("dispatched")

        peers.bob.serve("owners", handler, frozenset({Role.OWNER}))
        await peers.start()
        with pytest.raises(WrongRole, match="trainer"):
            await call(peers.alice, peers.bob.me, "owners", Note(1), Note, timeout_s=30)
        assert peers.bob.counters().refusals == {"WrongRole": 1}
        owner = peers.make(frozenset({Role.OWNER}))
        await peers.start(owner)
        with pytest.raises(ShoalError, match="internal error"):
            await call(owner, peers.bob.me, "owners", Note(1), Note, timeout_s=30)

    play(twin, scene, tmp_path)


def test_unknown_methods_and_messages_are_refused(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        peers.serve("echo", echo)
        await peers.start()
        with pytest.raises(NotServed, match="does not serve"):
            await call(peers.alice, peers.bob.me, "nothing", Note(1), Note, timeout_s=30)
        with pytest.raises(MessageInvalid, match="OtherNote"):
            await call(peers.alice, peers.bob.me, "echo", OtherNote(1), Note, timeout_s=30)
        with pytest.raises(MessageInvalid, match="Note"):
            await call(peers.alice, peers.bob.me, "echo", Note(1), OtherNote, timeout_s=30)
        assert [type(error) for _, error in peers.troubles] == [MessageInvalid]

    play(twin, scene, tmp_path)


def test_a_payload_over_the_cap_is_refused_before_it_is_read(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        async def handler(stream: Stream) -> None:
            await stream.receive(Note, max_payload_bytes=1000)

        peers.serve("small", handler)
        await peers.start()
        for size in (1001, ROOM):
            with pytest.raises(MessageTooLarge, match="1000 are allowed"):
                await call(
                    peers.alice, peers.bob.me, "small", Note(1), Note, timeout_s=30, payload=bytes(size)
                )
        assert peers.bob.counters().bytes_in["small"] < 2 * FRAME_BYTES

    play(twin, scene, tmp_path)


def test_a_receiver_that_does_not_read_stops_the_sender_and_is_given_up(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        stalled = asyncio.Event()

        async def handler(stream: Stream) -> None:
            await stalled.wait()

        peers.serve("idle", handler)
        await peers.start()
        with pytest.raises(PeerSilent, match="moved no byte"):
            await flood(peers, "idle")
        assert peers.alice.counters().bytes_out["idle"] < 20 * FRAME_BYTES
        assert [(peer, type(error)) for peer, error in peers.troubles] == [(peers.bob.me, PeerSilent)] * 2
        stalled.set()

    play(twin, scene, tmp_path)


def test_a_cancelled_receive_loses_nothing(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        go_on = asyncio.Event()

        async def handler(stream: Stream) -> None:
            await go_on.wait()
            for number in range(3):
                await stream.send(Note(number), bytes(2 * FRAME_BYTES))

        peers.serve("late", handler)
        await peers.start()
        async with peers.alice.open(peers.bob.me, "late") as stream:
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await stream.receive(Note, max_payload_bytes=ROOM)
            go_on.set()
            for number in range(3):
                message = await stream.receive(Note, max_payload_bytes=ROOM)
                assert (message.header.number, len(message.payload)) == (number, 2 * FRAME_BYTES)

    play(twin, scene, tmp_path)


def test_a_cancelled_send_breaks_the_stream(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        broken = asyncio.Event()

        async def handler(stream: Stream) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                broken.set()

        peers.serve("idle", handler)
        await peers.start()
        async with peers.alice.open(peers.bob.me, "idle") as stream:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await stream.send(Note(1), bytes(ROOM))
            with pytest.raises(StreamBroken, match="cancelled"):
                await stream.send(Note(2))
            await broken.wait()
        assert not peers.troubles

    play(twin, scene, tmp_path)


def test_disconnect_breaks_streams_both_ways_and_the_peer_can_come_again(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        cancelled = asyncio.Event()
        serving = asyncio.Semaphore(0)

        async def handler(stream: Stream) -> None:
            serving.release()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        for transport in (peers.alice, peers.bob):
            transport.serve("wait", handler, ANYBODY)
        peers.serve("echo", echo)
        await peers.start()
        async with (
            peers.alice.open(peers.bob.me, "wait") as outgoing,
            peers.bob.open(peers.alice.me, "wait") as incoming,
        ):
            await serving.acquire()
            await serving.acquire()
            await peers.alice.disconnect(peers.bob.me)
            for stream in (outgoing, incoming):
                with pytest.raises(StreamBroken):
                    await stream.receive(Note)
        await cancelled.wait()
        reply = await call(peers.alice, peers.bob.me, "echo", Note(5), Note, timeout_s=30)
        assert reply.header == Note(5)

    play(twin, scene, tmp_path)


def test_closing_breaks_what_is_open_and_refuses_what_comes(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        peers.serve("echo", echo)
        await peers.start()
        async with peers.alice.open(peers.bob.me, "echo") as stream:
            await stream.send(Note(1))
            await stream.receive(Note)
            await peers.bob.close()
            with pytest.raises(StreamBroken):
                await stream.receive(Note)
        assert isinstance(peers.troubles[0][1], StreamBroken)
        with pytest.raises(PeerUnreachable):
            await call(peers.alice, peers.bob.me, "echo", Note(1), Note, timeout_s=30)
        assert isinstance(peers.troubles[-1][1], PeerUnreachable)

    play(twin, scene, tmp_path)


def test_a_peer_nobody_has_heard_of_is_unreachable(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        await peers.start()
        with pytest.raises(PeerUnreachable):
            async with peers.alice.open(PeerId("nobody"), "echo"):
                pass
        assert [(peer, type(error)) for peer, error in peers.troubles] == [("nobody", PeerUnreachable)]

    play(twin, scene, tmp_path)


def test_a_peer_calls_itself_like_any_other(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        peers.serve("echo", echo)
        await peers.start()
        reply = await call(peers.bob, peers.bob.me, "echo", Note(5), Note, timeout_s=30)
        assert reply.header == Note(5)

    play(twin, scene, tmp_path)


def test_a_call_without_answer_ends_at_its_deadline(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        async def handler(stream: Stream) -> None:
            await asyncio.Event().wait()

        peers.serve("never", handler)
        await peers.start()
        with pytest.raises(PeerSilent, match=r"within 0\.3 s"):
            await call(peers.alice, peers.bob.me, "never", Note(1), Note, timeout_s=0.3)

    play(twin, scene, tmp_path)


def test_streams_are_capped_for_each_peer(twin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "STREAMS_PER_PEER", 3)

    async def scene(peers: Peers) -> None:
        async def handler(stream: Stream) -> None:
            await stream.send(Note(0))
            await asyncio.Event().wait()

        peers.serve("hold", handler)
        await peers.start()
        streams = [peers.alice.open(peers.bob.me, "hold") for _ in range(3)]
        for stream in streams:
            await (await stream.__aenter__()).receive(Note)
        with pytest.raises(Busy, match="3 streams from this peer"):
            await call(peers.alice, peers.bob.me, "hold", Note(1), Note, timeout_s=30)
        assert peers.bob.counters().streams_in == peers.alice.counters().streams_out == 3
        other = peers.make(frozenset({Role.TRAINER}))
        await peers.start(other)
        await call(other, peers.bob.me, "hold", Note(1), Note, timeout_s=30)
        failed = ZeroDivisionError()
        for stream in streams:
            assert not await stream.__aexit__(ZeroDivisionError, failed, None)

    play(twin, scene, tmp_path)


def test_bytes_are_counted_by_method(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        peers.serve("echo", echo)
        await peers.start()
        size = 100_000
        async with peers.alice.open(peers.bob.me, "echo") as stream:
            await stream.send(Note(1), bytes(size))
            await stream.receive(Note, max_payload_bytes=size)
        sent, answered = peers.alice.counters(), peers.bob.counters()
        assert size < sent.bytes_out["echo"] < size + 500
        assert size < answered.bytes_in["echo"] < size + 500

    play(twin, scene, tmp_path)


def test_a_method_has_one_handler(twin: str, tmp_path: Path) -> None:
    async def scene(peers: Peers) -> None:
        peers.serve("echo", echo)
        with pytest.raises(UsageError):
            peers.serve("echo", echo)

    play(twin, scene, tmp_path)
