"""One fault in a group of real processes, from a clean round before it to equal bits after it.

`test_rounds_under_faults_real` plays a few cases, `soak/fault_points.py` all of them. Which process passes a
point, and what has to happen so that anybody passes it, is known here.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from fault_group import FaultGroup
from fault_orders import JsonObject
from fault_replica import Replica
from fault_table import Case

from shoal.protocol.faults import Action

STRUCK_S = 20.0  # a case whose point was not passed by then, since the machine stood still, is begun again
ATTEMPTS = 3
COMMIT_S = 90.0  # for the others to commit; goals are measured, this only ends a case that hangs
FORGETFUL: JsonObject = {"snapshot_every": 2, "payload_budget_bytes": 1}  # so that a joiner needs a snapshot
_LEADER_SENDS = {"Prepare", "Go", "Gone", "Commit"}
_LEADER_RECEIVES = {"Answer", "Report", "Done"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a case came to."""

    case: Case
    struck: str  # which process
    seconds: float  # from the blow until the last of the others had committed
    bytes_ratio: float | None  # what the others sent in that round, by what they sent in a clean one
    came_back: str  # the one that was struck: "in time", "replay", "snapshot" or "new process"


@dataclass(slots=True)
class Scene:
    """How a point comes to be passed."""

    armed: Sequence[Replica]  # the first of them that is struck disarms the others
    begin: Callable[[], Awaitable[object]]
    late: Replica | None = None  # who comes, or comes back, meanwhile: the round does not need it
    lost: Replica | None = None  # who has to die first
    comparable: bool = True  # with a clean round, in bytes


class NotStruck(AssertionError):
    """The point was not passed."""


async def play(group: FaultGroup, case: Case) -> Outcome:
    """Raises AssertionError when a promise is broken; else the group is whole again, and goes on."""
    numbers = [replica.number for replica in group.members]
    playing = _play_join if case.needs_joiner else _play_round
    for _ in range(ATTEMPTS - 1):
        try:
            return await playing(group, case)
        except NotStruck:
            await _make_whole(group, numbers)
    return await playing(group, case)


async def _make_whole(group: FaultGroup, numbers: Sequence[int]) -> None:
    """Nothing armed, and these workers, no others."""
    for replica in group.members:
        if replica.frozen:
            replica.signal(signal.SIGCONT)
        if replica.number not in numbers:
            await group.kill(replica)
    await asyncio.gather(*(replica.ask("disarm") for replica in group.awake()))
    here = [replica.number for replica in group.members]
    await group.start(*(number for number in numbers if number not in here))


async def _play_round(group: FaultGroup, case: Case) -> Outcome:
    for replica in group.members:
        replica.blows.clear()
    sent = await _bytes_out(group)
    await group.rounds(1)
    clean = _less(await _bytes_out(group), sent)
    before = {replica: await replica.ask("status") for replica in group.members}
    scene = await _scene(group, case)
    sent = await _bytes_out(group)
    height = max(replica.height for replica in group.awake()) + 1
    await scene.begin()
    victim = await _struck(group, case, scene.armed)
    others = [r for r in group.awake() if r not in (victim, scene.late, scene.lost)]
    if scene.late is not None:
        await _step_for_all(group, others)
    await group.reach(height, others, COMMIT_S)
    seconds = _seconds(others, height, victim.blows[case.arming])
    ratio = None
    if scene.comparable:
        spent = _less(await _bytes_out(group), sent)
        ratio = sum(spent[r] for r in others) / sum(clean[r] for r in others)
    await _mend(group, victim, scene.lost)
    await group.rounds(2)
    await check(group, case)
    return Outcome(case, str(victim), seconds, ratio, await _way_back(victim, before[victim]))


async def check(group: FaultGroup, case: Case) -> None:
    """P1 and P4."""
    await group.assert_equal()
    if not case.tells_lies:
        await group.assert_every_step_is_in_once()


async def _scene(group: FaultGroup, case: Case) -> Scene:
    leader = group.leader()
    followers = [replica for replica in group.members if replica is not leader]
    first, second, last = followers[0], followers[1], followers[-1]

    async def armed(*replicas: Replica) -> Sequence[Replica]:
        await group.arm(case.arming, *replicas)
        return replicas

    if case.needs_laggard:
        donors = [replica for replica in group.members if replica is not last]
        targets = await armed(*([last] if case.strikes_asker else donors))
        last.signal(signal.SIGSTOP)
        await group.meet()
        await group.rounds(2)

        async def wake() -> None:
            last.signal(signal.SIGCONT)

        return Scene(targets, wake, late=last, comparable=False)
    if case.needs_broken:
        donors = [replica for replica in group.members if replica is not last]
        targets = await armed(*([last] if case.strikes_asker else donors))
        await last.ask("spoil")
        await group.rounds(1)
        return Scene(targets, _nothing, late=last, comparable=False)
    if case.message == "Gone":
        await group.arm("Contributing.sending kill", last)
        return Scene(await armed(leader if case.sends else first), group.step, lost=last, comparable=False)
    if case.message == "Tick":
        await group.arm("ContributedPart.sending delay seconds=0.7", first)
        return Scene(await armed(second), group.step)
    if case.message == "PartRequest":
        await group.arm(f"PublishedPart.sending drop remote={second.peer}", first)
        holders = [replica for replica in group.members if replica is not second]
        return Scene(
            await armed(*([second] if case.strikes_asker else holders)), group.step, comparable=False
        )
    led = case.message in (_LEADER_SENDS if case.sends else _LEADER_RECEIVES)
    return Scene(await armed(leader if led else first), group.step)


async def _nothing() -> None:
    """What happens has begun."""


async def _play_join(group: FaultGroup, case: Case) -> Outcome:
    """A newcomer takes a snapshot while something happens to it, or to a donor; then it is sent away."""
    for replica in group.members:
        replica.blows.clear()
    height = group.members[0].height
    await group.rounds(max(3, height | 1) - height)  # there is a snapshot, and an entry after it
    donors = group.members
    asks = case.strikes_asker
    number = len(donors)
    if not asks:
        await group.arm(case.arming, *donors)
    joining = asyncio.create_task(group.start(number, arming=case.arming if asks else None))
    await group.until(lambda: len(group.members) > len(donors), "newcomer")
    joiner = group.members[-1]
    victim = await _struck(group, case, [joiner] if asks else donors)
    others = [replica for replica in donors if replica is not victim]
    height = max(replica.height for replica in others) + 1
    await _step_for_all(group, others)
    await group.reach(height, others, COMMIT_S)
    seconds = _seconds(others, height, victim.blows[case.arming])
    if victim.frozen:
        victim.signal(signal.SIGCONT)
    if asks and case.action is Action.KILL:
        await asyncio.gather(joining, return_exceptions=True)
        joiner = (await group.start(number))[0]
    else:
        await joining
        await _mend(group, victim, None)
    await group.rounds(2)
    await check(group, case)
    await group.kill(joiner)
    await group.meet()
    alive = "snapshot" if asks else "in time"
    return Outcome(case, str(victim), seconds, None, "new process" if case.action is Action.KILL else alive)


async def _struck(group: FaultGroup, case: Case, armed: Sequence[Replica]) -> Replica:
    """Who was; the others are disarmed."""
    try:
        await group.until(lambda: any(case.arming in r.blows for r in armed), "blow", STRUCK_S)
    except AssertionError as error:
        raise NotStruck(str(error)) from error
    victim = next(replica for replica in armed if case.arming in replica.blows)
    if case.action is Action.KILL:
        await group.until(lambda: victim.ended, f"end of {victim}")
    await asyncio.gather(*(r.ask("disarm") for r in armed if r in group.awake()))
    return victim


def _seconds(others: Sequence[Replica], height: int, struck_s: float) -> float:
    """From the blow to the last COMMIT; none if that was first."""
    return max(0.0, *(replica.reached_s[height] - struck_s for replica in others))


async def _step_for_all(group: FaultGroup, replicas: Sequence[Replica]) -> None:
    """As many steps as make a round due whoever else counts as a member by now."""
    await group.step(replicas, -(-2 * len(group.members) // len(replicas)))


async def _mend(group: FaultGroup, victim: Replica, lost: Replica | None) -> None:
    """Everybody is there again."""
    if victim.frozen:
        victim.signal(signal.SIGCONT)
    for replica in (victim, lost):
        if replica is not None and replica.ended:
            await group.start(replica.number)
    await group.meet()


async def _way_back(victim: Replica, before: JsonObject) -> str:
    if victim.ended:
        return "new process"
    after = await victim.ask("status")
    if any(
        after["bytes_in"].get(m, 0) > before["bytes_in"].get(m, 0) for m in after["bytes_in"] if "chunks" in m
    ):
        return "snapshot"
    return "replay" if after["outer"]["caught_up"] > before["outer"]["caught_up"] else "in time"


async def _bytes_out(group: FaultGroup) -> dict[Replica, int]:
    """All that those who are awake have sent for rounds so far, frames and all."""
    said = {replica: await replica.ask("status") for replica in group.awake()}
    return {replica: sum(status["bytes_out"].values()) for replica, status in said.items()}


def _less(after: dict[Replica, int], before: dict[Replica, int]) -> dict[Replica, int]:
    return {replica: sent - before.get(replica, 0) for replica, sent in after.items()}
