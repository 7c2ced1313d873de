"""Frames from an adversary: whatever comes in, only errors of the tree come out, and memory stays small."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_world import Note, OtherNote
from xxhash import xxh3_64_digest

from shoal.protocol.errors import (
    Busy,
    FrameInvalid,
    MessageInvalid,
    MessageTooLarge,
    NotHere,
    ProtocolViolation,
    ShoalError,
    StreamEnded,
)
from shoal.protocol.framing import MAX_FRAME_BYTES, FrameDecoder, FrameEncoder, FrameKind, kind_of, last_words
from shoal.protocol.limits import ABORT_TEXT_BYTES, FRAME_BYTES, HEADER_BYTES, LEAST_FRAME_BYTES
from shoal.protocol.transport import Message
from shoal.protocol.wire import encode

ROOM = 8 << 20


def sealed(kind: int, sequence: int, body: bytes) -> bytes:
    """A frame as a peer of this protocol would seal it, whatever its body says."""
    prefix = struct.pack("!BI", kind, sequence)
    return prefix + xxh3_64_digest(prefix + body) + body


def head(name: bytes, header: bytes, total: int, payload: bytes = b"") -> bytes:
    return struct.pack("!BHQ", len(name), len(header), total) + name + header + payload


def decoder(max_payload_bytes: int = ROOM) -> FrameDecoder:
    result = FrameDecoder()
    result.admit((Note,), max_payload_bytes)
    return result


def fed(frames: list[bytes], max_payload_bytes: int = ROOM) -> list[Message[Note]]:
    into = decoder(max_payload_bytes)
    return [message for frame in frames if (message := into.feed(frame)) is not None]


NOTE = encode(Note(7, "seven"))


@given(st.integers(0, 3 * FRAME_BYTES), st.integers(LEAST_FRAME_BYTES, FRAME_BYTES))
@settings(max_examples=30)
def test_any_payload_survives_any_cut(size: int, frame_bytes: int) -> None:
    payload = blake3(b"payload").digest(length=size)
    frames = list(FrameEncoder().message(Note(7, "seven"), payload, lambda: frame_bytes))
    assert all(len(frame) <= MAX_FRAME_BYTES for frame in frames)
    (message,) = fed(frames)
    assert message.header == Note(7, "seven")
    assert message.payload == payload


def test_buffers_of_any_shape_are_sent_as_their_bytes() -> None:
    for payload in (bytearray(b"abcd"), memoryview(b"abcd").cast("I"), memoryview(b"").cast("B")):
        (message,) = fed(list(FrameEncoder().message(Note(1), payload)))
        assert message.payload == bytes(payload)


def test_every_truncation_and_every_bit_flip_is_refused() -> None:
    (frame,) = FrameEncoder().message(Note(7, "seven"), b"payload")
    for length in range(len(frame)):
        with pytest.raises(FrameInvalid):
            fed([frame[:length]])
    for position in range(len(frame)):
        for bit in range(8):
            damaged = bytearray(frame)
            damaged[position] ^= 1 << bit
            with pytest.raises(FrameInvalid):
                fed([bytes(damaged)])
    with pytest.raises(FrameInvalid):
        fed([frame + b"x"])


def test_frames_out_of_turn_are_refused() -> None:
    frames = list(FrameEncoder().message(Note(1), bytes(3 * FRAME_BYTES)))
    orders = ([0, 2], [1], [0, 0], [0, 1, 1])
    for order in orders:
        with pytest.raises(FrameInvalid, match="due"):
            fed([frames[n] for n in order])


@pytest.mark.parametrize("total", [ROOM + 1, 2**31, 2**63, 2**64 - 1])
def test_a_claim_over_the_cap_is_refused_at_its_first_frame(total: int) -> None:
    with pytest.raises(MessageTooLarge):
        fed([sealed(FrameKind.HEAD, 0, head(b"Note", NOTE, total))])


def test_an_admitted_claim_takes_no_memory_until_the_bytes_come() -> None:
    claim = sealed(FrameKind.HEAD, 0, head(b"Note", NOTE, 1 << 30, bytes(LEAST_FRAME_BYTES)))
    into = decoder(1 << 30)
    tracemalloc.start()
    assert into.feed(claim) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


BAD_HEADS = {
    "empty": b"",
    "short": b"\x04\x00",
    "name beyond the frame": struct.pack("!BHQ", 200, 0, 0) + b"Note",
    "name over the cap": head(b"N" * 97, NOTE, 0),
    "header beyond the frame": struct.pack("!BHQ", 4, 500, 0) + b"Note" + NOTE,
    "header not protobuf": head(b"Note", b"\xff\xff\xff", 0),
    "header out of bounds": head(b"Note", b"\x08" + b"\xff" * 9 + b"\x01", 0),
    "name of no message": head(b"Nothing", NOTE, 0),
    "name of another message": head(b"OtherNote", encode(OtherNote(1)), 0),
    "name not text": head(b"\xff\xfe", NOTE, 0),
    "more payload than claimed": head(b"Note", NOTE, 3, b"four"),
    "less payload than it must have": head(b"Note", NOTE, LEAST_FRAME_BYTES, b"drip"),
    "header over the cap": head(b"Note", b"", 0)[:1] + struct.pack("!HQ", 65535, 0) + b"Note",
}


@pytest.mark.parametrize("body", BAD_HEADS.values(), ids=BAD_HEADS.keys())
def test_heads_that_contradict_themselves_are_refused(body: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        fed([sealed(FrameKind.HEAD, 0, body)])


def test_data_must_belong_to_a_message_and_fit_into_it() -> None:
    begun = sealed(FrameKind.HEAD, 0, head(b"Note", NOTE, 2 * FRAME_BYTES, bytes(FRAME_BYTES)))
    with pytest.raises(FrameInvalid):
        fed([sealed(FrameKind.DATA, 0, bytes(10))])
    for size in (0, 1, LEAST_FRAME_BYTES - 1, FRAME_BYTES + 1):
        with pytest.raises(FrameInvalid):
            fed([begun, sealed(FrameKind.DATA, 1, bytes(size))])
    for frame in (sealed(FrameKind.HEAD, 1, head(b"Note", NOTE, 0)), sealed(FrameKind.END, 1, bytes(16))):
        with pytest.raises(FrameInvalid, match="inside"):
            fed([begun, frame])


def test_end_must_count_right_and_come_once() -> None:
    encoder = FrameEncoder()
    frames = [*encoder.message(Note(1), b"12345"), encoder.end()]
    with pytest.raises(StreamEnded):
        fed(frames)
    for body in (
        b"",
        struct.pack("!QQ", 0, 5),
        struct.pack("!QQ", 1, 4),
        struct.pack("!QQ", 2, 5),
        bytes(17),
    ):
        with pytest.raises(FrameInvalid):
            fed([frames[0], sealed(FrameKind.END, 1, body)])
    into = decoder()
    into.feed(frames[0])
    for expected in (StreamEnded, FrameInvalid):
        with pytest.raises(expected):
            into.feed(frames[1])


@pytest.mark.parametrize("kind", [NotHere, Busy])
def test_the_text_of_a_peers_error_moves_no_cursor_and_writes_no_clipboard(kind: type[ShoalError]) -> None:
    """It ends on the terminals of volunteers and their owner, and in their logs."""
    said = "not here\nask another\x1b[2J\x1b]52;c;cm0gLXJm\x07\r\x00\u202e\x9b31m"
    told = last_words(FrameEncoder().abort(kind(said)))
    assert str(told) == "not here\nask another?[2J?]52;c;cm0gLXJm?????31m"


def test_abort_carries_the_error_anywhere_in_the_stream() -> None:
    encoder = FrameEncoder()
    begun = next(encoder.message(Note(1), bytes(2 * FRAME_BYTES)))
    abort = encoder.abort(Busy("full", 3.0))
    with pytest.raises(Busy, match="full") as busy:
        fed([begun, abort])
    assert busy.value.retry_after_s == 3.0
    assert isinstance(last_words(abort), Busy)
    assert last_words(begun) is None
    assert last_words(abort[:-1]) is None
    assert last_words(b"") is None
    assert kind_of(b"\x09") is None


def test_the_text_of_an_abort_is_cut_at_its_cap() -> None:
    abort = FrameEncoder().abort(NotHere("ä" * ABORT_TEXT_BYTES))
    with pytest.raises(NotHere, match=r"^ä+$") as cut:
        fed([abort])
    assert len(str(cut.value).encode()) <= ABORT_TEXT_BYTES
    for body in (b"", b"\0\0\0", bytes(4 + ABORT_TEXT_BYTES + 1)):
        with pytest.raises(FrameInvalid):
            fed([sealed(FrameKind.ABORT, 0, body)])
    with pytest.raises(ShoalError):
        fed([sealed(FrameKind.ABORT, 0, struct.pack("!I", 4_000_000_000) + b"\xff\xfe")])


def test_frames_over_the_largest_are_refused_unread() -> None:
    with pytest.raises(FrameInvalid, match="possible"):
        fed([bytes(MAX_FRAME_BYTES + 1)])


def test_what_a_receiver_admits_can_change_between_messages_only_to_what_has_begun() -> None:
    frames = list(FrameEncoder().message(Note(1), bytes(2 * FRAME_BYTES)))
    into = decoder()
    assert into.feed(frames[0]) is None
    into.admit((Note, OtherNote), 2 * FRAME_BYTES)
    with pytest.raises(MessageTooLarge):
        into.admit((Note,), 10)
    with pytest.raises(MessageInvalid):
        into.admit((OtherNote,), ROOM)


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_noise_raises_errors_of_the_tree(frames: list[bytes]) -> None:
    feed_until_refused(frames)


@given(st.lists(st.tuples(st.integers(0, 6), st.binary(max_size=100)), min_size=1, max_size=6))
@settings(max_examples=500)
def test_sealed_noise_raises_errors_of_the_tree(bodies: list[tuple[int, bytes]]) -> None:
    feed_until_refused([sealed(kind, sequence, body) for sequence, (kind, body) in enumerate(bodies)])


@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"Note", b"OtherNote", b""]),
            st.binary(max_size=HEADER_BYTES // 1000) | st.just(NOTE),
            st.integers(0, 2**64 - 1) | st.integers(0, 100),
            st.binary(max_size=100),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=500)
def test_heads_of_noise_raise_errors_of_the_tree(heads: list[tuple[bytes, bytes, int, bytes]]) -> None:
    feed_until_refused([sealed(FrameKind.HEAD, n, head(*parts)) for n, parts in enumerate(heads)])


def feed_until_refused(frames: list[bytes]) -> None:
    """Only errors of the tree, and nothing after the first."""
    into = decoder(1000)
    for frame in frames:
        try:
            message = into.feed(frame)
        except ShoalError:
            assert into.over
            return
        if message is not None:
            assert isinstance(message.header, Note)
            assert len(message.payload) <= 1000
