"""Serving versions: the weights that sessions are pinned to. The current one is kept, and the one before.

A replica serves anchors, never its moving local weights, and of them those of its snapshots: all replicas of
a stage keep the same ones, without asking each other, and a joiner begins with one. A version's name is the
log's head there; in a swarm that only serves, the checkpoint's digest. See `form` for what int8 changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from shoal.protocol.errors import NotHere, VersionRetired
from shoal.training.model.stage import Held
from shoal.training.serving.form import Form

KEPT = 2


class ServingVersion:
    """One set of weights; never changed in place."""

    def __init__(self, name: bytes, pieces: Sequence[Held], form: Form) -> None:
        """`pieces`: the flat weights, one tensor a fragment; or all of them, as `form` holds them."""
        self.name = name
        self._pieces, self._form = pieces, form

    def weights(self, dtype: torch.dtype, device: str) -> Held:
        """As it is computed with; put together by whoever asks first, on the lane."""
        whole = self._form.held(self._pieces, dtype, device)
        self._pieces = (whole,)
        return whole

    @property
    def nbytes(self) -> int:
        """Memory that it holds now."""
        return sum(piece.nbytes for piece in self._pieces)


class Versions:
    """What one server can serve."""

    def __init__(self, form: Form | None = None) -> None:
        """`form`: as it is computed with, unless told."""
        self._form = form or Form()
        self._kept: dict[bytes, ServingVersion] = {}  # oldest first
        self.retired: Callable[[bytes], None] = lambda name: None

    def publish(self, weights: bytes, *pieces: Held) -> None:
        """From now on the current one; the oldest goes. `weights`: their name, whatever the form."""
        name = self._form.name(weights)
        if name in self._kept:
            return
        self._kept[name] = ServingVersion(name, pieces, self._form)
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

    @property
    def nbytes(self) -> int:
        """Memory of all that are kept."""
        return sum(version.nbytes for version in self._kept.values())
