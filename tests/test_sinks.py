"""Sinks: what TensorBoard and wandb read is what the page shows; whatever becomes of them, nobody waits."""

from __future__ import annotations

import asyncio
import dataclasses
import struct
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

import pytest
from dashboard_world import full_snapshot
from view_world import NOW

from shoal.node.sinks.extra import require_extra
from shoal.node.sinks.scalars import Scalar, Scalars
from shoal.node.sinks.telling import WAITING, Sink, telling
from shoal.node.sinks.tensorboard import TensorBoard
from shoal.node.sinks.wandb import Wandb
from shoal.node.view.snapshot import Snapshot
from shoal.protocol.errors import StorageError, UsageError


def later(snapshot: Snapshot, seconds: float, tokens: int) -> Snapshot:
    run = dataclasses.replace(snapshot.run, tokens=snapshot.run.tokens + tokens)
    return dataclasses.replace(snapshot, at=snapshot.at + seconds, run=run)


async def told(sink: Sink, snapshots: Sequence[Snapshot]) -> list[str]:
    """What became an event."""
    words: list[str] = []
    async with telling([sink], lambda kind, fields: words.append(str(fields["text"]))) as take:
        for snapshot in snapshots:
            take(snapshot)
    return words


def points(found: Sequence[Scalar], name: str) -> dict[int, float]:
    return {scalar.tokens: scalar.value for scalar in found if scalar.name == name}


def test_tensorboard_reads_the_pages_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = full_snapshot()
    second = later(first, 10.0, 20_000)
    folder = tmp_path / "board"
    asyncio.run(told(TensorBoard(folder), [first, second]))
    asyncio.run(told(TensorBoard(folder), [later(second, 60.0, 0)]))  # the owner's peer started again

    board = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    board.Reload()

    def curve(name: str) -> dict[int, float]:
        events = board.Tensors(name)
        assert len({event.step for event in events}) == len(events) or not name.startswith("loss")
        return {event.step: event.tensor_proto.float_val[0] for event in events}

    train = {point.tokens: point.train for point in first.loss}
    assert curve("loss/train") == pytest.approx(train), "each point once, over all starts"
    held_out = {point.tokens: point.held_out for point in first.loss if point.held_out is not None}
    assert curve("loss/held_out") == pytest.approx(held_out)
    at = {first.run.tokens, second.run.tokens}
    assert curve("throughput/tokens_per_s") == pytest.approx(dict.fromkeys(at, first.throughput.now))
    assert curve("peers/online") == pytest.approx(dict.fromkeys(at, float(first.online)))
    for stage in first.stages:
        assert set(curve(f"stage_{stage.stage}/replicas").values()) == {float(stage.replicas)}
    assert board.Tensors("run/rounds")[0].wall_time == first.at


def test_wandb_reads_the_pages_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files, written without a network, as `wandb sync` would send them."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("shoal.node.sinks.telling.CLOSE_S", 120.0)  # a busy machine starts its helper slowly
    messages = import_module("wandb.proto.wandb_internal_pb2")

    first = full_snapshot()
    asyncio.run(told(Wandb("a project", "a run", "ab" * 32, tmp_path), [first]))
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert not Wandb("a project", "a run", "ab" * 32, tmp_path).fresh, "the next start goes on with it"

    rows = []
    for data in records(path.read_bytes()):
        record = messages.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            assert (record.run.project, record.run.run_id) == ("a project", "ab" * 8)
        if kind == "history":
            names = [(item.key or ".".join(item.nested_key), item.value_json) for item in record.history.item]
            rows.append(dict(names))
    train = {int(row["tokens"]): float(row["loss/train"]) for row in rows if "loss/train" in row}
    assert train == {point.tokens: point.train for point in first.loss}
    (now,) = [row for row in rows if "throughput/tokens_per_s" in row]
    assert int(now["tokens"]) == first.run.tokens
    assert float(now["throughput/tokens_per_s"]) == first.throughput.now
    assert float(now["peers/online"]) == first.online


def records(log: bytes) -> Iterator[bytes]:
    """Of wandb's file: LevelDB's log format, after a header of its own."""
    block, header, at, whole = 32 * 1024, 7, 7, b""
    while at + header < len(log):
        left = block - at % block
        if left < header:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)
        at += header + length
        whole += log[at - length : at]
        if kind in (1, 4):  # all of it, or its last piece
            yield whole
            whole = b""


def test_a_loss_waits_until_all_drivers_told_and_comes_once() -> None:
    snapshot = full_snapshot(at=NOW)
    newest = [point.tokens for point in snapshot.loss if point.at > NOW - 15.0]
    assert newest
    scalars = Scalars(from_the_start=True)
    assert not set(newest) & points(scalars.of(snapshot), "loss/train").keys()
    assert list(points(scalars.of(later(snapshot, 20.0, 0)), "loss/train")) == newest
    assert points(scalars.of(later(snapshot, 30.0, 0), last=True), "loss/train") == {}
    since = Scalars(from_the_start=False)
    assert points(since.of(snapshot, last=True), "loss/train") == {}, "what was before is written already"


class Stubborn:
    """A sink that takes nothing until it is told to."""

    title = "Stubborn"
    fresh = True

    def __init__(self) -> None:
        self.refuses = True
        self.taken: list[Scalar] = []
        self.asked = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def write(self, scalars: Sequence[Scalar]) -> None:
        self._loop.call_soon_threadsafe(self.asked.set)
        if self.refuses:
            raise OSError("no space left on device")
        self.taken += scalars

    def close(self) -> None:
        raise RuntimeError("a library's own trouble")


def test_a_sink_that_refuses_is_told_once_and_gets_what_it_missed() -> None:
    async def scene() -> None:
        sink, words = Stubborn(), list[str]()
        snapshot = full_snapshot()
        async with telling([sink], lambda kind, fields: words.append(str(fields["text"]))) as take:
            for seconds in range(3):
                sink.asked.clear()
                take(later(snapshot, seconds, 0))
                await sink.asked.wait()
            sink.refuses = False
            for seconds in range(3, 6):
                sink.asked.clear()
                take(later(snapshot, seconds, 0))
                await sink.asked.wait()
        assert words[0] == "Stubborn takes no figures: no space left on device"
        assert words[1:] in ([], ["Stubborn takes figures again"])  # the thread may be a step behind
        assert len({scalar.at for scalar in sink.taken if scalar.name == "peers/here"}) == 6
        assert len(points(sink.taken, "loss/train")) == len(snapshot.loss)

    asyncio.run(scene())


def test_a_sink_that_stands_still_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.node.sinks.telling.CLOSE_S", 0.05)
    gate = threading.Event()

    class Standing:
        title, fresh = "Standing", True

        def write(self, scalars: Sequence[Scalar]) -> None:
            gate.wait()

        def close(self) -> None:
            pass

    snapshot = full_snapshot()
    asyncio.run(told(Standing(), [snapshot] * (3 * WAITING)))
    gate.set()


def test_what_is_not_installed_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"pip install 'shoal\[no-such-extra\]'"):
        require_extra("no-such-extra", "--no-such-extra")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--tensorboard cannot use"):
        TensorBoard(tmp_path / "file" / "board")


def test_wandb_without_a_key_is_refused_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    import wandb

    wandb.teardown()  # it reads the environment once
    monkeypatch.setattr(wandb, "login", lambda **how: False)
    with pytest.raises(UsageError, match="wandb login"):
        Wandb("a project", "a run", "ab" * 32, tmp_path)
    wandb.teardown()
