"""Tenure: a peer's time at its stages, one after another. The daemon runs one; so does the simulator.

At each stage it recovers, serves and trains. Every window it looks whether the plan (`rebalance`) names this
peer. Then it fetches the new stage's state while it goes on with the old one (pre-copy), asks its group to be
let go (LEAVE), drains, and begins anew at the other stage. Whatever fails on the way, it stays.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from shoal.dht.view import SwarmView
from shoal.protocol.errors import ShoalError
from shoal.protocol.identity import PeerId, Role
from shoal.training.decisions import DecisionLog
from shoal.training.partition import spec_costs
from shoal.training.rebalance import Move, Placed, plan, settled
from shoal.training.spec import RunSpec

DRAIN_S = 20.0
MOVE_S = 30.0  # that a mover loses: its drain at worst, and the replay of the tail
_PERMISSION_S = 120.0  # several rounds; then the plan has to win anew


class Term(Protocol):
    """A replica of one stage, from its beginning to its end."""

    async def recover(self) -> None:
        """Reach the group's state and serve."""

    async def run(self) -> None:
        """Train until cancelled."""

    async def permission(self) -> None:
        """Returns when the group lets this replica go."""

    async def drain(self, deadline_s: float) -> None:
        """Finish what is held and contribute it, while `run` goes on."""


class Tenure:
    """See the module. `run` until cancelled; `term` is the replica that serves now."""

    def __init__(
        self,
        spec: RunSpec,
        *,
        view: Callable[[], SwarmView],
        begin: Callable[[int], AbstractAsyncContextManager[Term]],
        announce: Callable[[str, tuple[int, ...]], None],
        prefetch: Callable[[int, Sequence[PeerId]], Awaitable[None]],
        fits: Callable[[int], bool],
        event: Callable[[str, dict[str, object]], None],
        rng: random.Random,
        moves: bool = True,
        decisions: DecisionLog | None = None,
    ) -> None:
        """`begin`: a replica of a stage; `prefetch`: its state from these donors to the own disk; `fits`: in
        this machine's memory. Without `moves` the peer stays at its stage whatever the plan says."""
        self.term: Term | None = None
        self.moves = 0  # made
        self._spec = spec
        self._view = view
        self._begin = begin
        self._announce = announce
        self._prefetch = prefetch
        self._fits = fits
        self._event = event
        self._rng = rng
        self._decisions = decisions
        self._moves = moves and spec.stages.count > 1 and spec.stages.rebalance_window_s > 0.0
        self._costs = spec_costs(spec)

    async def run(self, stage: int) -> None:
        """Serve, beginning with this stage."""
        while True:
            async with self._begin(stage) as term:
                await term.recover()
                self.term = term
                self._announce("online", (stage,))
                self._event("online", {"stage": stage, "text": f"online at stage {stage}"})
                move = await self._serve(term, stage)
                self.term = None
            self.moves += 1
            stage = move.target
            self._announce("joining", (stage,))

    async def _serve(self, term: Term, stage: int) -> Move:
        """Train at one stage, until the swarm needs this peer elsewhere and its group has let it go."""
        async with asyncio.TaskGroup() as tasks:
            training = tasks.create_task(term.run())
            leaving = tasks.create_task(self._leave(term, stage))
            await asyncio.wait((training, leaving), return_when=asyncio.FIRST_COMPLETED)
            if leaving.done() and not leaving.cancelled() and leaving.exception() is None:
                self._announce("draining", (stage,))
                await term.drain(DRAIN_S)
                training.cancel()
        return leaving.result()

    async def _leave(self, term: Term, stage: int) -> Move:
        """Returns the move to make, once nothing stands in its way."""
        if not self._moves:
            await asyncio.Event().wait()
        previous: Move | None = None
        while True:
            await asyncio.sleep(self._spec.stages.rebalance_window_s * self._rng.uniform(0.9, 1.1))
            view, current = self._view(), self._plan()
            move, previous = settled(previous, current), current
            if move is None or move.peer != view.me or move.source != stage or not self._fits(move.target):
                continue
            text = f"stage {move.target} needs this peer more than stage {stage}"
            self._event("moving", {"source": stage, "target": move.target, "gain": move.gain, "text": text})
            why = await self._try(term, move)
            if not why:
                return move
            text = f"staying at stage {stage}: {why}"
            self._event("move-cut", {"target": move.target, "why": why, "text": text})
            previous = None

    async def _try(self, term: Term, move: Move) -> str:
        """Prepare a move; why it cannot be made, empty when it can."""
        donors = [member.peer for member in self._view().online(move.target)]
        try:
            await self._prefetch(move.target, donors)
            async with asyncio.timeout(_PERMISSION_S):
                await term.permission()
        except TimeoutError:
            return f"the group did not let it go within {_PERMISSION_S:g} s"
        except ShoalError as error:
            return str(error)
        again = self._plan()
        served = again is None or again.target != move.target
        return f"stage {move.target} has been served meanwhile" if served else ""

    def _plan(self) -> Move | None:
        replicas = placed(self._view())
        answer = plan(replicas, self._costs, self._spec.stages.minimum_replicas, MOVE_S)
        if self._decisions is not None:
            self._decisions.note("move", answer, replicas=replicas, move_s=MOVE_S)
        return answer


def placed(view: SwarmView) -> list[Placed]:
    """The replicas that train, or will soon, as their beats tell."""
    found = []
    for member in view.here():
        trains = member.state in ("online", "joining") and Role.TRAINER in member.roles
        if trains and member.stages:
            stage = member.stages[0]
            beat = member.progress(stage)
            found.append(Placed(member.peer, stage, member.service_s, beat is not None and beat.fixed))
    return found
