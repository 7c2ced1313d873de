"""Checks of answers: an honest text agrees, whoever recomputes it; a false one is told with names."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch
from serving_world import PROMPT, World, in_place, serving_spec
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from shoal.node.inference.writing import Options, Text
from shoal.protocol.virtual_time import run
from shoal.training.data.tokenizer import ByteTokenizer
from shoal.training.lane import ThreadLane
from shoal.training.serving.audit import NEAR_SCORE, Auditor, Disagreement, first_wrong
from shoal.training.serving.messages import SamplingOptions
from shoal.training.serving.tuner import Tuner
from shoal.training.serving.written import Written

WAYS = {
    "greedy": Options(max_new_tokens=40),
    "drawn": Options(max_new_tokens=40, temperature=0.9, seed=5),
    "narrow": Options(
        max_new_tokens=40, temperature=1.5, top_k=20, top_p=0.8, repetition_penalty=1.2, seed=9
    ),
}


async def audited(world: World, options: Options, texts: int = 3) -> tuple[Auditor, list[Disagreement]]:
    """Some texts, all of them checked."""
    told: list[Disagreement] = []
    tuner = Tuner(world.spec, world.client, world, random.Random(2), patience_s=2.0, offload=in_place)
    async with Auditor(tuner, 1.0, random.Random(3), told.append) as auditor:
        text = Text(world.spec, ByteTokenizer(), world.client, world, random.Random(4))
        text.auditor = auditor
        for number in range(texts):
            async with text.writing([*PROMPT, number], options) as writing:
                async for _ in writing:
                    pass
        await auditor.idle()
    return auditor, told


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_what_was_written_honestly_agrees(options: Options) -> None:
    async def main() -> None:
        async with World(serving_spec(3), 2) as world:
            auditor, told = await audited(world, options)
            assert (auditor.figures.agreed, auditor.figures.disagreed, told) == (3, 0, [])

    run(main)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("stage", [0, 2])
def test_a_server_with_other_weights_is_named_by_either_side(options: Options, stage: int) -> None:
    """One replica of a stage computes on weights of its own making: it wrote, or it checked."""

    async def main() -> None:
        async with World(serving_spec(3), 2) as world:
            liar = next(peer for peer in world.peers if peer.stage == stage)
            liar.versions._kept.clear()
            liar.versions.publish(b"v1".ljust(32), world.weights[stage] * 1.3)
            auditor, told = await audited(world, options)
            assert auditor.figures.disagreed > 0
            for found in told:
                assert liar.name in {*found.servers, *found.checked_by}
                assert not set(found.servers) & set(found.checked_by)
            assert auditor.status()["evidence"]

    run(main)


def test_a_text_that_is_cut_short_is_found() -> None:
    async def main() -> None:
        async with World(serving_spec(1), 2) as world:
            tokens = await world.text(PROMPT, 20)
            honest = Written(
                (*PROMPT, *tokens), len(PROMPT), SamplingOptions(stop=(256,)), (b"",), frozenset(), False
            )
            tuner = Tuner(world.spec, world.client, world, random.Random(1), offload=in_place)
            logits = (await tuner.logits(torch.tensor([honest.tokens]))).logits[0]
            assert first_wrong(honest, logits, NEAR_SCORE) is None
            cut = Written(
                honest.tokens[:15], len(PROMPT), honest.options, honest.versions, frozenset(), stopped=True
            )
            assert first_wrong(cut, logits[:15], NEAR_SCORE) == (15, honest.tokens[15])

    run(main)


def test_a_near_tie_is_no_disagreement_and_a_clear_lie_is() -> None:
    logits = torch.zeros(4, 10)
    logits[:, 3], logits[:, 4], logits[:, 5] = 5.0, 5.0 - 1e-4, 4.0
    for said, expected in ((3, None), (4, None), (5, (2, 3))):
        text = Written((1, 2, said, 3), 2, SamplingOptions(), (b"",), frozenset(), False)
        assert first_wrong(text, logits, NEAR_SCORE) == expected


def test_without_a_second_chain_nothing_is_claimed() -> None:
    async def main() -> None:
        async with World(serving_spec(2), 1) as world:
            auditor, _ = await audited(world, WAYS["greedy"])
            assert (auditor.figures.agreed, auditor.figures.unchecked) == (0, 3)
            assert "no other peer" in auditor.figures.why_unchecked

    run(main)


class OnTheLoop(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Values in the largest tensor that torch computes with or copies in this thread."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returned = [one.alias_info for one in func._schema.returns]
        if not all(alias is not None and not alias.is_write for alias in returned):  # more than a view
            tensors = [one for one in tree_flatten((args, out))[0] if isinstance(one, torch.Tensor)]
            self.largest = max([self.largest, *(one.numel() for one in tensors)])
        return out


def test_a_check_does_not_hold_up_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """In real time, with threads: the loop's own handles tokens and prints, no rows and no logits."""
    monkeypatch.setattr("serving_world.InlineLane", lambda duration_s: ThreadLane())

    async def main() -> None:
        async with World(serving_spec(2, width=64), 2) as world:
            tuner = Tuner(world.spec, world.client, world, random.Random(2), offload=asyncio.to_thread)
            async with Auditor(tuner, 1.0, random.Random(3)) as auditor:
                async with world.generation(count=12, checked=True) as generation:
                    assert len([token async for token in generation]) == 12
                largest = []
                for offload in (asyncio.to_thread, in_place):
                    tuner.offload = offload
                    with OnTheLoop() as watch:  # type: ignore[no-untyped-call]
                        await auditor.check(generation.written())
                    largest.append(watch.largest)
                assert (auditor.figures.agreed, auditor.figures.unshown) == (2, 0)
                assert largest[0] <= len(generation.tokens)
                assert largest[1] >= len(generation.tokens) * world.spec.data.vocabulary  # the watch sees it
            for peer in world.peers:
                await peer.server.engine._lane.close()

    asyncio.run(main())


def test_only_the_share_is_checked_and_what_is_under_way_ends_with_the_auditor() -> None:
    async def main() -> None:
        async with World(serving_spec(1), 2, duration_s=5.0) as world:
            tuner = Tuner(world.spec, world.client, world, random.Random(2), offload=in_place)
            text = Written((1, 2, 3), 2, SamplingOptions(), (b"v1".ljust(32),), frozenset(), False)
            async with Auditor(tuner, 0.25, random.Random(3)) as auditor:
                for _ in range(16):
                    if auditor.draw():
                        auditor.ended(text)
                await asyncio.sleep(0.1)
                assert 1 <= len(auditor._tasks) <= 8
            assert auditor.figures.agreed == 0
            assert not auditor._tasks

    run(main)
