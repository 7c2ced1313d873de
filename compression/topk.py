"""TopK: of each chunk of 4096 values the 64 of largest magnitude, the others as zeros.

Of equal magnitudes the earlier value is kept; of a last chunk with n values, n/64 rounded up. Two bits a kept
value (sign, and one of two magnitudes a chunk) or eight (codes and a scale a chunk). Needs error feedback
(SparseLoCo, arXiv 2508.15706). Layout: the scales of all chunks, then the kept values' indices within their
chunks, ascending, 12 bits each, then their codes.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch

from shoal.compression import scales as bfloat
from shoal.compression.codec import Buffer, Codec, CodecError, require_total, require_vector

CHUNK = 4096
DENSITY = 64  # one value of so many is kept
KEPT = CHUNK // DENSITY
_INVERSE_127 = float(np.float32(1 / 127))


class TopK(Codec):
    """What both widths share: selection, indices and layout."""

    needs_feedback = True
    scales_per_chunk: int

    def encoded_bytes(self, count: int) -> int:
        kept = _kept(count)
        return 2 * self.scales_per_chunk * _chunks(count) + -(-3 * kept // 2) + self._code_bytes(kept)

    def encode(self, values: torch.Tensor) -> Buffer:
        require_vector(values)
        count, kept = values.numel(), _kept(values.numel())
        if count == 0:
            return b""
        if not bool(values.isfinite().all()):
            raise self._not_finite()
        indices = _largest(values)
        chosen = values[indices + _chunk_starts(count).to(values.device)]
        chunks = torch.nn.functional.pad(chosen, (0, -kept % KEPT)).view(-1, KEPT)
        sizes = torch.full((len(chunks),), KEPT, device=values.device)
        sizes[-1] = kept - (len(chunks) - 1) * KEPT
        scales, codes = self._quantise(chunks, sizes)
        if not bool(scales.isfinite().all()):
            raise self._not_finite()
        sections = (
            bfloat.packed(scales.view(-1)),
            _packed_indices(indices),
            self._packed(codes.view(-1)[:kept]),
        )
        return torch.cat(sections).cpu().numpy().data

    def check(self, data: Buffer, count: int) -> None:
        self._check_size(data, count)
        scales, indices, codes = self._sections(data, count)
        if not bfloat.well_formed(scales) or not self._scales_fit(self._by_chunk(scales)):
            raise CodecError(f"{self.tag}: a scale that no encoder makes")
        if _kept(count) % 2 and indices[-1] & 0xF0:
            raise CodecError(f"{self.tag}: bits set behind the last index")
        positions = _positions(indices, count)
        if positions.size and (positions[-1] >= count or (np.diff(positions) <= 0).any()):
            raise CodecError(f"{self.tag}: indices out of order or range")
        if not self._codes_fit(self._by_chunk(scales), codes, _kept(count)):
            raise CodecError(f"{self.tag}: a code that no encoder makes")

    def decode(self, data: Buffer, count: int) -> torch.Tensor:
        positions, values = self._decoded(data, count)
        result = torch.zeros(count)
        result[positions] = values
        return result

    def add_decoded(self, data: Buffer, count: int, weight: float, total: torch.Tensor) -> float:
        require_total(total, count)
        positions, values = self._decoded(data, count)
        norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
        total[positions] += values.mul_(weight)
        return norm * norm

    def _decoded(self, data: Buffer, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions and values of what was kept."""
        self.check(data, count)
        scales, indices, codes = self._sections(data, count)
        values = self._values(self._by_chunk(scales), codes, _kept(count))
        return torch.from_numpy(_positions(indices, count)), values

    def _sections(self, data: Buffer, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        flat, border = np.frombuffer(data, np.uint8), 2 * self.scales_per_chunk * _chunks(count)
        scales, indices, codes = np.split(flat, (border, border + -(-3 * _kept(count) // 2)))
        return scales, indices, codes

    def _by_chunk(self, scales: np.ndarray) -> torch.Tensor:
        return bfloat.unpacked(scales).view(-1, self.scales_per_chunk)

    def _not_finite(self) -> CodecError:
        return CodecError(f"{self.tag}: values that are not finite, or too large to decode finite")

    @abstractmethod
    def _code_bytes(self, kept: int) -> int:
        """Bytes of so many codes."""

    @abstractmethod
    def _quantise(self, chunks: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales [chunks, scales_per_chunk] and codes [chunks, KEPT] of kept values, zeros behind `sizes`."""

    @abstractmethod
    def _packed(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes as bytes."""

    @abstractmethod
    def _scales_fit(self, scales: torch.Tensor) -> bool:
        """Whether an encoder can have made well-formed scales."""

    @abstractmethod
    def _codes_fit(self, scales: torch.Tensor, codes: np.ndarray, kept: int) -> bool:
        """Whether an encoder can have made the codes' bytes under these scales."""

    @abstractmethod
    def _values(self, scales: torch.Tensor, codes: np.ndarray, kept: int) -> torch.Tensor:
        """[kept] fp32."""


class TopK2(TopK):
    """12 + 2 bits a kept value, 4 bytes a chunk: 0.71 % of fp32.

    The two magnitudes are the means of those kept ones that are above, and not above, their common mean.
    """

    tag = f"topk2/{DENSITY}"
    scales_per_chunk = 2

    def _code_bytes(self, kept: int) -> int:
        return -(-kept // 4)

    def _quantise(self, chunks: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        magnitudes = chunks.abs()
        above = magnitudes > _mean(magnitudes, sizes).unsqueeze(1)
        high_count = above.sum(1)
        low = bfloat.nearest(_mean(magnitudes.where(~above, 0.0), sizes - high_count))
        high = bfloat.nearest(_mean(magnitudes.where(above, 0.0), high_count))
        high = torch.where(high_count == 0, low, high)
        negative = (chunks < 0.0) & (torch.where(above, high.unsqueeze(1), low.unsqueeze(1)) > 0.0)
        return torch.stack((low, high), 1), above.to(torch.uint8) | negative.to(torch.uint8) << 1

    def _packed(self, codes: torch.Tensor) -> torch.Tensor:
        fours = torch.nn.functional.pad(codes, (0, -codes.numel() % 4)).view(-1, 4)
        return fours[:, 0] | fours[:, 1] << 2 | fours[:, 2] << 4 | fours[:, 3] << 6

    def _scales_fit(self, scales: torch.Tensor) -> bool:
        return bool(((scales[:, 0] >= 0.0) & (scales[:, 0] <= scales[:, 1])).all())

    def _codes_fit(self, scales: torch.Tensor, codes: np.ndarray, kept: int) -> bool:
        bits = np.unpackbits(codes, bitorder="little")
        zero = self._magnitudes(scales, bits, kept) == 0.0
        return not bits[2 * kept :].any() and not bits[1 : 2 * kept : 2][zero.numpy()].any()

    def _values(self, scales: torch.Tensor, codes: np.ndarray, kept: int) -> torch.Tensor:
        bits = np.unpackbits(codes, bitorder="little")
        negative = torch.from_numpy(bits[1 : 2 * kept : 2].astype(np.float32))
        return self._magnitudes(scales, bits, kept) * (1.0 - 2.0 * negative)

    def _magnitudes(self, scales: torch.Tensor, bits: np.ndarray, kept: int) -> torch.Tensor:
        above = np.zeros(len(scales) * KEPT, np.bool_)
        above[:kept] = bits[: 2 * kept : 2]
        chunks = torch.from_numpy(above).view(-1, KEPT)
        return torch.where(chunks, scales[:, 1:], scales[:, :1]).view(-1)[:kept]


class TopK8(TopK):
    """12 + 8 bits a kept value, 2 bytes a chunk: 0.99 % of fp32. Code = round-half-even(x/scale)."""

    tag = f"topk8/{DENSITY}"
    scales_per_chunk = 1

    def _code_bytes(self, kept: int) -> int:
        return kept

    def _quantise(self, chunks: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales = bfloat.upwards(chunks.abs().amax(1, keepdim=True) * _INVERSE_127)
        if not bool((127.0 * scales).isfinite().all()):
            raise self._not_finite()
        return scales, (chunks * bfloat.inverse(scales)).round_().to(torch.int8)

    def _packed(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.view(torch.uint8)

    def _scales_fit(self, scales: torch.Tensor) -> bool:
        return bool(((scales >= 0.0) & (127.0 * scales).isfinite()).all())

    def _codes_fit(self, scales: torch.Tensor, codes: np.ndarray, kept: int) -> bool:
        zero = scales.expand(-1, KEPT).reshape(-1)[:kept] == 0.0
        return not (codes == 0x80).any() and not codes[zero.numpy()].any()

    def _values(self, scales: torch.Tensor, codes: np.ndarray, kept: int) -> torch.Tensor:
        values = torch.from_numpy(codes.view(np.int8).astype(np.float32))
        return values.mul_(scales.expand(-1, KEPT).reshape(-1)[:kept])


def _chunks(count: int) -> int:
    return -(-count // CHUNK)


def _kept(count: int) -> int:
    """How many of `count` values are kept: full chunks have CHUNK = DENSITY · KEPT."""
    return -(-count // DENSITY)


def _chunk_starts(count: int) -> torch.Tensor:
    """Where the chunk of each kept value begins."""
    return torch.arange(_kept(count)) // KEPT * CHUNK


def _largest(values: torch.Tensor) -> torch.Tensor:
    """Indices within their chunks of what is kept, ascending in each."""
    border = values.numel() // CHUNK * CHUNK
    places = CHUNK - 1 - torch.arange(CHUNK, device=values.device)
    indices = []
    for chunks in (values[:border].view(-1, CHUNK), values[border:].view(1, -1)):
        if chunks.numel():
            # No two keys are equal, so that the choice is the same on every device.
            keys = (chunks.abs().view(torch.int32).to(torch.int64) << 12) | places[: chunks.shape[1]]
            kept = torch.topk(keys, _kept(chunks.shape[1]), dim=1, sorted=False).indices
            indices.append(kept.sort(dim=1).values.view(-1))
    return torch.cat(indices)


def _mean(magnitudes: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Σ/size a chunk, 0 for size 0, summed by halves so that every device adds in one order."""
    sums = magnitudes * (1 / KEPT)
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums.view(-1) * (torch.full_like(sums.view(-1), KEPT) / sizes.clamp(min=1))


def _packed_indices(indices: torch.Tensor) -> torch.Tensor:
    """12 bits each: two in three bytes, the first one's low byte first."""
    pairs = torch.nn.functional.pad(indices, (0, indices.numel() % 2)).view(-1, 2)
    both = pairs[:, 0] | pairs[:, 1] << 12
    packed = torch.stack((both & 255, both >> 8 & 255, both >> 16), 1).to(torch.uint8)
    return packed.view(-1)[: -(-3 * indices.numel() // 2)]


def _positions(indices: np.ndarray, count: int) -> np.ndarray:
    """Packed indices as int64 positions in the vector."""
    kept = _kept(count)
    padded = np.zeros(-(-kept // 2) * 3, np.uint8)
    padded[: indices.size] = indices
    first, middle, last = padded.reshape(-1, 3).astype(np.int64).T
    local = np.stack((first | (middle & 15) << 8, middle >> 4 | last << 4), 1).reshape(-1)[:kept]
    positions: np.ndarray = local + _chunk_starts(count).numpy()
    return positions
