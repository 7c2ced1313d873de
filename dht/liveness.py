"""Is a peer alive? A pure verdict from what was heard of it, with its reason. `members` gathers the evidence.

Order of the rules, first match wins: goodbye, refused redial, silence or a lapsed record make a peer gone;
silence, a broken stream, a failed call or a compute lane that stands still make it suspect. Suspect peers
get no new work but keep their place; gone ones are out of routing until they are heard again.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from shoal.protocol import limits

SUSPECT_SILENCE_S = limits.SUSPECT_AFTER_S
GONE_SILENCE_S = limits.ABORT_AFTER_S
LANE_STALL_S = 10.0  # no micro-batch of a sound plan computes longer; slower lanes are measured (below)
LANE_STALL_GAPS = 4.0  # a lane may take this many of its usual gaps between two finished items
FAILED_CALL_S = 0.5  # a failed call counts this long, doubled by each further one ...
FAILED_CALL_MOST_S = 8.0  # ... up to this; after that the circuit breaker of routing is the judge


class Liveness(enum.StrEnum):
    """What routing may do with a peer: use it, spare it, forget it for now."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that is known of one peer's life. Times are loop times in seconds."""

    record_until_s: float  # its record lapses then
    watched_since_s: float | None = None  # since when beats are due from it; None: nobody listens for them
    known_alive: bool = False  # counted as alive before; a stranger has to be heard first
    heard_s: float | None = None  # last beat
    stream_open: bool = False
    refused: bool = False  # no stream, and the last dial was refused at once: the process is not there
    said_goodbye: bool = False
    failed_calls: int = 0  # reported and not yet lived down
    failed_s: float = -math.inf  # the last of them
    failed_reason: str = ""
    backlog_s: float = 0.0  # work it says it has
    worked_s: float = -math.inf  # its finished work grew, or its backlog was empty
    work_gap_s: float = 0.0  # usual time between two finished items


@dataclass(frozen=True, slots=True)
class Verdict:
    """`until_s`: when it can change though nothing is heard; judge again then."""

    liveness: Liveness
    reason: str
    until_s: float = math.inf


def judge(now: float, seen: Evidence) -> Verdict:
    """The verdict at loop time `now`."""
    if seen.said_goodbye:
        return Verdict(Liveness.GONE, "said goodbye")
    if seen.refused and not seen.stream_open:
        return Verdict(Liveness.GONE, "its connection closed and a new one was refused")
    if seen.watched_since_s is None:
        return _unwatched(now, seen)
    return _watched(now, seen, seen.watched_since_s)


def _unwatched(now: float, seen: Evidence) -> Verdict:
    """No beats are due: the record speaks, unless a call failed since."""
    if now >= seen.record_until_s:
        return Verdict(Liveness.GONE, "its record lapsed and was not renewed")
    hold_until_s = seen.failed_s + failed_call_hold_s(seen.failed_calls)
    if now < hold_until_s:
        return Verdict(Liveness.SUSPECT, _failed(seen), min(hold_until_s, seen.record_until_s))
    return Verdict(Liveness.ALIVE, "its record is fresh", seen.record_until_s)


def _watched(now: float, seen: Evidence, since_s: float) -> Verdict:
    last_s = since_s if seen.heard_s is None else max(seen.heard_s, since_s)
    gone_s = last_s + GONE_SILENCE_S
    if now >= gone_s:
        what = "never answered" if seen.heard_s is None else "silent"
        return Verdict(Liveness.GONE, f"{what} for {now - last_s:.1f} s")
    if seen.heard_s is None and not seen.known_alive:
        return Verdict(Liveness.SUSPECT, "not heard yet", gone_s)
    if now >= last_s + SUSPECT_SILENCE_S:
        return Verdict(Liveness.SUSPECT, f"silent for {now - last_s:.1f} s", gone_s)
    heard_s = -math.inf if seen.heard_s is None else seen.heard_s
    if not seen.stream_open and heard_s >= since_s:
        return Verdict(Liveness.SUSPECT, "its stream broke", gone_s)
    if seen.failed_calls and heard_s <= seen.failed_s:
        return Verdict(Liveness.SUSPECT, _failed(seen), gone_s)
    hold_until_s = seen.failed_s + failed_call_hold_s(seen.failed_calls)
    if now < hold_until_s:
        return Verdict(Liveness.SUSPECT, _failed(seen), min(gone_s, hold_until_s))
    return _working(now, seen, last_s + SUSPECT_SILENCE_S)


def _working(now: float, seen: Evidence, silence_s: float) -> Verdict:
    """It answers; does its lane move? `silence_s`: when silence would count."""
    if seen.backlog_s <= 0.0:
        return Verdict(Liveness.ALIVE, "heard", silence_s)
    stall_s = seen.worked_s + max(LANE_STALL_S, LANE_STALL_GAPS * seen.work_gap_s)
    if now >= stall_s:
        idle_s = now - seen.worked_s
        text = f"answers, but finished no work for {idle_s:.1f} s with {seen.backlog_s:.1f} s queued"
        return Verdict(Liveness.SUSPECT, text, silence_s)
    return Verdict(Liveness.ALIVE, "heard", min(silence_s, stall_s))


def failed_call_hold_s(failed_calls: int) -> float:
    """How long after a failed call a peer stays suspect even if it is heard again."""
    if failed_calls <= 0:
        return 0.0
    return min(FAILED_CALL_S * 2.0 ** min(failed_calls - 1, 30), FAILED_CALL_MOST_S)


def _failed(seen: Evidence) -> str:
    return f"a call failed: {seen.failed_reason}"
