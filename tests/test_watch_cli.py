"""`shoal status --watch`, `events` and `replay`, against a control socket that answers what the test says."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner
from view_world import NOW, a_spec, own, replica, swarm

from shoal.node.cli import peer
from shoal.node.cli.app import app
from shoal.node.cli.live import change, line, live_view
from shoal.node.control import Action, serve_control
from shoal.node.view.archive import Archive, Contribution, Entry, Write
from shoal.node.view.assemble import assemble
from shoal.node.view.history import History
from shoal.node.view.parts import EventRow, Finding, Peer, Verdict
from shoal.node.view.snapshot import Snapshot
from shoal.protocol.errors import ShoalError, StorageError, UsageError


def a_snapshot(height: int = 3, **changed: Any) -> Snapshot:
    view = swarm(replica("me", 0, height=height), replica("p1", 1, height=height))
    return dataclasses.replace(assemble(NOW, own(), view, a_spec()), **changed)


@contextlib.contextmanager
def daemon(root: Path, actions: Mapping[str, Action]) -> Iterator[None]:
    """A control socket as a daemon has it, on a loop in a thread."""
    folder = root / "peer-0" / "run"
    folder.mkdir(parents=True)
    loop = asyncio.new_event_loop()
    started, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with serve_control(folder / "control.sock", actions):
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    started.wait()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def run(*arguments: object) -> tuple[str, BaseException | None]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.stdout, result.exception


# --- status --watch


def answers(snapshots: list[Snapshot]) -> dict[str, Action]:
    """One after the other; then the daemon is gone."""
    left = list(snapshots)

    async def snapshot(request: Mapping[str, Any]) -> object:
        if not left:
            raise StorageError("that was all")
        return left.pop(0).to_json()

    return {"snapshot": snapshot}


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["text", "json"])
def test_watching_without_a_terminal_gives_a_line_for_each_change_and_none_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    monkeypatch.setattr(peer, "WATCH_S", 0.0)
    later = dataclasses.replace(a_snapshot(), at=NOW + 1.0)
    with daemon(tmp_path, answers([a_snapshot(), later, a_snapshot(4), a_snapshot(4)])):
        told, error = run("status", "--watch", *flags, "--data-dir", tmp_path)
    assert isinstance(error, ShoalError)
    lines = told.splitlines()
    assert len(lines) == 2
    if flags:
        assert [json.loads(text)["stages"][0]["height"] for text in lines] == [3, 4]
        assert json.loads(lines[0])["verdict"].startswith("Training.")
    else:
        assert ["round 3" in lines[0], "round 4" in lines[1]] == [True, True]
        assert "one loss away from stopping" in lines[0]


@pytest.mark.parametrize(
    ("changed", "tells"),
    [
        ({"at": NOW + 5.0}, False),
        ({"verdict": Verdict(text="Waiting.")}, True),
        (
            {"verdict": Verdict(text=a_snapshot().verdict.text, findings=(Finding(kind="hung", text="x"),))},
            True,
        ),
        ({"peers": a_snapshot().peers[:1]}, True),
        ({"peers": tuple(dataclasses.replace(p, tokens_per_s=9.0) for p in a_snapshot().peers)}, False),
        ({"peers": tuple(dataclasses.replace(p, liveness="suspect") for p in a_snapshot().peers)}, True),
    ],
)
def test_a_change_is_what_people_would_want_to_hear(changed: dict[str, Any], tells: bool) -> None:
    assert (change(a_snapshot(**changed)) != change(a_snapshot())) is tells


def test_the_live_view_shows_verdict_stages_peers_and_no_markup_of_strangers() -> None:
    stranger = Peer(
        peer="x", name="[bold]mallory[/bold]", state="online", liveness="alive", reason="", stages=(1,),
        tokens_per_s=1.0, backlog_s=0.0, rtt_ms=3.0, height=1, head=None, state_root=None,
        findings=("slow-link",),
    )  # fmt: skip
    finding = Finding(kind="hung", text="[red]ada[/red] finished no work")
    snapshot = a_snapshot(
        peers=(*a_snapshot().peers, stranger),
        verdict=Verdict(state="training", level="warn", text="Training. Stage 1 ...", findings=(finding,)),
    )
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(live_view(snapshot))
    shown = console.export_text()
    for text in (
        "Training. Stage 1 ...",
        "[red]ada[/red] finished no work",
        "[bold]mallory[/bold]",
        "slow-link",
    ):
        assert text in shown
    assert "[red]ada[/red]" in line(snapshot)


# --- events and replay


@pytest.fixture
def history(tmp_path: Path) -> Iterator[Path]:
    """The data folder of an owner whose history has 1,200 events."""
    archive = Archive(tmp_path / "history.sqlite")
    rows = [
        EventRow(
            number=n,
            at=NOW + n,
            kind="reroute" if n % 100 == 0 else "note",
            peer=f"p{n % 2}",
            name=f"name{n % 2}",
            text=f"[b]event {n}",
        )
        for n in range(1, 1201)
    ]
    done = Contribution(peer="p0", process=1, name="name0", tokens=5, uptime_s=1.0, micro_batches=1, at=NOW)
    entries = tuple(Entry(row=row, process=1, theirs=row.number) for row in rows)
    archive.write(Write(entries=entries, samples=(("tokens", NOW, 1.0),), contributions=(done,)))
    archive.close()

    async def offload(function: Any, *arguments: object) -> Any:
        return function(*arguments)

    kept = History(archive, offload, lambda: NOW)

    async def ask(request: Mapping[str, Any]) -> object:
        return await kept.ask(dict(request))

    with daemon(tmp_path / "data", {"history": ask}):
        yield tmp_path / "data"
    archive.close()


def test_the_last_events_are_told_in_words_or_as_json(history: Path) -> None:
    told, _ = run("events", "--most", 3, "--data-dir", history)
    assert [text.partition("  ")[2] for text in told.splitlines()] == [
        "name0: [b]event 1198",
        "name1: [b]event 1199",
        "name0: [b]event 1200",
    ]
    told, _ = run(
        "events", "--kind", "reroute", "--peer", "name0", "--most", 2, "--json", "--data-dir", history
    )
    assert [json.loads(text)["number"] for text in told.splitlines()] == [1100, 1200]


def test_an_export_has_everything_and_is_replayed_in_order(history: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    run("events", "--export", file, "--data-dir", history)
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    assert [one["what"] for one in lines[:2]] == ["contributor", "series"]
    assert [one["number"] for one in lines if one["what"] == "event"] == list(range(1, 1201))
    assert file.stat().st_mode & 0o077 == 0
    told, _ = run("replay", file, "--speed", 0, "--kind", "reroute")
    assert len(told.splitlines()) == 12
    _, error = run("events", "--export", file, "--data-dir", history)
    assert isinstance(error, StorageError), "nothing is written over"


@pytest.mark.parametrize("text", ["[]\n", "nonsense\n", '{"what": "event", "number": "1"}\n', "\xff\n"])
def test_a_file_that_is_no_export_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(text.encode("latin-1"))
    _, error = run("replay", file)
    assert isinstance(error, UsageError)
    assert "x.jsonl" in str(error)


def test_a_peer_that_keeps_no_history_says_where_one_is(tmp_path: Path) -> None:
    async def ask(request: Mapping[str, Any]) -> object:
        raise UsageError("this peer keeps no history; ask the owner's: shoal up does")

    with daemon(tmp_path, {"history": ask}):
        _, error = run("events", "--data-dir", tmp_path)
    assert isinstance(error, UsageError)
    assert "shoal up" in str(error)
