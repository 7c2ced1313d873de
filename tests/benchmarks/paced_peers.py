"""Real processes on the paced lane, for benchmarks: how they are invited, started and asked.

Used by `unequal.py` and `inference_share.py`.
"""

from __future__ import annotations

from pathlib import Path

import psutil

from shoal.node.demo.processes import JsonObject, PeerProcess, run_shoal

START_S = 180.0


def quiet_peer(name: str, folder: Path) -> PeerProcess:
    """A process whose events nobody reads."""
    return PeerProcess(name, folder, lambda peer, event: None)


async def token_of(owner: PeerProcess, name: str, role: str = "trainer") -> str:
    """A new token of the owner's."""
    command = ("token", "create", "--role", role, "--name", name, "--json")
    made = await run_shoal(*command, "--data-dir", str(owner.folder / "data"), timeout_s=START_S)
    return str(made["token"])


async def join(owner: PeerProcess, peer: PeerProcess, *options: str) -> None:
    """Start a volunteer with a token of its own; it is not online yet."""
    token = owner.folder / f"{peer.name}.token"
    token.touch(mode=0o600)
    token.write_text(await token_of(owner, peer.name))
    await peer.start("join", f"@{token}", "--listen", "127.0.0.1", *options)


async def training_of(peer: PeerProcess) -> tuple[JsonObject, float]:
    """What it says of its training, and the CPU seconds that it and its children have used."""
    status = await peer.status()
    if status is None or peer.process_id is None:
        raise SystemExit(f"{peer.name} does not answer\n{peer.last_words()}")
    process = psutil.Process(peer.process_id)
    times = [found.cpu_times() for found in (process, *process.children(recursive=True))]
    return status["training"], sum(used.user + used.system for used in times)
