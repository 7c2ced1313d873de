"""One peer's eyes: it makes the Snapshot, tells owners what happens here, and gathers what others tell.

Every daemon has one. With the owner role it also takes the others' telemetry and keeps a history; any
number of such peers may be there, each with its own, and the run goes on without all of them.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil

from shoal.dht.members import Members
from shoal.node.view.archive import Contribution, Entry, Start
from shoal.node.view.assemble import Seen, assemble
from shoal.node.view.buffer import Buffer
from shoal.node.view.diagnosis import WINDOW, diagnose, limiting
from shoal.node.view.figures import Told, figures_of
from shoal.node.view.history import History
from shoal.node.view.intake import Intake
from shoal.node.view.messages import TelemetryEvent, TelemetryFigures
from shoal.node.view.names import readable
from shoal.node.view.parts import Coordinator, EventRow, Finding
from shoal.node.view.push import FIGURES_S, Push
from shoal.node.view.rows import names_of
from shoal.node.view.snapshot import Own, Snapshot
from shoal.node.view.tally import Tally
from shoal.node.view.texts import fields_of, printable, told
from shoal.node.view.watching import Watch
from shoal.protocol.errors import ShoalError, UsageError
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Transport
from shoal.training.partition import spec_costs
from shoal.training.spec import RunSpec

LOOK_S = 1.0
SAMPLE_S = 10.0  # between two points of the series
HOUR_SAMPLES, RECENT_SAMPLES = 360, 30
OLDEST_S = 30 * 86400.0  # how far back an event may say that it was


class Observer:
    """`run` until cancelled; `snapshot` at any time."""

    def __init__(
        self,
        *,
        transport: Transport,
        members: Members,
        buffer: Buffer,
        own: Callable[[], Own],
        spec: Callable[[], RunSpec | None],
        standing: Callable[[], str],
        process: int,
        clock: Callable[[], float],
        rng: random.Random,
        history: History | None = None,
        takes: bool = False,
        tell: Callable[[Snapshot], None] = lambda snapshot: None,
    ) -> None:
        """`takes`: the others' telemetry, since this peer has the owner role. `clock`: Unix seconds.

        `tell` gets a Snapshot with every point of the series.
        """
        self._transport = transport
        self._members = members
        self._buffer = buffer
        self._own = own
        self._spec = spec
        self._standing = standing
        self._process = process
        self._clock = clock
        self._history = history
        self._tell = tell
        self._tally = Tally()
        self._watch = Watch()
        self._mine = Told(process)
        self._heard: dict[str, tuple[int, int]] = {}
        self._number = 0  # of the last event
        self._begun = False  # numbers are known: what happened here may be taken
        self._rates: deque[float] = deque(maxlen=HOUR_SAMPLES)
        self._best: float | None = None
        self._findings: tuple[Finding, ...] = ()
        self._cpu = _Cpu()
        self._intake: Intake | None = None
        if takes:
            self._intake = Intake(self._take, lambda peer: self._heard.get(peer, (0, 0)))
        self._push = Push(transport, members, buffer, self._figures, process, rng)

    # --- telling

    def snapshot(self) -> Snapshot:
        """Everything that is known here now. Raises NetworkError while the peer starts."""
        self._take_own()
        view, own, spec = self._members.view(), self._own(), self._spec()
        seen = Seen(
            standing=self._standing(),
            told={peer: told for peer, told in self._told().items() if not view.is_gone(peer)},
            tally=self._tally,
            findings=self._findings,
            recent=_mean([rate for rate in list(self._rates)[-RECENT_SAMPLES:] if rate > 0.0]),
            hour=_mean(self._rates),
            best=self._best,
            coordinator=self._coordinator(),
        )
        return assemble(self._clock(), own, view, spec, seen)

    async def ask_history(self, request: Mapping[str, Any]) -> object:
        """The control action `history`; see `History.ask`."""
        if self._history is None:
            raise UsageError("this peer keeps no history; ask the owner's: shoal up does")
        self._take_own()
        return await self._history.ask(dict(request))

    def _told(self) -> dict[PeerId, Told]:
        others = self._intake.told if self._intake is not None else {}
        return {**others, self._members.me: self._mine}

    def _coordinator(self) -> Coordinator:
        intake, history, now_s = self._intake, self._history, asyncio.get_running_loop().time()
        fresh = [one for one in intake.told.values() if now_s - one.told_s < 3 * FIGURES_S] if intake else []
        return Coordinator(
            pushing=len(fresh),
            events_taken=intake.taken if intake else 0,
            events_refused=(intake.refused if intake else 0) + (history.lost if history else 0),
            events_dropped=self._buffer.dropped + (intake.dropped if intake else 0),
            history=history.state if history else "not kept: this peer has not the owner's role",
            history_bytes=history.used_bytes if history else None,
            history_queue=history.queue if history else 0,
            cpu_share=self._cpu.share,
            memory_bytes=self._cpu.memory_bytes,
        )

    # --- life

    async def run(self) -> None:
        """Look, tell and take until cancelled."""
        if self._history is not None:
            self._go_on_from(await self._history.start())
        self._begun = True
        if self._intake is not None:
            self._intake.serve(self._transport)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._push.run(), name="push telemetry")
                tasks.create_task(self._keep_looking(), name="look around")
                if self._history is not None:
                    tasks.create_task(self._history.run(), name="write history")
        finally:
            if self._history is not None:
                self._take_own()
                await self._history.close()

    def _go_on_from(self, start: Start) -> None:
        """After a restart: what the disk has, before anybody tells what it lacks."""
        self._number, self._heard = start.number, dict(start.heard)
        _, stages = self._progress()
        for row in start.events:
            self._tally.take(row, mine=row.peer == self._members.me, tokens=0, stages=stages, new=False)
        for row in start.losses:
            self._tally.take_loss(row)
        self._rates.extend(start.rates)
        self._best = start.best

    async def _keep_looking(self) -> None:
        loop = asyncio.get_running_loop()
        sampled_s = loop.time()
        while True:
            self._take_own()
            view = self._members.view()
            self._watch.look(view)
            if loop.time() - self._mine.told_s >= FIGURES_S and (figures := self._figures()) is not None:
                self._mine.take(figures, loop.time())
            if loop.time() - sampled_s >= SAMPLE_S:
                sampled_s = loop.time()
                await self._sample()
            await asyncio.sleep(LOOK_S)

    async def _sample(self) -> None:
        """A point of every series; then judge."""
        self._cpu.look()
        view = self._members.view()
        self._watch.sample(view)
        try:
            snapshot = self.snapshot()
        except ShoalError:
            return  # still starting
        self._rates.append(snapshot.throughput.now)
        self._best = max(self._best or 0.0, snapshot.throughput.now)
        await asyncio.sleep(0.0)  # with a thousand peers each half takes the loop's 50 ms
        self._findings = self._judge(snapshot)
        self._tell(snapshot)
        history = self._history
        if history is None:
            return
        at = snapshot.at
        values = {
            "tokens": float(snapshot.run.tokens),
            "tokens_per_s": snapshot.throughput.now,
            "peers": float(len(snapshot.peers)),
            **{f"stage_replicas.{stage.stage}": float(stage.replicas) for stage in snapshot.stages},
            **{f"stage_tokens_per_s.{stage.stage}": stage.tokens_per_s for stage in snapshot.stages},
            **{f"lost.{lost.what}": lost.share for lost in snapshot.throughput.lost},
        }
        for name, value in values.items():
            history.sample(name, at, value)
        history.frame(snapshot)
        told = self._told()
        for peer in snapshot.peers:
            if peer.tokens is not None and (one := told.get(PeerId(peer.peer))) is not None:
                history.contributed(
                    Contribution(
                        peer=peer.peer,
                        process=one.process,
                        name=peer.name,
                        tokens=peer.tokens,
                        uptime_s=peer.uptime_s or 0.0,
                        micro_batches=peer.micro_batches or 0,
                        at=at,
                    )
                )

    def _judge(self, snapshot: Snapshot) -> tuple[Finding, ...]:
        view, spec = self._members.view(), self._spec()
        found: list[Finding] = []
        if spec is not None:
            timings = self._watch.timings(view, self._tally.rounds.told(WINDOW), names_of(view))
            found += diagnose(timings, spec_costs(spec))
            found += [one for one in (limiting(snapshot.stages),) if one is not None]
        if self._history is not None and self._history.trouble:
            found.append(Finding(kind="storage", text=f"The history is {self._history.state}"))
        return tuple(found)

    # --- taking

    def _figures(self) -> TelemetryFigures | None:
        try:
            return figures_of(self._own(), self._members.view())
        except ShoalError:
            return None  # still starting

    def _take_own(self) -> None:
        """What happened here since the last time."""
        while self._begun and (events := self._buffer.after(self._mine.number)):
            self._mine.number = events[-1].number
            self._take(self._members.me, self._process, events)

    def _take(self, peer: PeerId, process: int, events: tuple[TelemetryEvent, ...]) -> None:
        """New events of `peer`, which is who it says it is."""
        member, now, mine = self._members.view().get(peer), self._clock(), peer == self._members.me
        tokens, stages = self._progress()
        name = (member.name if member else "") or readable(peer)
        for event in events:
            self._number += 1
            fields, kind = fields_of(event), printable(event.kind, 32) or "event"
            row = EventRow(
                number=self._number,
                at=min(max(event.at_unix_s, now - OLDEST_S), now),
                kind=kind,
                peer=peer,
                name=name,
                text=told(kind, fields),
                fields=fields,
            )
            self._tally.take(row, mine=mine, tokens=tokens, stages=stages)
            if self._history is not None:
                self._history.add(Entry(row=row, process=process, theirs=event.number))

    def _progress(self) -> tuple[int, int]:
        """Tokens in the first stage's log, and how many stages there are."""
        spec = self._spec()
        beats = (member.progress(0) for member in self._members.view().group(0))
        tokens = max((beat.log_tokens for beat in beats if beat is not None), default=0)
        return tokens, spec.stages.count if spec else 0


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


class _Cpu:
    """What this process takes of a core and of memory."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()
        self.share: float | None = None
        self.memory_bytes: int | None = None

    def look(self) -> None:
        """Over the time since the last look."""
        self.share = self._process.cpu_percent() / 100.0
        self.memory_bytes = self._process.memory_info().rss
