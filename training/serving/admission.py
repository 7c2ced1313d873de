"""Whether a server takes one more session, who goes for it, and when to ask again. Pure.

A session is charged at once for all positions it may come to, so what was admitted never lacks memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SESSIONS = 256  # of one server
SESSIONS_PER_PEER = 64
EVICT_IDLE_S = 30.0  # after so long without a step a session may be evicted
_LEAST_RETRY_S, _MOST_RETRY_S = 0.05, 30.0


@dataclass(frozen=True, slots=True)
class Held:
    """A session, as admission sees it."""

    session: bytes
    peer: str  # whose
    charged_bytes: int
    idle_s: float
    left_s: float  # until it will have all its tokens, about


@dataclass(frozen=True, slots=True)
class Verdict:
    """Taken, once these are evicted; or not, for a reason."""

    evict: tuple[bytes, ...] = ()
    refusal: str = ""
    retry_after_s: float = 0.0


def admit(wanted_bytes: int, peer: str, held: Sequence[Held], budget_bytes: int) -> Verdict:
    """What to do with a request for a session of this peer's."""
    if wanted_bytes > budget_bytes:
        told = f"the session would take {wanted_bytes >> 20} MiB of {budget_bytes >> 20} MiB"
        return Verdict(refusal=f"{told}; ask for fewer tokens", retry_after_s=_MOST_RETRY_S)
    own = [one for one in held if one.peer == peer]
    if len(own) >= SESSIONS_PER_PEER:
        return Verdict(refusal=f"{len(own)} sessions of yours are open here", retry_after_s=_retry_s(own, 1))
    lacking_bytes = sum(one.charged_bytes for one in held) + wanted_bytes - budget_bytes
    lacking_sessions = len(held) + 1 - SESSIONS
    idle = sorted((one for one in held if one.idle_s >= EVICT_IDLE_S), key=lambda one: -one.idle_s)
    evict = _enough(idle, lacking_bytes, lacking_sessions)
    if evict is not None:
        return Verdict(evict=tuple(one.session for one in evict))
    leaving = sorted(held, key=lambda one: one.left_s)
    freed = _enough(leaving, lacking_bytes, lacking_sessions) or leaving
    return Verdict(refusal=f"all room is taken by {len(held)} sessions", retry_after_s=_retry_s(freed))


def _enough(candidates: Sequence[Held], lacking_bytes: int, lacking_sessions: int) -> list[Held] | None:
    """The first of them that together free what is lacking; None if all do not."""
    taken: list[Held] = []
    for one in candidates:
        if lacking_bytes <= 0 and lacking_sessions <= len(taken):
            break
        taken.append(one)
        lacking_bytes -= one.charged_bytes
    return taken if lacking_bytes <= 0 and lacking_sessions <= len(taken) else None


def _retry_s(leaving: Sequence[Held], count: int | None = None) -> float:
    """When so many of them (None: all) are through."""
    soonest = sorted(one.left_s for one in leaving)[:count]
    return min(max(soonest[-1], _LEAST_RETRY_S), _MOST_RETRY_S)
