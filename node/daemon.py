"""One peer: joins, takes a stage, trains until it is told to leave, and tells what it does on the way.

`shoal up` and `shoal join` run it through `run_daemon`. It composes; the deciding is done elsewhere: what
is trained where (`worker`), who is alive (`dht.members`), who is not wanted any more (`revoked`).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shoal.dht.table import Event
from shoal.node.control import Action, serve_control
from shoal.node.dashboard.child import Dashboard, dashboard
from shoal.node.events import Events
from shoal.node.exporting import Exports
from shoal.node.gathering import Gathering
from shoal.node.inference.tryout import Tryouts
from shoal.node.loop import LoopMeter, new_loop
from shoal.node.obeying import leave_when_told
from shoal.node.open_files import raise_file_limit
from shoal.node.options import PeerOptions
from shoal.node.owner.actions import OwnerActions
from shoal.node.owner.home import OwnerHome
from shoal.node.owner.invitations import keep_addresses
from shoal.node.paths import PeerFolder, checkpoint_store, run_folder
from shoal.node.preparing import preparing
from shoal.node.presence import Presence, present
from shoal.node.progress import Show, show_progress
from shoal.node.revoked import leave_when_revoked
from shoal.node.sinks.telling import telling
from shoal.node.tokenizers import serve_tokenizer
from shoal.node.version import VERSION
from shoal.node.view.archive import Archive
from shoal.node.view.buffer import Buffer
from shoal.node.view.history import History
from shoal.node.view.metrics import serve_metrics
from shoal.node.view.observer import Observer
from shoal.node.view.snapshot import Own, Snapshot
from shoal.node.worker import Worker
from shoal.protocol.admission import JoinToken
from shoal.protocol.allocator import keep_freed_memory
from shoal.protocol.errors import NetworkError, ShoalError
from shoal.protocol.identity import PeerKey, Role
from shoal.protocol.limits import RECORDS_HELD

_INTERRUPTED = 130
log = logging.getLogger(__name__)


def run_daemon(
    token: JoinToken,
    folder: PeerFolder,
    options: PeerOptions,
    events: Events,
    owner: OwnerHome | None = None,
    show: Show | None = None,
) -> int:
    """Run a peer to its end; the exit code. `show` draws what is under way. Raises what ended it."""
    keep_freed_memory()
    raise_file_limit()
    gc.disable()  # `freeze` turns it on again
    meter = LoopMeter()
    daemon = Daemon(token, folder, options, events, meter, owner, show)
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
        show: Show | None,
    ) -> None:
        self._token = token
        self._folder = run_folder(folder.path, token.run_id)
        self._identity_path = folder.identity_path
        self._store = checkpoint_store(folder.root)
        self._options = options
        places = [folder.root, Path("~").expanduser()]
        self._buffer = Buffer(owner=Role.OWNER in token.roles, places=places)
        self._events = events = self._buffer.tee(events)
        self._meter = meter
        self._show = show
        self._owner = owner
        self._stop = asyncio.Event()
        self._stop_reason = ""
        self._exit_code = 0
        self._at_once = False  # leave without finishing what is held
        self._started_s = time.monotonic()
        self._presence: Presence | None = None
        self._names: dict[str, str] = {}  # for the last event of a peer that is not in the view any more
        self._worker: Worker | None = None
        self._gathering: Gathering | None = None
        self._dashboard: Dashboard | None = None
        self._tryouts: Tryouts | None = None
        self._observer: Observer | None = None

    async def run(self) -> int:
        """Until it is told to stop; returns the exit code."""
        self._install_signals()
        options, owner = self._options, self._owner
        key = await asyncio.to_thread(PeerKey.load_or_create, self._identity_path)
        orders = OwnerActions(owner, lambda: self._presence, lambda: self._gathering, self._events)
        actions = {
            "status": self._answer_status,
            "snapshot": self._answer_snapshot,
            "history": self._answer_history,
            "leave": self._answer_leave,
            "ledger": self._answer_ledger,
            "reload_lists": self._answer_reload,
            "checkpoint": self._answer_checkpoint,
            "checkpoint_status": self._answer_checkpoint_status,
            **orders.actions(),
        }
        self._events("starting", {"peer": key.peer, "pid": os.getpid(), "data_dir": str(self._folder)})
        control = self._folder / "control.sock"
        async with (
            preparing(options) as device,
            dashboard(options.dashboard, control, self._events) as self._dashboard,
            present(
                self._token,
                key,
                self._folder,
                options.listening,
                name=options.name,
                revocations_path=owner.key.revocations_path if owner else None,
                amendments_path=owner.key.amendments_path if owner else None,
                alone_is_fine=owner is not None,
                upload_bytes_per_s=options.upload_bytes_per_s,
            ) as presence,
            Tryouts(presence, self._events) as tryouts,
            Exports(self._folder) as exports,
            serve_control(
                control,
                actions | _page_actions(self._dashboard, tryouts, exports),
            ),
        ):
            self._presence, self._tryouts = presence, tryouts
            if owner is not None:
                presence.spec = owner.spec
            serve_tokenizer(presence.transport, lambda: presence.spec)
            self._gathering = Gathering(presence, self._folder, self._store, self._events)
            presence.members.on_event(self._member_changed)
            worker = Worker(presence, options, self._folder, self._store, self._events, device)
            self._worker, presence.make_beat = worker, worker.beat
            with ThreadPoolExecutor(1, thread_name_prefix="history") as disk:
                async with telling(options.sinks, self._events) as tell:
                    self._observer = self._observe(presence, disk, tell)
                    async with self._serve_metrics(self._observer):
                        await self._live(presence, worker, self._observer)
            await presence.members.leave(self._stop_reason or "left")
        self._events("left", self._farewell())
        return self._exit_code

    def _observe(self, presence: Presence, disk: Executor, tell: Callable[[Snapshot], None]) -> Observer:
        """What this peer shows, tells and, with the owner's role, takes and keeps."""

        async def offload(function: Callable[..., Any], *arguments: object) -> Any:
            return await asyncio.get_running_loop().run_in_executor(disk, function, *arguments)

        takes = Role.OWNER in presence.membership.me.roles
        archive = Archive(self._folder / "history.sqlite")
        return Observer(
            transport=presence.transport,
            members=presence.members,
            buffer=self._buffer,
            own=self._own,
            spec=lambda: presence.spec.spec if presence.spec else None,
            standing=lambda: presence.membership.amendments.current.state,
            process=presence.incarnation,
            clock=time.time,
            rng=random.Random(presence.rng.getrandbits(64)),
            history=History(archive, offload, time.time) if takes else None,
            takes=takes,
            tell=tell,
        )

    @contextlib.asynccontextmanager
    async def _serve_metrics(self, observer: Observer) -> AsyncIterator[None]:
        if self._options.metrics is None:
            yield
            return
        host, port = self._options.metrics
        async with serve_metrics(host, port, observer.snapshot) as taken:
            where = f"http://{host}:{taken}/metrics"
            self._events("metrics", {"port": taken, "text": f"metrics for Prometheus: {where}"})
            yield

    async def _live(self, presence: Presence, worker: Worker, observer: Observer) -> None:
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(presence.keep_leaf_fresh(), name="renew leaf"),
                tasks.create_task(self._meter.watch_lag(), name="watch lag"),
                tasks.create_task(leave_when_revoked(presence), name="watch revocations"),
                tasks.create_task(self._obey(presence), name="obey the owner"),
                tasks.create_task(worker.test_reach(), name="test reach"),
                tasks.create_task(self._gather_checkpoints(), name="gather checkpoints"),
                tasks.create_task(self._aside(observer.run(), "it tells nobody any more how it fares")),
            ]
            if self._owner is not None:
                background.append(tasks.create_task(keep_addresses(presence, self._owner, self._events)))
            if self._show is not None:
                showing = show_progress(presence, worker, self._show)
                background.append(tasks.create_task(self._aside(showing, "no progress is drawn any more")))
            if self._dashboard is not None:
                background.append(tasks.create_task(self._dashboard.run(), name="keep the page"))
            work = tasks.create_task(worker.run(), name="work")
            stop = tasks.create_task(self._stop.wait(), name="wait for stop")
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not self._at_once:
                await self._drain(presence, worker)
            for task in (work, stop, *background):
                task.cancel()

    async def _obey(self, presence: Presence) -> None:
        def leave(reason: str, at_once: bool) -> None:
            self._at_once = at_once
            self._ask_to_stop(reason, 0)

        book, me = presence.membership.amendments, presence.transport.me
        await leave_when_told(book, me, presence.incarnation, leave, stays=self._owner is not None)

    async def _drain(self, presence: Presence, worker: Worker) -> None:
        self._events("draining", {"text": f"leaving ({self._stop_reason}): finishing what is held"})
        presence.announce("draining", presence.stages)
        await worker.drain()

    async def _aside(self, work: Coroutine[None, None, None], without: str) -> None:
        """What is shown of a run must not end it: a bug there is told, and training goes on."""
        try:
            await work
        except Exception as error:
            log.exception("%s", without)
            self._events("view-failed", {"why": repr(error), "text": f"{without}; it trains on"})

    async def _gather_checkpoints(self) -> None:
        """When somebody asks; the owner's peer besides from time to time."""
        if self._gathering is not None:
            await self._gathering.run(from_time_to_time=self._owner is not None)

    # --- telling

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
        elif len(self._names) > RECORDS_HELD:  # those who fell silent say no farewell
            del self._names[next(iter(self._names))]
        self._events(f"peer_{event.kind}", fields)

    def _farewell(self) -> dict[str, object]:
        trainee = self._worker.trainee if self._worker is not None else None
        last = trainee.status() if trainee is not None else {}
        done = self._worker.done() if self._worker is not None else Counter[str]()
        steps, tokens = done["inner_steps"], done["tokens"]
        uptime_s = time.monotonic() - self._started_s
        text = f"left after {uptime_s / 60:.1f} min: {steps} steps, {tokens} tokens contributed. Thank you."
        return {"reason": self._stop_reason, "uptime_s": uptime_s, "training": last, "text": text}

    def snapshot(self) -> Snapshot:
        """Everything this peer knows, for the control socket."""
        return self._watching().snapshot()

    def _watching(self) -> Observer:
        if self._observer is None:
            raise NetworkError("this peer is still starting\ntry again in a moment")
        return self._observer

    def _own(self) -> Own:
        presence, worker = self._presence, self._worker
        if presence is None or worker is None:
            raise NetworkError("this peer is still starting\ntry again in a moment")
        trainee, device = worker.trainee, worker.device
        membership = presence.membership
        spec = presence.spec.spec if presence.spec else None
        counters = presence.transport.counters()
        return Own(
            version=VERSION,
            pid=os.getpid(),
            run_name=spec.run.name if spec else "",
            run_id=presence.token.run_id.hex(),
            peer=presence.transport.me,
            name=presence.name,
            roles=tuple(sorted(role.value for role in membership.me.roles)),
            state=presence.state,
            stage=trainee.stage if trainee else None,
            stage_count=spec.stages.count if spec else 0,
            layers=trainee.layers if trainee else None,
            device=device.title if device else "",
            memory_bytes=device.memory_bytes if device else 0,
            addresses=presence.addresses,
            bootstrap=presence.directory.bootstrap_addresses(),
            reachable=worker.reach.text,
            uplink_bytes_per_s=presence.transport.uplink_bytes_per_s(),
            upload_limit_bytes_per_s=self._options.upload_bytes_per_s,
            uptime_s=round(time.monotonic() - self._started_s, 1),
            token_id=presence.token.token_id,
            token_until=membership.token.not_after,
            leaf_until=membership.me.not_after,
            revocation_version=membership.revocations.version,
            data_dir=str(self._folder),
            trouble=next((one.trouble for one in worker.trainees.values() if one.trouble), ""),
            loop=self._meter.health(),
            bytes_out=counters.bytes_out,
            bytes_in=counters.bytes_in,
            refusals=counters.refusals,
            training=trainee.status() if trainee else {},
            others=tuple(one.status() for one in worker.trainees.values() if one is not trainee),
            done=worker.done(),
            audits=self._tryouts.checks if self._tryouts else {},
        )

    # --- the control socket

    async def _answer_status(self, request: Mapping[str, Any]) -> object:
        return await asyncio.to_thread(self.snapshot().brief)  # as below

    async def _answer_snapshot(self, request: Mapping[str, Any]) -> object:
        return await asyncio.to_thread(self.snapshot().to_json)  # tens of ms where peers are hundreds

    async def _answer_history(self, request: Mapping[str, Any]) -> object:
        return await self._watching().ask_history(request)

    async def _answer_leave(self, request: Mapping[str, Any]) -> object:
        self._ask_to_stop("shoal leave", 0)
        return {"leaving": True}

    async def _answer_ledger(self, request: Mapping[str, Any]) -> object:
        """Of the first of its stages, or of the one that is asked for."""
        if self._worker is None:
            return {}
        trainee = self._worker.trainees.get(int(request.get("stage", -1)), self._worker.trainee)
        return trainee.ledger() if trainee is not None else {}

    async def _answer_reload(self, request: Mapping[str, Any]) -> object:
        if self._presence is None:
            return False
        membership = self._presence.membership
        revocations, amendments = membership.revocations.reload(), membership.amendments.reload()
        return revocations or amendments

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


def _page_actions(page: Dashboard | None, tryouts: Tryouts, exports: Exports) -> dict[str, Action]:
    """What only the page asks for."""
    return {} if page is None else page.actions | tryouts.actions | exports.actions


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
