"""What is said in a session: by the client to each server of its chain, and by a server to the next one.

A session's positions are counted from its first token. Stage 0 takes tokens, each other stage the hidden
states of the one before; what the last stage draws goes to the client and to stage 0: the chain is a ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from shoal.dht.directory import PeerIdText, StageIndex
from shoal.protocol.wire import Bounds, Count, Identifier, Items, Length, OneOf, Text, wire_message

SESSION, ROWS = "session", "session.rows"  # methods
POSITIONS = 1 << 20  # the spec's most
STOP, LENGTH = "stop", "length"
SessionId = Annotated[bytes, Length(16, 16)]
Version = Annotated[bytes, Length(0, 32)]
Position = Annotated[int, Bounds(0, POSITIONS)]
Rows = Annotated[int, Bounds(1, 1024)]
TokenId = Annotated[int, Bounds(0, (1 << 20) - 1)]
Finish = Annotated[str, OneOf(frozenset({"", STOP, LENGTH}))]


@wire_message
@dataclass(frozen=True, slots=True)
class TokenBias:
    """Added to the logit of a token."""

    token: TokenId
    bias: Annotated[float, Bounds(-1000.0, 1000.0)]


@wire_message
@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How the last stage draws."""

    temperature: Annotated[float, Bounds(0.0, 100.0)] = 0.0  # 0: the likeliest
    top_p: Annotated[float, Bounds(1e-6, 1.0)] = 1.0
    top_k: Position = 0  # 0: all
    repetition_penalty: Annotated[float, Bounds(0.01, 100.0)] = 1.0
    seed: Identifier = 0
    bias: Annotated[tuple[TokenBias, ...], Items(300)] = ()
    stop: Annotated[tuple[TokenId, ...], Items(16)] = ()  # ends the text, and is not part of it


@wire_message
@dataclass(frozen=True, slots=True)
class OpenSession:
    """The client asks a server to hold a session. Payload, to the ends of the chain: its tokens, int32.

    The stream lives as long as the session.
    """

    session: SessionId
    stage: StageIndex
    capacity: Annotated[int, Bounds(2, POSITIONS)]  # tokens there may be, prompt and new ones
    version: Version  # empty: the current one
    sampling: SamplingOptions | None = None  # to the last stage


@wire_message
@dataclass(frozen=True, slots=True)
class SessionOpened:
    """The server holds it, on these weights."""

    version: Version


@wire_message
@dataclass(frozen=True, slots=True)
class SessionRoute:
    """The client tells a server which one comes after it. The highest epoch counts."""

    epoch: Count
    stage: StageIndex
    peer: PeerIdText


@wire_message
@dataclass(frozen=True, slots=True)
class SessionToken:
    """The last stage tells the client a token. With STOP it is not part of the text."""

    position: Position
    token: TokenId
    finish: Finish = ""


@wire_message
@dataclass(frozen=True, slots=True)
class SessionPulse:
    """A server is alive, and how far it is."""

    received: Position
    computed: Position


@wire_message
@dataclass(frozen=True, slots=True)
class SessionCut:
    """A server tells the client that it cannot reach the one after it."""

    epoch: Count
    reason: Text


@wire_message
@dataclass(frozen=True, slots=True)
class RowsAttach:
    """A server begins to supply the next one; those of lower epochs are heard no longer."""

    session: SessionId
    epoch: Count
    stage: StageIndex


@wire_message
@dataclass(frozen=True, slots=True)
class RowsHave:
    """The answer: positions already here. Supply starts with the next."""

    positions: Position


@wire_message
@dataclass(frozen=True, slots=True)
class RowsChunk:
    """Consecutive positions. Payload: hidden states [count, width], to stage 0 tokens int32 [count]."""

    start: Position
    count: Rows
