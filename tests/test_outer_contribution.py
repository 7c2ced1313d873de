"""A contribution is encoded while it is sent; what cannot be is not listed, and loses nothing (P4)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from outer_faults import Faults
from outer_world import Node, World, inline, round_spec
from partition_world import PartitionWorld

from shoal.compression import kernels
from shoal.protocol.identity import PeerId
from shoal.protocol.memory_transport import Link
from shoal.protocol.virtual_time import run
from shoal.training.outer import contribution
from shoal.training.outer.buffers import Buffers
from shoal.training.outer.entry import seats_in
from shoal.training.outer.messages import ContributedPart
from shoal.training.outer.policy import in_turns
from shoal.training.outer.round import Round

ENCODE_S = 0.25  # a part
PART_VALUES = 1024


@pytest.fixture(autouse=True)
def part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work off the loop comes in pieces of a part, however small that is, and after what was taken."""
    monkeypatch.setattr(kernels, "active", None)
    monkeypatch.setattr(contribution, "_GROUP_VALUES", 1)


def encode_with(node: Node, before: Callable[[int], None], encode_s: float = ENCODE_S) -> None:
    """Each part takes this node `encode_s`; `before` gets its index when that is over."""

    async def offload(function: Callable[..., Any], *arguments: Any) -> Any:
        if function.__name__ == "_encode":
            await asyncio.sleep(encode_s)
            _, (part,) = arguments
            before(part.index)
        return await inline(function, *arguments)

    object.__setattr__(node.outer.context, "offload", offload)


def test_parts_are_on_their_way_while_others_are_still_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int]] = []
    take = Round.take_contribution

    def taking(self: Round, seat: int, part: int, data: Any) -> None:
        told.append(("arrived", part))
        take(self, seat, part, data)

    monkeypatch.setattr(Round, "take_contribution", taking)

    async def main() -> None:
        async with World(3) as world:
            for node in world.nodes:
                encode_with(node, lambda part: told.append(("encoded", part)))
            await world.rounds(1)
            assert world.equal()
            world.assert_every_step_is_in_once()
            assert len([what for what, _ in told if what == "encoded"]) == 3 * 5, "each part once a member"
            last = max(at for at, (what, _) in enumerate(told) if what == "encoded")
            assert len([what for what, _ in told[:last] if what == "arrived"]) > 2

    run(main)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError], ids=["numpy", "torch"])
@pytest.mark.parametrize("wrong", [[2], [0, 1, 2, 3, 4]], ids=["one part", "all parts"])
def test_parts_that_cannot_be_encoded_are_not_listed_and_come_with_the_next_round(
    wrong: list[int], error: type[Exception]
) -> None:
    async def main() -> None:
        async with World(3) as world:
            await world.rounds(1)
            node, left = world.nodes[1], set(wrong)

            def before(part: int) -> None:
                if part in left:
                    left.discard(part)
                    raise error("no memory for a part")

            encode_with(node, before)
            await world.rounds(1)
            entry = world.entries()[1]
            seat = entry.seat_of(node.name)
            assert [n for n in range(entry.parts) if seat not in seats_in(entry.listed_in(n))] == wrong
            assert [kind for kind, _ in node.events].count("parts-not-encoded") == len(wrong)
            await world.rounds(2)
            assert world.equal()
            world.assert_every_step_is_in_once()

    run(main)


def unlisted(world: World, node: Node) -> list[int]:
    """Parts of the last entry that do not list a node."""
    entry = world.entries()[-1]
    seat = entry.seat_of(node.name)
    return [part for part in range(entry.parts) if seat not in seats_in(entry.listed_in(part))]


@pytest.mark.parametrize(
    ("encode_s", "parts"), [([7.0] * 3, 5), ([0.5, 0.75], 20)], ids=["equal", "one is slower"]
)
def test_who_encodes_for_long_is_listed_in_all_parts_its_own_too(encode_s: list[float], parts: int) -> None:
    """Nor does anybody suspect it: a stream may be silent between two parts for longer than inside one."""

    async def main() -> None:
        spec = round_spec(outer={"round_deadline_s": 60.0})
        async with World(len(encode_s), spec, size=parts * PART_VALUES) as world:
            for node, each_s in zip(world.nodes, encode_s, strict=True):
                encode_with(node, lambda part: None, each_s)
            for _ in range(2):
                await world.rounds(1)
                assert [unlisted(world, node) for node in world.nodes] == [[]] * len(encode_s)
            assert not any(node.suspected for node in world.nodes)
            assert not {kind for node in world.nodes for kind, _ in node.events if kind.endswith("-cut")}
            assert world.equal()
            world.assert_every_step_is_in_once()

    run(main)


def test_nobody_waits_for_the_parts_of_one_who_encodes_much_slower_than_the_others() -> None:
    """It publishes what it closed without its own contribution, and others close without that too (P3)."""
    encoded: list[int] = []

    async def main() -> None:
        async with World(4, round_spec(outer={"round_deadline_s": 60.0}), size=20 * PART_VALUES) as world:
            *quick, slow = world.nodes
            for node in quick:
                encode_with(node, lambda part: None, 0.1)
            encode_with(slow, encoded.append, 0.8)
            for _ in range(3):
                encoded.clear()
                await world.rounds(1)
                assert len(encoded) < 10, "the round is over before half of its parts are encoded"
                assert [unlisted(world, node) for node in quick] == [[]] * 3
                assert len(unlisted(world, slow)) < 20
            assert not any(node.suspected for node in world.nodes)
            assert world.equal()
            world.assert_every_step_is_in_once()

    run(main)


@pytest.mark.parametrize(
    ("encode_s", "parts"), [([0.1, 0.1, 0.1, 0.3], 20), ([0.1, 0.1, 0.1, 0.8], 20), ([0.1, 0.8], 5)], ids=str
)
def test_who_encodes_much_slower_than_the_others_is_listed_in_all_parts_in_turn(
    encode_s: list[float], parts: int
) -> None:
    """What was: it encoded in the same order each round, and was listed in the first parts of it alone."""

    async def main() -> None:
        spec = round_spec(outer={"round_deadline_s": 60.0})
        async with World(len(encode_s), spec, size=parts * PART_VALUES) as world:
            for node, each_s in zip(world.nodes, encode_s, strict=True):
                encode_with(node, lambda part: None, each_s)
            missed = set(range(parts))
            for _ in range(6):
                await world.rounds(1)
                assert unlisted(world, world.nodes[-1]), "it is too slow for all parts"
                missed.intersection_update(unlisted(world, world.nodes[-1]))
            assert not missed
            assert world.equal()
            world.assert_every_step_is_in_once()

    run(main)


def test_a_leader_that_dies_after_go_has_what_was_encoded_sent_on_not_made_again() -> None:
    encoded: list[int] = []

    async def main() -> None:
        async with World(4) as world:
            await world.rounds(1)
            for node in world.nodes:
                encode_with(node, encoded.append)
            for node in world.nodes:
                node.step()
                node.step()
            async with asyncio.timeout(10.0):
                while not encoded:
                    await asyncio.sleep(0.01)
            leading = next(node for node in world.nodes if node.outer._member.engaged_with == node.name)
            world.kill(leading)
            await world.reach(2)
            assert max(encoded.count(part) for part in range(5)) <= 4, "no member encodes a part twice"
            assert world.equal()
            await world.rounds(1)

    run(main)


@pytest.mark.parametrize(
    ("count", "fragments", "seed", "encode_s"),
    [
        (7, 3, 5, [0.01, 0.1, 0.8]),
        (3, 1, 4, [0.8, 0.8, 0.8]),
        (8, 2, 1, [0.01, 0.1, 2.0]),
        (7, 2, 1, [0.8, 0.1, 2.0]),
    ],
    ids=str,
)
def test_a_cut_into_three_sides_while_parts_are_encoded_leaves_each_step_in_once(
    count: int, fragments: int, seed: int, encode_s: list[float]
) -> None:
    """Each side ends the round with other parts of the same steps.

    One that re-entered made the log hold all of them, and what only the others had was dropped; a side that
    had made more than six rounds had forgotten what it had offered to the first.
    """
    faults = Faults()

    async def main() -> None:
        outer = {"inner_steps": 4, "part_bytes": 1024, "snapshot_every": 4, "fragments": fragments}
        spec = round_spec(outer=outer)
        async with PartitionWorld(3, spec, size=6 * 256, seed=seed, wrap=faults.wrap) as world:
            for node, each_s in zip(world.nodes, encode_s, strict=True):
                encode_with(node, lambda part: None, each_s)
            sides = [[node] for node in world.nodes]
            await world.part_amid_a_round(faults, ContributedPart, count, *sides)

    run(main)


def test_after_a_jump_to_one_of_three_sides_whose_chain_loses() -> None:
    """What was: steps that a later lost entry had brought back were taken for those of the round itself, of
    which a third side's entry came back without that part, and went out of local weights (4 lost)."""
    faults = Faults()

    async def main() -> None:
        spec = round_spec(outer={"inner_steps": 4, "part_bytes": 1024, "snapshot_every": 2})
        async with PartitionWorld(3, spec, size=6 * 256, seed=1, wrap=faults.wrap, silent_s=20.0) as world:
            faults.hangs = False
            one, other, away = world.nodes
            for node in world.nodes:
                encode_with(node, lambda part: None, 0.1)
            for a, b in itertools.permutations(world.nodes, 2):
                world.network.set_link(a.name, b.name, Link(latency_s=0.02, bytes_per_s=1e5))
            await world.train(15)

            def strike(peer: PeerId) -> None:
                world.cut([one], [other], [away])
                world.freeze(away)

            faults.arm(ContributedPart, "receiving", strike, count=14)
            await world.train(60)
            world.thaw(away)
            world.heal()
            world.cut([one, away], [other])
            await world.train(8)
            assert away.outer.head == one.outer.head
            world.freeze(one)
            world.freeze(away)
            await world.train(80)
            world.thaw(one)
            world.thaw(away)
            await world.heal_whole()

    run(main)


@pytest.mark.parametrize("mine", range(4))
def test_the_owners_of_parts_are_served_in_turns(mine: int) -> None:
    owner_of = [0, 0, 1, 3, 3, 3, 2, 1, 2, 0, 1, 2]
    turn = [(mine + step) % 4 for step in (1, 2, 3, 4)]
    order = in_turns(owner_of, mine, [7] * 12)
    assert sorted(order) == list(range(12))
    assert [owner_of[part] for part in order] == 3 * turn
    missed = {0, 2, 3, 6, 9, 1, 7, 4}
    order = in_turns(owner_of, mine, [5 if part in missed else 7 for part in range(12)])
    assert {*order[:8]} == missed, "those first that were listed longest ago, of each owner in turn, too"
    assert [owner_of[part] for part in order[:4]] == turn


def addresses(buffers: Buffers, counts: Iterable[int]) -> list[int]:
    held = [buffers.take(count) for count in counts]
    return [tensor.data_ptr() for tensor in held]


def test_buffers_of_parts_come_back_as_much_memory_as_three_of_the_fragment() -> None:
    buffers = Buffers()
    whole = addresses(buffers, [24_000] * 4)
    parts = addresses(buffers, [1000] * 100)
    assert len({*whole, *addresses(buffers, [24_000] * 4)}) <= 5
    assert len({*parts} & {*addresses(buffers, [1000] * 100)}) >= 3 * 24
    assert sum(len(free) for free in buffers._free.values()) == 3 + 3 * 24
