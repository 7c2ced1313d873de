"""A stage of which no copy is left: it never begins anew in silence, `stages.when_lost` decides.

Called for a replica that has found nothing of its stage anywhere, while others tell of entries. It looks
again until somebody has the stage after all: a replica that thaws, a peer that comes back with its disk, a
checkpoint that turns up. Under "halt" that is all; otherwise one of those who wait rebuilds the stage after a
while ("mean": each layer the mean of the neighbours' nearest, as in CheckFree, arXiv 2506.15461; "identity":
layers that pass on what they get), and the others take it from that one. The log begins anew with an entry
that says so (`Rebuilt`); whoever comes later reads it there.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3

from shoal.compression.codec import bytes_of
from shoal.dht.liveness import Liveness
from shoal.dht.view import SwarmView
from shoal.protocol.errors import ShoalError
from shoal.training.model.layout import StageLayout, stage_layout
from shoal.training.neighbours import silent_since_s
from shoal.training.outer.context import Context
from shoal.training.outer.log import LogState, Rebuilt
from shoal.training.outer.policy import SILENT_S, succession
from shoal.training.outer.service import Outer
from shoal.training.outer.snapshot import Snapshot, snapshot_of
from shoal.training.partition import stage_ranges
from shoal.training.recovery.download import download, newest_offer

LOOK_S = 2.0
PATIENCE_S = 10.0  # before a stage is rebuilt: what was only slow to be met has been met by then
_ABSURD_TIMES = 64
_BRANCH_ENDS = ("attention.o", "feedforward.down")  # zero, and a layer adds nothing to what it gets


@dataclass(frozen=True, slots=True)
class Loss:
    """What others tell of the run that this stage took part in."""

    height: int  # of the highest log
    log_tokens: int  # of the longest
    certain: bool  # whoever held or guarded the stage is gone for good; else it may yet come from somebody
    known: bool  # who held it, or that nobody has for long: a newcomer amid a cut has met one side only


def loss_of(view: SwarmView, stage: int) -> Loss | None:
    """Whether a stage is lost: no replica of it is alive, and others have committed entries."""
    others = [member for member in view.members if member.peer != view.me]
    holders = [m for m in others if stage in m.stages and m.state_at(stage) in ("online", "draining")]
    if any(member.liveness is Liveness.ALIVE and member.beat is not None for member in holders):
        return None
    beats = [
        beat
        for member in view.members
        for beat in (member.beat.stages if member.beat is not None else ())
        if member.peer != view.me or beat.stage != stage  # this peer may hold another one
    ]
    height = _believed([beat.height for beat in beats])
    if not height:
        return None
    guardians = [m for m in others if m.beat is not None and any(g.stage == stage for g in m.beat.guards)]
    hoped_for = any(
        member.liveness is not Liveness.GONE
        or (not member.departed and view.now_s - silent_since_s(member, view.now_s) < SILENT_S)
        for member in (*holders, *guardians)
    )
    absent = view.now_s - view.absent_since_s.get(stage, view.now_s) >= SILENT_S
    tokens = _believed([beat.log_tokens for beat in beats])
    return Loss(height, tokens, absent or not hoped_for, absent or bool(holders))


def _believed(claims: Sequence[int]) -> int:
    """The largest, unless it is absurd beside the middle one: the rebuilt log begins beyond it, and one liar
    could leave no numbers there."""
    told = sorted(claim for claim in claims if claim)
    return min(told[-1], _ABSURD_TIMES * statistics.median_low(told)) if told else 0


def told(stage: int, policy: str, loss: Loss) -> str:
    """For people: what happened, and what to do."""
    cause = (
        f"stage {stage} is lost: no peer, disk or checkpoint that can be reached has it, and the run is at "
        f"round {loss.height}"
    )
    if policy != "halt":
        return f'{cause}; it will be rebuilt (stages.when_lost = "{policy}") unless somebody brings it'
    return (
        f'{cause}; waiting (stages.when_lost = "halt")\n'
        "start a peer that held it again with its --data-dir, or put a checkpoint's parts together on any "
        "peer: shoal checkpoint gather PART...\n"
        "or begin a new run from the last whole one: shoal checkpoint import DIR"
    )


class LostStage:
    """Belongs to one replica that recovers."""

    def __init__(
        self,
        context: Context,
        layout: StageLayout,
        initial: torch.Tensor,
        outer: Outer,
        view: Callable[[], SwarmView],
        search: Callable[[], Awaitable[None]],
    ) -> None:
        """`initial`: the weights that the run began with; `search`: look again for state, wherever it is."""
        self._context = context
        self._layout = layout
        self._initial = initial
        self._outer = outer
        self._view = view
        self._search = search

    async def resolve(self) -> None:
        """Returns when this replica has the stage's state, or there was none to lose."""
        context, loop = self._context, asyncio.get_running_loop()
        policy, begun_s, heard = context.spec.stages.when_lost, loop.time(), False
        while self._outer.height == 0 and (loss := loss_of(self._view(), context.stage)) is not None:
            if not heard:
                text = told(context.stage, policy, loss)
                context.event("stage-lost", {"stage": context.stage, "policy": policy, "text": text})
                heard = True
            patience_s = PATIENCE_S if loss.known else SILENT_S
            patient = loss.certain and loop.time() - begun_s >= patience_s
            if policy != "halt" and patient and self._is_first():
                try:
                    await self._rebuild(policy, loss)
                    return
                except ShoalError as error:
                    context.event("rebuild-failed", {"stage": context.stage, "why": str(error)})
            await asyncio.sleep(LOOK_S)
            await self._search()
        if heard and self._outer.height == 0:
            await self._search()  # somebody came while the last search went on
        if heard:
            context.event("stage-found", {"stage": context.stage, "height": self._outer.height})

    def _is_first(self) -> bool:
        """Of those who wait for this stage, by hash: two must not rebuild it."""
        context, view = self._context, self._view()
        waiting = {member.peer for member in view.group(context.stage, "joining")} | {context.me}
        return succession(context.run_id, context.stage, 0, sorted(waiting))[0] == context.me

    async def _rebuild(self, policy: str, loss: Loss) -> None:
        context = self._context
        neighbours = await self._neighbours() if policy == "mean" else ()
        layers = [(layout, snapshot.anchor) for layout, snapshot in neighbours]
        anchor = await context.offload(rebuilt, self._layout, self._initial, layers)
        every = context.spec.outer.snapshot_every
        height = every * (1 + loss.height // every)  # beyond all that was, and where snapshots are
        entry = Rebuilt(
            stage=context.stage,
            height=height,
            policy=policy,
            lost_height=loss.height,
            peer=context.me,
            sources=tuple(snapshot.state.head for _, snapshot in neighbours),
            weights=await context.offload(lambda: blake3(bytes_of(anchor)).digest()),
        )
        tokens = loss.log_tokens * len(context.fragments)
        head = entry.head(context.run_id)
        state = LogState(context.stage, height, head, tokens, (), (), (), rebuilt=entry)
        snapshot: Snapshot = await context.offload(
            snapshot_of, state, anchor, torch.zeros_like(anchor), context.fragments
        )
        await self._outer.resume(snapshot)
        context.event(
            "stage-rebuilt",
            {"stage": context.stage, "height": height, "policy": policy, "rounds": loss.height},
        )

    async def _neighbours(self) -> tuple[tuple[StageLayout, Snapshot], ...]:
        """The stages before and after this one, as far as there are any. Raises NotHere."""
        spec, stage, found = self._context.spec, self._context.stage, []
        for other in (stage - 1, stage + 1):
            if 0 <= other < spec.stages.count:
                layout = stage_layout(spec, stage_ranges(spec)[other])
                found.append((layout, await self._newest(other, layout)))
        return tuple(found)

    async def _newest(self, stage: int, layout: StageLayout) -> Snapshot:
        mine = self._context
        context = mine.beside(stage, layout.size)
        donors = [member.peer for member in self._view().online(stage)]
        return await download(context, *await newest_offer(context, donors))


def rebuilt(
    layout: StageLayout, initial: torch.Tensor, neighbours: Sequence[tuple[StageLayout, torch.Tensor]]
) -> torch.Tensor:
    """Weights [size] for a lost stage: means of the neighbours' nearest layers; without neighbours layers
    that pass on what they get. Embedding, head and final norm, which nobody else has like them: `initial`."""
    flat = initial.clone()
    for slot in layout.slots:
        if not slot.name.startswith("layers."):
            continue
        kind = slot.name.split(".", 2)[2]
        if not neighbours:
            if kind in _BRANCH_ENDS:
                slot.view(flat).zero_()
            continue
        near = [_parameter(other, weights, kind, layout) for other, weights in neighbours]
        slot.view(flat).copy_(torch.stack(near).mean(0))
    return flat


def _parameter(other: StageLayout, weights: torch.Tensor, kind: str, layout: StageLayout) -> torch.Tensor:
    """Of the neighbour's layer that is next to this stage."""
    layer = other.layers[-1] if other.layers.start < layout.layers.start else other.layers[0]
    (slot,) = (slot for slot in other.slots if slot.name == f"layers.{layer}.{kind}")
    return slot.view(weights)
