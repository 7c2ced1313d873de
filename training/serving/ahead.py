"""What the next server has of a session, as the one that supplies it knows. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class Ahead:
    """The other's positions by their tokens: those up to `sent` are as they are here."""

    def __init__(self, there: Sequence[int]) -> None:
        """`there`: which tokens' positions it said it has."""
        self.sent, self._there = 0, there

    def rewind(self, position: int) -> None:
        """Positions from there on are others now."""
        self.sent, self._there = min(self.sent, position), self._there[:position]

    def due(self, tokens: Sequence[int], produced: int) -> range:
        """Which of the first `produced` positions, with these tokens, have yet to be sent."""
        self.sent += alike(self._there[self.sent : produced], tokens[self.sent : produced])
        return range(self.sent, produced)

    def sending(self, due: range) -> None:
        """They are on their way; what was there from them on is no more."""
        self.sent, self._there = due.stop, ()


def alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    return next((at for at in range(most) if one[at] != other[at]), most)
