"""Watches how the members' lanes and sends go, so that `diagnosis` has timings to judge. For `observer`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from shoal.dht.liveness import Liveness
from shoal.dht.view import Member, SwarmView, is_measured
from shoal.node.view.diagnosis import WINDOW, Timings
from shoal.node.view.rounds import ToldRound
from shoal.protocol.identity import PeerId

_SMOOTHING = 0.2


@dataclass(slots=True)
class _Watched:
    incarnation: int
    stages: tuple[int, ...]
    finished: int = -1
    moved_s: float = 0.0  # when its lane finished something, or had nothing to do
    gap_s: float = 0.0
    service_s: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))


class Watch:
    """`look` every second or so, `sample` once a round or so."""

    def __init__(self) -> None:
        self._watched: dict[PeerId, _Watched] = {}

    def look(self, view: SwarmView) -> None:
        """Note which lanes moved."""
        here = {member.peer: member for member in view.here() if member.stages and member.beat}
        for peer in self._watched.keys() - here.keys():
            del self._watched[peer]
        for peer, member in here.items():
            known = self._watched.get(peer)
            if known is None or (known.incarnation, known.stages) != (member.incarnation, member.stages):
                known = _Watched(member.incarnation, member.stages, moved_s=view.now_s)
                self._watched[peer] = known
            finished = member.beat.finished_work if member.beat else 0
            if finished != known.finished:
                if known.finished >= 0 and finished > known.finished:
                    gap_s = (view.now_s - known.moved_s) / (finished - known.finished)
                    known.gap_s += _SMOOTHING * (gap_s - known.gap_s) if known.gap_s else gap_s
                known.finished, known.moved_s = finished, view.now_s
            elif member.backlog_s <= 0.0 or not (member.liveness is Liveness.ALIVE or _stands(member)):
                known.moved_s = view.now_s  # nothing to do, or silent: that is liveness's to say

    def sample(self, view: SwarmView) -> None:
        """Keep the lanes' present times of a micro-batch."""
        for peer, known in self._watched.items():
            member = view.get(peer)
            if member is not None and is_measured(member.service_s):
                known.service_s.append(member.service_s)

    def timings(self, view: SwarmView, rounds: Iterable[ToldRound], names: dict[str, str]) -> list[Timings]:
        """Of everybody online; `rounds` as their members told them."""
        sends: dict[str, deque[tuple[float, float]]] = {}
        for told in rounds:
            seconds = next((phase.seconds for phase in told.phases if phase.name == "send"), None)
            if told.bytes_out and seconds is not None:
                sends.setdefault(told.peer, deque(maxlen=WINDOW)).append((told.bytes_out, seconds))
        found = []
        for peer, known in sorted(self._watched.items()):
            member = view.get(peer)
            if member is None or member.state != "online":
                continue
            found.append(
                Timings(
                    peer=peer,
                    name=names.get(peer, peer),
                    stage=known.stages[0],
                    besides=known.stages[1:],
                    service_s=tuple(known.service_s),
                    sends=tuple(sends.get(peer, ())),
                    stalled_s=view.now_s - known.moved_s,
                    gap_s=known.gap_s,
                )
            )
        return found


def _stands(member: Member) -> bool:
    """Whether it is suspected for its lane alone: it is heard."""
    return member.liveness is Liveness.SUSPECT and "finished no work" in member.reason
