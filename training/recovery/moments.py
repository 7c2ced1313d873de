"""Moments for a joiner: what AdamW has learned of each weight's gradients, from one donor.

A joiner has the group's weights, and would step blindly until its own optimizer has seen enough gradients.
So it takes the second moments and their step count from a named donor, a byte each; its first moments begin
at zero. A bias correction of their own (design section 10) was tried and loses what is gained: the first
gradient alone then makes full steps. Without it steps grow over the first dozen
(`tests/benchmarks/joiner_moments.py`). Inner state is each replica's own: nothing is agreed on, and who finds
no donor begins without. The trainer asks, and serves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from shoal.compression.codec import bytes_of
from shoal.protocol import limits
from shoal.protocol.errors import Busy, MessageInvalid, NotHere, ProtocolViolation, ShoalError
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Channel, Stream, Transport
from shoal.protocol.wire import Bounds, Count, wire_message
from shoal.training.inner import Moments
from shoal.training.methods import at_stage
from shoal.training.outer.context import GROUP_ROLES, Context, Offload
from shoal.training.recovery.download import receive_soon
from shoal.training.weights import Weights

PIECE_VALUES = 1 << 20  # of one message: a frame takes them, scales included
BLOCK = 256  # values that share a scale
GIVEN_AT_ONCE = 2
GIVE_S = 60.0  # to one joiner: 60 MB at 8 Mbit/s
DONORS_ASKED = 3
_OCTAVE = 8  # codes: the square is known within 4.4 %, its root, which is what steps are divided by, 2.2 %
_LEAST = 254  # code of the smallest square that is told apart, 2^-31.75 of its block's largest
_NEVER = 255  # code of a weight that never had a gradient


@wire_message
@dataclass(frozen=True, slots=True)
class MomentsRequest:
    """Asks a replica for the second moments of its inner optimizer."""


@wire_message
@dataclass(frozen=True, slots=True)
class SecondMoments:
    """A piece of them, as of so many steps. Payload: a scale a block, float32, then a code a value."""

    steps: Annotated[int, Bounds(1, 2**53)]
    start: Count


class MomentsDonor:
    """Serves method "moments" of a stage to whoever joins it."""

    def __init__(self, stage: int, transport: Transport, weights: Weights, offload: Offload) -> None:
        self._stage = stage
        self._transport = transport
        self._weights = weights
        self._offload = offload
        self._giving = 0

    def serve(self) -> None:
        """Register; the transport owns the handlers' tasks."""
        self._transport.serve(at_stage(self._stage, "moments"), self._give, GROUP_ROLES, Channel.BULK)

    async def _give(self, stream: Stream) -> None:
        await stream.receive(MomentsRequest)
        if self._giving >= GIVEN_AT_ONCE:
            raise Busy(f"{self._giving} others are taking moments from here", retry_after_s=5.0)
        self._giving += 1
        try:
            async with asyncio.timeout(GIVE_S):
                await self._send(stream)
        except TimeoutError:
            raise Busy(
                f"{stream.remote.peer} did not take it within {GIVE_S:g} s", retry_after_s=5.0
            ) from None
        finally:
            self._giving -= 1

    async def _send(self, stream: Stream) -> None:
        moments = await self._weights.moments(self._offload)
        if moments is None or not moments.steps:
            raise NotHere("no inner step has been made here yet, or none that keeps moments")
        for start in range(0, moments.square.numel(), PIECE_VALUES):
            piece = await self._offload(encode, moments.square[start : start + PIECE_VALUES])
            await stream.send(SecondMoments(moments.steps, start), piece)


async def take_moments(context: Context, donors: Sequence[PeerId]) -> Moments | None:
    """The second moments of the first donor that gives them; None, and an event, where nobody does.

    GIVE_S for all of them: what they save is a dozen small steps.
    """
    reasons, until_s = [], asyncio.get_running_loop().time() + GIVE_S
    for donor in donors[:DONORS_ASKED]:
        try:
            async with asyncio.timeout_at(until_s):
                moments = await _ask(context, donor)
        except TimeoutError:
            reasons.append(f"{donor}: not within {GIVE_S:g} s, all donors together")
            break
        except ShoalError as error:
            reasons.append(f"{donor}: {error}")
            if isinstance(error, ProtocolViolation):
                context.refuse(donor, str(error))
        else:
            context.event("moments-taken", {"donor": donor, "steps": moments.steps})
            return moments
    if reasons:
        context.event("moments-missing", {"why": "; ".join(reasons)})
    return None


async def _ask(context: Context, donor: PeerId) -> Moments:
    square, steps = torch.empty(context.size), 0
    method = at_stage(context.stage, "moments")
    async with context.transport.open(donor, method, Channel.BULK) as stream:
        await stream.send(MomentsRequest())
        await stream.end()
        for start in range(0, context.size, PIECE_VALUES):
            piece = square[start : start + PIECE_VALUES]
            wanted = encoded_bytes(piece.numel())
            message = await receive_soon(stream, SecondMoments, limits.FRAME_BYTES)
            header: SecondMoments = message.header
            if (header.start, len(message.payload)) != (start, wanted):
                came = f"{len(message.payload)} bytes from {header.start}"
                raise MessageInvalid(f"{came}, where {wanted} from {start} were due")
            if header.steps != (steps or header.steps):
                raise MessageInvalid(f"moments of {header.steps} steps follow on those of {steps}")
            steps = header.steps
            await context.offload(decode, message.payload, piece)
    if not await context.offload(fill_unknown, square):
        raise NotHere(f"{donor} has seen no gradient yet")
    return Moments(steps, torch.zeros_like(square), square)


def encoded_bytes(count: int) -> int:
    """Of so many values."""
    return 4 * -(-count // BLOCK) + count


def encode(square: torch.Tensor) -> bytes:
    """Mean squares [n] as scales float32 [⌈n / BLOCK⌉] and codes uint8 [n], logarithmic: their range is wide,
    and one that became zero would make its weight's next step as large as can be."""
    finite = torch.nan_to_num(square.float(), nan=0.0, posinf=torch.finfo(torch.float32).max)
    blocks = _blocks(finite)
    scales = blocks.amax(1)
    codes = (torch.log2(scales).unsqueeze(1) - torch.log2(blocks)).mul_(_OCTAVE).round_().clamp_(0, _LEAST)
    codes = torch.where(blocks > 0, codes, _NEVER)  # of zeros: what their logarithms made counts for nothing
    return bytes(bytes_of(scales)) + bytes(bytes_of(codes.to(torch.uint8).flatten()[: square.numel()]))


def decode(data: memoryview, into: torch.Tensor) -> None:
    """Fills `into` [n]; what never had a gradient counts as the block's largest, zero where none had.

    Raises MessageInvalid for scales that are no mean squares.
    """
    count = into.numel()
    split = len(data) - count
    scales = torch.frombuffer(bytearray(data[:split]), dtype=torch.float32)
    if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
        raise MessageInvalid("a scale of moments that is negative or not finite")
    codes = _blocks(torch.frombuffer(bytearray(data[split:]), dtype=torch.uint8))
    shrunk = torch.exp2(codes.float().div_(-_OCTAVE))
    shrunk = torch.where(codes == _NEVER, 1.0, shrunk)
    into.copy_((shrunk * scales.unsqueeze(1)).flatten()[:count])


def _blocks(values: torch.Tensor) -> torch.Tensor:
    """[blocks, BLOCK], the last one filled up with zeros."""
    short = -values.numel() % BLOCK
    return torch.nn.functional.pad(values, (0, short)).view(-1, BLOCK)


def fill_unknown(square: torch.Tensor) -> bool:
    """Of blocks that never had a gradient nothing is known: steps there begin small, and grow. False where
    that is so of all."""
    most = float(square.max())
    square.masked_fill_(square == 0, most)
    return most > 0.0
