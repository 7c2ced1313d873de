"""The arithmetic of a round's parts, run off the loop: deltas, their weighted mean, and applying an entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3

from shoal.compression.codec import Buffer, Codec, CodecError, bytes_of
from shoal.training.outer.entry import SKIP, Contributor, Entry, bitmap, part_digest
from shoal.training.outer.local import Rebase, Sent
from shoal.training.outer.parts import Part
from shoal.training.outer.strategy import OuterStrategy

# A part's decoded norm may exceed the whole delta's by the quantisation error, never by more than this.
_NORM_TOLERANCE = 1.1


@dataclass(frozen=True, slots=True, eq=False)
class Published:
    """A part's mean as its owner published it."""

    listed: bytes  # bitmap of seats
    encoded: Buffer
    digest: bytes


def publish(listed: bytes, encoded: Buffer) -> Published:
    """With the digest that names it."""
    return Published(listed, encoded, part_digest(listed, encoded))


def delta_norm(anchor: torch.Tensor, sent: torch.Tensor) -> float:
    """‖a − s‖, summed in fp64 over slices so that no full copy is made."""
    total = 0.0
    for a, s in zip(torch.split(anchor, 1 << 20), torch.split(sent, 1 << 20), strict=True):
        total += float(torch.linalg.vector_norm(a - s, dtype=torch.float64)) ** 2
    return float(total**0.5)


def encode_delta(codec: Codec, anchor: torch.Tensor, sent: torch.Tensor) -> Buffer:
    """q = encode(a − s) of one part. Raises CodecError where it is not finite."""
    return codec.encode(anchor - sent)


@dataclass(frozen=True, slots=True, eq=False)
class Mean:
    """What an owner makes of a part; `published` is None when nothing was left to average."""

    published: Published | None
    refused: dict[int, str]  # seat -> why


def weighted_mean(
    incoming: Codec,
    outgoing: Codec,
    contributions: Sequence[tuple[Contributor, Buffer]],
    count: int,
    roster_size: int,
) -> Mean:
    """Σ tokens·clip·Δ / Σ tokens over contributions in roster order, encoded once.

    Refuses contributions whose bytes no encoder makes, or whose norm exceeds what their sender declared, on
    which the clip factors were built.
    """
    total = torch.zeros(count, dtype=torch.float32)
    tokens = sum(row.tokens for row, _ in contributions)
    refused: dict[int, str] = {}
    accepted: dict[int, int] = {}
    for row, data in contributions:
        try:
            delta = incoming.decode(data, count)
        except CodecError as error:
            refused[row.seat] = str(error)
            continue
        norm = float(torch.linalg.vector_norm(delta))
        if norm > _NORM_TOLERANCE * row.norm:
            refused[row.seat] = f"a part's norm is {norm:.3g}, {row.norm:.3g} was declared for all"
            continue
        total.add_(delta.mul_(row.clip * row.tokens / tokens))
        accepted[row.seat] = row.tokens
    if not accepted:
        return Mean(None, refused)
    if refused:
        total.mul_(tokens / sum(accepted.values()))
    return Mean(publish(bitmap(set(accepted), roster_size), outgoing.encode(total)), refused)


@dataclass(frozen=True, slots=True, eq=False)
class Applied:
    """The agreed state after an entry, and what local weights have to do about it."""

    anchor: torch.Tensor
    momentum: torch.Tensor
    changes: list[Rebase]
    digest: bytes  # of both


def apply_entry(
    strategy: OuterStrategy,
    codec: Codec,
    parts: Sequence[Part],
    entry: Entry,
    published: Mapping[int, Buffer],
    anchor: torch.Tensor,
    momentum: torch.Tensor,
    seat: int | None,
    sent: Sent | None,
) -> Applied:
    """The outer step of an entry, on copies; anchor and momentum [size] fp32 stay as they are.

    Local weights, per part (design section 9): listed, w ← new + (w − s); not listed, w ← w + (new − a);
    SKIP, nothing. Listed is what the entry says of `seat`, this process's, with `sent` its s of that round.
    """
    after, velocity = anchor.clone(), momentum.clone()
    changes = []
    for part in parts:
        if entry.digest(part.index) == SKIP:
            continue
        mean = codec.decode(published[part.index], part.count)
        strategy.step(after[part.span], velocity[part.span], mean)
        listed = seat is not None and bool(entry.listed_in(part.index)[seat // 8] >> seat % 8 & 1)
        old = sent.weights if listed and sent is not None else anchor
        changes.append(Rebase(part.start, old[part.span], after[part.span]))
    return Applied(after, velocity, changes, tensors_digest(after, velocity))


def tensors_digest(anchor: torch.Tensor, momentum: torch.Tensor) -> bytes:
    """BLAKE3 over the bytes of anchors, then momentum: equal on replicas with equal heads (P1)."""
    hasher = blake3(b"shoal tensors\0")
    for tensor in (anchor, momentum):
        hasher.update(bytes_of(tensor))
    return hasher.digest()
