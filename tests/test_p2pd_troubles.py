"""p2pd that loses its files, dies as it starts or again and again, or answers nonsense: it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from directory_world import HivemindWorld, Person, Run

from shoal.dht.daemon import Daemon, DaemonSettings, DaemonState
from shoal.dht.hivemind_directory import HivemindDirectory
from shoal.protocol.errors import ShoalError, TransportLost
from shoal.protocol.private_files import write_private
from shoal.protocol.virtual_time import run as run_in_virtual_time


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


async def back(directory: HivemindDirectory, person: Person, restarts: int) -> None:
    """Returns when p2pd was restarted so often, and takes records under the same peer id as before."""
    async with asyncio.timeout(20.0):
        for sequence in range(10, 1000):
            if directory.status().restarts >= restarts and directory.status().daemon is DaemonState.UP:
                with contextlib.suppress(ShoalError):
                    await directory.publish(person.signed(sequence), time.time() + 29.0)
                    break
            await asyncio.sleep(0.05)


def p2pd_of(directory: Any) -> Daemon:
    assert isinstance(directory, HivemindDirectory) and directory._daemon is not None
    return directory._daemon


def test_files_that_were_cleared_away_are_made_again(run: Run) -> None:
    """As /tmp is by many systems; without the identity, hivemind would make another peer of this one."""

    async def scenario() -> None:
        ann, bob = run.person(), run.person()
        async with HivemindWorld(run).directories(ann, bob) as (_, second):
            daemon = p2pd_of(second)
            p2p = daemon.check()[0]
            sockets = Path(p2p._client.control.daemon_connector.control_maddr["unix"]).parent
            shutil.rmtree(sockets)
            (run.directory / bob.key.peer[-8:] / "p2pd.identity").unlink()
            assert isinstance(second, HivemindDirectory)
            await back(second, bob, restarts=1)
            assert daemon.check()[0].peer_id.to_base58() == bob.key.peer

    asyncio.run(scenario())


def test_an_answer_that_nobody_can_read_is_the_end_of_that_p2pd(run: Run) -> None:
    async def scenario() -> None:
        ann, bob = run.person(), run.person()
        async with HivemindWorld(run).directories(ann, bob) as (_, second):
            connector = p2pd_of(second).check()[0]._client.control.daemon_connector
            opened = connector.open_connection

            async def garbled() -> Any:
                _, writer = await opened()
                reader = asyncio.StreamReader()
                reader.feed_data(b"\x03\xff\xff\xff")
                return reader, writer

            connector.open_connection = garbled
            assert isinstance(second, HivemindDirectory)
            await back(second, bob, restarts=1)

    asyncio.run(scenario())


def test_one_that_dies_while_it_is_attached_is_not_waited_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        async def attach(p2p: Any) -> None:
            os.kill(p2p._child.pid, signal.SIGKILL)
            await asyncio.Event().wait()

        settings = DaemonSettings(tmp_path / "dht", Run(tmp_path).person().key.libp2p_identity())
        guard: Any = SimpleNamespace(my_routes=())
        daemon = Daemon(settings, guard, attach, random.Random(1))
        try:
            with pytest.raises(TransportLost, match=r"ended with status -9|closed the connection|broke"):
                await daemon.start()
        finally:
            await daemon.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("taken", [True, False], ids=["taken", "free"])
def test_the_port_that_tokens_carry_is_given_up_only_to_somebody_who_has_taken_it(
    tmp_path: Path, taken: bool
) -> None:
    """Not because p2pd started too slowly, on a machine that has much else to do."""

    async def scenario() -> None:
        unused: Any = SimpleNamespace(my_routes=())
        daemon: Any = Daemon(DaemonSettings(tmp_path, b""), unused, unused, random.Random(1))
        tried: list[int] = []

        async def launch() -> None:
            tried.append(daemon._port)
            if len(tried) == 1:
                raise TransportLost("p2pd does not start")

        daemon._launch = launch
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
            write_private(tmp_path / "p2pd.port", str(port).encode())
            if not taken:
                listening.close()
            await daemon.start()
            await daemon.close()
        assert tried == [port, 0 if taken else port]

    asyncio.run(scenario())


@pytest.mark.parametrize("stored", [b"", b"many", b"-1", b"65536"])
def test_a_file_that_names_no_port_is_as_good_as_none(tmp_path: Path, stored: bytes) -> None:
    unused: Any = SimpleNamespace(my_routes=())
    write_private(tmp_path / "p2pd.port", stored)
    assert Daemon(DaemonSettings(tmp_path, b""), unused, unused, random.Random(1))._last_port() == 0


class ShortLived:
    """A p2pd that is up at once, and dies after so long."""

    def __init__(self, life_s: float) -> None:
        self._life_s = life_s

    async def until_fault(self) -> str:
        await asyncio.sleep(self._life_s)
        return "it died"

    async def identify(self) -> tuple[str, ...]:
        return ()

    async def shutdown(self) -> None: ...

    def kill(self) -> None: ...

    def forget_errors(self) -> None: ...


@pytest.mark.parametrize(("life_s", "most", "least"), [(0.5, 30, 15), (60.0, 11, 9)])
def test_one_that_dies_again_and_again_is_restarted_ever_later_but_for_a_steady_one(
    tmp_path: Path, life_s: float, most: int, least: int
) -> None:
    """Each start costs this machine a process, and others the dials of somebody who joins."""
    launched_s: list[float] = []

    async def main() -> None:
        unused: Any = SimpleNamespace(my_routes=())
        daemon: Any = Daemon(DaemonSettings(tmp_path, b""), unused, unused, random.Random(1))

        async def launch() -> None:
            launched_s.append(asyncio.get_running_loop().time())
            daemon._p2p = ShortLived(life_s)

        daemon._launch = launch
        await launch()
        watching = asyncio.create_task(daemon._supervise())
        await asyncio.sleep(600.0)
        assert not watching.done()
        watching.cancel()

    run_in_virtual_time(main)
    assert least <= len(launched_s) <= most, launched_s
