"""What is said in a session: by the client to each server of its chain, and by a server to the next one.

A session's positions are counted from its first token. Stage 0 takes tokens, each other stage the hidden
states of the one before; what the last stage draws goes to the client and to stage 0: the chain is a ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from shoal.dht.directory import PeerIdText, SignedRecord, StageIndex
from shoal.protocol.limits import DRAFT_TOKENS
from shoal.protocol.wire import (
    Bounds,
    Count,
    Identifier,
    Items,
    Length,
    OneOf,
    Seconds,
    Text,
    wire_message,
)
from shoal.training.model.lowrank import TARGETS

SESSION, ROWS, TUNE = "session", "rows", "tune"  # methods of a stage
HIDDEN, LOGITS, LOSS = "hidden", "logits", "loss"
POSITIONS = 1 << 20  # the spec's most
SHOWN = 8  # positions of a text, at most
STOP, LENGTH = "stop", "length"
SessionId = Annotated[bytes, Length(16, 16)]
Version = Annotated[bytes, Length(0, 32)]
Position = Annotated[int, Bounds(0, POSITIONS)]
Rows = Annotated[int, Bounds(1, 1024)]
TokenId = Annotated[int, Bounds(0, (1 << 20) - 1)]
Target = Annotated[str, OneOf(frozenset(TARGETS))]
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
    """The client tells a server which one comes after it. The highest epoch counts.

    `beside`: one that is being built, and is supplied as well until the next route is told.
    """

    epoch: Count
    stage: StageIndex
    peer: PeerIdText
    beside: bool = False
    record: Annotated[tuple[SignedRecord, ...], Items(1)] = ()  # of `peer`, for not everybody knows everybody


@wire_message
@dataclass(frozen=True, slots=True)
class SessionDraft:
    """The client tells the first stage what it believes the text to be: its last token, and guesses after it.

    The latest counts. Whatever is guessed, the text stays the same; right guesses make it come sooner.
    """

    start: Position
    tokens: Annotated[tuple[TokenId, ...], Items(DRAFT_TOKENS + 1)]


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
    step_s: Seconds = 0.0  # of this session of late, its wait included; 0: not measured yet


@wire_message
@dataclass(frozen=True, slots=True)
class SessionCut:
    """A server tells the client that it cannot reach the one after it."""

    epoch: Count
    reason: Text


@wire_message
@dataclass(frozen=True, slots=True)
class SessionShow:
    """The client asks a server what went through it, at the text's end. Signs are drawn from the seed."""

    positions: Annotated[tuple[Position, ...], Items(SHOWN)]
    seed: Identifier


@wire_message
@dataclass(frozen=True, slots=True)
class SessionShown:
    """The answer, at those of the positions that are computed. Payload: see `prints.Shown`."""

    positions: Annotated[tuple[Position, ...], Items(SHOWN)]


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
    """The answer: positions already here. Payload: their tokens, int32. Supply starts where they differ."""

    positions: Position


@wire_message
@dataclass(frozen=True, slots=True)
class RowsChunk:
    """Consecutive positions. Payload: tokens int32 [count]; behind stage 0 hidden states [count, width]."""

    start: Position
    count: Rows
    batch: Count = 0  # of the sender's, in which it was computed
    sessions: Annotated[int, Bounds(0, 1 << 16)] = 0  # of that batch, that come here


@wire_message
@dataclass(frozen=True, slots=True)
class TuneSpan:
    """A client asks for one stage of a batch, with its own adapter, and for the way back. Method `tune`.

    Payload, fp32 but for ids: tokens int32 [B, T] at the first stage, else hidden [B, P + T, width]; the
    adapter's tensors in the order of `AdapterForm.shapes`; for LOSS labels int32 [B, T], -1 where none is
    wanted; and to go back from HIDDEN the gradient of what came out. The answer: hidden states, logits
    [B, P + T, vocabulary] or nothing; on the way back the gradients of the hidden states that came in and of
    the adapter's tensors.
    """

    stage: StageIndex
    version: Version  # empty: the current one
    sequences: Annotated[int, Bounds(1, 256)]
    length: Annotated[int, Bounds(1, POSITIONS)]
    output: Annotated[str, OneOf(frozenset({HIDDEN, LOGITS, LOSS}))]
    back: bool = False
    rank: Annotated[int, Bounds(0, 256)] = 0
    alpha: Annotated[float, Bounds(-1e6, 1e6)] = 1.0
    targets: Annotated[tuple[Target, ...], Items(7)] = ()
    prompt: Annotated[int, Bounds(0, 4096)] = 0


@wire_message
@dataclass(frozen=True, slots=True)
class TunedSpan:
    """The answer, and on which weights it was computed."""

    version: Version
    loss: Annotated[float, Bounds(-1e9, 1e9)] = 0.0  # mean over the labels
