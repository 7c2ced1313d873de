"""Snapshots and swarms for tests of what the owner sees."""

from __future__ import annotations

from shoal.dht.beats import Beat, StageBeat
from shoal.dht.view import Member, SwarmView
from shoal.node.loop import LoopHealth
from shoal.node.view.snapshot import Own
from shoal.protocol.identity import PeerId
from shoal.training.spec import RunSpec, StagesSection

NOW = 1_800_000_000.0


def a_spec(stages: int = 2) -> RunSpec:
    return RunSpec(stages=StagesSection(count=stages))


def own(peer: str = "me", name: str = "owner") -> Own:
    return Own(
        version="1",
        pid=1,
        run_name="run",
        run_id="00",
        peer=peer,
        name=name,
        roles=("owner", "trainer"),
        state="online",
        stage=0,
        stage_count=2,
        layers=(0, 1),
        device="cpu",
        memory_bytes=1,
        addresses=("127.0.0.1:1",),
        bootstrap=(),
        reachable="",
        uplink_bytes_per_s=None,
        upload_limit_bytes_per_s=None,
        uptime_s=1.0,
        token_id="",
        token_until=NOW,
        leaf_until=NOW,
        revocation_version=0,
        data_dir="/",
        trouble="",
        loop=LoopHealth(culprits=(("a callback", 1.5),)),
    )


def replica(
    peer: str,
    stage: int,
    *,
    service_s: float = 0.1,
    height: int = 3,
    head: bytes = bytes(32),
    tokens_per_s: float = 100.0,
    guards: tuple[int, ...] = (),
) -> Member:
    beat = StageBeat(stage, height, head, log_tokens=1000 * height, service_s=service_s)
    return Member(
        peer=PeerId(peer),
        name=f"name of {peer}",
        stages=(stage,),
        tokens_per_s=tokens_per_s,
        service_s=service_s,
        heard_s=9.5,
        rtt_s=0.01,
        beat=Beat(stages=(beat,), guards=tuple(StageBeat(at) for at in guards)),
    )


def swarm(*members: Member, me: str = "me") -> SwarmView:
    return SwarmView(PeerId(me), 10.0, tuple(sorted(members, key=lambda member: member.peer)))
