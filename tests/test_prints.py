"""Fingerprints of hidden states: rounding is forgiven, a shaken stage is named, its servers with it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from serving_world import PROMPT, Peer, World, draft_of, in_place, reference, serving_spec

from shoal.node.inference.writing import Options, Text
from shoal.protocol.errors import MessageInvalid
from shoal.protocol.memory_transport import Link
from shoal.protocol.virtual_time import run
from shoal.training.data.tokenizer import ByteTokenizer
from shoal.training.model.layout import stage_layout
from shoal.training.model.stage import StageModel
from shoal.training.serving.audit import Auditor, coarsest, near_hidden
from shoal.training.serving.cached_stage import CachedStage, Span
from shoal.training.serving.prints import Prints, Shown, first_strange
from shoal.training.serving.tuner import Tuner

SEED = 7
Lie = Callable[[Peer], None]


async def audited(world: World, draft: Any = None, texts: int = 2) -> Auditor:
    tuner = Tuner(world.spec, world.client, world, random.Random(2), patience_s=2.0, offload=in_place)
    async with Auditor(tuner, 1.0, random.Random(3), dtype=coarsest(world.spec)) as auditor:
        text = Text(world.spec, ByteTokenizer(), world.client, world, random.Random(4), draft)
        text.auditor = auditor
        for _ in range(texts):
            async with text.writing(PROMPT, Options(max_new_tokens=40)) as writing:
                tokens = [piece.token async for piece in writing if piece.token is not None]
            if world.spec.model.dtype == "float32" and world.spec.model.serving_weights != "int8":
                assert tokens == reference(world, PROMPT, 40)[: len(tokens)]
        await auditor.idle()
    return auditor


@pytest.mark.parametrize(
    ("more", "noise"),
    [({}, None), ({"dtype": "bfloat16"}, None), ({"serving_weights": "int8"}, None), ({}, 0.1)],
    ids=["float32", "bfloat16", "int8", "draft"],
)
def test_honest_chains_agree(more: dict[str, Any], noise: float | None) -> None:
    async def main() -> None:
        async with World(serving_spec(3, **more), 2) as world:
            auditor = await audited(world, draft_of(world, noise) if noise is not None else None)
            figures = auditor.figures
            assert (figures.agreed, figures.disagreed, figures.unshown) == (2, 0, 0), auditor.status()

    run(main, limit_s=60)


def shakes(peer: Peer) -> None:
    """It computes a little wrongly, and says what it computed."""
    engine: Any = peer.server.engine
    compute = engine._compute

    def shaken(pieces: Any) -> Any:
        found: list[tuple[Any, list[int]]] = list(compute(pieces))
        return [(1.003 * hidden, drawn) for hidden, drawn in found]

    engine._compute = shaken


def sends_otherwise(peer: Peer) -> None:
    """It computes and says what is right, and sends on something else."""
    rows: Any = peer.server._rows
    form = rows.form

    class Form:
        def __getattr__(self, name: str) -> Any:
            return getattr(form, name)

        def pack_hidden(self, hidden: torch.Tensor, codec: str) -> memoryview:
            packed: memoryview = form.pack_hidden(hidden * 1.003, codec)
            return packed

    rows.form = Form()


@pytest.mark.parametrize("lie", [shakes, sends_otherwise])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_that_shakes_its_hidden_states_is_named_though_its_tokens_are_right(
    stage: int, lie: Lie
) -> None:
    async def main() -> None:
        async with World(serving_spec(3), 2) as world:
            liar = next(peer for peer in world.peers if peer.stage == stage)
            world.hidden = {peer.name for peer in world.peers if peer.stage == stage and peer is not liar}
            lie(liar)
            tuner = Tuner(world.spec, world.client, world, random.Random(2), offload=in_place)
            async with Auditor(tuner, 1.0, random.Random(3)) as auditor:
                async with world.generation(count=40, checked=True) as generation:
                    tokens = [token async for token in generation]
                assert tokens == reference(world, PROMPT, 40)
                world.hidden = set()
                await auditor.check(generation.written())
            (found,) = auditor.figures.evidence
            assert found.stage == stage
            assert found.said == found.recomputed
            assert liar.name in found.suspects
            named = {peer.stage for peer in world.peers if peer.name in found.suspects}
            assert named == ({stage} if lie is shakes else {stage, stage + 1})
            assert near_hidden("float32") < found.off < 0.1

    run(main, limit_s=60)


def test_a_text_that_its_reader_ends_at_a_string_is_compared_as_others_are() -> None:
    async def main() -> None:
        async with World(serving_spec(3), 2) as world:
            liar = next(peer for peer in world.peers if peer.stage == 1)
            world.hidden = {peer.name for peer in world.peers if peer.stage == 1 and peer is not liar}
            shakes(liar)
            true = reference(world, PROMPT, 40)
            stop = chr(next(token for at, token in enumerate(true) if token < 128 and token not in true[:at]))
            tuner = Tuner(world.spec, world.client, world, random.Random(2), offload=in_place)
            async with Auditor(tuner, 1.0, random.Random(3)) as auditor:
                text = Text(world.spec, ByteTokenizer(), world.client, world, random.Random(4))
                text.auditor = auditor
                async with text.writing(PROMPT, Options(max_new_tokens=60, stop=(stop,))) as writing:
                    assert [piece.token async for piece in writing] == true[: true.index(ord(stop)) + 1]
                world.hidden = set()
                await auditor.idle()
            (found,) = auditor.figures.evidence
            assert (found.stage, found.said) == (1, found.recomputed)
            assert liar.name in found.suspects

    run(main, limit_s=60)


def test_servers_that_show_nothing_are_counted_and_cost_no_check() -> None:
    async def main() -> None:
        async with World(serving_spec(2), 2) as world:
            for peer in world.peers:
                if peer.stage == 0:
                    server: Any = peer.server
                    server._tell = _silent(peer)
            auditor = await audited(world, texts=1)
            assert (auditor.figures.agreed, auditor.figures.unshown) == (1, 1)

    run(main, limit_s=60)


def _silent(peer: Peer) -> Any:
    tell = peer.server._tell

    async def told(session: Any, stream: Any) -> None:
        session.ask = lambda asked: None
        await tell(session, stream)

    return told


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_how_rows_are_batched_moves_prints_by_far_less_than_is_forgiven(dtype: str) -> None:
    """One by one, in chunks and whole: the same stage in other matrix products."""
    spec = serving_spec(1, width=256, heads=4, kv_heads=2, feedforward=512, layers=4, dtype=dtype)
    layout = stage_layout(spec, range(4))
    kind: torch.dtype = getattr(torch, dtype)
    weights = (0.05 * torch.randn(layout.size, generator=torch.Generator().manual_seed(1))).to(kind)
    tokens = torch.randint(0, 256, (64,), generator=torch.Generator().manual_seed(2))
    stage, model = CachedStage(spec, layout), StageModel(spec, layout)
    with torch.no_grad():
        whole = model.blocks(weights, model.embed(weights, tokens[None]), None)[0].float()
    for size in (1, 7, 64):
        cache = stage.cache(weights)
        parts = [
            stage.forward(weights, tokens[at : at + size], [Span(cache, at, len(tokens[at : at + size]))])
            for at in range(0, 64, size)
        ]
        off = Prints.of(torch.cat(parts).float(), SEED).off(whole, SEED)
        assert float(off.max()) < near_hidden(dtype) / 2, f"{float(off.max()):.2g}"


def test_prints_tell_of_small_values_too() -> None:
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    rows[:, 0] = 100.0  # as models have them
    other = rows.clone()
    other[2, rows[2].abs().argsort()[:32]] += 3.0  # none of the largest
    off = Prints.of(other, SEED).off(rows, SEED)
    assert off[2] > 1e-2 > 1e-6 > float(off[[0, 1, 3]].max())
    assert Prints.of(other, SEED).apart(Prints.of(rows, SEED))[2] > 1e-2


def test_prints_cross_the_wire_and_rubbish_does_not() -> None:
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    shown = Shown((1, 5, 9), SEED, Prints.of(rows, SEED), Prints.of(2 * rows, SEED))
    data = shown.pack()
    again = Shown.unpack((1, 5, 9), SEED, memoryview(data), sides=(True, True), width=64)
    assert again.pack() == data
    assert first_strange([again, again], [2 * rows.repeat(4, 1)], 10.0) is None
    short, foreign = data[:-1], b"\xff" * 4 + data[4:]
    infinite = data[: 4 * 24] + b"\0\0\x80\x7f" + data[4 * 25 :]
    for wrong in (short, foreign, infinite, data + data):
        with pytest.raises(MessageInvalid):
            Shown.unpack((1, 5, 9), SEED, memoryview(wrong), sides=(True, True), width=64)


def test_who_died_when_all_was_written_leaves_a_gap_that_nobody_is_blamed_for() -> None:
    async def main() -> None:
        async with World(serving_spec(3), 1) as world:
            last = next(peer for peer in world.peers if peer.stage == 2)
            world.network.set_link(last.name, world.client.me, Link(latency_s=1.0), one_way=True)
            tokens: list[int] = []
            async with world.generation(count=12, checked=True) as generation:
                async for token in generation:
                    tokens.append(token)
                    if len(tokens) == 4:  # the others are on their way
                        world.kill(next(peer for peer in world.peers if peer.stage == 1))
            assert tokens == reference(world, PROMPT, 12)
            assert generation.written().shown == ()

    run(main, limit_s=60)
