"""One replica's dealings with checkpoints: what it starts from, what it goes on from, and what it writes.

The trainer makes one where it has a folder; without a folder nothing is written and nothing read.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from shoal.dht.members import Members
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.transport import Transport
from shoal.training.checkpoint.gather import serve_take
from shoal.training.checkpoint.keeper import Keeper
from shoal.training.checkpoint.manifest import CHECKPOINTS_FOLDER, START_FOLDER
from shoal.training.checkpoint.reshape import StageState, load_stage
from shoal.training.checkpoint.restore import Refused, restore_stage
from shoal.training.checkpoint.start import start_state
from shoal.training.inner import Moments
from shoal.training.model.layout import StageLayout
from shoal.training.outer.context import Event, Offload
from shoal.training.outer.service import Outer
from shoal.training.spec import RunSpec
from shoal.training.weights import Weights

_ASKED = 16  # peers besides the owner's, when a stage is empty
_RESTORED_FOLDER = "restored"
_TOLD = 64  # events that are not repeated


class StageCheckpoints:
    """See the module."""

    def __init__(
        self,
        spec: RunSpec,
        stage: int,
        layout: StageLayout,
        *,
        transport: Transport,
        members: Members,
        folder: Path,
        imported: Sequence[Path],
        offload: Offload,
        event: Event,
        rng: random.Random,
    ) -> None:
        """`folder`: the run's on this peer; `imported`: others, in which the run's start may lie."""
        self._spec = spec
        self._stage = stage
        self._layout = layout
        self._transport = transport
        self._members = members
        self._folder = folder
        self._imported = imported
        self._offload = offload
        self._event = event
        self._rng = rng
        self._moments: Moments | None = None
        self._told: set[tuple[str, str]] = set()
        self._refused = Refused()
        self.keeper: Keeper | None = None

    async def start(self) -> StageState | None:
        """What the run begins with, if not random weights. Raises StageEmpty when nobody has it."""
        if not self._spec.checkpoint.start:
            return None
        found = await start_state(
            self._spec,
            self._layout,
            load_stage,
            folders=self._imported,
            fetched=self._folder / START_FOLDER,
            transport=self._transport,
            peers=self._others,
            offload=self._offload,
            event=self._event,
            rng=self._rng,
        )
        self._moments = found.moments
        return found

    async def attach(self, outer: Outer, weights: Weights) -> bool:
        """After the replica has found its state: take up the inner moments, and write from now on.

        False where there were none to take up.
        """
        self.keeper = Keeper(
            self._spec,
            self._stage,
            self._layout,
            transport=self._transport,
            folder=self._folder / CHECKPOINTS_FOLDER,
            snapshot=outer.snapshot,
            moments=lambda: weights.moments(self._offload),
            offload=self._offload,
            event=self._event,
        )
        serve_take(self.keeper, self._stage, self._transport)
        moments = await self.keeper.own_moments() or self._moments
        if moments is not None:
            await weights.restore(moments)
        self._moments = None
        return moments is not None

    async def run(self) -> None:
        """Write from time to time, until cancelled; after `attach`."""
        if self.keeper is not None:
            await self.keeper.run()

    def status(self) -> dict[str, object]:
        """Figures for `shoal status`."""
        return self.keeper.status() if self.keeper is not None else {}

    async def restore(self, outer: Outer) -> None:
        """Where neither disk nor group had anything: from the last checkpoint, if somebody has one."""
        fetched = self._folder / _RESTORED_FOLDER
        found = await restore_stage(
            self._spec,
            self._stage,
            self._layout,
            folders=[self._folder / CHECKPOINTS_FOLDER, *self._imported],
            fetched=fetched,
            transport=self._transport,
            peers=self._likely(),
            offload=self._offload,
            event=self._tell_once,
            refused=self._refused,
        )
        await self._offload(shutil.rmtree, fetched, True)
        if found is None or found.snapshot.height <= outer.height:
            return
        await outer.resume(found.snapshot)
        self._moments = found.moments
        fields = {"stage": self._stage, "height": outer.height, "checkpoint": found.digest}
        self._event("stage-restored", fields)

    def _tell_once(self, kind: str, fields: dict[str, object]) -> None:
        """Who waits for a lost stage looks again every few seconds, and finds the same damage."""
        if (told := (kind, str(fields))) in self._told:
            return
        if len(self._told) >= _TOLD:
            self._told.clear()
        self._told.add(told)
        self._event(kind, fields)

    def _others(self) -> list[PeerId]:
        return [member.peer for member in self._members.view().here() if member.peer != self._transport.me]

    def _likely(self) -> list[PeerId]:
        """Who may have gathered a checkpoint: owners, and some others, for there may be thousands."""
        view, others = self._members.view(), self._others()
        owners = [
            member.peer for member in view.here() if Role.OWNER in member.roles and member.peer in others
        ]
        others = [peer for peer in others if peer not in owners]
        return owners + self._rng.sample(others, min(_ASKED, len(others)))
