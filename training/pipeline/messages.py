"""What travels between hops. Payloads: token ids as little-endian int32, then hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from shoal.dht.directory import PeerIdText, StageIndex
from shoal.protocol import limits
from shoal.protocol.wire import Bounds, Count, Finite, Identifier, Items, OneOf, Seconds, wire_message

Attempt = Identifier
Sequences = Annotated[int, Bounds(1, 1 << 16)]
Length = Annotated[int, Bounds(1, 1 << 20)]
APPLIED, TENTATIVE, UNKNOWN = "applied", "tentative", "unknown"
Decision = Annotated[str, OneOf(frozenset({APPLIED, TENTATIVE, UNKNOWN}))]
HOP_CODECS = ("float32", "bfloat16", "int8")  # the widest first
HopCodec = Annotated[str, OneOf(frozenset(HOP_CODECS))]


@wire_message
@dataclass(frozen=True, slots=True)
class Link:
    """One hop of a chain: which replica, in which attempt of its caller."""

    stage: StageIndex
    peer: PeerIdText
    attempt: Attempt


Chain = Annotated[tuple[Link, ...], Items(limits.STAGES)]


def spans(chain: tuple[Link, ...], stages: range) -> bool:
    """Whether a chain has one link for each of these stages, in order."""
    return [link.stage for link in chain] == list(stages)


def begins(chain: tuple[Link, ...], stages: range) -> bool:
    """Whether a chain has one link for each of the first of these stages, in order."""
    return spans(chain, stages[: len(chain)])


@wire_message
@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The name of a micro-batch: unique for ever, whichever way it goes."""

    driver: PeerIdText
    incarnation: Identifier
    number: Count


@wire_message
@dataclass(frozen=True, slots=True)
class Propagate:
    """Forward what the Activations after this hold, and answer with their gradient.

    It comes without them, so that a replica refuses before it has read them, and knows their size. An END
    before the answer says that nobody wants it; a stream that breaks may be that of a caller that died.
    """

    micro_batch: MicroBatch
    stage: StageIndex
    attempt: Attempt
    chain: Chain  # the hops before this one, the driver first
    sequences: Sequences
    deadline_s: Seconds  # left of the whole chain's time
    codec: HopCodec = "float32"  # of the hidden states there and of their gradient back
    hedged: bool = False  # the chain's one hedge is spent
    adopt: Chain = ()  # the hops behind a failed replica of this stage: they may have it already
    again: bool = False  # a replica, here or before, failed with it: it goes before those of its age


@wire_message
@dataclass(frozen=True, slots=True)
class Adopt:
    """Who asked you for this attempt has failed; its caller asked me instead: your answer is for me now."""

    micro_batch: MicroBatch
    stage: StageIndex
    attempt: Attempt  # by which the failed replica asked; only hops of the chain know it
    chain: Chain  # the hops before this one, the driver first, the adopting one last
    hedged: bool = False


@wire_message
@dataclass(frozen=True, slots=True)
class Adopted:
    """The answer to Adopt; Working and Gradient follow as after a Propagate."""

    codec: HopCodec  # of the gradient, as it was asked for at first


@wire_message
@dataclass(frozen=True, slots=True)
class Activations:
    """Its payload follows a Propagate (tokens [B, T+1], hidden [B, T, width]) or a Gradient (its values)."""


@wire_message
@dataclass(frozen=True, slots=True)
class Working:
    """Sent while a hop computes or waits for the hops behind it: silence means trouble, slowness does not."""

    stage: StageIndex  # that has the micro-batch now, as far as is known here
    finished: Count = 0  # pieces of work that the sender's lane has finished
    hedged: bool = False  # behind here the chain's hedge was spent
    chain: Chain = ()  # the hops behind the sender as far as it knows; empty: those it has told before


@wire_message
@dataclass(frozen=True, slots=True)
class HedgeSpent:
    """The caller has asked another replica, too: nobody behind here may."""


@wire_message
@dataclass(frozen=True, slots=True)
class Gradient:
    """The answer to Propagate; the gradient of the loss sum with respect to hidden [B, T, width] follows."""

    chain: Chain  # this hop and those behind it
    loss: Finite  # summed over tokens, nats
    backlog_s: Seconds
    service_s: Seconds  # lane time that a micro-batch takes here
    held_s: Seconds = 0.0  # from the last byte of the activations to this answer
    waited_s: Seconds = 0.0  # of that, for the stages behind


@wire_message
@dataclass(frozen=True, slots=True)
class CommitChain:
    """The driver decided: this chain counts. Each hop on it applies its weight gradient, once."""

    micro_batch: MicroBatch
    chain: Chain


@wire_message
@dataclass(frozen=True, slots=True)
class QueryChain:
    """An undecided hop asks another hop of its chain what was decided."""

    micro_batch: MicroBatch
    stage: StageIndex = 0  # of the hop that asks


@wire_message
@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to CommitChain and QueryChain; `chain` is the decided one where it was APPLIED."""

    decision: Decision
    chain: Chain


@wire_message
@dataclass(frozen=True, slots=True)
class Infer:
    """Forward only, on the anchor, to score. Payload: tokens [B, T+1], then hidden [B, T, width]."""

    stage: StageIndex
    sequences: Sequences
    length: Length
    score: bool  # true: peers of other versions asked for logits, too


@wire_message
@dataclass(frozen=True, slots=True)
class Inferred:
    """The answer to Infer: summed over tokens, nats."""

    loss: Finite
    height: Count
