"""Snapshot: the one type that every front end shows, and what it says of a swarm."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from view_world import NOW, a_spec, own, replica, swarm

from shoal.node.view.assemble import Seen, assemble
from shoal.node.view.parts import EventRow, Finding, Phase, Round, RoundMember, Verdict
from shoal.node.view.snapshot import Snapshot


def test_json_and_back_is_the_same_snapshot() -> None:
    member = RoundMember(
        peer="a", name="A", bytes_out=5, phases=(Phase(name="send", start_s=0.5, seconds=1.0),)
    )
    rounds = Round(
        stage=1, height=3, at=NOW, seconds=1.5, tokens=9, contributors=2, skipped=0, bytes_out=5,
        members=(member,), slowest={"send": "a"},
    )  # fmt: skip
    event = EventRow(number=1, at=NOW, kind="reroute", peer="a", name="A", text="t", fields={"seconds": 1.5})
    view = swarm(replica("me", 0), replica("other", 1, guards=(0,)))
    whole = assemble(NOW, own(), view, a_spec())
    verdict = Verdict(state="waiting", text="x", findings=(Finding(kind="hung", text="y", stage=1),))
    found = replace(whole, rounds=(rounds,), events=(event,), verdict=verdict)
    assert Snapshot.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_json_of_another_version_is_read_as_far_as_it_goes_and_nonsense_is_refused() -> None:
    plain = json.loads(json.dumps(assemble(NOW, own(), swarm(replica("me", 0)), a_spec()).to_json()))
    assert Snapshot.from_json({**plain, "from_the_future": 1}).at == NOW
    with pytest.raises(ValueError, match="list"):
        Snapshot.from_json({**plain, "peers": "nobody"})
    with pytest.raises(ValueError, match="float"):
        Snapshot.from_json({**plain, "at": "now"})


def test_the_brief_form_has_the_own_peers_keys_on_top() -> None:
    brief = assemble(NOW, own(), swarm(replica("me", 0)), a_spec()).brief()
    assert (brief["run_name"], brief["stage"], brief["stage_replicas"]) == ("run", 0, (1, 0))
    assert brief["verdict"] == "Waiting: stage 1 has no replica."


@pytest.mark.parametrize(
    ("stages", "state", "text"),
    [
        ((0,), "waiting", "stage 1 has no replica"),
        ((0, 1, 1), "training", "Stage 0 has one replica: one loss away from stopping"),
        ((0, 0, 1, 1), "training", "Every stage has 2 replicas or more"),
    ],
)
def test_the_verdict_says_what_would_stop_the_run_first(
    stages: tuple[int, ...], state: str, text: str
) -> None:
    view = swarm(*(replica(f"peer{i}", stage) for i, stage in enumerate(stages)), me="peer0")
    found = assemble(NOW, own("peer0"), view, a_spec()).verdict
    assert found.state == state
    assert text in found.text


@pytest.mark.parametrize(
    ("standing", "text"), [("paused", "Paused by the owner."), ("stopped", "Stopped by")]
)
def test_what_the_owner_ordered_comes_first(standing: str, text: str) -> None:
    found = assemble(NOW, own(), swarm(replica("me", 0), replica("p", 1)), a_spec(), Seen(standing=standing))
    assert found.verdict.state == standing
    assert text in found.verdict.text


def test_a_swarm_that_only_serves_says_so() -> None:
    spec = a_spec()
    spec = spec.model_copy(update={"inner": spec.inner.model_copy(update={"mode": "off"})})
    found = assemble(NOW, own(), swarm(replica("me", 0), replica("p", 1)), spec)
    assert found.verdict.state == "serving"
    assert found.verdict.text.startswith("Serving. Stage 0 has one replica")


def test_the_weakest_stage_is_the_one_with_least_replicas_then_the_slowest() -> None:
    slow = swarm(*(replica(f"p{i}", i % 2, service_s=0.4 if i % 2 else 0.1) for i in range(4)), me="p0")
    stages = assemble(NOW, own("p0"), slow, a_spec()).stages
    assert [stage.weakest for stage in stages] == [False, True]
    assert [stage.balance for stage in stages] == [1.0, pytest.approx(0.25)]
    lone = swarm(replica("p0", 0, service_s=0.01), replica("p1", 1), replica("p2", 1), me="p0")
    assert [stage.weakest for stage in assemble(NOW, own("p0"), lone, a_spec()).stages] == [True, False]


def test_replicas_with_another_state_at_the_same_height_are_told() -> None:
    view = swarm(replica("p0", 0), replica("p1", 0, head=bytes(31) + b"x"), replica("p2", 1), me="p0")
    stages = assemble(NOW, own("p0"), view, a_spec()).stages
    assert [stage.heads_equal for stage in stages] == [False, None]


def test_what_if_this_peer_leaves() -> None:
    view = swarm(replica("p0", 0), replica("p1", 0), replica("p2", 1), replica("p3", 0, guards=(1,)), me="p0")
    said = {peer.peer: peer.if_leaves for peer in assemble(NOW, own("p0"), view, a_spec()).peers}
    assert "stage 0 goes on with 2 others" in said["p1"]
    assert "stage 1 stops until another peer takes it; 1 peer keeps a copy" in said["p2"]
    bare = swarm(replica("p0", 0), replica("p2", 1), me="p0")
    assert "is lost" in assemble(NOW, own("p0"), bare, a_spec()).peers[1].if_leaves


def test_a_peer_that_holds_two_stages_is_one_row_in_two_columns() -> None:
    both = replica("me", 0)
    beat = both.beat
    assert beat is not None
    beat = replace(beat, stages=(*beat.stages, replace(beat.stages[0], stage=1)))
    both = replace(both, stages=(0, 1), beat=beat)
    found = assemble(NOW, own(), swarm(both, replica("other", 0)), a_spec())
    assert found.replicas == (2, 1)
    assert [peer.stages for peer in found.peers] == [(0, 1), (0,)]
    assert found.online == 2
    alone, shared = found.stages[1].could_tokens_per_s, found.stages[0].could_tokens_per_s
    assert alone is not None
    assert shared == pytest.approx(3 * alone), "its lane is shared out over both"
    assert "stage 0 goes on with 1 other" in found.peers[0].if_leaves
    assert "stage 1 stops" in found.peers[0].if_leaves
    joining = assemble(NOW, own(), swarm(replace(both, states=("online", "joining"))), a_spec())
    assert (joining.replicas, joining.stages[1].joining) == ((1, 0), 1)
