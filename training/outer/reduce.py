"""The arithmetic of a part's owner, run off the loop: the weighted mean, what it leaves out, and its name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.compression.codec import Buffer, Codec, CodecError
from shoal.protocol.errors import MessageInvalid
from shoal.training.outer.entry import Contributor, bitmap, part_digest

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


def checked(codec: Codec, part: int, listed: bytes, encoded: Buffer, count: int) -> Published:
    """A part from the network, named. Raises MessageInvalid where it does not decode to `count` values."""
    try:
        codec.check(encoded, count)
    except CodecError as error:
        raise MessageInvalid(f"part {part}: {error}") from error
    return publish(listed, encoded)


@dataclass(frozen=True, slots=True, eq=False)
class Mean:
    """What an owner makes of a part; `published` is None when nothing was left to average."""

    published: Published | None
    refused: dict[int, str]  # seat -> why
    remainder: torch.Tensor | None = None  # what the encoded mean leaves out, where that is fed back


def weighted_mean(
    incoming: Codec,
    outgoing: Codec,
    contributions: Sequence[tuple[Contributor, Buffer]],
    count: int,
    roster_size: int,
    residual: torch.Tensor | None = None,
    feedback_decay: float | None = None,
) -> Mean:
    """C(r + Σ tokens·clip·Δ / Σ tokens) over contributions in roster order; `residual` is r [count].

    With `feedback_decay` β the remainder β·(what was encoded − what it decodes to) comes back too.
    Refuses contributions whose bytes no encoder makes, or whose norm exceeds what their sender declared, on
    which the clip factors were built: then the sum begins again without them.
    """
    refused: dict[int, str] = {}
    while accepted := [(row, data) for row, data in contributions if row.seat not in refused]:
        tokens = sum(row.tokens for row, _ in accepted)
        weighted = [(data, row.clip * row.tokens / tokens) for row, data in accepted]
        total, squares = incoming.weighted_sum(weighted, count)
        found = {row.seat: _fault(row, square) for (row, _), square in zip(accepted, squares, strict=True)}
        wrong = {seat: reason for seat, reason in found.items() if reason is not None}
        refused |= wrong
        if not wrong:
            break
    if not accepted:
        return Mean(None, refused)
    feeds_back = feedback_decay is not None and outgoing.needs_feedback
    remainder = torch.empty(count) if feeds_back else None
    encoded, _ = outgoing.encode_difference(total, None, residual, remainder, feedback_decay or 1.0)
    listed = bitmap({row.seat for row, _ in accepted}, roster_size)
    return Mean(publish(listed, encoded), refused, remainder)


def _fault(row: Contributor, square: float | CodecError) -> str | None:
    """Why a contribution has to be refused, given its squared norm or what is wrong with its bytes."""
    if isinstance(square, CodecError):
        return str(square)
    norm = math.sqrt(square)
    if norm > _NORM_TOLERANCE * row.norm:
        return f"a part's norm is {norm:.3g}, {row.norm:.3g} was declared for all"
    return None
