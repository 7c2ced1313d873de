"""What a member tells of its part in a round: phases that follow each other, bytes, and what was encoded."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from outer_world import World, round_spec

from shoal.node.view.rounds import PHASES
from shoal.protocol.memory_transport import Link
from shoal.protocol.virtual_time import run


def told(world: World) -> list[list[dict[str, Any]]]:
    """The round events of each node."""
    return [[data for kind, data in node.events if kind == "round"] for node in world.nodes]


def test_every_member_tells_all_phases_of_its_rounds_in_their_order() -> None:
    async def main() -> None:
        async with World(3) as world:
            names = [node.name for node in world.nodes]
            for one, other in itertools.combinations(names, 2):
                world.network.set_link(one, other, Link(latency_s=0.05, bytes_per_s=1e6))
            await world.rounds(3)
            for rounds in told(world):
                for data in rounds[1:]:
                    phases = data["phases"]
                    assert set(phases) == set(PHASES)
                    end_s = {name: round(phase["start_s"] + phase["s"], 3) for name, phase in phases.items()}
                    assert phases["inner"]["start_s"] <= 0.0  # steps take no time in this world
                    assert end_s["inner"] == pytest.approx(phases["prepare"]["start_s"], abs=1e-3)
                    in_order = [end_s[name] for name in ("prepare", "wait", "send", "apply")]
                    assert in_order == sorted(in_order)
                    assert end_s["collect"] <= end_s["decide"] <= end_s["apply"]
                    assert phases["wait"]["s"] >= 0.05, "GO crosses the link"

    run(main)


@pytest.mark.parametrize(("family", "bits", "leaves"), [("float32", 32.0, False), ("onebit", 2.0, True)])
def test_what_was_encoded_is_told_with_its_bits_and_what_it_left_out(
    family: str, bits: float, leaves: bool
) -> None:
    async def main() -> None:
        compression = {"contribution": family, "published": "float32", "warmup_rounds": 0}
        async with World(2, round_spec(compression=compression)) as world:
            await world.rounds(2)
            for rounds in told(world):
                data = rounds[-1]
                assert data["bytes_out"] > 0
                assert 0.0 < data["bits_per_value"] <= bits
                assert data["update_norm"] > 0.0
                assert (data["residual_norm"] > 0.0) is leaves

    run(main)
