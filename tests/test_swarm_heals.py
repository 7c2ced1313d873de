"""Real processes on loopback: a peer moves to a stage one loss from empty, an empty one comes back.

Each test has a swarm of its own; times are printed, none is asserted.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from swarm_world import Peer, Shared, Swarm, swarm_spec, until, write_corpus

from shoal.node.paths import CACHE_KEY

WINDOW_S = 3.0


@pytest.fixture
def moving() -> Iterator[Shared]:
    """Two replicas of each of two stages, who stay there; who comes without --stage may move."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as text:
        folder = Path(text)  # not pytest's: Unix sockets lie in it, and their paths must be short
        patch.setenv(CACHE_KEY, str(folder / "cache"))
        with Shared(Swarm(folder, swarm_spec(write_corpus(folder / "corpus.txt"), 2, WINDOW_S))) as shared:
            shared.run(shared.swarm.start(replicas=2))
            yield shared


def stages_of(peer: Peer) -> list[int]:
    """Where it has been online, in order."""
    return [int(event["stage"]) for event in peer.events if event["event"] == "online"]


def guarded_height(swarm: Swarm, stage: int) -> int:
    """Of the highest copy of a stage at somebody who does not train it, as it said last."""
    guards = [
        guard
        for peer in swarm.peers
        if peer.alive
        for guard in peer.last_status.get("training", {}).get("guards", ())
    ]
    return max((int(guard["height"]) for guard in guards if guard["stage"] == stage), default=0)


def test_a_peer_moves_to_a_stage_that_is_one_loss_from_empty(moving: Shared) -> None:
    swarm = moving.swarm

    async def story() -> None:
        mover = await swarm.join()
        (stage,) = stages_of(mover)
        other = 1 - stage
        await swarm.until_training([mover])
        victim = next(peer for peer in swarm.replicas(other) if peer is not swarm.peers[0])
        begun_s = time.monotonic()
        victim.kill()
        await until(lambda: stages_of(mover) == [stage, other], "the move", 90.0, swarm.poll)
        print(f"{mover.name} moved {time.monotonic() - begun_s:.1f} s after the kill")
        assert any(event["event"] == "prefetched" for event in mover.events) or any(
            event["event"] == "guarding" and event["stage"] == other for event in mover.events
        )
        await swarm.until_training([mover])
        await swarm.until_compared(swarm.replicas(other))
        assert swarm.heads.differences() == []
        assert swarm.applied_twice() == []

    moving.run(story())


def test_a_stage_whose_replicas_are_all_killed_comes_back_from_its_guardians(moving: Shared) -> None:
    swarm = moving.swarm

    async def story() -> None:
        await until(lambda: guarded_height(swarm, 1) > 0, "a copy of stage 1", 60.0, swarm.poll)
        lost = swarm.replicas(1)
        known = guarded_height(swarm, 1)
        for peer in lost:
            peer.kill()
        heir = await swarm.join()
        assert heir.stage == 1
        (told,) = (event for event in heir.events if event["event"] == "stage-rescued")
        assert told["height"] >= known
        assert not any(event["event"] == "stage-lost" for event in heir.events)
        placed, online = (
            next(event["at"] for event in heir.events if event["event"] == kind)
            for kind in ("plan", "online")
        )
        print(f"online {online - placed:.1f} s after it was placed, at height {told['height']}")
        await swarm.until_training([heir, *swarm.replicas(0)])
        rounds = [event for peer in lost for event in peer.events if event["event"] == "round"]
        heads = {(int(event["height"]), event["head"]) for event in rounds if "head" in event}
        if any(height == told["height"] for height, _ in heads):
            assert (told["height"], told["head"]) in heads
        assert swarm.applied_twice() == []

    moving.run(story())
