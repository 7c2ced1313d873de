"""Frames: how messages become byte strings and come back, checked. Pure: no I/O, no clock.

    frame   kind (1 byte), sequence (4), checksum (8: XXH3 of everything else), body
    HEAD    a message begins: lengths of type name, header and payload; name; header; first payload bytes
    DATA    further payload bytes of the message
    END     nothing more will come: number of messages, sum of payload bytes
    ABORT   the sender gave up: error code, text

One transport message carries one frame. The sender chooses where to cut (a frame should cross a slow link in
a fraction of a second), but only a message's last frame may have less than LEAST_FRAME_BYTES of payload, so
nobody drips bytes. The decoder knows what the receiver admits before it keeps anything, and memory
grows with the bytes that came, never with the size that was claimed.
Called by `framed_stream`; both transports and their fault injection go through here.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterator
from typing import Any

from xxhash import xxh3_64

from shoal.protocol.errors import (
    FrameInvalid,
    MessageInvalid,
    MessageTooLarge,
    ShoalError,
    StreamEnded,
    from_wire,
    to_wire,
)
from shoal.protocol.limits import (
    ABORT_TEXT_BYTES,
    FRAME_BYTES,
    HEADER_BYTES,
    LEAST_FRAME_BYTES,
    MESSAGE_NAME_BYTES,
)
from shoal.protocol.transport import Buffer, Message
from shoal.protocol.wire import decode, encode


class FrameKind(enum.IntEnum):
    """What a frame is for."""

    HEAD = 1
    DATA = 2
    END = 3
    ABORT = 4


_KINDS = {int(kind): kind for kind in FrameKind}  # a call of the enum takes ten times as long
_CHECKSUM_BYTES = 8
_PREFIX = struct.Struct("!BI")
_HEAD = struct.Struct("!BHQ")  # bytes of type name, of header, of payload in all frames
_END = struct.Struct("!QQ")  # messages, payload bytes
_ABORT = struct.Struct("!I")  # error code
_BODY = _PREFIX.size + _CHECKSUM_BYTES
MAX_FRAME_BYTES = _BODY + _HEAD.size + MESSAGE_NAME_BYTES + HEADER_BYTES + FRAME_BYTES


def kind_of(frame: bytes) -> FrameKind | None:
    """The kind a frame claims, unchecked; None for no kind."""
    return _KINDS.get(frame[0]) if frame else None


def payload_bytes_of(frame: bytes) -> int:
    """How much payload a whole frame carries, unchecked: what is left of it without its headers."""
    match kind_of(frame):
        case FrameKind.HEAD:
            name, header, _ = _HEAD.unpack_from(frame, _BODY)
            return len(frame) - _BODY - _HEAD.size - int(name) - int(header)
        case FrameKind.DATA:
            return len(frame) - _BODY
    return 0


class FrameEncoder:
    """The sending half of one stream."""

    def __init__(self) -> None:
        self._sequence = 0
        self._messages = 0
        self._payload_bytes = 0

    def message(
        self, header: object, payload: Buffer = b"", frame_bytes: Callable[[], int] = lambda: FRAME_BYTES
    ) -> Iterator[bytes]:
        """The frames of one message, made as they are asked for. Raises what `encode` raises.

        `frame_bytes` says before every frame how much payload it takes (LEAST_FRAME_BYTES to FRAME_BYTES).
        """
        name = type(header).__name__.encode()
        encoded = encode(header)
        view = memoryview(payload)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        lengths = _HEAD.pack(len(name), len(encoded), view.nbytes)
        sent = frame_bytes()
        yield self._frame(FrameKind.HEAD, lengths + name + encoded, view[:sent])
        while sent < view.nbytes:
            start, sent = sent, sent + frame_bytes()
            yield self._frame(FrameKind.DATA, b"", view[start:sent])
        self._messages += 1
        self._payload_bytes += view.nbytes

    def end(self) -> bytes:
        """The frame that says nothing more will come."""
        return self._frame(FrameKind.END, _END.pack(self._messages, self._payload_bytes), b"")

    def abort(self, error: BaseException) -> bytes:
        """The frame that says why the sender gave up, with the text cut to ABORT_TEXT_BYTES."""
        code, text = to_wire(error)
        cut = text.encode(errors="replace")[:ABORT_TEXT_BYTES].decode(errors="ignore").encode()
        return self._frame(FrameKind.ABORT, _ABORT.pack(code) + cut, b"")

    def _frame(self, kind: FrameKind, body: bytes, payload: Buffer) -> bytes:
        prefix = _PREFIX.pack(kind, self._sequence)
        self._sequence += 1
        checksum = _checksum(prefix, body, payload)
        return b"".join((prefix, checksum, body, payload))


class FrameDecoder:
    """The receiving half of one stream: `admit` the next message, then `feed` frames until it is whole.

    After END, ABORT or any error it takes nothing more.
    """

    def __init__(self) -> None:
        self.over = False  # nothing more is taken
        self.finished = False  # because the sender said END or ABORT
        self._sequence = 0
        self._messages = 0
        self._payload_bytes = 0
        self._admitted: tuple[type[Any], ...] = ()
        self._kinds: dict[str, type[Any]] = {}  # the same by their names
        self._max_payload_bytes = 0
        self._header: object | None = None  # of the message that is coming in
        self._pieces: list[memoryview] = []  # of its payload, in the frames that brought them
        self._filled = 0
        self._total = 0

    @property
    def inside_message(self) -> bool:
        """Whether a message has begun and is not whole."""
        return self._header is not None

    def admit(self, kinds: tuple[type[Any], ...], max_payload_bytes: int) -> None:
        """What the receiver takes next. Inside a message, the begun one is judged by it at once."""
        if kinds != self._admitted:
            self._admitted, self._kinds = kinds, {kind.__name__: kind for kind in kinds}
        self._max_payload_bytes = max_payload_bytes
        if self._header is not None:
            self._require_admitted(type(self._header).__name__, self._total)

    def feed(self, frame: bytes) -> Message[Any] | None:
        """The message that this frame completes, or None when it goes on.

        Raises StreamEnded at END, the sender's error at ABORT; FrameInvalid, MessageInvalid, MessageTooLarge
        for what breaks the protocol.
        """
        if self.over:
            raise FrameInvalid("a frame came after the stream was over")
        try:
            return self._take(frame)
        except ShoalError:
            self.over = True
            self._header, self._pieces = None, []
            raise

    def _take(self, frame: bytes) -> Message[Any] | None:
        kind, body = self._opened(frame)
        match kind:
            case FrameKind.HEAD:
                payload = self._begin(body)
            case FrameKind.DATA:
                if self._header is None:
                    raise FrameInvalid("payload bytes came before the message they belong to")
                payload = body
            case FrameKind.END:
                self._require_end(body)
                self.finished = True
                raise StreamEnded(f"the other side finished after {self._messages} messages")
            case FrameKind.ABORT:
                error = _aborted(body)
                self.finished = True
                raise error
        self._keep(payload)
        return self._completed() if self._filled == self._total else None

    def _opened(self, frame: bytes) -> tuple[FrameKind, memoryview]:
        """Kind and body of a frame that is whole and in its turn."""
        if not _BODY <= len(frame) <= MAX_FRAME_BYTES:
            raise FrameInvalid(f"a frame of {len(frame)} bytes; {_BODY} to {MAX_FRAME_BYTES} are possible")
        view = memoryview(frame)
        number, sequence = _PREFIX.unpack_from(view)
        if not _is_intact(view):
            raise FrameInvalid(f"frame {self._sequence}: the checksum does not fit its {len(frame)} bytes")
        if sequence != self._sequence:
            raise FrameInvalid(f"frame {sequence} came where {self._sequence} was due; frames were lost")
        self._sequence += 1
        kind = kind_of(frame)
        if kind is None:
            raise FrameInvalid(f"frame {sequence} is of unknown kind {number}")
        return kind, view[_BODY:]

    def _begin(self, body: memoryview) -> memoryview:
        """Judge a message by its head, before anything is kept; the payload bytes in this frame."""
        if self._header is not None:
            raise FrameInvalid(f"a message began inside another ({self._filled} of {self._total} bytes came)")
        if len(body) < _HEAD.size:
            raise FrameInvalid(f"a HEAD frame with a body of {len(body)} bytes")
        name_bytes, header_bytes, total = _HEAD.unpack_from(body)
        if name_bytes > MESSAGE_NAME_BYTES or header_bytes > HEADER_BYTES:
            raise MessageTooLarge(f"a header of {header_bytes} bytes, named with {name_bytes}")
        header_at = _HEAD.size + name_bytes
        payload_at = header_at + header_bytes
        if len(body) < payload_at:
            raise FrameInvalid(f"a HEAD frame with {len(body)} bytes whose lengths say otherwise")
        name = bytes(body[_HEAD.size : header_at]).decode("ascii", errors="replace")
        cls = self._require_admitted(name, total)
        self._header = decode(cls, bytes(body[header_at:payload_at]))
        self._filled, self._total = 0, total
        return body[payload_at:]

    def _require_admitted(self, name: str, total: int) -> type[Any]:
        cls = self._kinds.get(name)
        if cls is None:
            raise MessageInvalid(f"{name!r} came where {', '.join(self._kinds) or 'nothing'} was expected")
        if total > self._max_payload_bytes:
            raise MessageTooLarge(f"{name} with {total} payload bytes; {self._max_payload_bytes} are allowed")
        return cls

    def _keep(self, payload: memoryview) -> None:
        missing = self._total - self._filled
        if not min(LEAST_FRAME_BYTES, missing) <= len(payload) <= min(FRAME_BYTES, missing):
            raise FrameInvalid(f"{len(payload)} payload bytes in a frame, {missing} were missing")
        self._pieces.append(payload)
        self._filled += len(payload)

    def _completed(self) -> Message[Any]:
        pieces = self._pieces
        payload = pieces[0] if len(pieces) == 1 else memoryview(bytearray().join(pieces))
        message: Message[Any] = Message(self._header, payload)
        self._header, self._pieces = None, []
        self._messages += 1
        self._payload_bytes += self._total
        return message

    def _require_end(self, body: memoryview) -> None:
        if self._header is not None:
            raise FrameInvalid(f"END inside a message ({self._filled} of {self._total} bytes came)")
        if len(body) != _END.size or _END.unpack(body) != (self._messages, self._payload_bytes):
            raise FrameInvalid(f"END counts otherwise than the {self._messages} messages that came")


def last_words(frame: bytes) -> ShoalError | None:
    """The error in an ABORT frame, whatever its place in the stream; None for other or damaged frames."""
    view = memoryview(frame)
    if kind_of(frame) is not FrameKind.ABORT or len(frame) < _BODY or not _is_intact(view):
        return None
    try:
        return _aborted(view[_BODY:])
    except FrameInvalid:
        return None


def _checksum(*pieces: Buffer) -> bytes:
    """Finds damage, not forgery: TLS sees to that, and BLAKE3, ten times slower, names what is kept."""
    hashed = xxh3_64()
    for piece in pieces:
        hashed.update(piece)
    return hashed.digest()


def _is_intact(frame: memoryview) -> bool:
    return _checksum(frame[: _PREFIX.size], frame[_BODY:]) == _claimed(frame)


def _claimed(frame: memoryview) -> memoryview:
    return frame[_PREFIX.size : _BODY]


def _aborted(body: memoryview) -> ShoalError:
    if not _ABORT.size <= len(body) <= _ABORT.size + ABORT_TEXT_BYTES:
        raise FrameInvalid(f"an ABORT frame with a body of {len(body)} bytes")
    (code,) = _ABORT.unpack_from(body)
    return from_wire(code, bytes(body[_ABORT.size :]).decode(errors="replace"))
