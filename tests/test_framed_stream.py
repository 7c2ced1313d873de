"""A stream above its pipe: what is read once reaches whoever waits for it, whatever else goes wrong."""

from __future__ import annotations

import asyncio

import pytest
from transport_world import Note

from shoal.protocol.errors import NotHere, StreamBroken
from shoal.protocol.framed_stream import FramedStream, FramePipe, Traffic
from shoal.protocol.framing import FrameEncoder
from shoal.protocol.identity import PeerId, VerifiedPeer
from shoal.protocol.progress import Pulse
from shoal.protocol.uplink import Outlet
from shoal.protocol.virtual_time import run


class DeafPipe(FramePipe):
    """Takes nothing any more; frames that the other side sent before may still come."""

    def __init__(self) -> None:
        self.incoming: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def write(self, frame: bytes) -> None:
        raise StreamBroken("the other side has gone")

    async def read(self) -> bytes | None:
        return await self.incoming.get()

    def peek(self) -> bytes | None:
        return b""  # nothing has come yet when the send begins

    def take(self) -> bytes | None:
        return self.incoming.get_nowait()

    async def half_close(self) -> None:
        pass

    def break_off(self) -> None:
        pass


def stream_over(pipe: FramePipe) -> FramedStream:
    """The opener's side."""
    remote = VerifiedPeer(PeerId("bob"), frozenset(), "", 1e12)
    return FramedStream(remote, pipe, Traffic(), Pulse(), Outlet(), lambda error: None, opened_here=True)


async def fail_to_send(pipe: DeafPipe) -> tuple[FramedStream, asyncio.Task[None]]:
    """A stream whose send has failed and now looks for the other side's reason."""
    stream = stream_over(pipe)
    sending = asyncio.create_task(stream.send(Note(1)))
    await asyncio.sleep(0.1)
    return stream, sending


def test_a_message_reaches_its_receiver_though_a_failed_send_waits_for_the_same_frame() -> None:
    async def main() -> None:
        pipe = DeafPipe()
        stream, sending = await fail_to_send(pipe)
        receiving = asyncio.create_task(stream.receive(Note))
        await asyncio.sleep(0.1)
        for frame in FrameEncoder().message(Note(7), b"", lambda: 1 << 15):
            pipe.incoming.put_nowait(frame)
        assert (await receiving).header == Note(7)
        with pytest.raises(StreamBroken):
            await sending

    run(main)


def test_sender_and_receiver_both_learn_why_the_other_side_gave_up() -> None:
    async def main() -> None:
        pipe = DeafPipe()
        stream, sending = await fail_to_send(pipe)
        receiving = asyncio.create_task(stream.receive(Note))
        await asyncio.sleep(0.1)
        pipe.incoming.put_nowait(FrameEncoder().abort(NotHere("no such round")))
        for task in (sending, receiving):
            with pytest.raises(NotHere):
                await task

    run(main)
