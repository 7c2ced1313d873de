"""Daemons as processes on real sockets: join, look, leave, and being shut out."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.node.control import ask
from shoal.node.daemon import Daemon
from shoal.node.demo.processes import PeerProcess, run_shoal
from shoal.node.paths import control_sockets
from shoal.node.presence import Presence
from shoal.node.view.snapshot import Snapshot
from shoal.training.spec_file import write_template

START_S = 90.0  # a machine that runs other tests beside these is slow to import torch

Scenario = Callable[["Swarm"], Awaitable[None]]


class Swarm:
    """An owner's peer and others around it, none of which trains."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.owner = self.peer("owner")
        self._processes = [self.owner]

    def peer(self, name: str) -> PeerProcess:
        return PeerProcess(name, self.folder / name, lambda peer, event: None)

    async def begin(self) -> None:
        path = self.folder / "run.toml"
        write_template("tiny", path)
        await self.owner.start("up", str(path), "--no-train")
        await self.owner.event("invitation", START_S)

    async def token(self, *options: str) -> dict[str, Any]:
        return await self.owners("token", "create", *options)

    async def owners(self, *command: str) -> dict[str, Any]:
        data = str(self.owner.folder / "data")
        return await run_shoal(*command, "--data-dir", data, "--json", timeout_s=START_S)

    async def join(self, name: str, token: str, *options: str) -> PeerProcess:
        peer = self.peer(name)
        self._processes.append(peer)
        path = self.folder / f"{name}.token"
        path.write_text(token)
        path.chmod(0o600)
        await peer.start("join", f"@{path}", "--no-train", *options)
        return peer

    async def end(self) -> None:
        await asyncio.gather(*(process.stop() for process in self._processes))


def _play(tmp_path: Path, scenario: Scenario) -> None:
    async def run() -> None:
        swarm = Swarm(tmp_path)
        try:
            await swarm.begin()
            await scenario(swarm)
        finally:
            await swarm.end()

    asyncio.run(run())


async def _seen_by(peer: PeerProcess, names: set[str]) -> None:
    """Returns once `peer` sees exactly these peers."""
    async with asyncio.timeout(START_S):
        while True:
            status = await peer.status()
            if status is not None and {other["name"] for other in status["peers"]} == names:
                return
            await asyncio.sleep(0.1)


async def _told_by(owner: PeerProcess, names: set[str]) -> None:
    """Returns once the owner's snapshot has what these peers push, its history their events."""
    (control,) = control_sockets(owner.folder / "data")
    async with asyncio.timeout(START_S):
        while True:
            found = Snapshot.from_json(await ask(control, "snapshot"))
            told = {peer.name for peer in found.peers if peer.told_s is not None and peer.version}
            kept = await ask(control, "history", what="events", kind="observing")
            if names == told == {event["name"] for event in kept["events"]}:
                break
            await asyncio.sleep(0.1)
    assert found.coordinator.history.startswith("kept in ")


def test_peers_join_see_each_other_and_leave(tmp_path: Path) -> None:
    async def scenario(swarm: Swarm) -> None:
        ada, ben = await asyncio.gather(
            swarm.join("ada", (await swarm.token("--name", "ada"))["token"], "--upload", "20Mbit"),
            swarm.join("ben", (await swarm.token("--name", "ben"))["token"]),
        )
        await asyncio.gather(*(peer.event("observing", START_S) for peer in (ada, ben)))
        everybody = {"owner", "ada", "ben"}
        await asyncio.gather(*(_seen_by(peer, everybody) for peer in (swarm.owner, ada, ben)))
        status = await ada.status()
        assert status is not None
        assert status["run_name"] == "tiny"
        assert status["roles"] == ["trainer"]
        assert status["loop"]["callbacks"] > 0
        assert status["upload_limit_bytes_per_s"] == 2.5e6
        assert status["uplink_bytes_per_s"] is None, "it has sent nothing in bulk"
        await _told_by(swarm.owner, everybody)
        left = await run_shoal("leave", "--data-dir", str(ada.folder / "data"), "--json", timeout_s=START_S)
        assert left == {"leaving": ["ada"]}
        await _exits(ada, 0)
        assert ben.process_id is not None
        os.kill(ben.process_id, signal.SIGINT)
        await _exits(ben, 130)
        await _seen_by(swarm.owner, {"owner"})

    _play(tmp_path, scenario)


def test_a_revoked_volunteer_is_put_out_and_cannot_come_back(tmp_path: Path) -> None:
    async def scenario(swarm: Swarm) -> None:
        token = await swarm.token()
        mallory = await swarm.join("mallory", token["token"])
        await mallory.event("observing", START_S)
        await _seen_by(swarm.owner, {"owner", "mallory"})
        revoked = await swarm.owners("token", "revoke", token["id"])
        assert revoked["daemons_told"] == 1
        await _exits(mallory, 10)
        assert "revoked" in mallory.last_words()
        again = await swarm.join("again", token["token"])
        await _exits(again, 10)
        assert "revoked" in again.last_words()
        await _seen_by(swarm.owner, {"owner"})

    _play(tmp_path, scenario)


def test_tokens_of_another_owner_or_gone_swarm_find_nobody(tmp_path: Path) -> None:
    async def scenario(swarm: Swarm) -> None:
        other = Swarm(tmp_path / "other")
        other.folder.mkdir()
        try:
            await other.begin()
            token = (await other.token())["token"]
        finally:
            await other.end()
        stranger = await swarm.join("stranger", token)
        await _exits(stranger, 11)
        assert "/ip4/127.0.0.1/" in stranger.last_words()
        await _seen_by(swarm.owner, {"owner"})

    _play(tmp_path, scenario)


async def _exits(peer: PeerProcess, code: int) -> None:
    async with asyncio.timeout(START_S):
        while peer.alive:
            await asyncio.sleep(0.1)
    assert peer.exit_code == code, peer.last_words()


def test_a_peer_outlives_pip_replacing_shoal_beneath_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was: its record asked the disk for the version each time, and while there was none it died."""

    def gone(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    here: Any = SimpleNamespace(
        transport=SimpleNamespace(me="somebody"),
        membership=SimpleNamespace(chain=()),
        incarnation=1,
        state="online",
        stages=(),
        states=(),
        name="peer",
        addresses=(),
        device="",
    )
    before = Presence._record(here)
    monkeypatch.setattr(importlib.metadata, "distribution", gone)
    assert Presence._record(here) == before


def test_a_status_of_many_peers_is_not_made_on_the_loop() -> None:
    made_in: list[int] = []
    here: Any = SimpleNamespace(
        snapshot=lambda: SimpleNamespace(brief=lambda: made_in.append(threading.get_ident()))
    )
    asyncio.run(Daemon._answer_status(here, {}))
    assert made_in[0] != threading.get_ident()
