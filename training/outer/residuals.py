"""Residuals: what rounding below 8 bits left out, to go with the next round (error feedback on both legs).

    contribution   q = C((a − s) + e);   listed: e ← β·((a − s) + e − decode(q));   not listed: e stays
    mean           p = C(m + r);         committed: r ← β·(m + r − decode(p));      else: r stays

(Karimireddy et al., arXiv 1901.09847; both legs as in DoubleSqueeze, arXiv 1905.05957.) e belongs to a
process's unsent steps and goes where they go; r is a part owner's, dropped when the part gets another.
Both change only when an entry commits what they were computed for.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch

from shoal.training.outer.parts import Part


class Residuals:
    """One replica's. Tensors are never changed in place once they are here."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._contributed: dict[int, torch.Tensor] = {}  # by part
        self._published: dict[int, torch.Tensor] = {}
        self.handed_over = 0  # residuals of means that were dropped with their parts

    def contributed(self, part: Part) -> torch.Tensor | None:
        """e [count], None where there is none."""
        return self._contributed.get(part.index)

    def carried(self, parts: Iterable[Part]) -> dict[int, torch.Tensor]:
        """e of those parts that have one, by index."""
        return {part.index: e for part in parts if (e := self.contributed(part)) is not None}

    def published(self, part: Part) -> torch.Tensor | None:
        """r [count], None where there is none."""
        return self._published.get(part.index)

    def retire_contributed(self, remainders: dict[int, torch.Tensor | None]) -> None:
        """An entry lists these parts of what was contributed: here is what it left out."""
        _replace(self._contributed, remainders)

    def retire_published(self, remainders: dict[int, torch.Tensor | None]) -> None:
        """An entry commits these parts as this peer published them."""
        _replace(self._published, remainders)

    def keep_published(self, fragment: tuple[Part, ...], owned: Container[int]) -> None:
        """Of a fragment's parts only those stay that this peer still owns."""
        for part in fragment:
            if part.index in self._published and part.index not in owned:
                del self._published[part.index]
                self.handed_over += 1

    def restore(self, contributed: dict[int, torch.Tensor]) -> None:
        """e as an earlier process of this peer left it."""
        self._contributed.update(contributed)


def _replace(kept: dict[int, torch.Tensor], remainders: dict[int, torch.Tensor | None]) -> None:
    for part, remainder in remainders.items():
        if remainder is None:
            kept.pop(part, None)
        else:
            kept[part] = remainder
