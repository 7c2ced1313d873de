"""One fault while a stage's state goes to another peer amid training, until all are back and all is counted.

`transfer_table` says what is struck where; who that is, and how anybody comes to be there, is known here. Who
passes a point either is struck there or stands there until somebody else has been struck.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fault_cases import FORGETFUL, NotStruck
from fault_orders import JsonObject, key_of
from pipeline_cases import ATTEMPTS, Played, conclude, decided_again, forget, gone, rerouted, struck, thaw
from pipeline_group import SPARE, PipelineGroup, PipelineReplica
from pipeline_table import STAGES, Blow
from transfer_table import Role, Scene, Transfer

from shoal.protocol.errors import ShoalError

PACE_S = (
    0.12  # of a micro-batch: half of the work of the other cases, so that a machine of two cores keeps up
)
NEEDY = 3.0  # times, that it takes longer where the plan is to send somebody
BEGUN_S = 60.0  # until somebody is at the point: processes start, the plan has to win two windows
ARRIVED_S = 90.0  # from the end of all trouble until somebody is where it goes, or stays; for what hangs
ENDS = ("online", "move-cut")  # what is told when a move is over
HOLD = "leave.asking freeze"
JOINS: JsonObject = {  # more chunks than are asked of one donor at once, and nobody keeps all entries
    "model": {"width": 128, "feedforward": 1536},
    "outer": {**FORGETFUL, "snapshot_every": 4, "part_bytes": 1 << 20},
}
MOVES: JsonObject = {"stages": {"rebalance_window_s": 1.0}, "outer": {"inner_steps": 2}}
SECTIONS = {Scene.JOIN: JOINS, Scene.MOVE: MOVES}  # of the spec


@dataclass(slots=True)
class Cast:
    """Who plays."""

    target: int  # the stage that is gone to
    donors: Sequence[PipelineReplica]
    bystanders: Sequence[PipelineReplica]
    asker: PipelineReplica | None = None
    joining: asyncio.Task[object] | None = None
    armed: list[PipelineReplica] = field(default_factory=list)

    def has_ended(self) -> bool:
        """Whether the asker is there, or stays where it is."""
        if self.joining is not None:
            return self.joining.done()
        return self.asker is not None and any(kind in ENDS for _, kind, _ in self.asker.told)

    def of(self, role: Role) -> Sequence[PipelineReplica]:
        """Who is struck in a role."""
        asker = [self.asker] if self.asker is not None else []
        donors = {Role.DONOR: self.donors[:1], Role.OTHER: self.donors[1:2], Role.STAGE: self.donors}
        return donors.get(role) or (asker if role is Role.ASKER else self.bystanders[:1])

    def passing(self, case: Transfer) -> Sequence[PipelineReplica]:
        """Who may come to the point."""
        if case.asker_passes:
            return self.of(Role.ASKER)
        if case.asks_to_leave:
            return self.bystanders  # who leads, or whoever answers first
        several = case.scene is Scene.JOIN and case.message in ("ChunkRequest", "Chunk")
        return self.of(case.role) if several else self.donors


async def play_transfer(group: PipelineGroup, case: Transfer) -> Played:
    """Raises AssertionError when a promise is broken; else the group is whole again, and goes on."""
    for _ in range(ATTEMPTS - 1):
        try:
            return await _play(group, case)
        except NotStruck:
            await _mend(group, None)
            if group.spare is not None:
                await _send_away(group, group.spare)
    return await _play(group, case)


async def _play(group: PipelineGroup, case: Transfer) -> Played:
    await group.ask_all("pace", seconds=PACE_S)
    cast = await (_join if case.scene is Scene.JOIN else _move)(group, case)
    victims = await _strike(group, case, cast)
    struck_s = max(replica.blows.get(_arming(group, case), 0.0) for replica in cast.armed)
    ended = ""
    if case.blow is Blow.EMPTY:  # nobody is coming back: who is on the way has to do
        ended = await _arrived(group, cast, struck_s)
    drivers = [one for one in group.drivers() if one not in victims and one is not cast.asker]
    seconds = await decided_again(group, drivers, struck_s)
    reroutes = rerouted(group)
    if case.blow is Blow.EMPTY:
        await group.at_work(group.members)
        back_s = asyncio.get_running_loop().time() - struck_s
    await gone(group, victims if case.blow is Blow.LEAVE else [])
    await _mend(group, cast.target)
    if cast.joining is not None:
        await _joined(group, case, cast.joining)
    elif cast.asker not in victims or case.blow not in (Blow.KILL, Blow.LEAVE):
        ended = await _arrived(group, cast, struck_s)
    await _mend(group, None)
    await group.at_work(group.members)
    if case.blow is not Blow.EMPTY:
        back_s = asyncio.get_running_loop().time() - struck_s
    if case.blow is Blow.CORRUPT and case.message == "Chunk":
        refused = (await group.spare.ask("account"))["refused"] if group.spare is not None else []
        assert refused, f"nobody was refused\n{group.story()}"
    played = await conclude(group, case, victims, struck_s, seconds, reroutes, back_s)
    if cast.joining is not None and group.spare is not None:
        await _send_away(group, group.spare)
    return replace(played, ended=ended)


async def _join(group: PipelineGroup, case: Transfer) -> Cast:
    """Somebody new comes to the middle stage."""
    group.spare_stage = 1
    await asyncio.to_thread(shutil.rmtree, group.disk_of(SPARE), ignore_errors=True)
    await group.high(1, 5)  # a snapshot, and a tail
    forget(group)
    cast = Cast(1, _in_turn(group, 1), group.of_stage(0))
    first = case.arming if case.asker_passes else None
    if first is None:
        await _arm(group, case, cast)
    joining = cast.joining = asyncio.create_task(group.enter(SPARE, arming=first, other=_other(case)))
    joining.add_done_callback(lambda done: done.cancelled() or done.exception())
    await group.until(lambda: group.spare is not None or joining.done(), "newcomer")
    cast.asker = group.spare or next(life for life in group.lives[::-1] if life.number == SPARE)
    cast.armed = cast.armed or [cast.asker]
    return cast


async def _move(group: PipelineGroup, case: Transfer) -> Cast:
    """Who moves is needed at the next stage, from now on."""
    if group.spare is None:
        group.spare_stage = 1
        await group.start(SPARE)
        await group.at_work(group.members)
    mover = group.spare
    assert mover is not None
    target = (mover.stage + 1) % STAGES
    await group.high(target, 5)  # a snapshot to copy
    forget(group)
    if case.blow is Blow.EMPTY:
        await group.guarded(target)
    others = [replica for replica in group.of_stage(mover.stage) if replica is not mover]
    cast = Cast(target, _in_turn(group, target), others, mover)
    if case.asks_to_leave:
        await group.arm(HOLD, mover, other="hold")
    else:
        await _arm(group, case, cast)
    await group.ask_all("pace", cast.donors, seconds=NEEDY * PACE_S)
    if case.asks_to_leave:
        await struck(group, HOLD, [mover], all_of=True, limit_s=BEGUN_S)
        await group.led_next(mover.stage, [mover] if case.asker_leads else others)
        await _arm(group, case, cast)
        await group.release([mover])
    return cast


def _in_turn(group: PipelineGroup, stage: int) -> list[PipelineReplica]:
    """A stage's replicas in the order in which they are asked."""
    return sorted(group.of_stage(stage), key=lambda replica: replica.peer)


def _other(case: Transfer) -> str:
    """What stands in for a freeze of who passes."""
    if case.strikes_who_passes and case.blow is not Blow.SLOW:
        return case.blow.other
    return "hold" if case.blow is Blow.SLOW or not case.strikes_who_passes else ""


async def _arm(group: PipelineGroup, case: Transfer, cast: Cast) -> None:
    cast.armed = list(cast.passing(case))
    await group.arm(_arming(group, case), *cast.armed, other=_other(case))


def _arming(group: PipelineGroup, case: Transfer) -> str:
    """Whoever passes towards the asker: others ask for a stage's state as well."""
    return case.arming if case.asker_passes else f"{case.arming} remote={key_of(group.seed, SPARE).peer}"


async def _strike(group: PipelineGroup, case: Transfer, cast: Cast) -> list[PipelineReplica]:
    """Wait until somebody is at the point, and strike whom the case says."""
    passing = await struck(
        group, _arming(group, case), cast.armed, all_of=False, limit_s=BEGUN_S, over=cast.has_ended
    )
    victims = passing if case.strikes_who_passes else list(cast.of(case.role))
    if _other(case) == "hold":
        match case.blow:
            case Blow.KILL | Blow.EMPTY:
                await group.kill_all(victims)
            case Blow.FREEZE:
                group.freeze(*victims)
            case Blow.SLOW:
                group.throttle(*victims)
            case Blow.LEAVE:
                await group.ask_all("leave", victims)
        await group.release(passing)
    elif case.blow is Blow.KILL:
        await group.until(lambda: all(victim.ended for victim in victims), "end of who was killed")
    if case.blow is Blow.EMPTY:
        for victim in victims:
            await asyncio.to_thread(shutil.rmtree, group.disk_of(victim.number))
    await group.ask_all("disarm")
    return victims


async def _arrived(group: PipelineGroup, cast: Cast, struck_s: float) -> str:
    """Who moves is where it goes, or has said why it stays; which of the two."""
    asker = cast.asker
    assert asker is not None

    def ends() -> list[str]:
        told = (said for said in asker.told if said[0] >= struck_s)
        return [str(data["text"]) for _, kind, data in told if kind in ENDS]

    await group.until(lambda: asker.ended or bool(ends()), "end of the move", ARRIVED_S)
    assert not asker.ended, f"who moves has ended\n{group.story()}"
    return ends()[0]


async def _joined(group: PipelineGroup, case: Transfer, joining: asyncio.Task[object]) -> None:
    """The newcomer is there; who was killed comes again."""
    try:
        await joining
    except (ConnectionError, ShoalError):
        if group.spare is not None:
            raise
    if group.spare is None and case.blow is Blow.KILL:
        await group.start(SPARE)


async def _mend(group: PipelineGroup, needy: int | None) -> None:
    """Nothing armed, nobody frozen or slow but a stage that somebody is to come to; all are there."""
    group.throttle()
    thaw(group)
    await group.ask_all("disarm")
    for stage in range(STAGES):
        of = [replica for replica in group.awake() if replica.stage == stage]
        await group.ask_all("pace", of, seconds=PACE_S * (NEEDY if stage == needy else 1.0))
    here = {replica.number for replica in group.members}
    await group.enter(*(number for number in group.numbers if number not in here))


async def _send_away(group: PipelineGroup, newcomer: PipelineReplica) -> None:
    with contextlib.suppress(ConnectionError):
        await newcomer.ask("leave")
    await gone(group, [newcomer])
    await group.meet()
