"""Orders of the owner of the memory worlds, and what a swarm under them is checked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from members_world import RUN, owner

from shoal.node.simulate.peer import SimulatedPeer
from shoal.node.simulate.promises import Promises
from shoal.protocol.amendments import Amendments, Setting, SignedAmendments, sign_amendments

Change = Callable[[Amendments], Amendments]


class Owner:
    """Signs lists, each with one more change, as the owner's key does."""

    def __init__(self) -> None:
        self.listed = Amendments(RUN)

    def order(self, **changes: object) -> SignedAmendments:
        """The next version."""
        version = self.listed.version + 1
        self.listed = replace(self.listed, version=version, **changes)  # type: ignore[arg-type]
        return sign_amendments(self.listed, owner().sign)

    def set(self, key: str, value: float) -> SignedAmendments:
        added = Setting(self.listed.version + 1, key, value)
        return self.order(settings=(*self.listed.settings, added))


def decided(replicas: Iterable[SimulatedPeer]) -> set[tuple[str, int]]:
    """Micro-batches that these replicas of one stage applied; none twice (P2)."""
    found: set[tuple[str, int]] = set()
    for replica in replicas:
        for driver, intervals in replica.trainer.ledger().items():
            numbers = {(driver, n) for start, stop in intervals for n in range(start, stop)}
            assert not found & numbers, "applied at two replicas"
            found |= numbers
    return found


def check_tiling(replicas: Iterable[SimulatedPeer], stages: int) -> None:
    """P4, on every log."""
    promises = Promises(stages, 1.0)
    for replica in replicas:
        outer, steps = replica.trainer.outer, replica.trainer.weights.inner_steps
        promises.close(replica.peer, outer, replica.incarnation, steps)
    assert not promises.broken, promises.broken
