"""One peer: joins, takes a stage, trains until it is told to leave, and tells what it does on the way.

`shoal up` and `shoal join` run it through `run_daemon`. It composes; the deciding is done elsewhere: which
stage (`placing`), who is alive (`dht.members`), what to compute (`training.trainer`).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shoal.dht.beats import Beat
from shoal.dht.liveness import Liveness
from shoal.dht.table import Event
from shoal.node.control import serve_control
from shoal.node.events import Events
from shoal.node.gathering import Gathering
from shoal.node.hardware import Device, check_memory, choose_device, warm_up, warm_up_codecs
from shoal.node.loop import LoopMeter, new_loop
from shoal.node.owner.home import OwnerHome
from shoal.node.paths import PeerFolder, checkpoint_store, run_folder
from shoal.node.placing import take_stage
from shoal.node.presence import Listening, Presence, present
from shoal.node.reachability import Reach, find_reach, say_hello
from shoal.node.status import Status, stage_replicas, swarm_table, verdict
from shoal.node.trainee import Trainee
from shoal.protocol.admission import JoinToken
from shoal.protocol.allocator import keep_freed_memory
from shoal.protocol.errors import Busy, NetworkError, ProtocolViolation, ShoalError, TokenRevoked, UsageError
from shoal.protocol.identity import PeerId, PeerKey
from shoal.training.plan import make_plan
from shoal.training.spec import RunSpec
from shoal.training.tenure import DRAIN_S, Tenure

ALL_THREADS: int | None = None
_ASKED_WHEN_ALONE = 4
_ADDRESSES_EVERY_S = 10.0
_OWN_IN_TOKEN, _OTHERS_IN_TOKEN = 5, 3
_INTERRUPTED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerOptions:
    """What a volunteer may say about their machine."""

    device: str = "auto"
    memory_bytes: int | None = None
    threads: int | None = ALL_THREADS
    upload_bytes_per_s: float | None = None  # most to send; None: no limit
    name: str = ""
    stage: int | None = None  # None: where the swarm needs it most
    train: bool = True
    pace_s: float = 0.0  # a micro-batch takes at least so long, for speed tests: `training.lane.paced`
    listening: Listening = field(default_factory=Listening)


def run_daemon(
    token: JoinToken,
    folder: PeerFolder,
    options: PeerOptions,
    events: Events,
    owner: OwnerHome | None = None,
) -> int:
    """Run a peer to its end; the exit code. Raises the ShoalError that ended it."""
    keep_freed_memory()
    gc.disable()  # `warm_up` turns it on again
    meter = LoopMeter()
    daemon = Daemon(token, folder, options, events, meter, owner)
    with asyncio.Runner(loop_factory=lambda: new_loop(meter)) as runner:
        try:
            return runner.run(daemon.run())
        except BaseExceptionGroup as group:
            raise _cause(group) from group


class Daemon:
    """See the module. One use."""

    def __init__(
        self,
        token: JoinToken,
        folder: PeerFolder,
        options: PeerOptions,
        events: Events,
        meter: LoopMeter,
        owner: OwnerHome | None,
    ) -> None:
        self._token = token
        self._folder = run_folder(folder.path, token.run_id)
        self._identity_path = folder.identity_path
        self._store = checkpoint_store(folder.root)
        self._options = options
        self._events = events
        self._meter = meter
        self._owner = owner
        self._stop = asyncio.Event()
        self._stop_reason = ""
        self._exit_code = 0
        self._started_s = time.monotonic()
        self._presence: Presence | None = None
        self._device: Device | None = None
        self._names: dict[str, str] = {}  # for the last event of a peer that is not in the view any more
        self._trainee: Trainee | None = None
        self._tenure: Tenure | None = None
        self._gathering: Gathering | None = None
        self._reach = Reach("nobody else is here yet to try it", None)

    async def run(self) -> int:
        """Until it is told to stop; returns the exit code."""
        self._install_signals()
        options, owner = self._options, self._owner
        key = await asyncio.to_thread(PeerKey.load_or_create, self._identity_path)
        actions = {
            "status": self._answer_status,
            "leave": self._answer_leave,
            "ledger": self._answer_ledger,
            "reload_revocations": self._answer_reload,
            "checkpoint": self._answer_checkpoint,
            "checkpoint_status": self._answer_checkpoint_status,
        }
        self._events("starting", {"peer": key.peer, "pid": os.getpid(), "data_dir": str(self._folder)})
        async with (
            present(
                self._token,
                key,
                self._folder,
                options.listening,
                name=options.name,
                revocations_path=owner.key.revocations_path if owner else None,
                alone_is_fine=owner is not None,
                upload_bytes_per_s=options.upload_bytes_per_s,
            ) as presence,
            serve_control(self._folder / "control.sock", actions),
        ):
            self._presence = presence
            if owner is not None:
                presence.spec = owner.spec
            self._gathering = Gathering(presence, self._folder, self._store, self._events)
            presence.members.on_event(self._member_changed)
            presence.make_beat = self._beat
            await self._live(presence)
            await presence.members.leave(self._stop_reason or "left")
        self._events("left", self._farewell())
        return self._exit_code

    async def _live(self, presence: Presence) -> None:
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(presence.keep_leaf_fresh(), name="renew leaf"),
                tasks.create_task(self._meter.watch_lag(), name="watch lag"),
                tasks.create_task(self._leave_when_revoked(presence), name="watch revocations"),
                tasks.create_task(self._test_reach(presence), name="test reach"),
                tasks.create_task(self._gather_checkpoints(), name="gather checkpoints"),
            ]
            if self._owner is not None:
                background.append(tasks.create_task(self._keep_addresses(presence, self._owner)))
            work = tasks.create_task(self._work(presence), name="work")
            stop = tasks.create_task(self._stop.wait(), name="wait for stop")
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                await self._drain(presence)
            for task in (work, stop, *background):
                task.cancel()

    async def _work(self, presence: Presence) -> None:
        """Learn the run, take a stage, train."""
        if not self._options.train:
            await self._watch(presence)
        async with asyncio.TaskGroup() as tasks:
            preparing = tasks.create_task(self._prepare_device(presence), name="prepare the device")
            choosing = tasks.create_task(self._find_place(presence), name="find a place")
        device, (spec, stage) = preparing.result(), choosing.result()
        if others := self._others(presence):
            self._reach = await find_reach(presence.transport, others, presence.rng)
        self._tenure = Tenure(
            spec,
            view=presence.members.view,
            begin=lambda at: self._begin(presence, spec, at, device),
            announce=presence.announce,
            prefetch=self._prefetch,
            fits=lambda at: make_plan(spec).stages[at].memory.total <= device.memory_bytes,
            event=self._tell_tenure,
            rng=presence.rng,
            moves=self._options.stage is None,
        )
        await self._tenure.run(stage)

    @contextlib.asynccontextmanager
    async def _begin(
        self, presence: Presence, spec: RunSpec, stage: int, device: Device
    ) -> AsyncIterator[Trainee]:
        """A replica of a stage; a later one is another incarnation, with its own steps and micro-batches."""
        if self._trainee is not None:
            presence.incarnation = time.time_ns()
        planned = make_plan(spec).stages[stage]
        check_memory(device, planned)
        self._tell_plan(presence, spec, stage, device)
        await asyncio.to_thread(warm_up_codecs, planned)
        options = self._options
        async with Trainee(
            presence,
            spec,
            stage,
            device,
            self._folder,
            self._store,
            self._events,
            fixed=options.stage is not None,
            pace_s=options.pace_s,
        ) as trainee:
            self._trainee = trainee
            yield trainee

    async def _prefetch(self, stage: int, donors: Sequence[PeerId]) -> None:
        if self._trainee is not None:
            await self._trainee.prefetch(stage, donors)

    async def _watch(self, presence: Presence) -> None:
        """Take part without a stage, until cancelled."""
        spec = (presence.spec or await presence.learn_spec(self._folder)).spec
        presence.announce("observing", ())
        await asyncio.to_thread(warm_up)
        self._events("observing", {"text": f"watching run {spec.run.name}; this peer does not train"})
        await asyncio.Event().wait()

    async def _prepare_device(self, presence: Presence) -> Device:
        options = self._options
        device = await asyncio.to_thread(choose_device, options.device, options.memory_bytes, options.threads)
        self._device, presence.device = device, device.title
        await asyncio.to_thread(warm_up)
        return device

    async def _find_place(self, presence: Presence) -> tuple[RunSpec, int]:
        spec = (presence.spec or await presence.learn_spec(self._folder)).spec
        wanted = self._options.stage
        if wanted is None:
            members, announce, first = presence.members, presence.announce, not self._token.bootstrap
            return spec, await take_stage(members, announce, spec.stages.count, first=first)
        if wanted >= spec.stages.count:
            raise UsageError(
                f"the run has the stages 0 to {spec.stages.count - 1}, so --stage {wanted} is none"
            )
        presence.announce("joining", (wanted,))
        return spec, wanted

    async def _drain(self, presence: Presence) -> None:
        self._events("draining", {"text": f"leaving ({self._stop_reason}): finishing what is held"})
        presence.announce("draining", presence.stages)
        if self._tenure is not None and self._tenure.term is not None:
            await self._tenure.term.drain(DRAIN_S)

    async def _leave_when_revoked(self, presence: Presence) -> None:
        """Raises TokenRevoked once the owner's list names this peer.

        Others cut a revoked peer off before the list reaches it. So when nobody talks to it any more, it
        asks one who used to; a single liar among live peers cannot send it away.
        """
        book, changed = presence.membership.revocations, asyncio.Event()
        book.changed.append(changed.set)
        presence.members.on_event(lambda event: changed.set())
        while not book.is_revoked(presence.membership.me):
            await self._ask_if_alone(presence)
            changed.clear()
            await changed.wait()
        raise TokenRevoked(
            f"the run's owner has shut this peer out (revocation list {book.version} names "
            f"token {self._token.token_id} or this peer)\nonly a new token from the owner helps"
        )

    async def _ask_if_alone(self, presence: Presence) -> None:
        """Raises TokenRevoked if that is what the others, all silent by now, say when dialled."""
        others = [
            member for member in presence.members.view().members if member.peer != presence.transport.me
        ]
        if any(member.liveness is Liveness.ALIVE for member in others):
            return
        for member in others[:_ASKED_WHEN_ALONE]:
            with contextlib.suppress(NetworkError, ProtocolViolation, Busy):
                await say_hello(presence.transport, member.peer)

    async def _keep_addresses(self, presence: Presence, owner: OwnerHome) -> None:
        """Keep what new tokens carry up to date, and hand the first invitation out."""
        known: tuple[str, ...] = ()
        while True:
            found = presence.directory.bootstrap_addresses()[:_OWN_IN_TOKEN]
            if found:  # P6: whoever has a token can join while any of these is there
                found = (*found, *sorted(presence.directory.met_addresses(_OTHERS_IN_TOKEN)))
            if found and found != known:
                await asyncio.to_thread(owner.keep_addresses, found)
                if not known:
                    await self._invite(owner)
                known = found
            await asyncio.sleep(_ADDRESSES_EVERY_S if known else 0.2)

    async def _invite(self, owner: OwnerHome) -> None:
        path, text = await asyncio.to_thread(owner.invitation, time.time())
        self._events(
            "invitation",
            {
                "token_file": str(path),
                "text": f"to join from another terminal or machine:\n\n  shoal join {text}\n\n"
                f"(the same token is in {path}; one volunteer, one token: shoal token create)",
            },
        )

    async def _gather_checkpoints(self) -> None:
        """When somebody asks; the owner's peer besides from time to time."""
        if self._gathering is not None:
            await self._gathering.run(from_time_to_time=self._owner is not None)

    async def _test_reach(self, presence: Presence) -> None:
        """The first peer of a swarm has nobody to ask at its start; ask when somebody is here."""
        while self._reach.reachable is None:
            await presence.members.changed()
            if presence.state == "online" and self._others(presence):
                self._reach = await find_reach(presence.transport, self._others(presence), presence.rng)

    # --- telling

    @staticmethod
    def _others(presence: Presence) -> list[PeerId]:
        view = presence.members.view()
        return [member.peer for member in view.here() if member.peer != view.me]

    def _beat(self) -> Beat:
        return self._trainee.beat() if self._trainee is not None else Beat()

    def _tell_plan(self, presence: Presence, spec: RunSpec, stage: int, device: Device) -> None:
        """One screen before work."""
        planned = make_plan(spec).stages[stage]
        view = presence.members.view()
        others = sum(member.peer != presence.transport.me for member in view.group(stage))
        layers = planned.layers
        text = "\n".join(
            (
                f"run {spec.run.name} ({presence.token.run_id.hex()[:8]}), you are {presence.name}",
                f"  device    {device.title}",
                f"  stage     {stage} of {spec.stages.count}: layers {layers.start}-{layers.stop - 1} of "
                f"{spec.model.layers}, {planned.parameters:,} parameters; "
                f"{others or 'no'} other {'peer shares' if others == 1 else 'peers share'} it",
                f"  memory    {planned.memory.total >> 20:,} MiB of {device.memory_bytes >> 20:,} MiB",
                f"  address   {', '.join(presence.addresses)}: {self._reach.text}",
                f"  status    {verdict(stage_replicas(view, spec.stages.count))}",
            )
        )
        fields = {
            "peer": presence.transport.me,
            "stage": stage,
            "stages": spec.stages.count,
            "layers": [layers.start, layers.stop],
            "device": device.title,
            "memory_bytes": planned.memory.total,
            "reachable": self._reach.reachable,
        }
        self._events("plan", {**fields, "text": text})

    def _tell_tenure(self, kind: str, fields: dict[str, object]) -> None:
        heads = self._trainee.heads() if kind == "online" and self._trainee is not None else {}
        self._events(kind, {**fields, **heads})

    def _member_changed(self, event: Event) -> None:
        presence = self._presence
        member = presence.members.view().get(event.peer) if presence else None
        fields: dict[str, object] = {"peer": event.peer, "reason": event.reason}
        if member is not None:
            self._names[event.peer] = member.name
            fields["stage"] = member.stages[0] if member.stages else None
        fields["name"] = self._names.get(event.peer, "")
        if event.kind == "left":
            self._names.pop(event.peer, None)
        self._events(f"peer_{event.kind}", fields)

    def _farewell(self) -> dict[str, object]:
        done = self._trainee.status() if self._trainee is not None else {}
        steps, tokens = done.get("inner_steps", 0), done.get("tokens", 0)
        uptime_s = time.monotonic() - self._started_s
        text = f"left after {uptime_s / 60:.1f} min: {steps} steps, {tokens} tokens contributed. Thank you."
        return {"reason": self._stop_reason, "uptime_s": uptime_s, "training": done, "text": text}

    def status(self) -> Status:
        """Everything this peer knows, for the control socket."""
        presence, trainee = self._presence, self._trainee
        if presence is None:
            raise NetworkError("this peer is still starting\ntry again in a moment")
        membership, view = presence.membership, presence.members.view()
        spec = presence.spec.spec if presence.spec else None
        return Status(
            version=version("shoal"),
            pid=os.getpid(),
            run_name=spec.run.name if spec else "",
            run_id=presence.token.run_id.hex(),
            peer=presence.transport.me,
            name=presence.name,
            roles=tuple(sorted(membership.me.roles)),
            state=presence.state,
            stage=trainee.stage if trainee else None,
            stage_count=spec.stages.count if spec else 0,
            layers=trainee.layers if trainee else None,
            device=self._device.title if self._device else "",
            memory_bytes=self._device.memory_bytes if self._device else 0,
            addresses=presence.addresses,
            bootstrap=presence.directory.bootstrap_addresses(),
            reachable=self._reach.text,
            uplink_bytes_per_s=presence.transport.uplink_bytes_per_s(),
            upload_limit_bytes_per_s=self._options.upload_bytes_per_s,
            uptime_s=round(time.monotonic() - self._started_s, 1),
            token_id=presence.token.token_id,
            token_until=membership.token.not_after,
            leaf_until=membership.me.not_after,
            revocation_version=membership.revocations.version,
            data_dir=str(self._folder),
            stage_replicas=stage_replicas(view, spec.stages.count) if spec else (),
            peers=swarm_table(view),
            loop=self._meter.health(),
            training=trainee.status() if trainee else {},
        )

    # --- the control socket

    async def _answer_status(self, request: Mapping[str, Any]) -> object:
        return self.status().to_json()

    async def _answer_leave(self, request: Mapping[str, Any]) -> object:
        self._ask_to_stop("shoal leave", 0)
        return {"leaving": True}

    async def _answer_ledger(self, request: Mapping[str, Any]) -> object:
        return self._trainee.ledger() if self._trainee is not None else {}

    async def _answer_reload(self, request: Mapping[str, Any]) -> object:
        presence = self._presence
        return presence is not None and presence.membership.revocations.reload()

    async def _answer_checkpoint(self, request: Mapping[str, Any]) -> object:
        return self._checkpoints().ask()

    async def _answer_checkpoint_status(self, request: Mapping[str, Any]) -> object:
        return self._checkpoints().status()

    def _checkpoints(self) -> Gathering:
        if self._gathering is None:
            raise NetworkError("this peer is still starting\ntry again in a moment")
        return self._gathering

    # --- stopping

    def _install_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._ask_to_stop, "Ctrl-C", _INTERRUPTED)
        loop.add_signal_handler(signal.SIGTERM, self._ask_to_stop, "told to terminate", 0)

    def _ask_to_stop(self, reason: str, exit_code: int) -> None:
        """The first time drain; the second time go at once."""
        if self._stop.is_set() and exit_code == _INTERRUPTED:
            os._exit(_INTERRUPTED)
        self._stop_reason, self._exit_code = reason, exit_code
        self._stop.set()


def _cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error to show: the first of ours, else the first of all."""
    mine, others = group.split(ShoalError)
    found: BaseException = mine or others or group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def socket_of(folder: Path) -> Path:
    """The control socket in a peer's folder of a run."""
    return folder / "control.sock"
