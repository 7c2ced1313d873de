"""Which codecs a round uses: what the spec wants, int8 at first, by the slowest link where it says auto."""

from __future__ import annotations

import pytest
from outer_world import World, round_spec

from shoal.protocol.errors import MessageInvalid
from shoal.protocol.virtual_time import run
from shoal.training.outer.codecs import codec_of, round_codecs
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
