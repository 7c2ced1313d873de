"""Entropy: another codec's bytes, deflated where that makes them smaller. Worth it on slow links only.

Layout: a byte that says how (0 as they are, 1 deflated), then the bytes. Codes of a quantiser hardly repeat,
so the search for matches is left out: Huffman codes and run lengths, which zeros make. The bytes depend on
the version of zlib; what they decode to does not.
"""

from __future__ import annotations

import zlib

import torch

from shoal.compression.codec import Buffer, Codec, CodecError

_RAW, _DEFLATED = b"\0", b"\1"


class Entropy(Codec):
    """At most one byte more than the codec it chains."""

    exact = False

    def __init__(self, inner: Codec) -> None:
        self.inner = inner
        self.tag = f"{inner.tag}+zlib"
        self.needs_feedback = inner.needs_feedback

    def encoded_bytes(self, count: int) -> int:
        return 1 + self.inner.encoded_bytes(count)

    def encode(self, values: torch.Tensor) -> Buffer:
        raw = self.inner.encode(values)
        deflate = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_RLE)
        deflated = deflate.compress(raw) + deflate.flush()
        return _DEFLATED + deflated if len(deflated) < memoryview(raw).nbytes else _RAW + bytes(raw)

    def check(self, data: Buffer, count: int) -> None:
        self.inner.check(self._inflated(data, count), count)

    def decode(self, data: Buffer, count: int) -> torch.Tensor:
        return self.inner.decode(self._inflated(data, count), count)

    def add_decoded(self, data: Buffer, count: int, weight: float, total: torch.Tensor) -> float:
        return self.inner.add_decoded(self._inflated(data, count), count, weight, total)

    def _inflated(self, data: Buffer, count: int) -> Buffer:
        """The inner codec's bytes; never more of them than `count` values take."""
        view, expected = memoryview(data).cast("B"), self.inner.encoded_bytes(count)
        if view[:1] == _RAW:
            return view[1:]
        if view[:1] != _DEFLATED or view.nbytes > expected:
            raise CodecError(f"{self.tag}: {view.nbytes} bytes that are framed as no encoder does")
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            raw = inflate.decompress(view[1:], expected + 1)
        except zlib.error as error:
            raise CodecError(f"{self.tag}: {error}") from error
        if len(raw) != expected or not inflate.eof or inflate.unused_data:
            raise CodecError(f"{self.tag}: deflated bytes that end too early or too late")
        return raw
