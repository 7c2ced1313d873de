"""Supervisor of p2pd, libp2p's daemon: starts it, notices its death or silence, restarts it.

Used by `hivemind_directory`. p2pd starts without bootstrap peers (then it is up in 0.2 s, whatever the
network does), with our identity and always on the same port. When it dies or hangs, hivemind says nothing and
its calls wait for ever; so every call goes through `Daemon.call`, which fails with TransportLost within 3 s.
p2pd ends by itself when this process does: it has lost its control connection then.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shoal.dht.addresses import host_route, is_taken
from shoal.dht.hivemind_loading import load_hivemind
from shoal.protocol.errors import PeerSilent, ShoalError, StorageError, TransportLost, UsageError
from shoal.protocol.private_files import private_directory, read_private, write_private

if TYPE_CHECKING:
    from shoal.dht.kademlia.call_guard import CallGuard
    from shoal.dht.kademlia.guarded_p2p import GuardedP2P

logger = logging.getLogger(__name__)
T = TypeVar("T")

PING_EVERY_S = 2.0
PING_DEADLINE_S = 1.0
LAUNCH_S = 20.0
CLOSE_S = 2.0
FIRST_RESTART_S, LAST_RESTART_S = 0.2, 30.0
STEADY_S = 20.0  # a p2pd that lived as long is restarted as soon as the first; until then, ever later
DOWN_AFTER_STARTS = 3  # failed starts in a row until the state says so; trying goes on
_SOCKET_PATH_BYTES = 100  # Unix allows 107 (sun_path)
_SOCKET_NAME_BYTES = 40  # "/p2pclient-", 11 random characters, ".sock", and some air


class DaemonState(enum.StrEnum):
    STARTING = "starting"
    UP = "up"
    RESTARTING = "restarting"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class DaemonSettings:
    """How p2pd listens and where it keeps its files. `port` 0: any free one, the same after a restart."""

    state_dir: Path
    identity: bytes  # PeerKey.libp2p_identity(); written to state_dir with mode 0600
    host: str = "127.0.0.1"
    port: int = 0
    announce: tuple[str, ...] = ()  # multiaddrs to tell others instead of those listened on
    nat_port_map: bool = False  # asks the router to forward the port (UPnP): the volunteer's choice


class Daemon:
    """Keeps one p2pd running. `attach` is awaited with each new one before calls go to it."""

    def __init__(
        self,
        settings: DaemonSettings,
        guard: CallGuard,
        attach: Callable[[GuardedP2P], Awaitable[None]],
        rng: random.Random,
    ) -> None:
        self.state = DaemonState.STARTING
        self.restarts = 0
        self.last_fault = ""
        self._settings = settings
        self._guard = guard
        self._attach = attach
        self._rng = rng
        self._port = settings.port
        self._p2p: GuardedP2P | None = None
        self._lost: asyncio.Future[str] | None = None  # done when the p2pd of the moment is
        self._watch: asyncio.Task[None] | None = None
        self._sockets: tempfile.TemporaryDirectory[str] | None = None
        self._delay_s = FIRST_RESTART_S

    async def start(self) -> None:
        """Start p2pd and watch it.

        Raises TransportLost if it does not start, StorageError for its files, UsageError for the settings.
        """
        if self._settings.announce and not self._settings.port:
            raise UsageError("to announce addresses, choose the port that they lead to")
        if not self._port:
            self._port = await asyncio.to_thread(self._last_port)
        try:
            await self._launch()
        except TransportLost:
            if self._port == self._settings.port:
                raise
            await self._give_up_taken_port()
            await self._launch()
        self._watch = asyncio.create_task(self._supervise(), name="p2pd supervisor")

    async def close(self) -> None:
        """Stop p2pd."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait({self._watch})
        self.state = DaemonState.DOWN
        self._fail_pending("the directory is closed")
        if self._p2p is not None:
            await _dispose(self._p2p)
            self._p2p = None
        if self._sockets is not None:
            self._sockets.cleanup()

    @property
    def pid(self) -> int | None:
        """Of p2pd, for status."""
        return None if self._p2p is None else self._p2p._child.pid

    def check(self) -> tuple[GuardedP2P, asyncio.Future[str]]:
        """The p2pd of the moment and the future of its loss. Raises TransportLost if there is none."""
        p2p, lost = self._p2p, self._lost
        if p2p is None or lost is None or lost.done() or p2p.fault() is not None:
            raise TransportLost(
                f"p2pd is {self.state} ({self.last_fault or 'not started'}); it comes back by itself"
            )
        return p2p, lost

    async def call(self, work: Callable[[GuardedP2P], Awaitable[T]], timeout_s: float) -> T:
        """What `work` returns, as long as p2pd lives.

        Raises TransportLost when p2pd is or gets lost, PeerSilent after `timeout_s`, and what `work` raises.
        """
        p2p, lost = self.check()
        task = asyncio.ensure_future(work(p2p))
        try:
            waited: set[asyncio.Future[Any]] = {task, lost}
            await asyncio.wait(waited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        fault = lost.result() if lost.done() else p2p.fault()
        if not fault and (task.cancelled() or isinstance(task.exception(), PeerSilent)):
            fault = await self._ping(p2p)  # others are blamed only for a silence that is not our own
        if task.cancelled() or (task.exception() is not None and fault):
            if fault:
                raise TransportLost(f"p2pd was lost during the call: {fault}; it comes back by itself")
            raise PeerSilent(f"no peer of the directory answered within {timeout_s:g} s")
        return task.result()

    def _last_port(self) -> int:
        """0, for any, where the file names none: nobody's start is to fail for that."""
        stored = read_private(self._settings.state_dir / "p2pd.port", 8) or b""
        return int(stored) if stored.isdigit() and int(stored) < 1 << 16 else 0

    def _make_files(self) -> str:
        """What p2pd finds, its folder for sockets; before each start, for somebody may have cleared it away.

        Without the identity, hivemind would make one, and this peer another.
        """
        directory = self._settings.state_dir
        private_directory(directory)
        write_private(directory / "p2pd.identity", self._settings.identity)
        if self._sockets is not None and not os.path.isdir(self._sockets.name):
            self._sockets.cleanup()
            self._sockets = None
        if self._sockets is None:
            self._sockets = _socket_directory(directory)
        return self._sockets.name

    async def _launch(self) -> None:
        """One p2pd, attached. Raises TransportLost or StorageError."""
        guarded_p2p = await load_hivemind()
        settings = self._settings
        sockets = await asyncio.to_thread(self._make_files)
        attributes = {
            "_UNIX_SOCKET_PREFIX": f"/unix{sockets}/",
            "guard": self._guard,
            "born": [],
        }
        kind: type[GuardedP2P] = type("RunP2P", (guarded_p2p.GuardedP2P,), attributes)
        try:
            async with asyncio.timeout(LAUNCH_S):
                p2p = await kind.create(
                    host_maddrs=[host_route(settings.host, self._port)],
                    announce_maddrs=list(settings.announce) or None,
                    identity_path=str(settings.state_dir / "p2pd.identity"),
                    check_if_identity_free=False,
                    dht_mode="off",  # its peer routing tells strangers who is here; ours travels in envelopes
                    auto_nat=False,
                    nat_port_map=settings.nat_port_map,
                    startup_timeout=LAUNCH_S,
                )
                routes = await _while_it_lives(p2p, self._introduce(p2p))
        except BaseException as error:
            for unfinished in kind.born:
                await _dispose(unfinished)
            if isinstance(error, (TimeoutError, OSError, EOFError, *guarded_p2p.P2P_ERRORS)):
                raise TransportLost(f"p2pd does not start: {error or type(error).__name__}") from error
            raise
        await asyncio.to_thread(self._keep_port, routes)
        self._p2p = p2p
        self._lost = asyncio.get_running_loop().create_future()
        self.state = DaemonState.UP

    async def _give_up_taken_port(self) -> None:
        """For one to listen on, where somebody else has that of the last time."""
        if await asyncio.to_thread(is_taken, self._settings.host, self._port):
            self._port = self._settings.port

    async def _introduce(self, p2p: GuardedP2P) -> tuple[str, ...]:
        self._guard.my_routes = routes = await p2p.identify()
        await self._attach(p2p)
        return routes

    def _keep_port(self, routes: tuple[str, ...]) -> None:
        """Whatever port was chosen, tokens carry it: use it from now on."""
        ports = [route.split("/tcp/")[1].split("/")[0] for route in routes if "/tcp/" in route]
        if ports and not self._port and not self._settings.announce:
            self._port = int(ports[0])
            try:
                write_private(self._settings.state_dir / "p2pd.port", ports[0].encode())
            except StorageError as error:
                logger.warning("the directory's port will change at the next start: %s", error)

    async def _supervise(self) -> None:
        while (p2p := self._p2p) is not None:
            begun_s = self._now()
            self.last_fault = await self._until_lost(p2p)
            if self._now() - begun_s >= STEADY_S:
                self._delay_s = FIRST_RESTART_S
            logger.warning("lost p2pd (%s); restarting it", self.last_fault)
            self.state = DaemonState.RESTARTING
            self.restarts += 1
            self._fail_pending(self.last_fault)
            self._p2p = None
            await _dispose(p2p, gently=False)
            await self._restart()

    async def _restart(self) -> None:
        failures = 0
        while True:
            await asyncio.sleep(self._delay_s * self._rng.uniform(0.5, 1.5))
            self._delay_s = min(self._delay_s * 2, LAST_RESTART_S)
            try:
                await self._launch()
                return
            except ShoalError as error:
                failures += 1
                self.last_fault = str(error)
                logger.warning("%s (attempt %d)", error, failures)
            if failures >= DOWN_AFTER_STARTS:
                self.state = DaemonState.DOWN
                await self._give_up_taken_port()

    async def _until_lost(self, p2p: GuardedP2P) -> str:
        """Watch the process, the connection to it, and whether it answers."""
        ended = asyncio.create_task(p2p.until_fault())
        try:
            while True:
                await asyncio.wait({ended}, timeout=PING_EVERY_S)
                if ended.done():
                    return ended.result()
                if fault := await self._ping(p2p):
                    return fault
        finally:
            ended.cancel()
            await asyncio.wait({ended})

    async def _ping(self, p2p: GuardedP2P) -> str | None:
        """Why this p2pd is to be given up; None if it answers."""
        try:
            async with asyncio.timeout(PING_DEADLINE_S):
                self._guard.my_routes = await p2p.identify()
        except TimeoutError:
            return f"p2pd did not answer for {PING_DEADLINE_S:g} s"
        except (OSError, EOFError) as error:
            return f"p2pd does not answer: {error}"
        return None

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    def _fail_pending(self, fault: str) -> None:
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(fault)


async def _while_it_lives(p2p: GuardedP2P, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; if p2pd ends first, hivemind would wait for its answers. Raises TransportLost."""
    ended, working = asyncio.ensure_future(p2p.until_fault()), asyncio.ensure_future(work)
    try:
        await asyncio.wait({ended, working}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise TransportLost(f"p2pd does not start: {ended.result()}")
        return working.result()
    finally:
        ended.cancel()
        working.cancel()
        await asyncio.wait({ended, working})


async def _dispose(p2p: GuardedP2P, gently: bool = True) -> None:
    """End a p2pd, hung or not, and leave nothing behind; by a task that is being cancelled, too.

    Without asyncio.timeout: that of CPython 3.11.2 raises CancelledError in it, and nothing would be killed.
    """
    if not gently:
        p2p.kill()
    ending = asyncio.ensure_future(p2p.shutdown())
    try:
        await asyncio.wait({ending}, timeout=CLOSE_S)
    finally:
        p2p.kill()  # where it has not ended
    await asyncio.wait({ending}, timeout=CLOSE_S)
    if not ending.done():
        logger.warning("p2pd does not end, killed as it is")
        ending.cancel()
    elif (error := ending.exception()) is not None:
        logger.warning("p2pd was closed badly: %r", error)
    p2p.forget_errors()


def _socket_directory(state_dir: Path) -> tempfile.TemporaryDirectory[str]:
    """A fresh directory with mode 0700 and a short enough path; that of a killed process is removed."""
    for stale in state_dir.glob("p2pd-*"):
        shutil.rmtree(stale, ignore_errors=True)
    longest = _SOCKET_PATH_BYTES - _SOCKET_NAME_BYTES - len("/p2pd-12345678")
    absolute = str(state_dir.absolute())
    # A deep data folder or TMPDIR is too long for a socket.
    places = (absolute, tempfile.gettempdir(), "/tmp")
    parent = next((place for place in places if len(os.fsencode(place)) <= longest), None)
    try:
        return tempfile.TemporaryDirectory(prefix="p2pd-", dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise StorageError(
            f"no directory for p2pd's sockets: {error}; check the disk and its permissions"
        ) from error
