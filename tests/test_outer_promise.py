"""Ballots: what a member has promised is on its disk before it says so, and binds its next process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from ballots_world import FIRST, SECOND, ask, leader, offer_of, prepare
from outer_world import Keeper, Node, World, inline, round_spec
from slow_disk import SlowDisk

from shoal.protocol import wire
from shoal.protocol.errors import Busy, StreamBroken
from shoal.protocol.virtual_time import run
from shoal.training.outer.local import MemoryWeights, Sent, Take
from shoal.training.outer.messages import Go
from shoal.training.outer.promise import Promise, Promises
from shoal.training.outer.proposal import draft_of
from shoal.training.recovery.snapshots import QUEUED


async def join(world: World, incarnation: int, directory: Path) -> Node:
    node = world.node(0, incarnation, directory)
    await node.start()
    return node


def promise_file(directory: Path) -> Path:
    return next(directory.rglob("promise"))


def test_a_restarted_member_refuses_a_lower_ballot(tmp_path: Path) -> None:
    async def main() -> None:
        async with World(0) as world:
            first, second = await leader(world, FIRST), await leader(world, SECOND)
            node = await join(world, 1, tmp_path)
            node.step()
            assert not (await ask(second, node, 5)).promised
            world.kill(node)  # nothing was closed, and nothing written since the answer
            node = await join(world, 2, tmp_path)
            node.step()
            assert (await ask(second, node, 4)).promised == 5
            assert (await ask(first, node, 5)).promised == 5, "at equal numbers the leader's name decides"
            assert not (await ask(first, node, 6)).promised
            assert (await ask(second, node, 5)).promised == 6

    run(main)


def test_the_disk_has_a_promise_before_the_leader_has_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with World(0) as world:
            node = await join(world, 1, tmp_path)
            node.step()
            head = node.outer.head
            await ask(await leader(world, FIRST), node, 3)
            assert wire.decode(Promise, promise_file(tmp_path).read_bytes()) == Promise(head, 3, FIRST)

    run(main)


def test_a_promise_for_one_entry_says_nothing_of_the_next(tmp_path: Path) -> None:
    async def main() -> None:
        async with World(0) as world:
            first = await leader(world, FIRST)
            node = await join(world, 1, tmp_path)
            node.step()
            await ask(first, node, 7)
            await world.rounds(1)
            world.kill(node)
            node = await join(world, 2, tmp_path)
            node.step()
            assert node.outer.height == 1
            assert not (await ask(first, node, 1)).promised

    run(main)


def test_the_end_of_a_leaders_earlier_attempt_does_not_end_the_one_under_way(tmp_path: Path) -> None:
    """A connection that one side has given up may end later than the next one begins."""

    async def main() -> None:
        async with World(0) as world:
            first, second = await leader(world, FIRST), await leader(world, SECOND)
            node = await join(world, 1, tmp_path)
            node.step()
            async with first.open(node.name, "outer.0.round") as now:
                async with first.open(node.name, "outer.0.round") as earlier:
                    assert not (await prepare(earlier, FIRST, node, 1)).promised
                    assert not (await prepare(now, FIRST, node, 2)).promised
                await asyncio.sleep(0.1)
                assert node.outer._member.engaged_with == FIRST
                with pytest.raises(Busy):  # else its COMMIT could come after a promise to another leader
                    await ask(second, node, 3)
            await asyncio.sleep(0.1)
            assert not (await ask(second, node, 3)).promised

    run(main)


def test_what_an_earlier_attempts_round_sends_is_what_the_next_attempt_is_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The copy for the next attempt is made when the round of the earlier one, which was slow, has begun."""

    async def slow(function: Callable[..., Any], *arguments: Any) -> Any:
        await asyncio.sleep(2.0 if function.__name__ == "draw_owners" else 0.0)
        return await inline(function, *arguments)

    async def slow_sent(weights: MemoryWeights, span: slice, take: Take) -> Sent:
        await asyncio.sleep(4.0)
        return weights.sent_now(span, take)

    async def main() -> None:
        async with World(1) as world:
            (node,) = world.nodes
            first = await leader(world, FIRST)
            node.step()
            with suppress(StreamBroken):  # the member hears nothing on the earlier one, and leaves it
                async with (
                    first.open(node.name, "outer.0.round") as earlier,
                    first.open(node.name, "outer.0.round") as now,
                ):
                    answer = await prepare(earlier, FIRST, node, 1)
                    object.__setattr__(node.outer.context, "offload", slow)
                    monkeypatch.setattr(MemoryWeights, "sent", slow_sent)
                    draft = draft_of(
                        offer_of(FIRST, node, 1),
                        {node.name: answer},
                        offer_of(FIRST, node, 1),
                        node.outer._replica.log,
                        1,
                        8192,
                    )
                    await earlier.send(Go(30.0), draft.encode())
                    await asyncio.sleep(0.5)
                    node.step()
                    answer = await prepare(now, FIRST, node, 2)
                    assert answer.draft_bytes, "its round is undecided"
                    assert answer.to_step == draft.contributors[0].to_step == 1, (
                        "else these steps go in twice"
                    )

    run(main)


@pytest.mark.parametrize("damage", ["cut short", "no file of ours", "a folder"])
def test_a_disk_that_refuses_is_reported_and_rounds_go_on(tmp_path: Path, damage: str) -> None:
    async def main() -> None:
        async with World(0) as world:
            node = await join(world, 1, tmp_path)
            await world.rounds(2)
            await node.stop()
            path = promise_file(tmp_path)
            data = path.read_bytes()
            path.unlink()
            if damage == "a folder":
                (path / "in the way").mkdir(parents=True)
            else:
                path.write_bytes(data[:-1] if damage == "cut short" else bytes(5000))
                path.chmod(0o600)
            node = await join(world, 2, tmp_path)
            await world.rounds(2)
            assert node.outer.height == 4
            refused = [str(event["why"]) for kind, event in node.events if kind == "disk-refused"]
            assert any(str(path) in why for why in refused)

    run(main)


def test_a_promise_whose_leader_went_away_never_comes_after_a_later_one(tmp_path: Path) -> None:
    async def main() -> None:
        disk = SlowDisk([1.0, 0.1])
        async with World(0) as world:
            context = Keeper(world, 0, disk.offload).guard._context
            promises, deciding = Promises(context, tmp_path), asyncio.Lock()

            async def prepare(promise: Promise) -> None:
                async with deciding:
                    await promises.give(promise)

            stalled = asyncio.create_task(prepare(Promise(b"h" * 32, 3, FIRST)))
            await asyncio.sleep(0.1)
            stalled.cancel()
            await prepare(Promise(b"h" * 32, 5, SECOND))
            assert stalled.cancelled()
            await disk.still()
            assert wire.decode(Promise, promise_file(tmp_path).read_bytes()) == promises.current
            assert promises.current.ballot == 5

    run(main)


def test_a_switch_of_chains_reaches_a_disk_that_is_behind(tmp_path: Path) -> None:
    """Else the disk keeps the chain that lost, and a restart takes up whichever snapshot is highest there."""

    async def main() -> None:
        async with World(0, round_spec(outer={"snapshot_every": 1})) as world:
            node = world.node(0, directory=tmp_path)
            await node.start()
            await world.rounds(3)
            snapshots, goes_on = node.outer._snapshots, asyncio.Event()
            await snapshots._writes.join()

            async def stuck(function: Callable[..., Any], *arguments: Any) -> Any:
                await goes_on.wait()
                return function(*arguments)

            object.__setattr__(node.outer.context, "disk", stuck)
            for _ in range(QUEUED + 2):
                snapshots.write(lambda: None)
                await asyncio.sleep(0.0)
            snapshots.switch(snapshots.get(2))
            goes_on.set()
            await snapshots._writes.join()
            directory = snapshots.directory
            assert directory is not None
            assert {path.stem for path in directory.glob("snapshot-*")} == {"snapshot-000000000002"}
            assert [kind for kind, _ in node.events].count("disk-behind")

    run(main)
