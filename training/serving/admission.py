"""Whether a server takes one more session, who goes for it, and when to ask again. Pure.

A session is charged at once for all positions it may come to, so what was admitted never lacks memory.
Shares are of a token, not of a peer: a holder may run as many peers as it likes, and others keep room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Of one server. Each of them supplies the next server by a stream for as long as it lives. The next one takes
# STREAMS_PER_PEER = 256 from a peer: with at most 96 of these, inference leaves room for training's own
SESSIONS = 96
SESSIONS_PER_TOKEN = SESSIONS // 2
EVICT_IDLE_S = 30.0  # after so long without a step a session may be evicted
_LEAST_RETRY_S, _MOST_RETRY_S = 0.05, 30.0


@dataclass(frozen=True, slots=True)
class Held:
    """A session, as admission sees it."""

    session: bytes
    token: str  # whose
    charged_bytes: int
    idle_s: float
    left_s: float  # until it will have all its tokens, about


@dataclass(frozen=True, slots=True)
class Verdict:
    """Taken, once these are evicted; or not, for a reason."""

    evict: tuple[bytes, ...] = ()
    refusal: str = ""
    retry_after_s: float = 0.0


def admit(wanted_bytes: int, token: str, held: Sequence[Held], budget_bytes: int) -> Verdict:
    """What to do with a request for a session by a holder of this token, who may have half of the budget."""
    share_bytes = budget_bytes // 2
    if wanted_bytes > share_bytes:
        told = f"the session would take {wanted_bytes >> 20} MiB of {share_bytes >> 20} MiB for one token"
        return Verdict(refusal=f"{told}; ask for fewer tokens", retry_after_s=_MOST_RETRY_S)
    own = [one for one in held if one.token == token]
    evict_own = _make_room(own, wanted_bytes, share_bytes, SESSIONS_PER_TOKEN)
    if not isinstance(evict_own, list):
        told = f"{len(own)} sessions of your token are open here, as much as one may have"
        return Verdict(refusal=told, retry_after_s=evict_own)
    others = [one for one in held if one not in evict_own]
    evict = _make_room(others, wanted_bytes, budget_bytes, SESSIONS)
    if not isinstance(evict, list):
        return Verdict(refusal=f"all room is taken by {len(held)} sessions", retry_after_s=evict)
    return Verdict(evict=tuple(one.session for one in (*evict_own, *evict)))


def _make_room(
    held: Sequence[Held], wanted_bytes: int, most_bytes: int, most_sessions: int
) -> list[Held] | float:
    """Whom to evict for one more session, the longest idle first; or the time until there is room."""
    lacking_bytes = sum(one.charged_bytes for one in held) + wanted_bytes - most_bytes
    lacking_sessions = len(held) + 1 - most_sessions
    idle = sorted((one for one in held if one.idle_s >= EVICT_IDLE_S), key=lambda one: -one.idle_s)
    evict = _enough(idle, lacking_bytes, lacking_sessions)
    if evict is not None:
        return evict
    freed = _enough(sorted(held, key=lambda one: one.left_s), lacking_bytes, lacking_sessions) or held
    return min(max(max(one.left_s for one in freed), _LEAST_RETRY_S), _MOST_RETRY_S)


def _enough(candidates: Sequence[Held], lacking_bytes: int, lacking_sessions: int) -> list[Held] | None:
    """The first of them that together free what is lacking; None if all do not."""
    taken: list[Held] = []
    for one in candidates:
        if lacking_bytes <= 0 and lacking_sessions <= len(taken):
            break
        taken.append(one)
        lacking_bytes -= one.charged_bytes
    return taken if lacking_bytes <= 0 and lacking_sessions <= len(taken) else None
