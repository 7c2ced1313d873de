"""Real processes on loopback: one peer holds both stages of a run until another comes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from swarm_world import START_S, Peer, Shared, Swarm, swarm_spec, until, write_corpus

from shoal.node.paths import CACHE_KEY


def online_at(peer: Peer) -> list[int]:
    return [int(event["stage"]) for event in peer.events if event["event"] == "online"]


def told(peer: Peer, kind: str) -> bool:
    return any(event["event"] == kind for event in peer.events)


def test_one_peer_trains_a_run_of_two_stages_and_a_second_one_takes_one_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        monkeypatch.setenv(CACHE_KEY, str(folder / "cache"))
        swarm = Swarm(folder, swarm_spec(write_corpus(folder / "corpus.txt"), 2, rebalance_window_s=1.0))

        async def story() -> None:
            owner = await swarm.found("--stages", "2")
            await until(lambda: online_at(owner) == [0, 1], "the owner at both stages", START_S)
            await swarm.until_training([owner])
            (other,) = owner.last_status["others"]
            assert (owner.last_status["training"]["stage"], other["stage"]) == (0, 1)
            assert owner.last_status["stage_replicas"] == [1, 1]
            volunteer = await swarm.join()
            await until(lambda: told(owner, "returning"), "a stage given back", START_S)
            await until(lambda: not owner.last_status["others"], "its end", START_S, swarm.poll)
            await swarm.until_training([owner, volunteer])
            stages = {int(peer.last_status["training"]["stage"]) for peer in (owner, volunteer)}
            assert stages == {0, 1}
            assert owner.last_status["training"].get("lost", 0) == 0

        with Shared(swarm) as shared:
            shared.run(story())
