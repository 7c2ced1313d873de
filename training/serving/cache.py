"""Keys and values of the positions that a session has at one stage, in pages.

Pages are made when positions come, and are gone with the session. `admission` counts them beforehand. Used on
the compute lane only.
"""

from __future__ import annotations

import math

import torch

from shoal.training.spec import RunSpec

PAGE = 64  # positions


class Cache:
    """One session's, at one stage."""

    def __init__(self, spec: RunSpec, layers: range, dtype: torch.dtype, device: str) -> None:
        model = spec.model
        self._shape = (len(layers), 2, model.kv_heads, PAGE, model.width // model.heads)
        self._first = layers.start
        self._dtype, self._device = dtype, device
        self._pages: tuple[list[torch.Tensor], ...] = tuple([] for _ in layers)  # [2, kv_heads, PAGE, d]

    def write(self, layer: int, start: int, both: torch.Tensor) -> None:
        """Put keys and values [2, kv_heads, n, d] of a layer at the positions from `start`."""
        count = both.shape[2]
        self._grow(start + count)
        pages, done = self._pages[layer - self._first], 0
        while done < count:
            page, offset = divmod(start + done, PAGE)
            fits = min(count - done, PAGE - offset)
            pages[page][:, :, offset : offset + fits] = both[:, :, done : done + fits]
            done += fits

    def read(self, layer: int, stop: int) -> torch.Tensor:
        """Keys and values [2, kv_heads, stop, d] of the positions before `stop`."""
        pages = self._pages[layer - self._first][: math.ceil(stop / PAGE)]
        whole = pages[0] if len(pages) == 1 else torch.cat(pages, dim=2)
        return whole[:, :, :stop]

    def trim(self, positions: int) -> None:
        """Give back the pages behind that many positions: they were a draft's."""
        for pages in self._pages:
            del pages[math.ceil(positions / PAGE) :]

    def _grow(self, positions: int) -> None:
        while len(self._pages[0]) * PAGE < positions:
            page = torch.zeros(self._shape, dtype=self._dtype, device=self._device)
            for pages, of_layer in zip(self._pages, page, strict=True):
                pages.append(of_layer)


def cache_bytes(spec: RunSpec, layers: range, positions: int, dtype: torch.dtype) -> int:
    """What the cache of so many positions takes; whole pages."""
    model = spec.model
    per_position = 2 * len(layers) * model.kv_heads * (model.width // model.heads) * dtype.itemsize
    return math.ceil(positions / PAGE) * PAGE * per_position
