"""What a caller remembers of one replica, and whether it may be asked now: rates, breaker, slow start. Pure.

Each event gives a new Standing; times are the caller's loop time. A replica that is new, was away or failed
is asked for one micro-batch; each forward that it passes on and each answer admits one more, which doubles
what is under way every round trip, as TCP's slow start does. (Answers alone would not do: through many
stages they take minutes, and a replica that is new to all its callers would idle for a good part of its
stay.) So a breaker that half-opens lets exactly one probe through. Who was not asked for long is new again:
it may have been slow for reasons that are gone.

The rules are plain functions of tuples and numbers, so that the simulator of large swarms can compile them;
the methods call them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from shoal.training.pipeline.replicas import Replica
from shoal.training.pipeline.routing import YOUNGER_SERVICES, Candidate, Chance

OWN_MEASUREMENTS = 3  # from then on what a replica claims of its rate no longer counts
STALE_S, STALE_SERVICES = 30.0, 20.0  # after so long, and so many of its micro-batches, it is measured anew
UNKNOWN_SERVICE_S = 0.05  # where nobody was ever measured; a guess that the first answer replaces
BACKOFF_S, BACKOFF_CAP_S = 0.5, 30.0
NO_WINDOW = 64  # of one caller at one replica: the slow start is over
_SMOOTHING = 0.2  # of the newest measurement in the averages
_JITTER = (0.5, 1.5)


class Report(NamedTuple):
    """What an answer told of its replica and of the link to it."""

    service_s: float
    backlog_s: float
    seconds_per_byte: float


def after_answer(standing: Standing, now: float, report: Report) -> Standing:
    """It did what was asked."""
    measured = standing.measured
    service_s = averaged(standing.service_s, report.service_s, measured)
    if 0 < measured < OWN_MEASUREMENTS:  # the least: a process that has just begun imports and compiles
        service_s = min(standing.service_s, report.service_s)
    return Standing(
        measured + 1,
        service_s,
        averaged(standing.seconds_per_byte, report.seconds_per_byte, measured),
        report.backlog_s,
        now,
        0,
        standing.closed_until_s,
        min(standing.window + 1, NO_WINDOW),
        standing.crowded,
        standing.away,
    )


def averaged(known: float, new: float, measured: int) -> float:
    """The first measurement, or a moving average."""
    return new if measured == 0 else known + _SMOOTHING * (new - known)


def narrowed(standing: Standing, window: int, crowded: bool, closed_until_s: float) -> Standing:
    """The same, with another window."""
    return Standing(
        standing.measured,
        standing.service_s,
        standing.seconds_per_byte,
        standing.backlog_s,
        standing.reported_s,
        standing.failures,
        closed_until_s,
        window,
        crowded,
        standing.away,
    )


def after_forward(standing: Standing, in_flight: int) -> Standing:
    """It is through with the forward of one of `in_flight`: it works, and may have one more of ours."""
    if not standing.window <= in_flight < NO_WINDOW:
        return standing
    return narrowed(standing, standing.window + 1, standing.crowded, standing.closed_until_s)


def after_refusal(
    standing: Standing, now: float, retry_after_s: float, in_flight: int, rng: Chance
) -> Standing:
    """It is full, with so many of ours; that is no failure."""
    closed_until_s = now + retry_after_s * rng.uniform(_JITTER[0], _JITTER[1])
    return narrowed(standing, max(1, in_flight), True, closed_until_s)


def after_failure(standing: Standing, now: float, rng: Chance) -> Standing:
    """Open the breaker, longer after each failure; when it closes, one probe goes first."""
    backoff_s = min(BACKOFF_CAP_S, BACKOFF_S * 2.0 ** min(standing.failures, 30))
    return Standing(
        standing.measured,
        standing.service_s,
        standing.seconds_per_byte,
        standing.backlog_s,
        standing.reported_s,
        standing.failures + 1,
        now + backoff_s * rng.uniform(_JITTER[0], _JITTER[1]),
        1,
        standing.crowded,
        standing.away,
    )


def is_established(standing: Standing) -> bool:
    """Whether own measurements speak for it."""
    return standing.measured >= OWN_MEASUREMENTS


def is_admitted(standing: Standing, now: float, in_flight: int, all_new: bool) -> bool:
    """Whether another micro-batch may go there while `in_flight` of ours are under way.

    `all_new`: no replica of the stage is established; then a slow start would spare nobody.
    """
    if now < standing.closed_until_s:
        return False
    return in_flight < standing.window or (all_new and not standing.failures and not standing.crowded)


def as_candidate(
    standing: Standing, replica: Replica, sent_s: Sequence[float], now: float, typical_s: float
) -> Candidate:
    """For `routing.choose`.

    `sent_s`: when those of ours were sent that are under way there. `typical_s`: lane time of a
    micro-batch at this stage, 0 if nobody's is known.
    """
    backlog_s, reported_s = standing.backlog_s, standing.reported_s
    if replica.heard_s > reported_s:
        backlog_s, reported_s = replica.backlog_s, replica.heard_s
    sent_since = 0
    for sent in sent_s:
        if sent > reported_s:
            sent_since += 1
    return Candidate(
        replica.peer,
        replica.rtt_s,
        standing.seconds_per_byte,
        max(0.0, backlog_s - (now - reported_s)),
        len(sent_s),
        sent_since,
        expected_service_s(standing, replica, typical_s),
        is_established(standing),
    )


def expected_service_s(standing: Standing, replica: Replica, typical_s: float) -> float:
    """Lane time of a micro-batch there, as measured, as claimed, or as usual at the stage."""
    known = standing.service_s if is_established(standing) else replica.service_s
    return known or standing.service_s or typical_s or UNKNOWN_SERVICE_S


class Standing(NamedTuple):
    """One replica in the eyes of one caller."""

    measured: int = 0  # answers since it was new or returned
    service_s: float = 0.0
    seconds_per_byte: float = 0.0
    backlog_s: float = 0.0  # as it said at ...
    reported_s: float = -math.inf
    failures: int = 0  # in a row
    closed_until_s: float = -math.inf  # by the breaker, or because it was busy
    window: int = 1  # most micro-batches of ours under way there
    crowded: bool = False  # it has been full: the window holds in any case
    away: bool = False

    def answered(self, now: float, report: Report) -> Standing:
        return after_answer(self, now, report)

    def passed(self, in_flight: int) -> Standing:
        return after_forward(self, in_flight)

    def busy(self, now: float, retry_after_s: float, in_flight: int, rng: Chance) -> Standing:
        return after_refusal(self, now, retry_after_s, in_flight, rng)

    def failed(self, now: float, rng: Chance) -> Standing:
        return after_failure(self, now, rng)

    def candidate(self, replica: Replica, sent_s: Sequence[float], now: float, typical_s: float) -> Candidate:
        return as_candidate(self, replica, sent_s, now, typical_s)

    @property
    def established(self) -> bool:
        return is_established(self)

    def admits(self, now: float, in_flight: int, *, all_new: bool = False, again: bool = False) -> bool:
        """As `is_admitted`. `again`: another replica failed with it; who is known to work keeps a little room
        for what is older than its queue, so the window is wider by that."""
        if again and self.established and not self.failures:
            in_flight -= int(YOUNGER_SERVICES)
        return is_admitted(self, now, in_flight, all_new)

    def outrun(self) -> Standing:
        """The hedge was faster, and what it was doing for us is cancelled: fewer for a while."""
        return self._replace(window=max(1, self.window // 2))

    def listed(self, here: bool) -> Standing:
        """The membership lists it (no more); after an absence its queue and link may be others."""
        if here and self.away:
            return self._replace(away=False, window=1, crowded=False, measured=0, backlog_s=0.0)
        return self if here else self._replace(away=True)

    def aged(self, now: float) -> Standing:
        """What was measured long ago says little of today."""
        if self.established and now - self.reported_s > max(STALE_S, STALE_SERVICES * self.service_s):
            return self._replace(window=1, crowded=False, measured=0)
        return self
