"""On a link known to be slow parts are encoded as they are sent: the answer comes first, bits are equal."""

from __future__ import annotations

import asyncio
import math

import pytest
import torch
from outer_world import World, inline, round_spec

from shoal.compression.registry import codec_for
from shoal.protocol.virtual_time import run
from shoal.training.outer.codecs import RoundCodecs
from shoal.training.outer.contribution import SLOW_LINK_BYTES_PER_S, Contribution, contribute
from shoal.training.outer.local import Sent
from shoal.training.outer.parts import cut
from shoal.training.outer.residuals import Residuals
from shoal.training.spec import RunSpec

UNKNOWN, SLOW, FAST = 1.0, SLOW_LINK_BYTES_PER_S / 8, 2 * SLOW_LINK_BYTES_PER_S
FAMILIES = ["float32", "int8", "int4", "onebit", "topk8", "layers"]
SIZE = 40_000


def spec_of(family: str) -> RunSpec:
    published = "int4" if family == "topk8" else family
    return round_spec(compression={"contribution": family, "published": published, "warmup_rounds": 1})


async def offered(family: str, uplink_bytes_per_s: float, worst: float = 0.0) -> Contribution:
    """Of weights near the anchor, one of which is `worst`; something is carried in every other part."""
    section = spec_of(family).compression
    (fragment,) = cut(SIZE, 4096, section.block)
    codec = codec_for("int8" if family == "layers" else family, section.block)
    anchor, weights = (torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    weights[SIZE // 2] = worst
    residuals = Residuals(SIZE)
    residuals.retire_contributed({part.index: torch.full((part.count,), 0.1) for part in fragment.parts[::2]})
    sent = Sent(weights, 1, 1)
    codecs = RoundCodecs((codec, codec))
    return await contribute(fragment, codecs, section, anchor, sent, residuals, inline, uplink_bytes_per_s)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_encoded_on_the_way_is_what_was_encoded_ahead(family: str) -> None:
    async def main() -> None:
        ahead, late = await offered(family, UNKNOWN), await offered(family, SLOW)
        parts = ahead.fragment.parts
        assert len(ahead.encoded) == len(parts)
        assert (late.encoded, late.remainders) == ({}, {}), "the answer waits for the norm alone"
        assert late.norm == pytest.approx(ahead.norm, rel=1e-6)
        assert late.mix == ahead.mix
        assert bool(late.mix) is (family == "layers")
        for part in reversed(parts):
            assert bytes(await late.part(part)) == bytes(await ahead.part(part))
            one, other = late.remainder(part), ahead.remainder(part)
            assert one is other is None or (one is not None and other is not None and torch.equal(one, other))
        assert late.figures() == pytest.approx(ahead.figures(), rel=1e-6)

    asyncio.run(main())


@pytest.mark.parametrize("worst", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("uplink", [UNKNOWN, SLOW, FAST])
def test_weights_that_are_not_finite_are_offered_on_no_link(uplink: float, worst: float) -> None:
    async def main() -> None:
        assert not math.isfinite((await offered("int8", uplink, worst)).norm)

    asyncio.run(main())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_on_slow_links_comes_to_the_same_state(family: str) -> None:
    states = []

    async def main(uplink: float) -> None:
        async with World(3, spec_of(family)) as world:
            world.usual_uplink = uplink
            for height in range(1, 4):
                world.everybody_steps()
                world.everybody_steps()
                await world.reach(height)
            assert world.equal()
            outer = world.nodes[0].outer
            states.append((outer.anchor.clone(), outer.momentum.clone()))

    for uplink in (FAST, SLOW):
        run(main(uplink))
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))
