"""How far a peer is with what takes long: fetching its stage, then a round's inner steps; for terminals."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from shoal.node.presence import Presence
from shoal.node.worker import Worker
from shoal.training.amended import amended
from shoal.training.outer.messages import method
from shoal.training.partition import stage_ranges
from shoal.training.plan import stage_parameters

LOOK_S = 0.5
_BYTES_A_PARAMETER = 8  # of a snapshot: anchor and momentum, fp32


@dataclass(frozen=True, slots=True)
class Progress:
    """`what` is under way, `done` of `total`."""

    what: str
    done: int
    total: int
    of_bytes: bool = False


Show = Callable[[Progress | None], None]


async def show_progress(presence: Presence, worker: Worker, show: Show) -> None:
    """Until cancelled. None: nothing is under way that one could wait for."""
    begun: tuple[int, int] | None = None  # stage, and what had come of it when its replica began
    while True:
        stage, came = _stage(worker), 0
        if stage is not None:
            came = presence.transport.counters().bytes_in.get(method(stage, "chunks"), 0)
            begun = begun if begun is not None and begun[0] == stage else (stage, came)
        show(_progress(presence, worker, came - begun[1] if begun else 0))
        await asyncio.sleep(LOOK_S)


def _stage(worker: Worker) -> int | None:
    return worker.trainee.stage if worker.trainee is not None else None


def _progress(presence: Presence, worker: Worker, came: int) -> Progress | None:
    stage, signed = _stage(worker), presence.spec
    if stage is None or signed is None:
        return None
    beats = worker.beat().stages
    if presence.state == "joining" and came:
        total = _BYTES_A_PARAMETER * stage_parameters(signed.spec, stage_ranges(signed.spec)[stage])
        return Progress(f"fetching stage {stage}", min(came, total), total, of_bytes=True)
    if presence.state != "online" or not beats or not signed.spec.trains:
        return None
    listed, beat = presence.membership.amendments.current, beats[0]
    steps = amended(signed.spec, listed.settings).outer.inner_steps
    return Progress(f"round {beat.height + 1}", min(beat.steps_since_round, steps), steps)
