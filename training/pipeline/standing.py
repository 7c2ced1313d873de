"""What a caller remembers of one replica, and whether it may be asked now: rates, breaker, slow start. Pure.

Each event gives a new Standing; times are the caller's loop time. A replica that is new, was away or failed
is asked for one micro-batch; each forward that it passes on and each answer admits one more, which doubles
what is under way every round trip, as TCP's slow start does. (Answers alone would not do: through many
stages they take minutes, and a replica that is new to all its callers would idle for a good part of its
stay.) So a breaker that half-opens lets exactly one probe through. Who was not asked for long is new again:
it may have been slow for reasons that are gone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from dataclasses import dataclass, replace

from shoal.training.pipeline.replicas import Replica
from shoal.training.pipeline.routing import Candidate

OWN_MEASUREMENTS = 3  # from then on what a replica claims of its rate no longer counts
STALE_S, STALE_SERVICES = 30.0, 20.0  # after so long, and so many of its micro-batches, it is measured anew
UNKNOWN_SERVICE_S = 0.05  # where nobody was ever measured; a guess that the first answer replaces
BACKOFF_S, BACKOFF_CAP_S = 0.5, 30.0
NO_WINDOW = 64  # as many as a driver may have in flight: the slow start is over
_SMOOTHING = 0.2  # of the newest measurement in the averages
_JITTER = (0.5, 1.5)


@dataclass(frozen=True, slots=True)
class Report:
    """What an answer told of its replica and of the link to it."""

    service_s: float
    backlog_s: float
    seconds_per_byte: float


@dataclass(frozen=True, slots=True)
class Standing:
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
        """It did what was asked."""
        return replace(
            self,
            measured=self.measured + 1,
            service_s=self._service_s(report.service_s),
            seconds_per_byte=self._averaged(self.seconds_per_byte, report.seconds_per_byte),
            backlog_s=report.backlog_s,
            reported_s=now,
            failures=0,
            window=min(self.window + 1, NO_WINDOW),
        )

    def passed(self, in_flight: int) -> Standing:
        """It is through with the forward of one of `in_flight`: it works, and may have one more of ours."""
        grows = self.window <= in_flight < NO_WINDOW
        return replace(self, window=self.window + 1) if grows else self

    def outrun(self) -> Standing:
        """The hedge was faster, and what it was doing for us is cancelled: fewer for a while."""
        return replace(self, window=max(1, self.window // 2))

    def busy(self, now: float, retry_after_s: float, in_flight: int, rng: random.Random) -> Standing:
        """It is full, with so many of ours; that is no failure."""
        closed_until_s = now + retry_after_s * rng.uniform(*_JITTER)
        return replace(self, closed_until_s=closed_until_s, window=max(1, in_flight), crowded=True)

    def failed(self, now: float, rng: random.Random) -> Standing:
        """Open the breaker, longer after each failure; when it closes, one probe goes first."""
        backoff_s = min(BACKOFF_CAP_S, BACKOFF_S * 2.0 ** min(self.failures, 30)) * rng.uniform(*_JITTER)
        return replace(self, failures=self.failures + 1, closed_until_s=now + backoff_s, window=1)

    def listed(self, here: bool) -> Standing:
        """The membership lists it (no more); after an absence its queue and link may be others."""
        if here and self.away:
            return replace(self, away=False, window=1, crowded=False, measured=0, backlog_s=0.0)
        return self if here else replace(self, away=True)

    def aged(self, now: float) -> Standing:
        """What was measured long ago says little of today."""
        if self.established and now - self.reported_s > max(STALE_S, STALE_SERVICES * self.service_s):
            return replace(self, window=1, crowded=False, measured=0)
        return self

    @property
    def established(self) -> bool:
        """Whether own measurements speak for it."""
        return self.measured >= OWN_MEASUREMENTS

    def admits(self, now: float, in_flight: int, *, all_new: bool = False) -> bool:
        """Whether another micro-batch may go there while `in_flight` of ours are under way.

        `all_new`: no replica of the stage is established; then a slow start would spare nobody.
        """
        if now < self.closed_until_s:
            return False
        return in_flight < self.window or (all_new and not self.failures and not self.crowded)

    def candidate(
        self, replica: Replica, sent_s: Collection[float], now: float, typical_s: float
    ) -> Candidate:
        """For `routing.choose`.

        `sent_s`: when those of ours were sent that are under way there. `typical_s`: lane time of a
        micro-batch at this stage, 0 if nobody's is known.
        """
        backlog_s, reported_s = self.backlog_s, self.reported_s
        if replica.heard_s > reported_s:
            backlog_s, reported_s = replica.backlog_s, replica.heard_s
        return Candidate(
            peer=replica.peer,
            rtt_s=replica.rtt_s,
            seconds_per_byte=self.seconds_per_byte,
            backlog_s=max(0.0, backlog_s - (now - reported_s)),
            in_flight=len(sent_s),
            sent_since=sum(sent > reported_s for sent in sent_s),
            service_s=self.expected_service_s(replica, typical_s),
            proven=self.established,
        )

    def expected_service_s(self, replica: Replica, typical_s: float) -> float:
        """Lane time of a micro-batch there, as measured, as claimed, or as usual at the stage."""
        known = self.service_s if self.established else replica.service_s
        return known or self.service_s or typical_s or UNKNOWN_SERVICE_S

    def _service_s(self, new: float) -> float:
        """The least of the first ones: a process that has just begun imports, allocates and compiles."""
        if 0 < self.measured < OWN_MEASUREMENTS:
            return min(self.service_s, new)
        return self._averaged(self.service_s, new)

    def _averaged(self, known: float, new: float) -> float:
        return new if self.measured == 0 else known + _SMOOTHING * (new - known)
