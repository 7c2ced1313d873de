"""A peer that holds several stages: what others are shown of each, and what its counters add up to."""

from __future__ import annotations

import dataclasses
import json

from rich.console import Console
from view_peers import training
from view_world import NOW, a_spec, own, replica, swarm

from shoal.dht.beats import Beat, StageBeat
from shoal.dht.view import Member
from shoal.node.cli.status_view import status_view
from shoal.node.dashboard.panels.pipeline import pipeline
from shoal.node.dashboard.state import PageState
from shoal.node.view.assemble import assemble
from shoal.node.view.figures import counts_of, figures_of
from shoal.node.view.metrics import families


def both() -> Member:
    """Online at the first of two stages, where it does 50 tokens a second, and draining at the other."""
    beats = (StageBeat(0, height=3, tokens_per_s=50.0), StageBeat(1, height=7, tokens_per_s=200.0))
    member = replica("both", 0, tokens_per_s=200.0)
    return dataclasses.replace(
        member, stages=(0, 1), states=("online", "draining"), beat=Beat(tokens_per_s=200.0, stages=beats)
    )


def test_a_stage_is_as_fast_as_its_replicas_are_there() -> None:
    """The rate of the whole run is that of its first stage."""
    view = swarm(both(), replica("first", 0, tokens_per_s=150.0), me="both")
    snapshot = assemble(NOW, own("both"), view, a_spec())
    assert [stage.tokens_per_s for stage in snapshot.stages] == [200.0, 0.0]
    assert snapshot.throughput.now == 200.0, "what it does at stage 1 is no work of the first"


def test_each_stage_has_its_own_round_and_state() -> None:
    snapshot = assemble(NOW, own("both"), swarm(both(), replica("one", 1, height=7), me="both"), a_spec())
    assert snapshot.peers[0].heights == (3, 7)
    assert snapshot.peers[1].heights == (7,)
    first, second = (str(part) for part in str(pipeline(snapshot, PageState())).split("Stage 1"))
    assert "name of both: online, 50 tok/s" in first
    assert "name of both: draining, 200 tok/s" in second
    console = Console(width=200)
    with console.capture() as shown:
        console.print(status_view([json.loads(json.dumps(snapshot.brief()))]))
    assert "3, 7" in shown.get()


def test_what_a_peer_tells_is_of_all_its_stages() -> None:
    driving = training(stage=0, loss=2.5, sessions={"sessions": 1})
    behind = training(stage=1, tokens=1000, outer={"rounds": 2, "repaired_parts": 4, "refused": {"p": 3}})
    done = counts_of(driving) + counts_of(behind)
    me = dataclasses.replace(own(), training=behind, others=(driving,), done=done)
    told = figures_of(me, swarm(both(), me="both"))
    assert told.training is not None
    assert (told.training.tokens, told.training.rounds, told.training.repaired_parts) == (5096, 5, 4)
    assert (told.training.loss, told.training.sessions) == (2.5, 1), "of the stage that has it"
    assert told.refused[0].count == 3
    snapshot = assemble(NOW, me, swarm(replica("me", 1)), a_spec())
    values = {family.name: family.samples[0].value for family in families(snapshot) if family.samples}
    assert values["shoal_tokens"] == 5096
