"""Fingerprints of hidden states: a position's largest values, its norm, and its sum with drawn signs. Pure.

Two honest servers differ by rounding: by how much of each value, `off` says. The largest values are the ones
that rounding moves least; the sum, whose signs nobody knows beforehand, moves with any of the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from blake3 import blake3

from shoal.protocol.errors import MessageInvalid

LARGEST = 8


@dataclass(frozen=True, slots=True, eq=False)
class Prints:
    """Of some positions."""

    indices: torch.Tensor  # int64 [n, k]
    values: torch.Tensor  # fp32 [n, k], at these
    sums: torch.Tensor  # fp32 [n]
    norms: torch.Tensor  # fp32 [n]

    @classmethod
    def of(cls, rows: torch.Tensor, seed: int) -> Prints:
        """Of hidden states fp32 [n, width]."""
        indices = rows.abs().topk(min(LARGEST, rows.shape[1]), dim=1).indices
        sums = (rows.double() * _signs(rows.shape[1], seed)).sum(dim=1).float()
        return cls(indices, rows.gather(1, indices), sums, rows.double().norm(dim=1).float())

    def pack(self) -> bytes:
        """Little-endian, field by field."""
        floats = torch.cat((self.values.flatten(), self.sums, self.norms)).numpy().astype("<f4")
        return self.indices.numpy().astype("<i4").tobytes() + floats.tobytes()

    @classmethod
    def unpack(cls, data: memoryview, positions: int, width: int) -> Prints:
        """Raises MessageInvalid for what no prints of so many positions are."""
        largest = min(LARGEST, width)
        count = positions * largest
        if data.nbytes != print_bytes(positions, width):
            raise MessageInvalid(f"prints of {positions} positions do not take {data.nbytes} bytes")
        indices = torch.from_numpy(np.frombuffer(data[: 4 * count], "<i4").astype(np.int64))
        floats = torch.from_numpy(np.frombuffer(data[4 * count :], "<f4").astype(np.float32))
        if count and not 0 <= int(indices.min()) <= int(indices.max()) < width:
            raise MessageInvalid(f"a print lies outside the width of {width}")
        if not bool(floats.isfinite().all()):
            raise MessageInvalid("a print holds NaN or infinity")
        values, sums, norms = torch.split(floats, [count, positions, positions])
        return cls(indices.view(positions, largest), values.view(positions, largest), sums, norms)

    def off(self, rows: torch.Tensor, seed: int) -> torch.Tensor:
        """[n]: by how much these are not the prints of rows fp32 [n, width], in shares of what is there."""
        mine = Prints.of(rows, seed)
        typical = mine.norms / math.sqrt(rows.shape[1])
        there = rows.gather(1, self.indices)
        scale = torch.maximum(there.abs(), typical[:, None]).clamp(min=1e-30)
        least = mine.values.abs().amin(dim=1, keepdim=True)  # a claimed one is among the largest, or next to
        wrong = torch.maximum((self.values - there).abs(), least - there.abs()) / scale
        norms = mine.norms.clamp(min=1e-30)
        whole = torch.maximum((self.sums - mine.sums).abs(), (self.norms - mine.norms).abs()) / norms
        return torch.maximum(wrong.amax(dim=1), whole)

    def apart(self, other: Prints) -> torch.Tensor:
        """[n]: by how much two that should be of the same rows are not, as far as they tell."""
        norms = torch.maximum(self.norms, other.norms).clamp(min=1e-30)
        whole = torch.maximum((self.sums - other.sums).abs(), (self.norms - other.norms).abs()) / norms
        same = self.indices[:, :, None] == other.indices[:, None, :]
        gap = (self.values[:, :, None] - other.values[:, None, :]).abs()
        scale = torch.maximum(self.values.abs()[:, :, None], other.values.abs()[:, None, :]).clamp(min=1e-30)
        return torch.maximum((gap / scale * same).amax(dim=(1, 2)), whole)


def print_bytes(positions: int, width: int) -> int:
    """Of the prints of so many positions."""
    return 4 * positions * (2 * min(LARGEST, width) + 2)


def _signs(width: int, seed: int) -> torch.Tensor:
    """fp64 [width] of 1 and -1."""
    drawn = blake3(b"signs" + seed.to_bytes(8, "big")).digest(length=math.ceil(width / 8))
    bits = np.unpackbits(np.frombuffer(drawn, np.uint8))[:width]
    return torch.from_numpy(2.0 * bits - 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """What one server says went through it, at some positions of a text."""

    positions: tuple[int, ...]
    seed: int
    came: Prints | None  # from the stage before
    went: Prints | None  # to the next one

    def pack(self) -> bytes:
        """What came, then what went."""
        return b"".join(prints.pack() for prints in (self.came, self.went) if prints is not None)

    @classmethod
    def unpack(
        cls, positions: tuple[int, ...], seed: int, data: memoryview, *, sides: tuple[bool, bool], width: int
    ) -> Shown:
        """`sides`: whether the stage has one before it, and one after it. Raises MessageInvalid."""
        size, found, at = print_bytes(len(positions), width), list[Prints | None](), 0
        for there in sides:
            found.append(Prints.unpack(data[at : at + size], len(positions), width) if there else None)
            at += size if there else 0
        if data.nbytes != at:
            raise MessageInvalid(f"{data.nbytes} bytes of prints came, {at} were due")
        return cls(positions, seed, *found)


@dataclass(frozen=True, slots=True)
class Strange:
    """A stage that gave what another chain did not get from the same, at a position."""

    stage: int
    position: int
    off: float
    writers: tuple[int, ...]  # stages whose servers, of those that wrote, are to blame, if it is they
    compared: bool  # with the other chain; else two of the writers contradict each other


def first_strange(
    shown: Sequence[Shown | None], reference: Sequence[torch.Tensor], near: float
) -> Strange | None:
    """By stage what was shown; `reference`: what goes into each stage but the first, fp32 [T, width].

    From the first stage on, so what went into the stage that is found was right.
    """
    for stage, rows in enumerate(reference):
        before, behind = shown[stage], shown[stage + 1]
        went = before.went if before is not None else None
        came = behind.came if behind is not None else None
        both = before is not None and behind is not None and before.positions == behind.positions
        if before and went and came and both and (found := _worst(before, went.apart(came), near)):
            return Strange(stage, *found, writers=(stage, stage + 1), compared=False)
        for one, prints, writers in ((before, went, (stage,)), (behind, came, (stage, stage + 1))):
            if one is None or prints is None:
                continue
            if found := _worst(one, prints.off(rows[list(one.positions)], one.seed), near):
                return Strange(stage, *found, writers=writers, compared=True)
    return None


def _worst(shown: Shown, off: torch.Tensor, near: float) -> tuple[int, float] | None:
    """Position and figure of the worst, if that is beyond `near`."""
    if not len(off) or float(off.max()) <= near:
        return None
    return shown.positions[int(off.argmax())], float(off.max())
