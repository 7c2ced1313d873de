"""The demo, whole: real processes, sockets, TLS and DHT, one peer killed, one joining, text at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SUMMARY = {
    "event", "tokens", "seconds", "loss_first", "loss_last", "rounds", "stages", "replicas", "killed",
    "reroute_s", "rejoin_s", "heads_equal", "text",
}  # fmt: skip


@pytest.mark.timeout(600)
def test_the_demo_measures_everything_it_promises() -> None:
    with tempfile.TemporaryDirectory() as folder:  # a short path: Unix sockets will lie in it
        _run_demo(Path(folder))


def _run_demo(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shoal.node.cli", "demo", "--seconds", "45", "--json"],
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    summary = events[-1]
    problems = [event["text"] for event in events if event["event"] in ("problem", "difference", "logs")]
    assert done.returncode == 0, (problems, summary, done.stderr[-2000:])
    assert problems == []
    assert summary.keys() == SUMMARY
    assert summary["heads_equal"] is True
    assert summary["loss_last"] < summary["loss_first"]
    assert summary["replicas"] == [2, 2]
    assert summary["killed"] != "owner"
    assert summary["text"]
    assert not list(folder.iterdir()), "a demo that held leaves nothing behind"
