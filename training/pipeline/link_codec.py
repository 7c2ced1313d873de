"""The codec of a link, hop by hop: the widest whose bytes cross while the device computes. Pure.

notes: activation-compression.md, section 2. Send time and compute overlap, so a link that needs less than
the stage's own time for a micro-batch costs nothing; a narrower codec would only lose bits. A codec of 8 bits
encodes at about 1 GB/s, so on a link where it wins, encoding is faster than the wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SHARE = 0.8  # of the compute time that sending may take
HYSTERESIS = 10  # messages in a row that would rather have another codec


def widest_in_time(sizes: Mapping[str, int], seconds_per_byte: float, compute_s: float) -> str:
    """The widest codec that is sent in time; the narrowest if none is.

    `sizes`: bytes of a micro-batch one way by codec, the widest first.
    `seconds_per_byte` 0 stands for a link that was not measured yet.
    """
    in_time = (codec for codec, size in sizes.items() if size * seconds_per_byte <= SHARE * compute_s)
    return next(in_time, [*sizes][-1])


@dataclass(frozen=True, slots=True)
class LinkCodec:
    """The codec that a link has now."""

    codec: str
    votes: int = 0  # messages in a row that another one was better for

    def wanting(self, codec: str) -> LinkCodec:
        """After a message for which `codec` would be best."""
        if codec == self.codec:
            return LinkCodec(self.codec)
        if self.votes + 1 >= HYSTERESIS:
            return LinkCodec(codec)
        return LinkCodec(self.codec, self.votes + 1)
