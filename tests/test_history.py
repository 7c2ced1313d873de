"""History: what the owner's peer keeps on disk, its bounds, and what happens when the disk refuses."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from view_peers import World, clock, inline, round_told, training
from view_world import NOW, own

from shoal.node.view.archive import PAGE, Archive, Contribution, Entry, Write
from shoal.node.view.history import QUEUE, History
from shoal.node.view.names import readable
from shoal.node.view.parts import EventRow, Run
from shoal.node.view.snapshot import Snapshot
from shoal.protocol import virtual_time
from shoal.protocol.errors import StorageError, UsageError

Scene = Callable[[World], Awaitable[None]]


@pytest.fixture
def archive(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Archive]:
    """One of its own, closed in the end; with limits where a test names them."""
    with contextlib.closing(Archive(tmp_path / "history.sqlite", **getattr(request, "param", {}))) as archive:
        yield archive


def play(scene: Scene) -> None:
    async def staged() -> None:
        world = World(1)
        try:
            await scene(world)
        finally:
            await world.close()

    virtual_time.run(staged)


def entry(number: int, *, at: float = NOW, kind: str = "note", peer: str = "a", text: str = "t") -> Entry:
    row = EventRow(
        number=number, at=at, kind=kind, peer=peer, name=peer.upper(), text=text, fields={"x": 1.5}
    )
    return Entry(row=row, process=7, theirs=number)


# --- through an owner's peer


def test_history_goes_on_after_a_restart_with_numbers_losses_and_rates(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.add("owner", owner=True, folder=tmp_path)
        peer = await world.add("peer")
        for height in range(1, 31):
            peer.buffer.add("round", round_told(height))
        peer.buffer.add("reroute", {"stage": 1, "seconds": 0.5})
        await asyncio.sleep(35.0)
        before = world.watchers["owner"].observer.snapshot()
        await world.remove("owner")
        owner = await world.add("owner", owner=True, folder=tmp_path)
        await asyncio.sleep(0.1)
        after = owner.observer.snapshot()
        assert after.loss == before.loss
        assert len(after.loss) == 30
        assert after.events[-1] == before.events[-1]
        assert after.throughput.best == before.throughput.best
        assert after.churn.reroutes == 1
        owner.buffer.add("moving", {"text": "moves"})
        found = await owner.observer.ask_history({"what": "events", "newest": True, "most": 1})
        assert isinstance(found, dict)
        assert found["events"][0]["number"] > before.events[-1].number

    play(scene)


def test_whoever_asks_before_the_history_is_read_costs_no_event(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        owner = await world.add("owner", owner=True, folder=tmp_path)
        owner.buffer.add("moving", {"text": "once"})
        await asyncio.sleep(2.0)
        await world.remove("owner")
        owner = await world.add("owner", owner=True, folder=tmp_path)
        owner.buffer.add("moving", {"text": "twice"})
        assert owner.observer.snapshot().events == ()
        await asyncio.sleep(2.0)
        found = await owner.observer.ask_history({"what": "events"})
        assert isinstance(found, dict)
        assert [row["text"] for row in found["events"]] == ["once", "twice"]

    play(scene)


def test_contributors_are_named_and_their_processes_summed(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        owner = await world.add("owner", owner=True, folder=tmp_path)
        for tokens in (1000, 500):
            peer = await world.add("peer")
            world.members["peer"] = dataclasses.replace(world.members["peer"], name="")
            peer.training = training(tokens=tokens, micro_batches=tokens // 100)
            await asyncio.sleep(25.0)
            await world.remove("peer")
        found = await owner.observer.ask_history({"what": "contributors"})
        assert isinstance(found, dict)
        (one,) = [row for row in found["contributors"] if row["peer"] == "peer"]
        assert (one["tokens"], one["micro_batches"]) == (1500, 15)
        assert one["name"] == readable("peer")
        assert one["last_at"] > one["first_at"]

    play(scene)


def test_a_name_is_short_readable_and_always_the_same() -> None:
    names = {readable(f"12D3KooW{number}") for number in range(1000)}
    assert len(names) > 900
    assert all(name.isascii() and len(name) <= 16 and name[2] == "-" for name in names)
    assert readable("12D3KooW1") == readable("12D3KooW1")


def test_a_disk_that_refuses_is_stated_and_nothing_else_stops(tmp_path: Path) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("where a folder should be")

    async def scene(world: World) -> None:
        owner = await world.add("owner", owner=True, folder=blocked)
        peer = await world.add("peer")
        peer.buffer.add("reroute", {"stage": 1, "seconds": 0.5})
        await asyncio.sleep(30.0)
        seen = owner.observer.snapshot()
        assert seen.coordinator.history.startswith("not kept: ")
        assert "storage" in {finding.kind for finding in seen.verdict.findings}
        assert [event.kind for event in seen.events] == ["reroute"], "what is told is seen all the same"
        blocked.unlink()
        blocked.mkdir()
        await asyncio.sleep(30.0)
        seen = owner.observer.snapshot()
        assert seen.coordinator.history.startswith("kept in ")
        found = await owner.observer.ask_history({"what": "events"})
        assert isinstance(found, dict)
        assert [row["kind"] for row in found["events"]] == ["reroute"], (
            "it was written when that was possible"
        )
        assert not seen.verdict.findings

    play(scene)


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"what": "secrets"},
        {"what": "events", "after": "x"},
        {"what": "events", "after": 2**70},
        {"what": "events", "most": float("inf")},
        {"what": "series", "since": []},
    ],
)
def test_a_question_that_makes_no_sense_is_refused(tmp_path: Path, request_: dict[str, object]) -> None:
    async def scene(world: World) -> None:
        owner = await world.add("owner", owner=True, folder=tmp_path)
        with pytest.raises(UsageError):
            await owner.observer.ask_history(request_)

    play(scene)


def test_a_peer_without_the_owners_role_keeps_no_history() -> None:
    async def scene(world: World) -> None:
        peer = await world.add("peer")
        with pytest.raises(UsageError, match="owner"):
            await peer.observer.ask_history({"what": "events"})

    play(scene)


def test_while_the_disk_is_full_the_oldest_waiting_events_are_dropped_and_counted(archive: Archive) -> None:
    async def scene() -> None:
        history = History(archive, inline, clock)
        await history.start()
        with archive._open() as db:
            db.execute(f"PRAGMA max_page_count={db.execute('PRAGMA page_count').fetchone()[0]}")
        for number in range(1, QUEUE + 1001):
            history.add(entry(number, text="x" * 200))
        assert not await history.flush()
        assert "full" in history.trouble
        assert (history.queue, history.lost) == (QUEUE, 1000)
        assert await history.flush(), "a new connection has no limit: there is room again"
        assert history.trouble == ""
        assert archive.events(0, None, None, 1, newest=False)[0].number == 1001

    virtual_time.run(scene)


def test_whoever_asks_and_is_cut_off_takes_no_events_along(archive: Archive) -> None:
    async def busy(function: Callable[..., Any], *arguments: Any) -> Any:
        await asyncio.sleep(1.0)  # a job that is cancelled meanwhile never begins
        return function(*arguments)

    async def scene() -> None:
        history = History(archive, busy, clock)
        await history.start()
        for number in range(1, 6):
            history.add(entry(number))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await history.ask({"what": "span"})
        assert await history.flush()
        found = await history.ask({"what": "events"})
        assert isinstance(found["events"], list)
        assert [row["number"] for row in found["events"]] == [1, 2, 3, 4, 5]

    virtual_time.run(scene)


# --- the file


def test_what_is_told_twice_is_kept_once(archive: Archive) -> None:
    archive.write(Write(entries=(entry(1), entry(2))))
    archive.write(Write(entries=(dataclasses.replace(entry(3), theirs=2),)))
    assert [row.number for row in archive.events(0, None, None, 10, newest=False)] == [1, 2]


def test_events_are_found_by_number_kind_and_peer(archive: Archive) -> None:
    entries = [
        entry(n, kind="even" if n % 2 == 0 else "odd", peer="b" if n > 5 else "a") for n in range(1, 11)
    ]
    archive.write(Write(entries=tuple(entries)))

    def numbers(after: int = 0, kind: str | None = None, peer: str | None = None, **how: bool) -> list[int]:
        return [row.number for row in archive.events(after, kind, peer, 3, newest=how.get("newest", False))]

    assert numbers() == [1, 2, 3]
    assert numbers(newest=True) == [8, 9, 10]
    assert numbers(4, kind="even") == [6, 8, 10]
    assert numbers(peer="B") == [6, 7, 8], "by name"
    assert len(archive.events(0, None, None, 10 * PAGE, newest=False)) == 10


@pytest.mark.parametrize("archive", [{"kept_s": 1000.0, "size_bytes": 400_000}], indirect=True)
def test_what_is_too_old_goes_and_the_file_stays_below_its_size(archive: Archive) -> None:
    archive.write(Write(entries=tuple(entry(n, at=NOW - 2000.0) for n in range(1, 11))))
    archive.tidy(NOW)
    assert archive.events(0, None, None, 10, newest=False) == []
    for start in range(100, 5100, 1000):
        samples = tuple(("tokens_per_s", NOW + n, 1.0) for n in range(start, start + 1000))
        rows = tuple(entry(n, text="x" * 200) for n in range(start, start + 1000))
        archive.write(Write(entries=rows, samples=samples))
        assert archive.tidy(NOW) <= 400_000
    assert archive.events(0, None, None, 1, newest=True)[0].number == 5099, "the newest are kept"


def test_a_damaged_file_is_put_aside_and_a_new_one_begun(archive: Archive) -> None:
    archive.path.write_bytes(b"this was a history once" * 1000)

    async def scene() -> None:
        history = History(archive, inline, clock)
        assert (await history.start()).number == 0
        history.add(entry(1))
        assert await history.flush()

    virtual_time.run(scene)
    assert archive.path.with_suffix(".damaged").exists()


def test_a_series_is_cut_evenly_into_the_points_that_are_wanted(archive: Archive) -> None:
    archive.write(Write(samples=tuple(("x", NOW + n, float(n)) for n in range(1000))))
    points = archive.series("x", NOW, 10)
    assert [value for _, value in points] == pytest.approx([49.5 + 100 * n for n in range(10)], abs=1.0)
    assert len(archive.series("x", NOW + 990, 100)) == 10
    assert archive.series("unknown", 0.0, 10) == []


def test_the_newest_figures_of_a_process_replace_those_before_and_never_shrink(archive: Archive) -> None:
    for tokens in (10, 30, 20):
        done = Contribution(
            peer="a",
            process=2**64 - 1,
            name="A",
            tokens=tokens,
            uptime_s=1.0,
            micro_batches=1,
            at=NOW + tokens,
        )
        archive.write(Write(contributions=(done,)))
    (row,) = archive.contributors(10)
    assert (row["tokens"], row["first_at"], row["last_at"]) == (30, NOW + 10, NOW + 20)


def test_a_file_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"history\.sqlite"):
        Archive(tmp_path / "nowhere" / "history.sqlite").start(10, NOW)


# --- the run as it was


def moment(at: float, tokens: int = 0) -> Snapshot:
    return Snapshot(at=at, me=own(), run=Run(tokens=tokens))


def test_the_owners_peer_keeps_the_run_as_it_was(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        owner = await world.add("owner", owner=True, folder=tmp_path)
        with pytest.raises(UsageError, match="no moment"):
            await owner.observer.ask_history({"what": "moment", "at": clock()})
        await world.add("peer")
        owner.buffer.add("moving", {"text": "before"})
        await asyncio.sleep(25.0)
        then = owner.observer.snapshot()
        await world.remove("peer")
        owner.buffer.add("moving", {"text": "after"})
        await asyncio.sleep(60.0)

        told = await owner.observer.ask_history({"what": "moment", "at": then.at})
        assert isinstance(told, dict)
        seen = Snapshot.from_json(told["snapshot"])
        assert told["before"] < seen.at <= then.at < told["after"]
        assert [peer.name for peer in seen.peers] == [peer.name for peer in then.peers]
        assert seen.verdict == then.verdict
        assert seen.verdict != owner.observer.snapshot().verdict
        assert [event.text for event in seen.events] == ["before"]
        span = await owner.observer.ask_history({"what": "span"})
        first = await owner.observer.ask_history({"what": "moment", "at": 0.0})
        assert isinstance(span, dict) and isinstance(first, dict)
        assert span["span"][0] == first["at"] and first["before"] is None

    play(scene)


def test_of_old_moments_fewer_are_kept(archive: Archive) -> None:
    ages = (*range(0, 7200, 10), *range(23 * 3600, 25 * 3600, 30))
    archive.write(Write(frames=tuple(moment(NOW - age) for age in ages)))
    archive.tidy(NOW)
    kept = []
    frame = archive.frame(NOW)
    while frame is not None:
        kept.append(NOW - frame.at)
        frame = archive.frame(frame.before) if frame.before is not None else None

    def number(first: float, last: float) -> int:
        return sum(first < age <= last for age in kept)

    assert number(-1, 3600) == 361
    assert number(3600, 7200) == pytest.approx(60, abs=1)
    assert number(23 * 3600, 24 * 3600) == pytest.approx(60, abs=1)
    assert number(24 * 3600, 25 * 3600) == pytest.approx(6, abs=1)
    frame = archive.frame(NOW - 23.5 * 3600.0)
    assert frame is not None
    archive.tidy(NOW)
    assert archive.frame(NOW - 23.5 * 3600.0) == frame, "tidied again nothing more goes"


@pytest.mark.parametrize("archive", [{"size_bytes": 100_000}], indirect=True)
def test_all_moments_keep_within_their_share(archive: Archive) -> None:
    noise = random.Random(1).randbytes(2000).hex()
    frames = tuple(
        dataclasses.replace(moment(NOW - n), me=dataclasses.replace(own(), device=f"{n}{noise}"))
        for n in range(60)
    )
    archive.write(Write(frames=frames))
    assert archive.tidy(NOW) <= 100_000
    span = archive.span()
    assert span is not None and span[1] == NOW and NOW - 59 < span[0] < NOW - 5
