"""When a session had better move to another server of a stage. Pure.

A token goes round the whole ring. So it is the ring's round that has to become shorter, by GAIN, and for as
long as LASTING_S at a stretch: loads come and go, and many clients see the same idle server. What a step
takes at the present server the session has measured itself; of others there is what they claim, and of one
that claims nothing is believed what the present one did at its best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal.protocol.identity import PeerId
from shoal.training.pipeline.replicas import Replica
from shoal.training.serving.choice import cost_s

GAIN = 1.2
LASTING_S = 5.0
LEAST_GAIN_S = 1.0  # of the rest of the text; less is not worth reading it again


@dataclass(frozen=True, slots=True)
class Seat:
    """A server of the session's chain."""

    peer: PeerId
    step_s: float  # of this session there of late, its wait included; 0: not measured yet
    best_s: float  # the least that this has been


@dataclass(frozen=True, slots=True)
class Wish:
    """To move from a server to another of its stage, since a time at which that was not yet wished."""

    stage: int
    seat: PeerId
    to: PeerId
    since_s: float

    def is_due(self, now_s: float, patience: float) -> bool:
        """`patience` from 1 on, drawn for each session: they do not all set out at once."""
        return now_s - self.since_s >= LASTING_S * patience


def wish(
    before: Wish | None,
    seats: Sequence[Seat],
    replicas: Mapping[int, Sequence[Replica]],
    tokens_left: int,
    now_s: float,
) -> Wish | None:
    """The move that shortens a round most; it is as old as `before` where that was from the same server.

    `seats` by stage, `replicas` those of each stage that may be asked.
    """
    if not all(seat.step_s for seat in seats):
        return None
    here_s = [_way_s(seat, replicas[stage]) + seat.step_s for stage, seat in enumerate(seats)]
    round_s = sum(here_s)
    best: tuple[float, int, PeerId] | None = None
    for stage, seat in enumerate(seats):
        for one in replicas[stage]:
            saved_s = here_s[stage] - cost_s(one, seat.best_s)
            pays = round_s >= GAIN * (round_s - saved_s) and saved_s * tokens_left >= LEAST_GAIN_S
            if one.peer != seat.peer and pays and (best is None or saved_s > best[0]):
                best = saved_s, stage, one.peer
    if best is None:
        return None
    _, stage, to = best
    seat = seats[stage]
    lasts = before is not None and (before.stage, before.seat) == (stage, seat.peer)
    return Wish(stage, seat.peer, to, before.since_s if before is not None and lasts else now_s)


def _way_s(seat: Seat, replicas: Sequence[Replica]) -> float:
    return next((one.rtt_s / 2 for one in replicas if one.peer == seat.peer), 0.0)
