"""Which codecs a round uses: what the spec wants, int8 at first, by the slowest link where it says auto."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from outer_world import Node, World, round_spec
from pydantic import ValidationError

from shoal.protocol.errors import MessageInvalid
from shoal.protocol.virtual_time import run
from shoal.training.outer.codecs import codec_of, codecs_of, measure, mix_of, round_codecs, usual_codecs
from shoal.training.outer.policy import slowest_uplink
from shoal.training.spec import CompressionSection

MBIT = 1e6 / 8


def chosen(height: int = 100, uplink_mbit_s: float = 0.0, **section: object) -> tuple[str, str]:
    compression = CompressionSection.model_validate(section)
    contribution, published = round_codecs(compression, height, uplink_mbit_s * MBIT)
    return contribution.partition("/")[0], published.partition("/")[0]


def test_the_spec_decides_after_the_warm_up() -> None:
    assert chosen(20, contribution="onebit", published="int4", warmup_rounds=20) == ("int8", "int8")
    assert chosen(21, contribution="onebit", published="int4", warmup_rounds=20) == ("onebit", "int4")
    assert chosen(1, contribution="bfloat16", published="float32", warmup_rounds=20) == (
        "bfloat16",
        "float32",
    )


@pytest.mark.parametrize(
    ("uplink_mbit_s", "family"), [(0, "int8"), (1000, "int8"), (150, "int4"), (20, "onebit")]
)
def test_auto_goes_by_the_slowest_uplink_and_by_int8_where_none_is_known(
    uplink_mbit_s: float, family: str
) -> None:
    assert chosen(uplink_mbit_s=uplink_mbit_s, contribution="auto", published="auto") == (family, family)


def test_uplinks_that_nobody_knows_are_no_slow_uplinks() -> None:
    assert slowest_uplink([1.0, 1.0]) == 0.0
    assert slowest_uplink([2.0**24, 2.0**20]) == 2.0**20


def test_a_codec_of_a_later_version_is_refused_by_name() -> None:
    with pytest.raises(MessageInvalid, match="int3"):
        codec_of("int3/64")


def test_a_group_on_slow_lines_changes_to_fewer_bits_on_its_own() -> None:
    spec = round_spec(compression={"contribution": "auto", "published": "auto", "warmup_rounds": 1})

    async def main() -> None:
        async with World(3, spec) as world:
            world.uplinks = {node.name: 30 * MBIT for node in world.nodes}
            await world.rounds(3)
            families = [entry.contribution.partition("/")[0] for entry in world.entries()]
            assert families == ["int8", "onebit", "onebit"]
            assert world.equal()

    run(main)


LAYERS = CompressionSection(contribution="layers", published="layers", warmup_rounds=1)


def test_bits_go_where_they_save_most_error() -> None:
    """Three layers, of which one carries nearly all of the delta: fewer bytes than int4 for no more error."""
    generator = torch.Generator().manual_seed(1)
    layers = [torch.randn(8192, generator=generator) * size for size in (1.0, 0.02, 0.001)]
    measured = [measure(LAYERS, layer, layer.numel()) for layer in layers]
    mix = mix_of(measured)
    chosen = [choices[code] for choices, code in zip(measured, mix, strict=True)]
    assert [choice.family for choice in chosen] == ["int4", "onebit", "onebit"]
    int4 = [choices[1] for choices in measured]
    assert sum(choice.squared_error for choice in chosen) <= 1.05 * sum(c.squared_error for c in int4)
    assert sum(choice.encoded_bytes for choice in chosen) < 0.6 * sum(c.encoded_bytes for c in int4)


def test_equal_layers_all_go_in_int4_which_is_what_forecasts_say() -> None:
    values = torch.randn(8192, generator=torch.Generator().manual_seed(1))
    assert set(mix_of([measure(LAYERS, values, values.numel())] * 5)) == {1}
    assert [tag.partition("/")[0] for tag in usual_codecs(LAYERS)] == ["int4", "int4"]


def test_one_leg_alone_cannot_go_by_layers() -> None:
    with pytest.raises(ValidationError, match="layers both, or neither"):
        CompressionSection(contribution="layers", published="int8")


class Uneven(World):
    """Steps that move the first part a thousand times as far as the others."""

    def move(self, node: Node) -> None:
        change = torch.randn(node.weights.size, generator=self.generator) * 1e-4
        change[:1024] *= 1000.0
        node.weights.step(change, 100)
        node.changes.append(change.double())
        node.outer.stepped()


def test_a_group_finds_its_mix_and_stays_equal_when_its_leader_dies() -> None:
    spec = round_spec(
        compression={"contribution": "layers", "published": "layers", "warmup_rounds": 1, "entropy": "zlib"}
    )

    async def main() -> None:
        async with Uneven(4, spec) as world:
            for _ in range(6):
                height = world.nodes[-1].outer.height
                for _ in range(2):
                    for node in world.live.values():
                        world.move(node)
                await world.reach(height + 1)
                if height == 3:
                    last = world.nodes[-1].outer.entry(height + 1)
                    leader = world.live[last.leader if last is not None else world.nodes[0].name]
                    world.kill(leader)
                    world.nodes.remove(leader)
            mixes = [entry.mix for entry in world.entries()]
            assert mixes[0] == b"" and all(mix[1:] == bytes([2] * 4) for mix in mixes[2:]), mixes
            assert {mix[0] for mix in mixes[2:]} <= {0, 1}
            assert world.equal()

    run(main)


def test_a_mix_that_no_leader_makes_is_refused() -> None:
    async def main() -> None:
        async with World(2) as world:
            await world.rounds(1)
            (entry,) = world.entries()
            for mix in (b"\1", b"\3" * entry.parts, bytes(entry.parts + 1)):
                with pytest.raises(MessageInvalid, match="mix of codecs"):
                    codecs_of(dataclasses.replace(entry, mix=mix), entry.parts)

    run(main)
