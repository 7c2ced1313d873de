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
from fault_measures import (
    OF_ROUNDS,
    bytes_out,
    longest_stall_s,
    seconds_of,
    spent_since,
    total,
    way_back,
)
from fault_orders import JsonObject
from fault_outcome import Fault, Outcome
from fault_replica import Replica
from fault_table import Case

from shoal.protocol.faults import Action

STRUCK_S = 20.0  # a case whose point was not passed by then, since the machine stood still, is begun again
ATTEMPTS = 3
COMMIT_S = 90.0  # for the others to commit; goals are measured, this only ends a case that hangs
FORGETFUL: JsonObject = {"snapshot_every": 2, "payload_budget_bytes": 1}  # so that a joiner needs a snapshot
_LEADER_SENDS = {"Prepare", "Go", "Gone", "Commit"}
_LEADER_RECEIVES = {"Answer", "Report", "Done"}


@dataclass(slots=True)
class Scene:
    """How a point comes to be passed."""

    armed: Sequence[Replica]  # the first of them that is struck disarms the others
    begin: Callable[[], Awaitable[object]]
    late: Replica | None = None  # who comes, or comes back, meanwhile: the round does not need it
    lost: Replica | None = None  # who has to die first
    along: Replica | None = None  # who is killed from outside at the moment of the blow
    refetches: bool = False  # somebody asks for parts besides, whether anybody is struck or not


class NotStruck(AssertionError):
    """The point was not passed."""


async def play(group: FaultGroup, case: Case) -> Outcome:
    """Raises AssertionError when a promise is broken; else the group is whole again, and goes on."""
    if case.needs_joiner:
        return await insist(group, lambda: _play_join(group, case))
    return await insist(group, lambda: play_round(group, case, lambda: _scene(group, case)))


async def insist(group: FaultGroup, playing: Callable[[], Awaitable[Outcome]]) -> Outcome:
    """Begin again where nobody was struck, or where a goal was missed while the machine stood still."""
    numbers = [replica.number for replica in group.members]
    for _ in range(ATTEMPTS - 1):
        try:
            outcome = await playing()
            if not (outcome.stalled_s and outcome.misses()):
                return outcome
        except NotStruck:
            await _make_whole(group, numbers)
    return await playing()


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


async def play_round(group: FaultGroup, fault: Fault, scene_of: Callable[[], Awaitable[Scene]]) -> Outcome:
    """A clean round, the fault in the next, the others' equal bits, everybody's return, two more rounds."""
    _forget(group)
    sent = await bytes_out(group)
    await group.rounds(1)
    clean = await spent_since(group, sent)
    before = {replica: await replica.ask("status") for replica in group.members}
    scene = await scene_of()
    sent = await bytes_out(group)
    height = max(replica.height for replica in group.awake()) + 1
    await scene.begin()
    victim = await _struck(group, fault, scene)
    others = [r for r in group.awake() if r not in (victim, scene.late, scene.lost)]
    if scene.late is not None:
        await _step_for_all(group, others)
    await group.reach(height, others, COMMIT_S)
    seconds = seconds_of(others, height, victim.blows[fault.arming])
    spent = await spent_since(group, sent)
    await group.assert_equal(others)
    stalled_s = longest_stall_s(others if victim is scene.late else [*others, victim])
    woken_s = asyncio.get_running_loop().time() if victim.frozen else None
    await _mend(group, victim, scene.lost, scene.along)
    rejoined_s = None
    if woken_s is not None:
        await group.until(lambda: victim.head == others[0].head, f"head of the others at {victim}")
        rejoined_s = max(0.0, victim.had_s[victim.head] - woken_s)
    await group.rounds(2)
    await check(group, fault)
    methods = [m for m in OF_ROUNDS if m != "part" or not scene.refetches]
    ratio = total(spent, others, methods) / total(clean, others, methods)
    came_back = await way_back(victim, before[victim])
    return Outcome(fault, str(victim), seconds, ratio, came_back, rejoined_s, stalled_s)


def _forget(group: FaultGroup) -> None:
    """What happened in earlier cases."""
    for replica in group.members:
        replica.blows.clear()
        replica.stalls.clear()


async def check(group: FaultGroup, fault: Fault) -> None:
    """P1 and P4."""
    await group.assert_equal()
    if not fault.tells_lies:
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

        return Scene(targets, wake, late=last, refetches=True)
    if case.needs_broken:
        donors = [replica for replica in group.members if replica is not last]
        targets = await armed(*([last] if case.strikes_asker else donors))
        await last.ask("spoil")
        await group.rounds(1)
        return Scene(targets, _nothing, late=last, refetches=True)
    if case.message == "OrdersRequest":
        await group.amend([replica for replica in group.members if replica is not last])
        return Scene(await armed(last if case.strikes_asker else leader), group.step, late=last)
    if case.message == "Gone":
        await group.arm("Contributing.sending kill", last)
        return Scene(await armed(leader if case.sends else first), group.step, lost=last)
    if case.message == "Tick":
        await group.arm("ContributedPart.sending delay seconds=0.7", first)
        return Scene(await armed(second), group.step)
    if case.message == "PartRequest":
        await group.arm(f"PublishedPart.sending drop remote={second.peer}", first)
        holders = [replica for replica in group.members if replica is not second]
        targets = await armed(*([second] if case.strikes_asker else holders))
        return Scene(targets, group.step, refetches=True)
    led = case.message in (_LEADER_SENDS if case.sends else _LEADER_RECEIVES)
    return Scene(await armed(leader if led else first), group.step)


async def _nothing() -> None:
    """What happens has begun."""


async def _play_join(group: FaultGroup, case: Case) -> Outcome:
    """A newcomer takes a snapshot while something happens to it, or to a donor; then it is sent away."""
    _forget(group)
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
    scene = Scene([joiner] if asks else donors, group.step)
    victim = await _struck(group, case, scene)
    others = [replica for replica in donors if replica is not victim]
    height = max(replica.height for replica in others) + 1
    await _step_for_all(group, others)
    await group.reach(height, others, COMMIT_S)
    seconds = seconds_of(others, height, victim.blows[case.arming])
    await group.assert_equal(others)
    stalled_s = longest_stall_s(others)
    if victim.frozen:
        victim.signal(signal.SIGCONT)
    if asks and case.action is Action.KILL:
        await asyncio.gather(joining, return_exceptions=True)
        joiner = (await group.start(number))[0]
    else:
        await joining
        await _mend(group, victim)
    await group.rounds(2)
    await check(group, case)
    await group.kill(joiner)
    await group.meet()
    alive = "snapshot" if asks else "in time"
    came_back = "new process" if case.action is Action.KILL else alive
    return Outcome(case, str(victim), seconds, None, came_back, stalled_s=stalled_s)


async def _struck(group: FaultGroup, fault: Fault, scene: Scene) -> Replica:
    """Who was; the others are disarmed."""
    armed = scene.armed
    try:
        await group.until(lambda: any(fault.arming in r.blows for r in armed), "blow", STRUCK_S)
    except AssertionError as error:
        raise NotStruck(str(error)) from error
    if scene.along is not None:
        await group.kill(scene.along)
    victim = next(replica for replica in armed if fault.arming in replica.blows)
    if fault.action is Action.KILL:
        await group.until(lambda: victim.ended, f"end of {victim}")
    await asyncio.gather(*(r.ask("disarm") for r in armed if r in group.awake()))
    return victim


async def _step_for_all(group: FaultGroup, replicas: Sequence[Replica]) -> None:
    """As many steps as make a round due whoever else counts as a member by now."""
    await group.step(replicas, -(-2 * len(group.members) // len(replicas)))


async def _mend(group: FaultGroup, victim: Replica, *lost: Replica | None) -> None:
    """Everybody is there again."""
    if victim.frozen:
        victim.signal(signal.SIGCONT)
    await group.start(*(r.number for r in (victim, *lost) if r is not None and r.ended))
    await group.meet()
