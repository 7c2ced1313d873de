"""Serving versions: the weights that sessions are pinned to. The current one is kept, and the one before.

A replica serves anchors, never its moving local weights, and of them those of its snapshots: all replicas of
a stage keep the same ones, without asking each other, and a joiner begins with one. A version's name is the
log's head there; in a swarm that only serves, the checkpoint's digest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from shoal.protocol.errors import NotHere, VersionRetired

KEPT = 2


class ServingVersion:
    """One set of weights; never changed in place."""

    def __init__(self, name: bytes, pieces: Sequence[torch.Tensor]) -> None:
        """`pieces`: the flat weights, one tensor a fragment."""
        self.name = name
        self._pieces = pieces

    def weights(self, dtype: torch.dtype, device: str) -> torch.Tensor:
        """[size] as it is computed with; put together by whoever asks first, on the lane."""
        whole = self._pieces[0] if len(self._pieces) == 1 else torch.cat(tuple(self._pieces))
        whole = whole.to(device, dtype)
        self._pieces = (whole,)
        return whole


class Versions:
    """What one server can serve."""

    def __init__(self) -> None:
        self._kept: dict[bytes, ServingVersion] = {}  # oldest first
        self.retired: Callable[[bytes], None] = lambda name: None

    def publish(self, name: bytes, *pieces: torch.Tensor) -> None:
        """From now on the current one; the oldest goes."""
        if name in self._kept:
            return
        self._kept[name] = ServingVersion(name, pieces)
        while len(self._kept) > KEPT:
            oldest = next(iter(self._kept))
            del self._kept[oldest]
            self.retired(oldest)

    def get(self, name: bytes) -> ServingVersion:
        """That version, the current one for an empty name. Raises NotHere, VersionRetired."""
        if not self._kept:
            raise NotHere("this peer has nothing to serve yet")
        if not name:
            return self._kept[next(reversed(self._kept))]
        if name not in self._kept:
            raise VersionRetired(f"version {name.hex()[:12]} is not kept here; open a new session")
        return self._kept[name]

    @property
    def names(self) -> list[bytes]:
        """Oldest first."""
        return list(self._kept)
