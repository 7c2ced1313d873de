"""The replicas of the next stage as one caller knows them: measured, admitted or not, and picked.

The state behind `routing`, `standing` and `link_codec`, which are pure; `Downstream` does the asking.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.protocol.errors import Busy, ShoalError, StageEmpty
from shoal.protocol.identity import PeerId
from shoal.protocol.limits import ABORT_AFTER_S
from shoal.training.decisions import DecisionLog
from shoal.training.lane import Lane
from shoal.training.pipeline.attempt import Answer, Attempt, Pick
from shoal.training.pipeline.line import Line, Turn
from shoal.training.pipeline.link_codec import LinkCodec, widest_in_time
from shoal.training.pipeline.payload import PayloadFormat
from shoal.training.pipeline.replicas import Replica, Replicas
from shoal.training.pipeline.routing import (
    HEDGE_SAMPLES,
    Candidate,
    choose,
    expected_finish_s,
    hedge_after_s,
)
from shoal.training.pipeline.standing import Standing

RATIOS_KEPT = 128  # answers whose lateness the hedges go by
STRANGERS_SHARE = 0.25  # of what is under way, while others have room: anybody can make up peers
LEAVER_WAITS_S = ABORT_AFTER_S  # a replica that is suspect, and not listed, is back or gone by then
_FORGET_S = 600.0  # a replica that is away for so long is new when it comes back
Event = Callable[[str, dict[str, object]], None]


@dataclass(slots=True)
class _Known:
    """One replica."""

    codec: LinkCodec
    standing: Standing
    attempts: set[Attempt] = field(default_factory=set)
    seen_s: float = 0.0
    met: bool = False  # its beats were heard, or it has worked for us: it is no mere record

    def has_room(self, now: float, all_new: bool, again: bool) -> bool:
        return self.standing.admits(now, len(self.attempts), all_new=all_new, again=again)


class Successors:
    """See the module."""

    def __init__(
        self,
        stage: int,
        replicas: Replicas,
        form: PayloadFormat,
        lane: Lane,
        rng: random.Random,
        event: Event,
        decisions: DecisionLog | None = None,
    ) -> None:
        """`lane`: this peer's own; sending a micro-batch may take about as long as it does."""
        self._decisions = decisions
        self.stage = stage
        self._replicas = replicas
        self._form = form
        self._lane = lane
        self._rng = rng
        self._event = event
        self._known: dict[PeerId, _Known] = {}
        self._ratios: deque[float] = deque(maxlen=RATIOS_KEPT)
        self._leaving = asyncio.Event()
        self._empty_since_s: float | None = None  # nobody is listed
        self._line = Line()
        self._freed = asyncio.Event()  # pulsed when an attempt ends or a window grows
        self.usual_codec = form.widest  # the last one picked
        self.retries = 0

    def leave(self) -> None:
        """This peer is going: from now on nothing waits for long for a replica where there is none."""
        self._leaving.set()

    def pick(self, sequences: int, besides: Collection[PeerId] = (), *, again: bool = False) -> Pick | None:
        """Whom to ask now, but for those who are asked already; None while nobody has room.

        `again`: it was asked for in vain before.
        """
        now = asyncio.get_running_loop().time()
        listed = [replica for replica in self._look(now) if replica.peer not in besides]
        all_new = not any(self._known[replica.peer].standing.established for replica in listed)
        roomy = [replica for replica in listed if self._known[replica.peer].has_room(now, all_new, again)]
        roomy = self._acquainted(roomy, again) or roomy
        sizes = {codec: self._form.hidden_bytes(sequences, codec) for codec in self._form.codecs}
        chosen = self._choose(self._candidates(roomy, now), 2 * sizes[self.usual_codec])
        if chosen is None:
            return None
        known = self._known[PeerId(chosen.peer)]
        wanted = widest_in_time(sizes, chosen.seconds_per_byte, self._lane.load().service_s)
        known.codec = known.codec.wanting(wanted)
        self.usual_codec = known.codec.codec
        return self._pick(chosen, self.usual_codec, sizes)

    def named(self, peer: PeerId, sequences: int) -> Pick | None:
        """What is expected of this one; None if it is not listed as a replica of the stage."""
        now = asyncio.get_running_loop().time()
        candidates = self._candidates([replica for replica in self._look(now) if replica.peer == peer], now)
        if not candidates:
            return None
        codec = self._known[peer].codec.codec
        return self._pick(candidates[0], codec, {codec: self._form.hidden_bytes(sequences, codec)})

    def _acquainted(self, roomy: list[Replica], again: bool) -> list[Replica]:
        """Whom to prefer: all, or those that are known to be there, `again` and while enough wait for others.

        Who is new is asked before those who are known to be good, and who is not there costs seconds:
        hundreds of records that lead nowhere must not take all of ours along.
        """
        under_way = sum(len(known.attempts) for known in self._known.values())
        strangers = sum(len(known.attempts) for known in self._known.values() if not known.met)
        if not again and strangers <= STRANGERS_SHARE * under_way:
            return roomy
        return [replica for replica in roomy if self._known[replica.peer].met]

    def _pick(self, chosen: Candidate, codec: str, sizes: Mapping[str, int]) -> Pick:
        expected_s = expected_finish_s(chosen, 2 * sizes[codec])
        return Pick(PeerId(chosen.peer), codec, chosen.rtt_s, chosen.service_s, expected_s)

    def hedge_after_s(self, pick: Pick, sequences: int, asking_s: float) -> float:
        """How long that one's own part may take, as it is known now, before another one is asked, too.

        Before there are answers to judge by, what it says of its rate and its queue since it was asked
        counts as well; of a stage of which nobody knows a rate, all may still be slow to begin, and a lane
        that finishes nothing is noticed anyway. `asking_s`: that the request took to be sent stands for a
        link that was not measured yet, there and back.
        """
        if len(self._ratios) >= HEDGE_SAMPLES:
            return hedge_after_s(pick.expected_s, self._ratios)
        now = asyncio.get_running_loop().time()
        replicas = [replica for replica in self._look(now) if replica.peer == pick.peer]
        known = replicas and (
            replicas[0].service_s or self._known[pick.peer].standing.service_s or self._typical_s()
        )
        if not known:
            return math.inf
        (candidate,) = self._candidates(replicas, now)
        payload_bytes = 2 * self._form.hidden_bytes(sequences, pick.codec)
        expected_s = max(pick.expected_s, expected_finish_s(candidate, payload_bytes))
        return hedge_after_s(expected_s + 2 * asking_s, self._ratios)

    def _choose(self, candidates: list[Candidate], payload_bytes: int) -> Candidate | None:
        if self._decisions is None or not candidates:
            return choose(candidates, payload_bytes, self._rng)
        seed = self._rng.getrandbits(64)
        chosen = choose(candidates, payload_bytes, random.Random(seed))
        answer = None if chosen is None else chosen.peer
        self._decisions.note("route", answer, candidates=candidates, payload_bytes=payload_bytes, seed=seed)
        return chosen

    def began(self, attempt: Attempt) -> None:
        self._known[attempt.peer].attempts.add(attempt)

    def ended(self, attempt: Attempt) -> None:
        """It is over, one way or the other."""
        self._known[attempt.peer].attempts.discard(attempt)
        self._wake()

    def passed(self, peer: PeerId) -> None:
        """It is through with a forward of ours."""
        known = self._known[peer]
        known.met = True
        standing = known.standing.passed(len(known.attempts))
        if standing is not known.standing:
            known.standing = standing
            self._wake()

    def answered(self, attempt: Attempt, answer: Answer, expected_s: float) -> None:
        """It answered, and the answer was of use."""
        self._ratios.append(answer.own_s / expected_s)
        known = self._known[attempt.peer]
        known.met = True
        known.standing = known.standing.answered(asyncio.get_running_loop().time(), answer.report)

    def outrun(self, attempt: Attempt) -> None:
        """The other of two answered first."""
        known = self._known[attempt.peer]
        known.standing = known.standing.outrun()

    def failed(self, attempt: Attempt, error: ShoalError) -> None:
        """Open the breaker and let the membership look into it; who is busy just gets its time."""
        known, now = self._known[attempt.peer], asyncio.get_running_loop().time()
        if isinstance(error, Busy):
            known.standing = known.standing.busy(now, error.retry_after_s, len(known.attempts), self._rng)
            return
        self.retries += 1
        known.standing = known.standing.failed(now, self._rng)
        self._replicas.suspect(attempt.peer, f"propagate: {error}")
        self._event("retry", {"stage": self.stage, "peer": attempt.peer, "reason": str(error)})

    async def room(self, sequences: int, deadline: float, *, again: bool = False) -> Pick:
        """Whom to ask, once somebody has room; the oldest micro-batch first, but for those `again`.
        Raises StageEmpty.

        `again`: as in `pick`."""
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    async with self._line.turn(deadline, again=again) as turn:
                        while not turn.overtaken.is_set():
                            if (found := self.pick(sequences, again=again)) is not None:
                                return found
                            await self._change(turn)
        except TimeoutError as error:
            listed = len(self._replicas.of_stage(self.stage))
            raise StageEmpty(
                f"stage {self.stage} has no replica to ask ({listed} known); waiting for one to join"
            ) from error

    async def _change(self, turn: Turn) -> None:
        """Until a replica appears, one may have room, a breaker half-opens, or somebody older waits."""
        now = asyncio.get_running_loop().time()
        listed = [self._known[replica.peer] for replica in self._look(now)]
        openings = [k.standing.closed_until_s - now for k in listed if k.standing.closed_until_s > now]
        if self._leaving.is_set() and self._empty_since_s is not None:
            openings.append(self._empty_since_s + LEAVER_WAITS_S - now)
            if openings[-1] <= 0.0:
                raise StageEmpty(f"stage {self.stage} has no replica, and this peer is leaving")
        reasons: list[asyncio.Task[Any]] = [
            asyncio.create_task(self._replicas.changed()),
            asyncio.create_task(self._freed.wait()),
            asyncio.create_task(turn.overtaken.wait()),
        ]
        if not self._leaving.is_set():
            reasons.append(asyncio.create_task(self._leaving.wait()))
        try:
            await asyncio.wait(
                reasons, timeout=min(openings, default=None), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            for reason in reasons:
                reason.cancel()
            await asyncio.gather(*reasons, return_exceptions=True)

    def _wake(self) -> None:
        self._freed.set()
        self._freed = asyncio.Event()

    def under_way(self) -> dict[PeerId, int]:
        """Attempts by replica."""
        return {peer: len(known.attempts) for peer, known in self._known.items()}

    def status(self) -> list[dict[str, object]]:
        """What this caller knows of each, for `shoal status`."""
        now = asyncio.get_running_loop().time()
        return [
            {
                "peer": peer,
                "service_s": known.standing.service_s,
                "bytes_per_s": 1.0 / slow if (slow := known.standing.seconds_per_byte) else None,
                "codec": known.codec.codec,
                "in_flight": len(known.attempts),
                "window": known.standing.window,
                "failures": known.standing.failures,
                "closed_s": max(0.0, known.standing.closed_until_s - now),
            }
            for peer, known in self._known.items()
            if not known.standing.away
        ]

    def _look(self, now: float) -> list[Replica]:
        """Who is listed; notes who came, who went and who is back."""
        listed = list(self._replicas.of_stage(self.stage))
        if listed:
            self._empty_since_s = None
        elif self._empty_since_s is None:
            self._empty_since_s = now
        for replica in listed:
            known = self._known.setdefault(replica.peer, _Known(LinkCodec(self._form.widest), Standing()))
            known.seen_s = now
            known.met |= replica.heard_s > -math.inf
        for peer, known in list(self._known.items()):
            known.standing = known.standing.listed(known.seen_s == now)
            if not known.attempts:
                known.standing = known.standing.aged(now)
            if now - known.seen_s > _FORGET_S and not known.attempts:
                del self._known[peer]
        return listed

    def _candidates(self, replicas: list[Replica], now: float) -> list[Candidate]:
        typical_s = self._typical_s()
        candidates = []
        for replica in replicas:
            known = self._known[replica.peer]
            sent_s = [attempt.sent_s for attempt in known.attempts]
            candidates.append(known.standing.candidate(replica, sent_s, now, typical_s))
        return candidates

    def _typical_s(self) -> float:
        """Lane time of a micro-batch at this stage, as far as it was measured; else 0."""
        measured = [known.standing.service_s for known in self._known.values() if known.standing.service_s]
        return sum(measured) / len(measured) if measured else 0.0
