"""What became of each micro-batch: decided by its driver, applied at every stage of its chain, at most once.

An outside view that no peer has: it reads everybody's ledger, and remembers those of the dead (promise P2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shoal.protocol.identity import PeerId
from shoal.training.pipeline.ledger import Intervals, Ledger
from shoal.training.pipeline.messages import Link, MicroBatch

Applied = dict[str, list[tuple[int, int]]]  # `driver/incarnation` -> intervals of numbers
Living = Mapping[PeerId, Mapping[int, Ledger]]  # by stage, of each peer
_LATE_S = 60.0  # a commit is owed no longer than the undecided are kept


@dataclass(slots=True)
class _Open:
    """A decision that not every hop of its chain is known to have applied."""

    micro_batch: MicroBatch
    chain: tuple[Link, ...]
    since_s: float


@dataclass
class Account:
    """Feed it with who is there (`look`), and with every ledger at its peer's end (`close`)."""

    decided: int = 0
    lost: int = 0
    unexplained: int = 0
    _seen: dict[str, Intervals] = field(default_factory=dict)
    _open: list[_Open] = field(default_factory=list)
    _gone: dict[PeerId, list[Ledger]] = field(default_factory=dict)
    _of_stage: dict[int, list[Applied]] = field(default_factory=dict)  # of the dead

    def look(self, now_s: float, living: Living) -> None:
        """Drivers are asked before they forget their chains."""
        for peer, ledgers in living.items():
            if 0 in ledgers:
                self._decisions(peer, ledgers[0], now_s)
        self._open = [entry for entry in self._open if self._is_open(entry, now_s, living)]

    def close(self, now_s: float, peer: PeerId, stage: int, ledger: Ledger) -> None:
        """This peer is no more, or no more at that stage."""
        if stage == 0:
            self._decisions(peer, ledger, now_s)
        self._gone.setdefault(peer, []).append(ledger)
        self._of_stage.setdefault(stage, []).append(ledger.applied())

    def duplicated(self, living: Living) -> int:
        """Micro-batches that two replicas of one stage applied."""
        ledgers = {stage: list(applied) for stage, applied in self._of_stage.items()}
        for stage, ledger in (held for serving in living.values() for held in serving.items()):
            ledgers.setdefault(stage, []).append(ledger.applied())
        return sum(overlap(applied) for applied in ledgers.values())

    def _decisions(self, peer: PeerId, ledger: Ledger, now_s: float) -> None:
        for name, spans in ledger.applied().items():
            incarnation = int(name.rpartition("/")[2])
            seen = self._seen.setdefault(name, Intervals())
            begun = seen.spans[0][1] if seen.spans and seen.spans[0][0] == 0 else 0  # all before are seen
            for start, stop in spans:
                for number in range(max(start, begun), stop):
                    if number in seen:
                        continue
                    seen.add(number)
                    self.decided += 1
                    micro_batch = MicroBatch(peer, incarnation, number)
                    chain = ledger.chain(micro_batch)[1:]
                    if chain:
                        self._open.append(_Open(micro_batch, chain, now_s))

    def _is_open(self, entry: _Open, now_s: float, living: Living) -> bool:
        missing = False
        for link in entry.chain:
            peer = PeerId(link.peer)
            ledgers = self._gone.get(peer, [])
            serving = living.get(peer, {}).get(link.stage)
            if any(ledger.has(entry.micro_batch) for ledger in ledgers):
                continue
            if serving is not None and serving.has(entry.micro_batch):
                continue
            if serving is None:
                self.lost += 1
                return False
            missing = True
        if missing and now_s - entry.since_s > _LATE_S:
            if entry.micro_batch.driver in living:
                self.unexplained += 1
            else:
                self.lost += 1
            return False
        return missing


def overlap(ledgers: Iterable[Applied]) -> int:
    """How many numbers occur more than once among these ledgers."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for applied in ledgers:
        for name, found in applied.items():
            spans.setdefault(name, []).extend(found)
    twice = 0
    for found in spans.values():
        end = -1
        for start, stop in sorted(found):
            twice += max(0, min(stop, end) - start)
            end = max(end, stop)
    return twice
