"""Every decision of a round that is not arithmetic on tensors: who leads, who owns, when to open and close.

Pure functions: peers, numbers and loop times in, decisions out. `service`, `leader` and `round` act on them.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections import Counter
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from shoal.protocol.identity import PeerId

CLIP_FACTOR = 3.0  # times the group's median (notes: verification B2, "robust reduce")
COUNTED_MOST = 2  # times the tokens of the whole group's round, that one contribution counts for
STEPS_MOST = 8  # times the middle one's: no honest replica is that much faster than its group (`fork`)
TAKEOVER_S = 1.0  # silence after which the next in order acts (design section 9)
NO_UPLINK = 0.0  # of a seat that is to own nothing
GRACE_FACTOR = 1.0  # after quorum, as long again as the quorum took
REPORT_SLACK_S = 2.0  # beyond two deadlines, for reports to come in
GRACE_MIN_S = 1.0  # a scheduler hiccup must not cost a contribution
SILENT_S = 120.0  # until a peer that stopped talking counts as departed (design section 9, partitions)
INTRODUCERS = 4  # asked for a stranger, one after another
BEHIND_S = 0.5  # a COMMIT already on its way gets this long before the entry is fetched instead


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMember:
    """A live replica of the stage, as its last beat tells; for this peer itself, as it is.

    In a large group a peer hears only some of the others: those it knows otherwise have told nothing.
    """

    peer: PeerId
    incarnation: int
    height: int = 0
    head: bytes = bytes(32)
    state_root: bytes = bytes(32)
    steps_since_round: int = 0
    tokens_since_round: int = 0
    log_tokens: int = 0  # of its whole log
    uplink: float = 1.0  # bytes a second, 1 where nobody's is known; part owners in proportion
    heard: bool = True  # else nothing is known of its progress, and it is asked all the same
    silent: bool = False  # nothing is heard of it, yet it did not depart: counts for the quorum only
    reentering: int = 0  # entries of a lost chain that it has still to bring back


def _score(*key: bytes) -> int:
    hasher = blake3(b"shoal rendezvous")
    for element in key:
        hasher.update(len(element).to_bytes(4, "little")).update(element)
    return int.from_bytes(hasher.digest(8), "little")


def succession(run_id: bytes, stage: int, height: int, members: Sequence[PeerId]) -> tuple[PeerId, ...]:
    """Who leads the round of a height, and who follows when that one is silent: by rendezvous hash."""
    return _ranked(run_id, f"leader/{stage}/{height}".encode(), tuple(members))


@functools.lru_cache(maxsize=256)  # looked up at every beat
def _ranked(run_id: bytes, place: bytes, members: tuple[PeerId, ...]) -> tuple[PeerId, ...]:
    return tuple(sorted(members, key=lambda peer: (_score(run_id, place, peer.encode()), peer), reverse=True))


def owners(
    run_id: bytes, stage: int, parts: Sequence[int], peers: Sequence[PeerId], uplinks: Sequence[float]
) -> list[int]:
    """The index of the owner of each part, which is given by its index in the stage.

    Weighted rendezvous (highest of uplink / −ln u, u a hash of run, stage, part and peer) under quotas in
    proportion to uplinks, for the owner of too many parts holds up everybody: a part goes to the first on
    its list who does not keep others above it (Gale and Shapley, 1962). The same from round to round; where
    the roster changes, few parts move but those of who came or left.
    """
    return list(_drawn(run_id, stage, tuple(parts), tuple(peers), tuple(uplinks)))


@functools.lru_cache(maxsize=64)
def _drawn(
    run_id: bytes, stage: int, parts: tuple[int, ...], peers: tuple[PeerId, ...], uplinks: tuple[float, ...]
) -> tuple[int, ...]:
    seeds = np.array([_score(run_id, f"owner/{stage}".encode(), p.encode()) for p in peers], np.uint64)
    mixed = _mix(seeds[None, :] ^ _mix(np.asarray(parts, np.uint64) + np.uint64(1))[:, None])
    uniform = (mixed >> np.uint64(11)).astype(np.float64) / 2**53 + 2**-54
    weights = np.maximum(np.asarray(uplinks, np.float64), 1e-9)
    scores = weights / -np.log(uniform)
    quotas = _quotas(weights, len(parts))
    owner = np.full(len(parts), -1)
    while len(asking := np.flatnonzero(owner < 0)):
        owner[asking] = np.argmax(scores[asking], axis=1)
        for peer in np.unique(owner[asking]):
            held = np.flatnonzero(owner == peer)
            refused = held[np.argsort(-scores[held, peer], kind="stable")][quotas[peer] :]
            owner[refused], scores[refused, peer] = -1, -np.inf
    return tuple(int(index) for index in owner)


def _quotas(weights: np.ndarray, parts: int) -> list[int]:
    """Whole numbers in proportion to weights that add up to `parts`: largest remainders."""
    exact = weights / weights.sum() * parts
    whole = np.floor(exact)
    whole[np.argsort(whole - exact, kind="stable")[: parts - int(whole.sum())]] += 1
    return [int(count) for count in whole]


def slowest_uplink(uplinks: Sequence[float]) -> float:
    """Bytes a second of the slowest in a roster; 0 while nobody's is known (then all are 1).

    NO_UPLINK says nothing of its owner's."""
    slowest = min((uplink for uplink in uplinks if uplink > NO_UPLINK), default=NO_UPLINK)
    return slowest if slowest > 1.0 else 0.0


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: a bijection that looks random; wraps around on purpose."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision and its reason, for people."""

    yes: bool
    reason: str


def holds_quorum(
    last: Sequence[PeerId], departed: Container[PeerId], here: Sequence[PeerId], head: bytes, contested: bool
) -> Verdict:
    """Whether `here`, who answered, may go on: at least half of `last`, the last round's, less the departed.

    At exactly half, the side that holds the lowest hash under the log head, so that two halves never both do.
    Newcomers do not count: they must neither block a group nor outvote it. In a contested round somebody is
    in another leader's, which may have been committed with those departed since: it takes more than half.
    """
    if contested:
        count = len(set(last) & set(here))
        return Verdict(2 * count > len(last), f"contested, {count} of {len(last)} answered")
    last = [peer for peer in last if peer not in departed]
    count = len(set(last) & set(here))
    if 2 * count > len(last) or not last:
        return Verdict(True, f"{count} of {len(last)} answered")
    lowest = min(last, key=lambda peer: (_score(head, peer.encode()), peer))
    if 2 * count == len(last) and lowest in here:
        return Verdict(True, f"half of {len(last)}, with the lowest hash")
    return Verdict(False, f"only {count} of the last round's {len(last)} answered")


def introducers(
    me: PeerId, leader: PeerId, last: Collection[PeerId], group: Sequence[GroupMember]
) -> list[PeerId]:
    """Who may tell how the others of the last round are dialled: who led it, for it has met them all, and
    those of it that are heard, where that one is gone."""
    led = [member.peer for member in group if member.peer == leader != me]
    others = [m.peer for m in group if m.heard and m.peer in last and m.peer not in (me, leader)]
    return [*led, *others][:INTRODUCERS]


def should_open(inner_steps: float, mine: GroupMember, group: Sequence[GroupMember]) -> Verdict:
    """A round is due on work done: H steps a replica on the mean of those heard, however they are spread.

    Counters that members reported before their last COMMIT say nothing about the round to come. What others
    claim counts up to STEPS_MOST times the middle one's steps: else one claim made every step a round.
    """
    heard = [member for member in group if member.heard]
    made = {m.peer: m.steps_since_round for m in heard if m.height == mine.height}
    due = inner_steps * max(len(heard), 1)
    steps: float = sum(made.values())
    if steps >= due:
        most = max(inner_steps, STEPS_MOST * statistics.median_low(made.values()))
        steps = sum(count if peer == mine.peer else min(count, most) for peer, count in made.items())
    return Verdict(steps >= due, f"{steps} of {due} inner steps")


def counted_tokens(claims: Sequence[int], members: int, round_tokens: int) -> list[int]:
    """What each contribution to a group's round counts for, of the tokens that its sender claims.

    `round_tokens`: of one member's share. A round opens on the work of all: however fast one is, by then it
    has done no more than is due from all together. Where that was long ago the middle one has done more, too.
    """
    usual = statistics.median_low(claims) if len(claims) > 1 else 0
    most = COUNTED_MOST * members * max(round_tokens, usual)
    return [min(claim, most) for claim in claims]


def clip_factors(norms: Sequence[float], tokens: Sequence[int]) -> list[float]:
    """Factor in (0, 1] for each contribution, against CLIP_FACTOR times the group's median norm.

    Norms are compared per √tokens, since an honest fast peer did more steps than a slow one. With one or two
    contributors nothing is ever clipped (the median is their mean).
    """
    rates = [norm / math.sqrt(max(count, 1)) for norm, count in zip(norms, tokens, strict=True)]
    bound = CLIP_FACTOR * statistics.median(rates) if rates else 0.0
    return [min(1.0, bound / rate) if rate > 0 and bound > 0 else 1.0 for rate in rates]


def may_leave(
    asking: Sequence[PeerId], present: Sequence[PeerId], leaving: Sequence[PeerId], minimum_replicas: int
) -> PeerId:
    """Whom an entry lets go; empty for nobody. One at a time, and never so that too few stay."""
    if not asking or set(leaving) & set(present) or len(present) - 1 < minimum_replicas:
        return PeerId("")
    return min(asking)


def in_turns(owner_of: Sequence[int], mine: int, listed_s: Sequence[float]) -> list[int]:
    """Parts in the order in which the member in seat `mine` encodes and sends them.

    Those first that were listed longest ago (`listed_s`): who is much slower than its group is listed in what
    it sends first, and would never be in the rest.

    Of each owner one in turn, so that all links are busy from the first on, beginning with the owner after
    itself, for others begin with others. Its own is the last of each turn, for it goes nowhere. Not of all:
    its own parts would close without it, round after round, where it encodes no faster than the others.
    """
    nth: Counter[tuple[int, float]] = Counter()
    keys = []
    for part, (owner, since) in enumerate(zip(owner_of, listed_s, strict=True)):
        keys.append((since, nth[owner, since], owner == mine, owner < mine, owner, part))
        nth[owner, since] += 1
    return [part for *_, part in sorted(keys)]


def closes_at(opened_s: float, quorum_s: float | None, deadline_s: float) -> float:
    """When to stop waiting: at the deadline, or after an adaptive grace once half of the weight is in."""
    if quorum_s is None:
        return opened_s + deadline_s
    grace_s = max(GRACE_MIN_S, GRACE_FACTOR * (quorum_s - opened_s))
    return min(opened_s + deadline_s, quorum_s + grace_s)


def is_half(weights: Mapping[int, int], complete: set[int]) -> bool:
    """Whether the complete ones carry at least half of the weight."""
    return 2 * sum(weights[seat] for seat in complete) >= sum(weights.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """All that `next_action` looks at."""

    now_s: float
    me: PeerId
    group: Sequence[GroupMember]  # live replicas, this one among them
    order: Sequence[PeerId]  # succession at the next height
    height: int
    engaged: bool  # a round with a live leader is under way, this peer's own included
    behind_since_s: float | None  # since when somebody is known to be ahead
    wanted_since_s: float | None  # since when a round is due, or one was left without leader
    not_before_s: float  # back-off after an attempt that failed
    urgent: bool = False  # this peer leaves and opens its last round itself
    patience_s: float = TAKEOVER_S  # that each in the order lets the one before go first


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do before `until_s` unless something changes."""

    until_s: float | None


@dataclass(frozen=True, slots=True)
class CatchUp:
    """Fetch what the others have committed."""


@dataclass(frozen=True, slots=True)
class Lead:
    """Open a round, or take over the one that was left."""


Action = Wait | CatchUp | Lead


def next_action(position: Position) -> Action:
    """What a replica does now. First who is behind catches up; then the first in order leads, each next one
    TAKEOVER_S later."""
    if position.behind_since_s is not None:
        due_s = max(position.behind_since_s + BEHIND_S, position.not_before_s)
        return CatchUp() if position.now_s >= due_s else Wait(due_s)
    if position.engaged or position.wanted_since_s is None:
        return Wait(None)
    rank = 0 if position.urgent or position.me not in position.order else position.order.index(position.me)
    due_s = max(position.wanted_since_s + rank * position.patience_s, position.not_before_s)
    return Lead() if position.now_s >= due_s else Wait(due_s)
