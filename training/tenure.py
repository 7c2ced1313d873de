"""Tenure: a peer's time at its stages, one after another or several at once. The daemon runs one.

At each stage it recovers, serves and trains. Every window it looks whether the plan (`rebalance`) names this
peer. Then it fetches the new stage's state while it goes on with the old one (pre-copy), asks its group to be
let go (LEAVE), drains, and begins anew at the other stage. Whatever fails on the way, it stays or goes back,
and lets some windows pass (`setbacks`). A peer with room for more holds empty stages besides, and leaves them
to others that come (`spread`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

from shoal.dht.beats import Beat
from shoal.dht.directory import STAGES_HELD
from shoal.dht.view import SwarmView
from shoal.protocol.errors import Busy, HardwareTooSmall, NetworkError, NotHere, ShoalError, StageEmpty, Stale
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.wire import changed
from shoal.training.decisions import DecisionLog
from shoal.training.partition import spec_costs
from shoal.training.rebalance import Move, Placed, plan, settled
from shoal.training.setbacks import Setbacks
from shoal.training.spec import RunSpec
from shoal.training.spread import give_back, take

DRAIN_S = 20.0
MOVE_S = 30.0  # that a mover loses: its drain at worst, and the replay of the tail
_TURN_WINDOWS = 2  # that a peer has to take an empty stage, before it is another one's turn
_MOVE_WINDOWS = 4  # that a move has to begin: a mover may have no memory for where the plan sends it
_PERMISSION_S = 120.0  # several rounds; then the plan has to win anew
_AGAIN_S = (5.0, 15.0, 45.0)  # between attempts to begin, for a peer that has no other stage
_PASSES = (NetworkError, StageEmpty, NotHere, Busy, Stale)  # what may be otherwise by then


class Term(Protocol):
    """A replica of one stage, from its beginning to its end."""

    async def recover(self) -> None:
        """Reach the group's state and serve."""

    async def run(self) -> None:
        """Train until cancelled."""

    async def permission(self, hurry: Callable[[], bool]) -> None:
        """Returns when the group lets this replica go; `hurry`: whether the next round shall be at once."""

    async def drain(self, deadline_s: float) -> None:
        """Finish what is held and contribute it, while `run` goes on."""

    async def stop_guarding(self, stage: int) -> None:
        """This peer is about to hold that stage, too."""


@dataclass(slots=True, eq=False)
class _Held:
    """One stage of this peer's."""

    stage: int
    besides: bool  # another one
    optional: bool  # there is another stage for the peer, if it cannot begin here
    state: str = "joining"
    term: Term | None = None  # once online
    failed: str = ""  # why it could not begin, where that is optional
    hopeless: bool = False  # and never will
    decided: asyncio.Event = field(default_factory=asyncio.Event)  # online, or not to be
    left: asyncio.Event = field(default_factory=asyncio.Event)  # set to leave in order
    task: asyncio.Task[None] | None = None


class Tenure:
    """See the module. `run` until cancelled; `terms` are the replicas that serve now."""

    def __init__(
        self,
        spec: RunSpec,
        *,
        view: Callable[[], SwarmView],
        begin: Callable[[int], AbstractAsyncContextManager[Term]],
        announce: Callable[[Mapping[int, str]], None],
        prefetch: Callable[[int, Sequence[PeerId]], Awaitable[None]],
        fits: Callable[[Sequence[int]], bool],
        event: Callable[[str, dict[str, object]], None],
        rng: random.Random,
        moves: bool = True,
        most: int = 1,
        decisions: DecisionLog | None = None,
    ) -> None:
        """`begin`: a replica of a stage; `announce`: what this peer is at each of its stages; `prefetch`: a
        stage's state from these donors to the own disk; `fits`: in this machine's memory, together. Without
        `moves` the peer stays at its stage whatever the plan says. `most`: stages that it holds at once."""
        self.moves = 0  # made
        self.room = 0  # for more stages beside those that it holds
        self.stays = False  # wherever it would help more: it cannot go there now
        self._spec = spec
        self._view = view
        self._begin = begin
        self._announce = announce
        self._prefetch = prefetch
        self._fits = fits
        self._event = event
        self._rng = rng
        self._decisions = decisions
        looks = spec.stages.count > 1 and spec.stages.rebalance_window_s > 0.0
        self._moves = moves and looks
        self._most = min(most, STAGES_HELD) if looks else 1
        self._costs = spec_costs(spec)
        self._setbacks = Setbacks(spec.stages.rebalance_window_s, rng)
        self._held: dict[int, _Held] = {}  # in the order in which it came to them
        self._bound: int | None = None  # for this stage, while it still leaves another one
        self._empty_windows = 0  # in which a stage has been empty
        self._returning: int | None = None  # what it would have given back a window ago
        self._leaving = False

    @property
    def terms(self) -> list[Term]:
        """Of the stages that it serves."""
        return [held.term for held in self._held.values() if held.term is not None]

    def complete(self, beat: Beat) -> Beat:
        """What its replicas say, with what only the tenure knows."""
        if self.stays:
            beat = changed(beat, stages=tuple(changed(stage, fixed=True) for stage in beat.stages))
        return beat if beat.room == self.room else changed(beat, room=self.room)

    async def run(self, stage: int) -> None:
        """Serve, beginning with this stage."""
        async with asyncio.TaskGroup() as tasks:
            await self._open(stage, tasks)
            await self._keep(tasks)

    async def drain(self, deadline_s: float) -> None:
        """Leave the run in order, while `run` goes on; from now on it goes to no other stage."""
        self._leaving, self._bound = True, None
        for held in self._held.values():
            held.state = "draining"
        self._say()
        await asyncio.gather(*(term.drain(deadline_s) for term in self.terms))

    async def _open(self, stage: int, tasks: asyncio.TaskGroup, *, optional: bool = False) -> _Held:
        """Begin at a stage; returns once it is online there or, where that is optional, cannot be; at once if
        it holds another one."""
        besides = bool(self._held)
        held = self._held[stage] = _Held(stage, besides, besides or optional)
        self._bound = None
        self._say()
        held.task = tasks.create_task(self._hold(held), name=f"stage {stage}")
        if not held.besides:
            await held.decided.wait()
        return held

    async def _close(self, held: _Held) -> None:
        """Leave a stage in order."""
        held.left.set()
        if held.task is not None:
            await held.task

    async def _hold(self, held: _Held) -> None:
        """From the beginning at a stage until `left`. Raises what ended it, if it has nowhere else to be."""
        try:
            for again_s in (*_AGAIN_S, None):
                if not await self._try_to_live(held, last=again_s is None) or again_s is None:
                    return
                await asyncio.sleep(again_s * self._rng.uniform(0.5, 1.5))
                if self._leaving:
                    return
        finally:
            held.term = None  # whoever waits for the end of `held` shall not hold its weights
            del self._held[held.stage]
            self._say()
            held.decided.set()

    async def _try_to_live(self, held: _Held, last: bool) -> bool:
        """Whether it is worth another attempt. A method of its own, as `_serve` is."""
        try:
            await self._live(held)
        except ShoalError as error:
            if held.term is not None:
                raise
            if held.optional:
                held.failed, held.hopeless = str(error), isinstance(error, HardwareTooSmall)
                if held.besides:
                    self._tell_of_failed(held)
                return False
            if last or not isinstance(error, _PASSES):
                raise
            text = f"stage {held.stage} could not be begun, and is tried again: {error}"
            self._event("begin-failed", {"stage": held.stage, "why": str(error), "text": text})
            return True
        return False

    async def _live(self, held: _Held) -> None:
        stage = held.stage
        async with self._begin(stage) as term:
            await term.recover()
            if self._leaving:
                return  # nobody would finish what it took on now
            held.term, held.state = term, "online"
            self._say()
            self._event("online", {"stage": stage, "text": f"online at stage {stage}"})
            held.decided.set()
            await self._serve(held, term)

    def _tell_of_failed(self, held: _Held) -> None:
        """The stages that it has are no worse for it."""
        if held.hopeless:
            self._most = len(self._held) - 1  # the plan said that it fits: it is not asked again
        text = f"not at stage {held.stage} besides: {held.failed}"
        self._event("take-cut", {"stage": held.stage, "why": held.failed, "text": text})

    async def _serve(self, held: _Held, term: Term) -> None:
        """Train until `left`, then leave in order. A method of its own: a task that was cancelled holds on to
        its frames, and they to the weights."""
        async with asyncio.TaskGroup() as tasks:
            training = tasks.create_task(term.run())
            await held.left.wait()
            held.state = "draining"
            self._say()
            await term.drain(DRAIN_S)
            training.cancel()

    def _say(self) -> None:
        """Who is on the way to a stage counts there already: nobody else need go."""
        stages = {stage: held.state for stage, held in self._held.items()}
        if self._bound is not None:
            stages[self._bound] = "joining"
        more = max(0, self._most - len(stages)) if self.terms and not self._leaving else 0
        others = set(range(self._spec.stages.count)) - stages.keys()
        self.room = more if more and any(self._fits([*stages, other]) for other in others) else 0
        if stages:
            self._announce(stages)

    async def _keep(self, tasks: asyncio.TaskGroup) -> None:
        """Look every window what the swarm needs of this peer, and do it; until it leaves."""
        if not self._moves and self._most == 1:
            await asyncio.Event().wait()
        previous: Move | None = None
        while True:
            await asyncio.sleep(self._spec.stages.rebalance_window_s * self._rng.uniform(0.9, 1.1))
            if self._leaving:
                return
            if len(self.terms) < len(self._held):
                continue  # one thing after another
            current = self._plan()
            move, previous = settled(previous, current), current
            # Each view names one of those that it has, and of a large swarm there are many views.
            if move is not None and self._is_for_me(move) and self._rng.random() < self._view().part():
                await self._move(move, tasks)
                previous = None
            elif self._most > 1:
                await self._spread(current, tasks)

    def _is_for_me(self, move: Move) -> bool:
        """Whether the plan names this peer, and it holds nothing else."""
        return self._moves and move.peer == self._view().me and [*self._held] == [move.source]

    async def _move(self, move: Move, tasks: asyncio.TaskGroup) -> None:
        """Go where the plan says, unless something stands in the way."""
        held = self._held[move.source]
        text = f"stage {move.target} needs this peer more than stage {move.source}"
        told = {"source": move.source, "target": move.target, "gain": move.gain, "text": text}
        self._event("moving", told)
        why = await self._try(held, move)
        if why:
            text = f"staying at stage {move.source}: {why}"
            self._event("move-cut", {"target": move.target, "why": why, "text": text})
            return
        self._bound = move.target
        await self._close(held)
        if self._leaving:
            return
        new = await self._open(move.target, tasks, optional=True)
        if not new.failed:
            self.moves += 1
            self._setbacks.over(move.target)
            return
        self._note_setback(move.target, for_good=new.hopeless)
        text = f"stage {move.target} could not be begun; going back to stage {move.source}: {new.failed}"
        fields = {"source": move.source, "target": move.target, "why": new.failed, "text": text}
        self._event("move-failed", fields)
        if not self._leaving:
            await self._open(move.source, tasks)

    def _note_setback(self, stage: int, *, for_good: bool = False) -> None:
        self._setbacks.failed(stage, asyncio.get_running_loop().time(), for_good=for_good)

    async def _try(self, held: _Held, move: Move) -> str:
        """Prepare a move; why it cannot be made, empty when it can."""
        donors = [member.peer for member in self._view().online(move.target)]
        try:
            await self._prefetch(move.target, donors)
        except ShoalError as error:
            self._note_setback(move.target)
            return str(error)
        if why := await self._permission(held, lambda: not self._view().online(move.target)):
            self._note_setback(move.target)
            return why
        again = self._plan()
        served = again is None or again.target != move.target
        return f"stage {move.target} has been served meanwhile" if served else ""

    async def _permission(self, held: _Held, hurry: Callable[[], bool] = lambda: False) -> str:
        """Ask the group to be let go; why not, empty when it may."""
        if held.term is None:
            return "it is not online"
        try:
            async with asyncio.timeout(_PERMISSION_S):
                await held.term.permission(hurry)
        except TimeoutError:
            return f"the group did not let it go within {_PERMISSION_S:g} s"
        except ShoalError as error:
            return str(error)
        return "this peer leaves the run" if self._leaving else ""

    async def _spread(self, move: Move | None, tasks: asyncio.TaskGroup) -> None:
        """Hold an empty stage besides, where nobody moves to it, or give back one that others hold."""
        view, stages = self._view(), self._spec.stages
        room = {m.peer: m.beat.room for m in view.here() if m.beat is not None} | {view.me: self.room}
        replicas = placed(view)
        wanted = None
        if not overlooks(view, replicas):
            wanted = take(replicas, stages.count, room, self._empty_windows // _TURN_WINDOWS)
        self._empty_windows = self._empty_windows + 1 if wanted is not None else 0
        if wanted is not None and move is not None and self._empty_windows <= _MOVE_WINDOWS:
            return  # somebody may be about to go there
        if wanted is not None:
            if wanted.peer == view.me and self._fits([*self._held, wanted.stage]):
                text = f"nobody else can hold stage {wanted.stage}: holding it besides {sorted(self._held)}"
                self._event("taking", {"stage": wanted.stage, "text": text})
                self._bound = wanted.stage  # said first: or its guarding would begin anew meanwhile
                self._say()
                for term in self.terms:
                    await term.stop_guarding(wanted.stage)
                if not self._leaving:
                    await self._open(wanted.stage, tasks)
            return
        spare = give_back(placed(view, "online"), view.me, [*self._held], stages.minimum_replicas)
        again, self._returning = spare is not None and spare == self._returning, spare
        if spare is not None and again:
            self._returning = None
            await self._give_back(self._held[spare])

    async def _give_back(self, held: _Held) -> None:
        why = await self._permission(held)
        others = [member for member in self._view().online(held.stage) if member.peer != self._view().me]
        if not why and not others:
            why = "nobody else holds it any more"
        if why:
            self._event("return-cut", {"stage": held.stage, "why": why})
            return
        text = f"stage {held.stage} is left to the {len(others)} others that hold it"
        self._event("returning", {"stage": held.stage, "text": text})
        await self._close(held)

    def _plan(self) -> Move | None:
        """What the swarm needs, of those who can go there: where this peer is the best one and cannot, it
        says that it stays, and all plans name the next one."""
        view = self._view()
        replicas = placed(view)
        if overlooks(view, replicas):
            return None
        fixed = not self._moves or len(self._held) > 1
        answer = self._best(replicas := _with_fixed(replicas, view.me, fixed))
        self.stays = not fixed and answer is not None and not self._can_go(answer.target)
        if self.stays:
            answer = self._best(replicas := _with_fixed(replicas, view.me, True))
        if self._decisions is not None:
            self._decisions.note("move", answer, replicas=replicas, move_s=MOVE_S)
        return answer

    def _best(self, replicas: Sequence[Placed]) -> Move | None:
        return plan(replicas, self._costs, self._spec.stages.minimum_replicas, MOVE_S)

    def _can_go(self, stage: int) -> bool:
        return self._fits([stage]) and not self._setbacks.bar(stage, asyncio.get_running_loop().time())


def _with_fixed(replicas: Sequence[Placed], peer: PeerId, fixed: bool) -> list[Placed]:
    """With what one peer knows of itself better than its last beat told."""
    return [replace(one, fixed=fixed) if one.peer == peer else one for one in replicas]


def announced(held: Mapping[int, str]) -> tuple[str, tuple[int, ...], tuple[str, ...]]:
    """What a record says of a peer at these stages: its state, the stages, and theirs where they differ."""
    state = next((state for state in ("online", "draining") if state in held.values()), "joining")
    states = tuple(held.values())
    return state, tuple(held), states if len(set(states)) > 1 else ()


def placed(view: SwarmView, *states: str) -> list[Placed]:
    """The replicas that train, or will soon (by default), as their beats tell."""
    states = states or ("online", "joining")
    stands_for = {stage: view.share(stage) for stage in view.sizes if view.part() < 1.0}
    found = []
    for member in view.here():
        if Role.TRAINER not in member.roles:
            continue
        held = [stage for stage in member.stages if member.state_at(stage) in states]
        for stage in held:
            beat = member.progress(stage)
            fixed = len(held) > 1 or (beat is not None and beat.fixed)
            service_s = len(held) * member.service_s
            found.append(Placed(member.peer, stage, service_s, fixed, stands_for.get(stage, 1.0)))
    return found


def overlooks(view: SwarmView, replicas: Sequence[Placed]) -> bool:
    """Whether the directory tells of a stage of which nobody is known here: it only looks empty."""
    told = {stage for stage, size in view.sizes.items() if size >= 1.0} if view.part() < 1.0 else set()
    return bool(told - {replica.stage for replica in replicas})
