"""Decisions of a live run are made again in the simulator, and come out the same."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from shoal.node.demo.processes import PeerProcess, run_shoal
from shoal.node.simulate.replay import replay
from shoal.protocol.errors import UsageError
from shoal.training import spec_file
from shoal.training.decisions import DecisionLog
from shoal.training.partition import spec_costs
from shoal.training.pipeline.routing import Candidate
from shoal.training.rebalance import Placed, plan
from shoal.training.spec import RunSpec
from shoal.training.templates import TEMPLATES

START_S = 90.0
ROUNDS = 3


def quick() -> RunSpec:
    """Two stages, a round every few steps, a look at the plan every second."""
    values = TEMPLATES["tiny"].model_dump()
    values["stages"] |= {"rebalance_window_s": 1.0}
    values["outer"] |= {"inner_steps": 4}
    return RunSpec.model_validate(values)


class Live:
    """Three peers as processes: the owner and two volunteers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rounds = 0
        self.enough = asyncio.Event()
        self.peers = [PeerProcess(name, folder / name, self._heard) for name in ("owner", "ada", "ben")]

    @property
    def files(self) -> list[Path]:
        return [peer.folder / "decisions.jsonl" for peer in self.peers]

    async def run(self) -> None:
        """Until some rounds are committed."""
        owner, *volunteers = self.peers
        path = self.folder / "run.toml"
        spec_file.write(quick(), path)
        try:
            await owner.start("up", str(path), "--decisions", str(self.files[0]))
            await owner.event("invitation", START_S)
            data = str(owner.folder / "data")
            made = await run_shoal("token", "create", "--data-dir", data, "--json", timeout_s=START_S)
            for peer, decisions in zip(volunteers, self.files[1:], strict=True):
                token = self.folder / f"{peer.name}.token"
                token.write_text(made["token"])
                token.chmod(0o600)
                await peer.start("join", f"@{token}", "--decisions", str(decisions))
            async with asyncio.timeout(START_S):
                await self.enough.wait()
        finally:
            await asyncio.gather(*(peer.stop() for peer in self.peers))

    def _heard(self, peer: PeerProcess, event: dict[str, Any]) -> None:
        self.rounds += event.get("event") == "round"
        if self.rounds >= ROUNDS * len(self.peers):
            self.enough.set()


def test_what_three_processes_decided_is_decided_again(tmp_path: Path) -> None:
    live = Live(tmp_path)
    asyncio.run(live.run())
    found = replay(quick(), live.files)
    assert found.differences == []
    assert found.decisions["route"] > 10
    assert found.decisions["lead"] >= ROUNDS
    assert found.decisions["move"] > 0


REPLICAS = [Placed("a", 0, 0.25), Placed("b", 0, 0.25), Placed("c", 0, 1.0), Placed("d", 1, 1.0)]  # type: ignore[arg-type]


def log(path: Path, **changed: object) -> Path:
    move = plan(REPLICAS, spec_costs(quick()), 1, 30.0)
    assert move is not None
    candidates = [Candidate(peer, 0.01, 0.0, 0.0, 0, 0, 0.1) for peer in "ef"]
    with DecisionLog(path, lambda kind, fields: None) as decisions:
        decisions.note("move", move, replicas=REPLICAS, move_s=30.0, **changed)
        decisions.note("route", None, candidates=[], payload_bytes=9, seed=7)
        decisions.note("route", "e", candidates=candidates[:1], payload_bytes=9, seed=7)
    return path


def test_a_policy_that_decides_otherwise_is_told_line_by_line(tmp_path: Path) -> None:
    path = log(tmp_path / "decisions")
    assert replay(quick(), [path]).differences == []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2]["answer"] = "f"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = replay(quick(), [path])
    assert found.decisions == {"move": 1, "route": 2}
    assert len(found.differences) == 1
    assert "line 3: route said f, now e" in found.differences[0]


def test_a_killed_process_leaves_half_a_line_and_that_is_no_decision(tmp_path: Path) -> None:
    path = log(tmp_path / "decisions")
    path.write_text(path.read_text()[:-20])
    assert replay(quick(), [path]).decisions == {"move": 1, "route": 1}


def test_a_full_disk_is_told_once_and_stops_no_policy() -> None:
    told: list[tuple[str, dict[str, object]]] = []
    with DecisionLog(Path("/dev/full"), lambda kind, fields: told.append((kind, fields))) as decisions:
        for _ in range(3):
            decisions.note("route", None, candidates=[], payload_bytes=9, seed=7)
    ((kind, fields),) = told
    assert kind == "decisions-refused"
    assert "/dev/full" in str(fields["text"])


def test_a_file_that_cannot_be_opened_is_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--decisions .*; name a file that can be written"):
        DecisionLog(tmp_path / "nowhere" / "decisions", lambda kind, fields: None)


@pytest.mark.parametrize(
    "line", ["{}", "[]", "nonsense", '{"policy": "route", "answer": 1}', '{"policy": "x"}']
)
def test_what_is_no_decision_is_refused_by_its_place(tmp_path: Path, line: str) -> None:
    path = tmp_path / "decisions"
    path.write_text(line + "\n")
    with pytest.raises(UsageError, match="decisions, line 1"):
        replay(quick(), [path])
