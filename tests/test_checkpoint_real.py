"""Checkpoints of real processes: gathered from a live swarm, killed in the middle, begun from by others."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from swarm_world import START_S, Peer, Swarm, swarm_spec, until, write_corpus

from shoal.node.demo.processes import JsonObject, run_shoal
from shoal.node.paths import CACHE_KEY
from shoal.protocol.errors import ShoalError
from shoal.training import spec_file
from shoal.training.checkpoint.manifest import numbered
from shoal.training.checkpoint.read import Checkpoint, open_checkpoint, verify
from shoal.training.spec import RunSpec

EVERY_S = 1.0


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Not pytest's: Unix sockets lie in it, and their paths must be short."""
    with tempfile.TemporaryDirectory() as text:
        monkeypatch.setenv(CACHE_KEY, str(Path(text) / "cache"))
        yield Path(text)


def spec_with(folder: Path, **checkpoint: object) -> RunSpec:
    spec = swarm_spec(write_corpus(folder / "corpus.txt"), 2)
    return RunSpec.model_validate(spec.model_dump() | {"checkpoint": checkpoint})


async def checkpoint(*arguments: str, peer: Peer) -> JsonObject:
    data_dir = str(peer.folder / "data")
    return await run_shoal("checkpoint", *arguments, "--json", "--data-dir", data_dir, timeout_s=START_S)


def written_by(peer: Peer) -> list[Checkpoint]:
    """Every one that has its name; raises for one that is not whole."""
    found = []
    for place in (peer.folder / "data").glob("peer-*/*/checkpoints"):
        for _, path in numbered(place):
            found.append(open_checkpoint(path))
            verify(found[-1])
    return found


def test_a_live_swarm_is_saved_and_another_run_starts_from_it(folder: Path) -> None:
    async def story() -> None:
        async with Swarm(folder / "a", spec_with(folder, every_s=0)) as swarm:
            await swarm.start(replicas=1)
            owner, other = swarm.peers
            await swarm.until_compared([owner])
            made = await checkpoint("now", peer=other)  # by any peer, not only the owner's
            saved = open_checkpoint(Path(made["path"]))
            verify(saved)
            assert saved.whole
            for part, peer in zip(saved.manifest.parts, (owner, other), strict=True):
                rounds = [e for e in peer.events if e["event"] == "round" and e["height"] == part.height]
                assert [event["head"] for event in rounds] == [part.head]
                assert [event["state_root"] for event in rounds] == [part.state_root]
            with pytest.raises(ShoalError, match="no peer called 'nobody'"):
                await checkpoint("now", "--peer", "nobody", peer=other)

        one, path = Swarm(folder / "b", swarm.spec), folder / "one.toml"
        data_dir = folder / "b" / "owner" / "data"
        imported = await run_shoal(
            "checkpoint", "import", str(saved.path), "--stages", "1", "--to", str(path), "--json",
            "--data-dir", str(data_dir), timeout_s=START_S,
        )  # fmt: skip
        assert imported["digest"] == saved.digest
        one.spec = spec_file.load(path)
        async with one:
            await one.start(replicas=2)
            owner, other = one.peers
            fetched = [event for event in other.events if event["event"] == "start-fetched"]
            assert [event["checkpoint"] for event in fetched] == [saved.digest]
            await one.until_compared([owner, other])
            assert one.heads.differences() == []
            assert saved.manifest.log_tokens > 0

            def trained_on() -> bool:
                return int(owner.last_status["training"]["log_tokens"]) > saved.manifest.log_tokens

            await until(trained_on, "an entry after those of the checkpoint", START_S, one.poll)

    asyncio.run(story())


def test_killed_while_it_writes_a_peer_leaves_only_whole_ones(folder: Path) -> None:
    async def story() -> None:
        seed = random.randrange(2**32)
        print("seed", seed)
        rng = random.Random(seed)
        async with Swarm(folder / "a", spec_with(folder, every_s=EVERY_S, kept=2)) as swarm:
            await swarm.start(replicas=1)
            owner, victim = swarm.peers
            await owner.event("guarding", START_S)  # from then on the stage outlives its only replica
            for _ in range(2):
                await until(lambda v=victim: has_written(v), "a checkpoint", START_S)  # type: ignore[misc]
                await until(lambda v=victim: is_writing(v), "the next on its way", START_S)  # type: ignore[misc]
                await asyncio.sleep(rng.uniform(0.0, 0.1))
                victim.kill()
                await victim.stop()
                assert 1 <= len(written_by(victim)) <= 3, "kept 2, and one more while the oldest goes"
                assert owner.alive
                victim = await swarm.join(stage=1)
            await swarm.until_training([owner])

    asyncio.run(story())


def has_written(peer: Peer) -> bool:
    return any(event["event"] == "checkpoint" for event in peer.events)


def is_writing(peer: Peer) -> bool:
    return any((peer.folder / "data").glob("peer-*/*/checkpoints/.partial-*"))
