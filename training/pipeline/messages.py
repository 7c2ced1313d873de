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
    """Forward these activations and answer with their gradient.

    Payload: tokens [B, T+1], hidden [B, T, width].
    """

    micro_batch: MicroBatch
    stage: StageIndex
    attempt: Attempt
    chain: Chain  # the hops before this one, the driver first
    sequences: Sequences
    deadline_s: Seconds  # left of the whole chain's time


@wire_message
@dataclass(frozen=True, slots=True)
class Working:
    """Sent while a hop computes or waits for the hops behind it: silence means trouble, slowness does not."""

    stage: StageIndex


@wire_message
@dataclass(frozen=True, slots=True)
class Gradient:
    """The answer to Propagate. Payload: gradient of the loss sum with respect to hidden [B, T, width]."""

    chain: Chain  # this hop and those behind it
    loss: Finite  # summed over tokens, nats
    backlog_s: Seconds
    service_s: Seconds  # this hop's own compute time for the micro-batch


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


@wire_message
@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to CommitChain and QueryChain; `chain` is the decided one where it was APPLIED."""

    decision: Decision
    chain: Chain


@wire_message
@dataclass(frozen=True, slots=True)
class Infer:
    """Forward only, on the anchor. Payload as in Propagate; tokens are [B, T] or, to score, [B, T+1]."""

    stage: StageIndex
    sequences: Sequences
    length: Length
    score: bool  # answer with the summed loss instead of the last position's logits


@wire_message
@dataclass(frozen=True, slots=True)
class Inferred:
    """The answer to Infer. Payload: logits fp32 [B, vocabulary], empty when scoring."""

    loss: Finite
    height: Count
