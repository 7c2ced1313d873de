"""Who guards which stage (design section 10): those that do, then the lowest-hash peers with memory to spare.

A guardian keeps a copy of a stage that it does not train, for the day when all that do are gone. Pure: every
peer decides for itself from what it sees. Who has a copy keeps it: were it always the lowest hash, each peer
that comes or goes would send copies around, and where memory is scarce nobody could take one before another
had let go. Ids cost nothing, nor does saying that one has a copy: if it can be, the two are of different
tokens. Views differ, so a stage may have one guardian more for a while; a copy is let go only when those who
shall have it do. In a swarm known in part thousands have the lowest hash of those whom they know; there a
guardian's has to be low enough for one of the whole swarm's, too.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from shoal.protocol.identity import PeerId
from shoal.training.outer.log import ENTRIES_BYTES
from shoal.training.plan import StagePlan

GUARDIANS = 2
MARGIN = 4  # times GUARDIANS are low enough in the whole swarm, on average: who they are can only be guessed
GUARDED_MOST = 8  # stages of one peer, as many as its beat tells of
_COPIES = 3  # of anchor and momentum: at the head and in two snapshots, where all three differ


@dataclass(frozen=True, slots=True)
class Candidate:
    """A peer that may guard what it does not hold."""

    peer: PeerId
    stages: tuple[int, ...]  # that it holds
    spare_bytes: int  # for copies, those that it has included
    guards: tuple[int, ...] = ()  # stages that it has a copy of, as it says
    token: str = ""  # that it came with


def guard_bytes(stage: StagePlan, snapshot_every: int) -> int:
    """Memory that a stage's copy takes at most: states, entries, and their parts since the last snapshot."""
    tail = snapshot_every * -(-stage.published_bytes // stage.fragments)
    return _COPIES * 8 * stage.parameters + tail + ENTRIES_BYTES


def choose_guardians(
    run_id: bytes, needs_bytes: Sequence[int], candidates: Sequence[Candidate], part: float = 1.0
) -> tuple[tuple[PeerId, ...], ...]:
    """The guardians of each stage, at most GUARDIANS, none of its replicas.

    Every stage gets one before any gets another, and a second one is sent to a stage that would have none.
    `part`: the candidates' share of those in the swarm.
    """
    hashes = np.array([_hash(run_id, candidate.peer) for candidate in candidates], np.uint64)
    low = 2.0**64 * MARGIN * GUARDIANS * part / max(len(candidates), 1) if part < 1.0 else math.inf
    chosen: list[list[PeerId]] = []
    holders: list[list[Candidate]] = []  # for each stage, who has a copy, the lowest hash first
    ranked: list[list[Candidate]] = []  # who may come to have one
    for stage in range(len(needs_bytes)):
        mixed = _mixed(hashes, stage)
        order = [int(index) for index in np.argsort(mixed, kind="stable")]
        others = [(candidates[i], int(mixed[i])) for i in order if stage not in candidates[i].stages]
        holders.append([candidate for candidate, _ in others if stage in candidate.guards])
        chosen.append([first.peer for first in holders[stage][:1]])
        chosen[stage] += [one.peer for one in _of_others(holders[stage], holders[stage][:1])[:1]]
        ranked.append([candidate for candidate, height in others if height < low])
    kept: dict[PeerId, set[int]] = {candidate.peer: set() for candidate in candidates}
    for stage, have in enumerate(holders):
        for peer in {*chosen[stage], *(candidate.peer for candidate in have[:GUARDIANS])}:
            kept[peer].add(stage)
    for wanted, stage in itertools.product(range(1, GUARDIANS + 1), range(len(needs_bytes))):
        if len(chosen[stage]) >= wanted:
            continue
        first = [candidate for candidate in candidates if candidate.peer in chosen[stage]]
        able = _able(stage, _of_others(ranked[stage], first), kept, needs_bytes)
        able = able or next((c.peer for c in holders[stage] if c.peer not in chosen[stage]), None)
        able = able or _able(stage, ranked[stage], kept, needs_bytes)
        if able is None and wanted == 1:
            able = _spared(stage, ranked[stage], kept, needs_bytes, chosen)
        if able is not None:
            chosen[stage].append(able)
            kept[able].add(stage)
    return tuple(tuple(guardians) for guardians in chosen)


def _of_others(candidates: Sequence[Candidate], than: Sequence[Candidate]) -> list[Candidate]:
    """Those who came with other tokens."""
    tokens = {candidate.token for candidate in than}
    return [candidate for candidate in candidates if candidate.token not in tokens]


def _able(
    stage: int, ranked: Sequence[Candidate], kept: Mapping[PeerId, set[int]], needs_bytes: Sequence[int]
) -> PeerId | None:
    """Who has room for a copy of a stage beside those it keeps, and has none of it."""
    for candidate in ranked:
        others = kept[candidate.peer]
        taken = sum(needs_bytes[other] for other in others)
        enough = taken + needs_bytes[stage] <= candidate.spare_bytes
        if stage not in others and len(others) < GUARDED_MOST and enough:
            return candidate.peer
    return None


def _spared(
    stage: int,
    ranked: Sequence[Candidate],
    kept: Mapping[PeerId, set[int]],
    needs_bytes: Sequence[int],
    chosen: Sequence[list[PeerId]],
) -> PeerId | None:
    """Who has room once it lets go of a stage that another one guards, too; it is taken from that one."""
    for other, guardians in enumerate(chosen):
        for peer in guardians if len(guardians) > 1 else ():
            without = {**kept, peer: kept[peer] - {other}}
            if _able(stage, [c for c in ranked if c.peer == peer], without, needs_bytes) is not None:
                guardians.remove(peer)
                kept[peer].discard(other)
                return peer
    return None


def may_let_go(me: PeerId, chosen: Sequence[PeerId], heights: Mapping[PeerId, int], trained: bool) -> bool:
    """Whether this peer may forget a stage: others that shall guard it have what it has.

    All that shall, for fewer than GUARDIANS may have the memory. Those that shall not are no others: they may
    let go at the same moment. `heights`: of all copies, this peer's among them; `trained`: by somebody.
    """
    have = sum(heights.get(peer, -1) >= heights[me] for peer in chosen)
    return trained and me not in chosen and 0 < len(chosen) == have


def _mixed(hashes: np.ndarray, stage: int) -> np.ndarray:
    """An order of its own for each stage: splitmix64's finaliser; wraps around on purpose."""
    values = hashes + np.uint64((stage + 1) * 0x9E3779B97F4A7C15 % 2**64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


@functools.lru_cache(maxsize=1 << 15)
def _hash(run_id: bytes, peer: PeerId) -> int:
    return int.from_bytes(blake3(b"shoal guardian" + run_id + peer.encode()).digest(8), "little")
