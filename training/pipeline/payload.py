"""The bytes of a micro-batch: token ids, then hidden states in the wire's dtype. Sizes are known beforehand.

Tokens travel as little-endian int32 [B, T+1]: inputs and targets overlap in all but one column. What arrives
is checked here (ids in the vocabulary, numbers finite), so the model never sees what could poison a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from shoal.protocol.errors import MessageInvalid
from shoal.training.spec import RunSpec


@dataclass(frozen=True, slots=True)
class PayloadFormat:
    """Shapes and dtype that both ends of a hop derive from the spec."""

    length: int  # T
    width: int
    vocabulary: int
    dtype: torch.dtype

    @classmethod
    def of(cls, spec: RunSpec) -> PayloadFormat:
        dtype = getattr(torch, spec.compression.activations)
        return cls(spec.model.sequence, spec.model.width, spec.data.vocabulary, dtype)

    def hidden_bytes(self, sequences: int, length: int | None = None) -> int:
        return sequences * (length or self.length) * self.width * self.dtype.itemsize

    def token_bytes(self, sequences: int, columns: int | None = None) -> int:
        return sequences * (columns or self.length + 1) * 4

    def pack(self, tokens: torch.Tensor, hidden: torch.Tensor | None) -> memoryview:
        """tokens int64 [B, C], hidden [B, T, width] or None (first stage of an inference) -> one buffer."""
        heads = tokens.to("cpu", torch.int32).contiguous().numpy().view(np.uint8).reshape(-1)
        if hidden is None:
            return memoryview(heads.data)
        body = self.pack_hidden(hidden)
        buffer = bytearray(heads.size + body.nbytes)
        buffer[: heads.size] = heads.data
        buffer[heads.size :] = body
        return memoryview(buffer)

    def pack_hidden(self, hidden: torch.Tensor) -> memoryview:
        """hidden [B, T, width] of any float dtype -> its bytes in the wire's dtype."""
        wire = hidden.detach().to("cpu", self.dtype).contiguous()
        return memoryview(wire.view(torch.uint8).numpy().reshape(-1).data)

    def unpack_tokens(self, data: memoryview, sequences: int, columns: int) -> torch.Tensor:
        """-> int64 [B, C], every id within the vocabulary."""
        size = self.token_bytes(sequences, columns)
        if data.nbytes < size:
            raise MessageInvalid(f"payload has {data.nbytes} bytes, its tokens alone take {size}")
        ids = torch.frombuffer(bytearray(data[:size]), dtype=torch.int32).view(sequences, columns).long()
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary:
            raise MessageInvalid(f"a token id lies outside the vocabulary of {self.vocabulary}")
        return ids

    def unpack_hidden(self, data: memoryview, sequences: int, length: int, device: str) -> torch.Tensor:
        """-> [B, T, width] on the device, finite."""
        size = self.hidden_bytes(sequences, length)
        if data.nbytes != size:
            raise MessageInvalid(f"hidden states take {size} bytes, {data.nbytes} came")
        flat = (
            torch.frombuffer(data, dtype=self.dtype)
            if not data.readonly
            else torch.frombuffer(bytearray(data), dtype=self.dtype)
        )
        hidden = flat.view(sequences, length, self.width).to(device)
        if not bool(torch.isfinite(hidden).all()):
            raise MessageInvalid("hidden states or their gradient hold NaN or infinity")
        return hidden
