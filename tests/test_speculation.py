"""A draft changes when a text comes, never what it says: good, bad and random ones, kills, rewindings."""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoint_world import known, spec_of, write_stages
from serving_world import GREEDY, PROMPT, World, draft_of, one_stage, reference, serving_spec

from shoal.node.inference.writing import Options, Text
from shoal.protocol.errors import MessageInvalid, UsageError
from shoal.protocol.identity import PeerId, Role, VerifiedPeer
from shoal.protocol.limits import DRAFT_TOKENS
from shoal.protocol.memory_transport import Link
from shoal.protocol.virtual_time import run
from shoal.training.checkpoint.hf_export import export
from shoal.training.checkpoint.manifest import WEIGHTS
from shoal.training.data.tokenizer import ByteTokenizer
from shoal.training.lane import InlineLane
from shoal.training.model.layout import stage_layout
from shoal.training.serving.ahead import Ahead, alike
from shoal.training.serving.cached_stage import CachedStage, Span
from shoal.training.serving.draft import DraftModel, load_draft
from shoal.training.serving.form import Form
from shoal.training.serving.hosted import HostedSession
from shoal.training.serving.messages import OpenSession, SamplingOptions
from shoal.training.serving.speculation import most_ahead
from shoal.training.serving.versions import ServingVersion
from shoal.training.serving.written import ChainFigures

TOKENS = 64
END = ByteTokenizer().end_of_document
POSITIONS = len(PROMPT) + TOKENS - 1  # the last token is never fed
DRAWING = SamplingOptions(temperature=0.8, top_p=0.95, top_k=50, repetition_penalty=1.2, seed=11)
SAME, GOOD, BAD, RANDOM = 0.0, 0.005, 0.1, 10.0  # noise in the draft's weights


SLOW = Link(latency_s=0.05)


@dataclass(frozen=True)
class Outcome:
    """Of a text with a draft."""

    text: list[int]
    figures: ChainFigures
    seconds: float
    computed: int  # positions, by the last stage


async def written(
    stages: int,
    noise: float | None,
    options: SamplingOptions = GREEDY,
    *,
    lost: tuple[int, ...] = (),
    at: int = 0,
    replicas: int = 1,
) -> Outcome:
    """A text; when `at` tokens have come the servers of the stages `lost` are killed."""
    async with World(serving_spec(stages), replicas, link=SLOW) as world:
        draft = None if noise is None else draft_of(world, noise)
        text: list[int] = []
        begun_s = asyncio.get_running_loop().time()
        async with world.generation(count=TOKENS, options=options, draft=draft) as generation:
            world.watched = generation
            async for token in generation:
                text.append(token)
                if len(text) == at:
                    for stage in lost:
                        world.kill(world.used(stage))
        seconds = asyncio.get_running_loop().time() - begun_s
        return Outcome(text, generation.figures, seconds, world.computed(stages - 1))


@functools.cache
def plain(stages: int, options: SamplingOptions) -> Outcome:
    return run(lambda: written(stages, None, options), limit_s=120)


@pytest.mark.parametrize(
    ("stages", "noise", "options"),
    [
        (1, GOOD, GREEDY),
        (2, SAME, GREEDY),
        (2, GOOD, GREEDY),
        (2, BAD, GREEDY),
        (2, RANDOM, GREEDY),
        (2, GOOD, DRAWING),
        (3, GOOD, GREEDY),
        (3, BAD, DRAWING),
    ],
)
def test_the_text_is_that_without_a_draft(stages: int, noise: float, options: SamplingOptions) -> None:
    outcome = run(lambda: written(stages, noise, options), limit_s=120)
    assert outcome.text == plain(stages, options).text
    if noise in (SAME, GOOD):
        assert outcome.figures.accepted > 0
    if noise != SAME:
        assert outcome.figures.refused > 0
    # each wrong guess may be computed before it is refused, and what is guessed behind it
    assert POSITIONS <= outcome.computed <= POSITIONS + outcome.figures.drafted


def test_right_guesses_are_under_way_together() -> None:
    with_draft = run(lambda: written(3, SAME))
    assert with_draft.figures.refused == 0
    assert with_draft.seconds < plain(3, GREEDY).seconds / 5
    assert run(lambda: written(3, RANDOM), limit_s=60).seconds < plain(3, GREEDY).seconds * 1.05


@pytest.mark.parametrize(("stages", "lost"), [(2, (0,)), (2, (1,)), (3, (1,)), (3, (0, 1, 2))])
def test_servers_killed_while_guesses_are_under_way_change_nothing(
    stages: int, lost: tuple[int, ...]
) -> None:
    for at in range(1, TOKENS, 21):
        killed = functools.partial(written, stages, GOOD, DRAWING, lost=lost, at=at, replicas=2)
        outcome = run(killed, limit_s=60)
        assert outcome.text == plain(stages, DRAWING).text, f"killed at token {at}"
        assert outcome.figures.replaced >= len(lost)


def test_a_draft_that_fails_costs_no_text(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with World(serving_spec(2), 1) as world:
            draft = draft_of(world)
            draft.weights.fill_(float("nan"))
            assert await world.text(draft=draft) == reference(world)

    run(main)
    assert "it goes on without" in caplog.text


def test_a_draft_ends_where_its_own_model_does() -> None:
    async def main() -> None:
        async with World(serving_spec(2), 1) as world:
            draft = draft_of(world)
            model = draft.spec.model.model_copy(update={"sequence": 16})
            draft = DraftModel(draft.spec.model_copy(update={"model": model}), draft.weights, draft.lane)
            async with world.generation(draft=draft) as generation:
                assert [token async for token in generation] == reference(world)
            assert generation.figures.drafted == 16 - len(PROMPT)

    run(main)


def test_a_draft_needs_the_runs_vocabulary() -> None:
    spec = serving_spec(2)
    model = DraftModel(*one_stage(spec), InlineLane())
    model.require(spec)
    for changes, words in (
        ({"vocabulary": 300}, "257 tokens, that of the run 300"),
        ({"tokenizer_blake3": "0" * 64}, "another one than the run's"),
    ):
        data = spec.data.model_copy(update=changes)
        with pytest.raises(UsageError, match=words):
            model.require(spec.model_copy(update={"data": data}))


def test_a_folder_in_the_llama_layout_drafts_for_texts(tmp_path: Path) -> None:
    spec = spec_of(1)
    export(write_stages(tmp_path / "store", spec), tmp_path / "draft")
    found, weights = load_draft(tmp_path / "draft")
    assert torch.equal(weights, known(stage_layout(spec, range(spec.model.layers)), WEIGHTS))

    async def main() -> None:
        async with World(serving_spec(2), 1) as world:
            model = DraftModel(found, weights, InlineLane())
            text = Text(world.spec, ByteTokenizer(), world.client, world, random.Random(1), model)
            async with text.writing(PROMPT, Options(max_new_tokens=20)) as writing:
                said = [piece.token async for piece in writing if piece.token is not None]
            assert said == list(itertools.takewhile(lambda token: token != END, reference(world, count=20)))
            assert writing.figures.drafted > 0
            data = world.spec.data.model_copy(update={"vocabulary": 300})
            larger = world.spec.model_copy(update={"data": data})
            with pytest.raises(UsageError, match="cannot draft for this run"):
                Text(larger, ByteTokenizer(), world.client, world, random.Random(1), model)

    run(main)


# --- what servers do with guesses


def session(stage: str, tokens: Sequence[int] = PROMPT, capacity: int = 200) -> HostedSession:
    """Of a server at the first or the last stage, or in between."""
    client = VerifiedPeer(PeerId("client"), frozenset({Role.INFERENCE}), "token", float("inf"))
    first, last = stage == "first", stage == "last"
    return HostedSession(
        OpenSession(b"s" * 16, 0, capacity, b""),
        client,
        ServingVersion(b"v", [], Form()),
        0,
        tokens=tokens if first or last else [],
        first=first,
        last=last,
        width=4,
        now_s=0.0,
    )


def test_the_first_stage_takes_a_bounded_number_of_guesses_and_drops_wrong_ones() -> None:
    held = session("first")
    held.guess(4, [PROMPT[4], *range(100)], 0.0)
    assert held.inputs == [*PROMPT, *range(DRAFT_TOKENS)]
    for flood in range(100):
        held.guess(4, [PROMPT[4], *[flood] * 64], 0.0)
    assert held.inputs == [*PROMPT, *[99] * DRAFT_TOKENS]
    assert held.waiting == len(held.inputs)
    held.guess(3, [7, 7, 7], 0.0)  # from another text than this
    held.guess(90, [7, 7, 7], 0.0)  # from a text that is not known here
    assert held.inputs == [*PROMPT, *[99] * DRAFT_TOKENS]
    held.take(0, 5, [99, 98], None, 0.0)  # what was drawn
    assert held.inputs == [*PROMPT, 99, 98]
    assert held.agreed == held.inputs
    with pytest.raises(MessageInvalid, match="leaves a session of 200"):
        held.guess(199, [1, 2], 0.0)


def test_what_was_rewound_while_it_was_computed_is_forgotten() -> None:
    held = session("between")
    held.take(1, 0, [1, 2, 3, 4], torch.arange(16.0).view(4, 4), 0.0)
    rows = held.next_rows(4)
    held.take(1, 2, [30, 40], -torch.ones(2, 4), 0.0)
    held.computed_rows(0, 4, rows, [], 0.0)
    assert (held.computed, held.produced, held.received) == (2, 2, 4)
    assert held.next_rows(2).tolist() == (-torch.ones(2, 4)).tolist()
    with pytest.raises(MessageInvalid, match="do not fit"):
        held.take(1, 5, [1], torch.ones(1, 4), 0.0)


def test_the_last_stage_refuses_what_follows_from_a_wrong_guess_until_it_is_mended() -> None:
    held = session("last")
    held.take(1, 0, [*PROMPT, 7, 8], torch.ones(7, 4), 0.0)
    held.next_rows(7)
    held.computed_rows(0, 7, None, [9], 0.0)  # not 7
    assert (held.inputs, held.computed, held.waiting) == (PROMPT, 5, 0)
    held.take(1, 7, [1, 2], torch.ones(2, 4), 0.0)  # was on its way
    held.take(1, 5, [7, 8], torch.ones(2, 4), 0.0)
    assert held.inputs == PROMPT
    held.take(1, 5, [9, 10], torch.ones(2, 4), 0.0)
    assert (held.inputs, held.waiting) == ([*PROMPT, 9, 10], 2)
    with pytest.raises(MessageInvalid, match="do not fit"):
        held.take(1, 8, [1], torch.ones(1, 4), 0.0)


def test_pages_of_refused_guesses_are_given_back() -> None:
    spec, weights = one_stage(serving_spec(2, sequence=256))
    stage = CachedStage(spec, stage_layout(spec, range(spec.model.layers)))
    text = torch.arange(100)
    whole = stage.forward(weights, text, [Span(stage.cache(weights), 0, 100)])
    cache = stage.cache(weights)
    stage.forward(weights, torch.cat((text[:60], 200 + torch.arange(40))), [Span(cache, 0, 100)])
    assert len(cache._pages[0]) == 2
    cache.trim(60)
    assert [len(pages) for pages in cache._pages] == [1] * spec.model.layers
    again = stage.forward(weights, text[60:], [Span(cache, 60, 40)])
    assert torch.allclose(again, whole[60:], atol=1e-5)


def test_supply_goes_on_where_the_other_differs() -> None:
    ahead = Ahead([1, 2, 3, 4])
    assert ahead.due([1, 2, 5], 3) == range(2, 3)
    ahead.sending(range(2, 3))
    assert not ahead.due([1, 2, 5], 3)
    ahead.rewind(1)
    assert ahead.due([1, 9, 5], 3) == range(1, 3)
    ahead = Ahead([1, 2, 3, 4])
    assert not ahead.due([1, 2], 2)
    assert ahead.due([1, 2, 3, 5], 4) == range(3, 4)
    assert alike([1, 2, 3], (1, 2, 4)) == 2


def test_the_better_the_draft_the_further_it_may_go_ahead() -> None:
    depths = [most_ahead(acceptance / 100) for acceptance in range(101)]
    assert depths == sorted(depths)
    assert depths[0] == 1
    assert depths[-1] == DRAFT_TOKENS
    assert most_ahead(0.8) == 10  # 0.8 ** 10 is the last above a tenth
