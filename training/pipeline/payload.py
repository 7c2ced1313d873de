"""The bytes of a micro-batch: token ids, then hidden states in some codec. Sizes are known beforehand.

Tokens travel as little-endian int32 [B, T+1]: inputs and targets overlap in all but one column. What arrives
is checked here (ids in the vocabulary, numbers finite), so the model never sees what could poison a step.
Codecs are deterministic and without memory: a retry carries the same bytes, and backward treats the
forward's rounding as identity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shoal.compression.codec import Codec, CodecError
from shoal.compression.registry import codec_for
from shoal.protocol.errors import MessageInvalid
from shoal.training.pipeline.messages import HOP_CODECS
from shoal.training.spec import RunSpec


@dataclass(frozen=True, slots=True)
class PayloadFormat:
    """Shapes and codecs that both ends of a hop derive from the spec."""

    length: int  # T
    width: int
    vocabulary: int
    codecs: Mapping[str, Codec]  # those the spec allows, the widest first

    @classmethod
    def of(cls, spec: RunSpec) -> PayloadFormat:
        return cls._of(spec, hop_codecs(spec))

    @classmethod
    def of_inference(cls, spec: RunSpec) -> PayloadFormat:
        """One codec for all hops, 16 bits or more: else an answer would depend on the way it went."""
        widest = hop_codecs(spec)[0]
        return cls._of(spec, ("bfloat16" if widest == "int8" else widest,))

    @classmethod
    def _of(cls, spec: RunSpec, families: tuple[str, ...]) -> PayloadFormat:
        codecs = {family: codec_for(family, spec.compression.block) for family in families}
        return cls(spec.model.sequence, spec.model.width, spec.data.vocabulary, codecs)

    @property
    def widest(self) -> str:
        """Where nothing is known of a link."""
        return next(iter(self.codecs))

    def hidden_bytes(self, sequences: int, codec: str, length: int | None = None) -> int:
        """Raises MessageInvalid for a codec that the spec does not allow."""
        return self._codec(codec).encoded_bytes(sequences * (length or self.length) * self.width)

    def token_bytes(self, sequences: int, columns: int | None = None) -> int:
        return sequences * (columns or self.length + 1) * 4

    def pack(self, tokens: torch.Tensor, hidden: torch.Tensor | None, codec: str) -> memoryview:
        """tokens int64 [B, C], hidden [B, T, width] or None (first stage of an inference) -> one buffer."""
        heads = tokens.to("cpu", torch.int32).contiguous().numpy().view(np.uint8).reshape(-1)
        if hidden is None:
            return memoryview(heads.data)
        body = self.pack_hidden(hidden, codec)
        buffer = bytearray(heads.size + body.nbytes)
        buffer[: heads.size] = heads.data
        buffer[heads.size :] = body
        return memoryview(buffer)

    def pack_ids(self, ids: Sequence[int]) -> bytes:
        """Token ids of one text, as `pack` writes them; for a few at a time."""
        return np.array(ids, "<i4").tobytes()

    def unpack_ids(self, data: memoryview) -> list[int]:
        """Of whole int32; every id within the vocabulary."""
        ids: list[int] = np.frombuffer(data, "<i4").tolist()
        if ids and not 0 <= min(ids) <= max(ids) < self.vocabulary:
            raise MessageInvalid(f"a token id lies outside the vocabulary of {self.vocabulary}")
        return ids

    def pack_hidden(self, hidden: torch.Tensor, codec: str) -> memoryview:
        """hidden [B, T, width] of any float dtype -> its bytes. Raises MessageInvalid unless it is finite."""
        try:
            return memoryview(self._codec(codec).encode(hidden.detach().float().flatten()))
        except CodecError as error:
            raise MessageInvalid(f"hidden states or their gradient cannot be sent: {error}") from error

    def unpack_tokens(self, data: memoryview, sequences: int, columns: int) -> torch.Tensor:
        """-> int64 [B, C], every id within the vocabulary."""
        size = self.token_bytes(sequences, columns)
        if data.nbytes < size:
            raise MessageInvalid(f"payload has {data.nbytes} bytes, its tokens alone take {size}")
        ids = torch.frombuffer(bytearray(data[:size]), dtype=torch.int32).view(sequences, columns).long()
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary:
            raise MessageInvalid(f"a token id lies outside the vocabulary of {self.vocabulary}")
        return ids

    def unpack_hidden(
        self, data: memoryview, sequences: int, codec: str, device: str, length: int | None = None
    ) -> torch.Tensor:
        """-> fp32 [B, T, width] on the device, finite."""
        shape = (sequences, length or self.length, self.width)
        size = self.hidden_bytes(sequences, codec, length)
        if data.nbytes != size:
            raise MessageInvalid(f"hidden states take {size} bytes, {data.nbytes} came")
        try:
            return self._codec(codec).decode(data, math.prod(shape)).view(shape).to(device)
        except CodecError as error:
            raise MessageInvalid(f"hidden states or their gradient hold NaN or infinity: {error}") from error

    def _codec(self, name: str) -> Codec:
        if name not in self.codecs:
            raise MessageInvalid(f"hops of this run use {', '.join(self.codecs)}, not {name}")
        return self.codecs[name]


def hop_codecs(spec: RunSpec) -> tuple[str, ...]:
    """Which codecs hops may use, the widest first: with `auto` none wider than what is computed in."""
    chosen = spec.compression.activations
    if chosen != "auto":
        return (chosen,)
    return HOP_CODECS[HOP_CODECS.index(spec.model.dtype) :]
