"""Who holds the run up? Names hung, slow-link and slow-compute peers and the limiting stage. Pure.

From timings alone: lane times of micro-batches, when a lane last finished something, bytes and seconds of
what was sent in rounds. A peer is compared with the median of the others, by its own median over the last
rounds, so that neither a single hiccup is an alarm nor that machines differ by 2 and links by 3. Slow is no
fault: routing gives such a peer less. The owner is told, so that somebody may look.
"""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal.node.view.parts import Finding, Stage

WINDOW = 8  # rounds, or samples
ENOUGH = 5  # of them, before anything is said
SLOW_COMPUTE = 3.0  # times the others' median lane time for the same work
SLOW_LINK = 5.0  # times less than the others' median send rate; uplinks differ by 3 in health
SLOW_SEND_S = 0.5  # a send that took less holds nobody up
HUNG_S, HUNG_GAPS = 15.0, 8.0  # a lane with work that finishes nothing; or so many of its usual gaps
LIMITS = 0.8  # of what the next stage could do


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """One replica, as far as it was watched."""

    peer: str
    name: str
    stage: int
    besides: tuple[int, ...] = ()  # more stages that it holds, on the same lane
    service_s: tuple[float, ...] = ()  # lane time of a micro-batch, a sample a round
    sends: tuple[tuple[float, float], ...] = ()  # bytes and seconds, of each of the last rounds
    stalled_s: float = 0.0  # with work queued, since its lane finished something
    gap_s: float = 0.0  # usually between two finished items


def diagnose(peers: Sequence[Timings], costs: Sequence[float]) -> tuple[Finding, ...]:
    """What there is to say; `costs` of the stages, for work is compared across them."""
    return (*_hung(peers), *_slow_compute(peers, costs), *_slow_links(peers))


def limiting(stages: Sequence[Stage]) -> Finding | None:
    """The stage that the others wait for, where one does."""
    known = sorted((row for row in stages if row.could_tokens_per_s), key=lambda r: r.could_tokens_per_s or 0)
    if len(known) < 2 or len(known) < len(stages):
        return None
    least, next_ = known[0].could_tokens_per_s or 0.0, known[1].could_tokens_per_s or 0.0
    if least > LIMITS * next_:
        return None
    text = f"Stage {known[0].stage} limits the run: it could do {least:,.0f} tok/s, the next {next_:,.0f}."
    return Finding(kind="limits-run", text=text, stage=known[0].stage)


def _hung(peers: Sequence[Timings]) -> list[Finding]:
    return [
        Finding(
            kind="hung",
            text=f"{one.name} answers, but finished no work for {one.stalled_s:.0f} s with some queued.",
            peer=one.peer,
            name=one.name,
            stage=one.stage,
        )
        for one in peers
        if one.stalled_s > max(HUNG_S, HUNG_GAPS * one.gap_s)
    ]


def _slow_compute(peers: Sequence[Timings], costs: Sequence[float]) -> list[Finding]:
    work = {one.peer: _work(one, costs) for one in peers if len(one.service_s) >= ENOUGH}
    usual = {
        one.peer: statistics.median(one.service_s) / work[one.peer] for one in peers if work.get(one.peer)
    }
    others = _medians_of_others(usual)
    found = []
    for one in peers:
        if one.peer not in others:
            continue
        times = usual[one.peer] / others[one.peer] if others[one.peer] > 0 else 0.0
        if times >= SLOW_COMPUTE:
            text = f"{one.name} computes {times:.1f} times slower than its peers ({_where(one)})."
            found.append(
                Finding(kind="slow-compute", text=text, peer=one.peer, name=one.name, stage=one.stage)
            )
    return found


def _work(one: Timings, costs: Sequence[float]) -> float:
    """What a micro-batch costs on its lane, of whichever of its stages; 0: not known."""
    held = [costs[stage] for stage in (one.stage, *one.besides) if stage < len(costs)]
    return statistics.fmean(held) if held else 0.0


def _slow_links(peers: Sequence[Timings]) -> list[Finding]:
    rates = {
        one.peer: statistics.median(sent / max(seconds, 1e-6) for sent, seconds in one.sends)
        for one in peers
        if len(one.sends) >= ENOUGH
    }
    others = _medians_of_others(rates)
    found = []
    for one in peers:
        if one.peer not in others:
            continue
        seconds = statistics.median(seconds for _, seconds in one.sends)
        times = others[one.peer] / max(rates[one.peer], 1e-6)
        if times >= SLOW_LINK and seconds >= SLOW_SEND_S:
            text = (
                f"{one.name} sends {times:.1f} times slower than its peers: {seconds:.1f} s of each round "
                f"of {_where(one)}."
            )
            found.append(Finding(kind="slow-link", text=text, peer=one.peer, name=one.name, stage=one.stage))
    return found


def _where(one: Timings) -> str:
    if not one.besides:
        return f"stage {one.stage}"
    return f"stages {', '.join(map(str, (one.stage, *one.besides)))}"


def _medians_of_others(values: Mapping[str, float]) -> dict[str, float]:
    """For each the median of all but it; empty for a lone one."""
    if len(values) < 2:
        return {}
    ordered = sorted(values.values())
    left = len(ordered) - 1
    found = {}
    for peer, value in values.items():
        at = bisect.bisect_left(ordered, value)
        low, high = ((k if k < at else k + 1) for k in ((left - 1) // 2, left // 2))
        found[peer] = (ordered[low] + ordered[high]) / 2
    return found
