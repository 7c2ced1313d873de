"""One fault in a pipeline of real processes: the blow, the others' work, everybody's return, the count.

`test_pipeline_faults_real` plays a few cases, `soak/pipeline_faults.py` all of them. What has to happen so
that anybody passes a point is known here.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass

from fault_cases import NotStruck
from fault_measures import longest_stall_s
from pipeline_audit import Audit
from pipeline_group import PipelineGroup, PipelineReplica, Reroute
from pipeline_table import HARMLESS, Blow, Case
from pipeline_worker import PACE_S
from transfer_table import Transfer

from shoal.protocol.faults import Action

STRUCK_S = 25.0  # a point that was not passed by then is tried again
ATTEMPTS = 3
DECIDED_S = 90.0  # goals are measured; this only ends a case that hangs
LEFT_S = 60.0
LOST_STAGE = 1  # whose replica fails, so that the other one adopts
LONG_PACE_S = 0.9  # hops that are asked for so much work say that they are at it


@dataclass(frozen=True, slots=True)
class Played:
    """What a case came to; every promise was kept."""

    case: Case | Transfer
    struck: str  # which process, or processes
    seconds: float  # from the blow until living drivers had decided all that they had in flight
    reroute_s: float  # the longest of the others' own count: from a failure that they saw to an answer
    handed_s: float  # the longest from the blow until such a micro-batch was with the one that answered
    back_s: float  # from the blow until everybody was there and at work again
    audit: Audit
    stalled_s: float  # the longest that the machine let one of the others stand still meanwhile
    ended: str = ""  # of a transfer: how

    def __str__(self) -> str:
        stalled = f"  (the machine stood still for {self.stalled_s:.1f} s)" if self.stalled_s else ""
        found = self.audit
        return (
            f"{self.case!s:40} {self.struck:11} {self.seconds:6.2f} s  handed over {self.handed_s:5.2f} s  "
            f"reroute {self.reroute_s:5.2f} s  back {self.back_s:6.2f} s  decided {found.decided:4} "
            f"applied {found.applied:4} lost {found.excused:2} unexplained {len(found.unexplained)}{stalled}"
            f"{f'  {self.ended}' if self.ended else ''}"
        )


async def play(group: PipelineGroup, case: Case) -> Played:
    """Raises AssertionError when a promise is broken; else the group is whole again, and goes on."""
    for _ in range(ATTEMPTS - 1):
        try:
            return await _play(group, case)
        except NotStruck:
            await _mend(group)
    return await _play(group, case)


async def _play(group: PipelineGroup, case: Case) -> Played:
    forget(group)
    clock = asyncio.get_running_loop().time
    victims = await _strike(group, case)
    struck_s = max(victim.blows[case.arming] for victim in victims)
    going = victims if case.blow is Blow.LEAVE else []
    if not any(one.stage == case.stage and one not in going for one in group.awake()):  # nobody to go on with
        await gone(group, going)
        await _mend(group)
    going_on = [driver for driver in group.drivers() if driver not in victims]
    seconds = await decided_again(group, going_on, struck_s)
    reroutes = rerouted(group)
    await gone(group, going)
    await _mend(group)
    await group.at_work(group.members)
    back_s = clock() - struck_s
    return await conclude(group, case, victims, struck_s, seconds, reroutes, back_s)


def forget(group: PipelineGroup) -> None:
    """What happened in earlier cases."""
    for replica in group.members:
        replica.blows.clear()
        replica.stalls.clear()
        replica.reroutes.clear()
        replica.told.clear()


def rerouted(group: PipelineGroup) -> list[Reroute]:
    """What those that run have told of since."""
    return [reroute for replica in group.awake() for reroute in replica.reroutes]


async def conclude(
    group: PipelineGroup,
    case: Case | Transfer,
    victims: list[PipelineReplica],
    struck_s: float,
    seconds: float,
    reroutes: list[Reroute],
    back_s: float,
) -> Played:
    """Everybody is back: count. Raises AssertionError when a promise is broken."""
    found = await group.audit()
    assert not found.broken, f"{'; '.join(found.broken)}\n{group.story()}"
    assert case.blow not in HARMLESS or not found.excused, f"{found.excused} are missing\n{group.story()}"
    await asyncio.to_thread(group.assert_checkpoints_are_whole)
    names = "+".join(map(str, victims))
    others = [replica for replica in group.members if replica not in victims and not replica.blows]
    stalled_s = longest_stall_s(others)
    reroute_s = max((reroute.seconds for reroute in reroutes), default=0.0)
    handed_s = max((reroute.handed_s - struck_s for reroute in reroutes), default=0.0)
    return Played(case, names, seconds, reroute_s, handed_s, back_s, found, stalled_s)


async def _strike(group: PipelineGroup, case: Case) -> list[PipelineReplica]:
    """Bring somebody to the point; returns who was struck there, and nothing is armed any more."""
    armed = group.of_stage(case.stage)
    if case.needs_slow_hops:
        await group.ask_all("pace", seconds=LONG_PACE_S)
    if case.needs_silent_driver:
        await _lose_one(group, "chain.decided freeze", group.of_stage(0)[0])
    if case.needs_loss:
        armed = armed if case.stage != LOST_STAGE else armed[1:]
    if case.blow is Blow.EMPTY:
        await group.guarded(case.stage)
        await asyncio.gather(*(group.arm(case.arming, one) for one in armed))
    else:
        await group.arm(case.arming, *armed, other=case.blow.other)
    if case.needs_loss:
        await _lose_one(group, "Working.received freeze", group.of_stage(LOST_STAGE)[0])
    victims = await struck(group, case.arming, armed, all_of=case.blow is Blow.EMPTY)
    if case.blow.action is Action.KILL:
        await group.until(lambda: all(victim.ended for victim in victims), "end of who was killed")
    if case.blow is Blow.EMPTY:  # with their machines: the stage is what its guardians have
        for victim in victims:
            await asyncio.to_thread(shutil.rmtree, group.disk_of(victim.number))
    await group.ask_all("disarm")
    return victims


async def _lose_one(group: PipelineGroup, arming: str, one: PipelineReplica) -> None:
    """It freezes there, until all is mended."""
    await group.arm(arming, one)
    await struck(group, arming, [one], all_of=True)


async def struck(
    group: PipelineGroup,
    arming: str,
    armed: list[PipelineReplica],
    *,
    all_of: bool,
    limit_s: float = STRUCK_S,
    over: Callable[[], bool] = lambda: False,
) -> list[PipelineReplica]:
    """Who was struck. Raises NotStruck when nobody was until `limit_s`, or until it is `over`."""
    enough = all if all_of else any

    def hit() -> bool:
        return enough(arming in replica.blows for replica in armed)

    try:
        await group.until(lambda: hit() or over(), f"blow of {arming}", limit_s)
    except AssertionError as error:
        if not str(error).startswith("no blow"):
            raise
        raise NotStruck(str(error)) from error
    if not hit():
        raise NotStruck(f"{arming} was not passed")
    return [replica for replica in armed if arming in replica.blows]


async def decided_again(group: PipelineGroup, drivers: list[PipelineReplica], struck_s: float) -> float:
    """Seconds from the blow until these have decided all that they have begun."""
    await group.ask_all("decide", drivers)
    what = "decision of all that was in flight"
    await group.until(lambda: all(driver.decided_s > struck_s for driver in drivers), what, DECIDED_S)
    return max((driver.decided_s - struck_s for driver in drivers), default=0.0)


async def gone(group: PipelineGroup, leaving: list[PipelineReplica]) -> None:
    """Whoever leaves has left. A driver that stood still has decisions that they wait for."""
    thaw(group)
    await group.until(lambda: all(one.ended for one in leaving), "end of who leaves", LEFT_S)


def thaw(group: PipelineGroup) -> None:
    for replica in group.members:
        if replica.frozen:
            replica.signal(signal.SIGCONT)


async def _mend(group: PipelineGroup) -> None:
    """Nothing armed, nobody frozen or slow, everybody there."""
    thaw(group)
    await group.ask_all("disarm")
    await group.ask_all("pace", seconds=PACE_S)
    here = {replica.number for replica in group.members}
    await group.start(*(number for number in group.numbers if number not in here))
