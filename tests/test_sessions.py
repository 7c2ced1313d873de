"""Sessions: batched, pinned to a version, admitted by budget, gone with their client; and their policies."""

from __future__ import annotations

import asyncio
import contextlib
import random
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

import pytest
import torch
from held_weights import dense
from serving_world import GREEDY, PROMPT, World, greedy, reference, serving_spec, weights_of
from trainer_world import TrainerWorld, round_spec

from shoal.dht.directory import SignedRecord
from shoal.protocol.errors import (
    Busy,
    MessageInvalid,
    NotHere,
    PeerUnreachable,
    StageEmpty,
    StreamBroken,
    VersionRetired,
)
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.limits import STREAMS_PER_PEER
from shoal.protocol.transport import Channel, Stream, Transport
from shoal.protocol.virtual_time import run
from shoal.training.methods import at_stage
from shoal.training.model.layout import stage_layout
from shoal.training.partition import stage_ranges
from shoal.training.pipeline.replicas import Replica
from shoal.training.serving.admission import EVICT_IDLE_S, SESSIONS, SESSIONS_PER_TOKEN, Held, admit
from shoal.training.serving.batching import MOST_ROWS, PROMPT_ROWS, Waiting, next_batch
from shoal.training.serving.chain import Generation
from shoal.training.serving.messages import (
    LENGTH,
    SESSION,
    STOP,
    OpenSession,
    SamplingOptions,
    SessionOpened,
    SessionRoute,
    TokenBias,
)
from shoal.training.serving.sampling import adjusted, filtered, next_token, uniform
from shoal.training.serving.versions import Versions

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers.generation import logits_process

MIB = 1 << 20


# --- sessions


def test_texts_written_together_are_those_written_alone() -> None:
    prompts = [[n + 1, 2 * n + 3, 5] for n in range(8)]

    async def main() -> None:
        async with World(serving_spec(2), 1, duration_s=0.05) as world:
            texts = await asyncio.gather(
                *(world.text(prompt, 40, seed=n) for n, prompt in enumerate(prompts))
            )
            assert texts == [reference(world, prompt, 40) for prompt in prompts]
            for peer in world.peers:
                figures = peer.server.engine.figures
                assert figures.positions == 8 * 42
                assert figures.batches < figures.positions / 3

    run(main, limit_s=60)


def test_servers_that_do_not_know_each_other_are_introduced_by_the_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server dials nobody whose record no client sent it; one is killed, so that routes change."""

    async def main() -> None:
        world = World(serving_spec(3), 2)
        for peer in world.peers:
            monkeypatch.setattr(peer.transport, "open", dials_known(world, peer.transport))
        async with world, world.generation(PROMPT, 40) as generation:
            tokens = []
            async for token in generation:
                tokens.append(token)
                if len(tokens) == 10:
                    world.kill(next(peer for peer in world.peers if peer.name == generation.route()[1]))
            assert tokens == reference(world, PROMPT, 40)

    run(main, limit_s=60)


def dials_known(world: World, transport: Transport) -> Callable[..., AbstractAsyncContextManager[Stream]]:
    dial, me = transport.open, transport.me

    def dial_known(
        peer: PeerId, method: str, channel: Channel = Channel.CONTROL
    ) -> AbstractAsyncContextManager[Stream]:
        if (me, peer) not in world.introduced:
            raise PeerUnreachable(f"{me} does not know {peer}")
        return dial(peer, method, channel)

    return dial_known


def test_a_stop_token_ends_the_text_and_is_no_part_of_it() -> None:
    async def main() -> None:
        async with World(serving_spec(3), 1) as world:
            whole = reference(world, PROMPT, 20)
            stop = whole[12]
            options = SamplingOptions(stop=(stop,))
            async with world.generation(count=64, options=options) as generation:
                text = [token async for token in generation]
            assert text == whole[: whole.index(stop)]
            assert generation.finish == STOP

    run(main, limit_s=60)


def test_a_text_ends_where_the_models_sequence_does() -> None:
    async def main() -> None:
        async with World(serving_spec(2, sequence=16), 1) as world:
            async with world.generation(count=64) as generation:
                text = [token async for token in generation]
            assert len(text) == 16 - len(PROMPT)
            assert generation.finish == LENGTH
            with pytest.raises(MessageInvalid, match="a prompt of 16 tokens"):
                world.generation(list(range(16)))

    run(main, limit_s=60)


def test_a_session_stays_with_its_version_until_that_is_retired() -> None:
    async def main() -> None:
        async with World(serving_spec(2), 2) as world:
            old = reference(world, PROMPT, 64)
            newer = weights_of(world.spec, seed=5)
            text: list[int] = []
            async with world.generation(count=64) as generation:
                async for token in generation:
                    text.append(token)
                    if len(text) == 20:
                        for peer in world.peers:
                            peer.versions.publish(b"v2".ljust(32), newer[peer.stage])
                    if len(text) == 40:
                        for peer in world.peers:
                            peer.versions.publish(b"v3".ljust(32), newer[peer.stage])
            assert text[:40] == old[:40]
            assert generation.figures.restarted == 1
            world.weights = newer
            assert text[40:] == reference(world, PROMPT + text[:40], 24)

    run(main, limit_s=60)


def test_who_takes_over_must_have_the_version() -> None:
    async def main() -> None:
        async with World(serving_spec(2), 3) as world:
            old = reference(world, PROMPT, 64)
            behind, ahead = world.peers[4], world.peers[5]
            for name in (b"v2", b"v3"):
                ahead.versions.publish(name.ljust(32), weights_of(world.spec, seed=5)[1])
            world.hidden = {behind.name, ahead.name}
            text: list[int] = []
            async with world.generation(count=64) as generation:
                async for token in generation:
                    text.append(token)
                    if len(text) == 20:
                        world.hidden = {behind.name}
                        world.kill(world.peers[3])
                        world.hidden = set()
            assert text == old
            assert generation.figures.restarted == 0
            assert ahead.computed == 0

    run(main, limit_s=60)


def test_versions_keep_two() -> None:
    versions, retired = Versions(), list[bytes]()
    versions.retired = retired.append
    with pytest.raises(NotHere, match="nothing to serve yet"):
        versions.get(b"")
    for name in (b"a", b"b", b"b", b"c"):
        versions.publish(name, torch.zeros(1))
    assert (versions.names, retired, versions.get(b"").name) == ([b"b", b"c"], [b"a"], b"c")
    with pytest.raises(VersionRetired):
        versions.get(b"a")


def test_a_server_without_room_says_when_to_ask_again_and_the_client_does() -> None:
    async def main() -> None:
        spec = serving_spec(2)
        async with World(spec, 1) as probe, probe.generation() as generation:
            await anext(aiter(generation))
            room = max(int(str(peer.server.status()["charged_bytes"])) for peer in probe.peers)
        async with World(spec, 1, budget_bytes=4 * room) as world:  # half of it for one token
            texts = await asyncio.gather(*(world.text(seed=n) for n in range(5)))
            assert texts == 5 * [reference(world)]
            assert any(peer.server.refused for peer in world.peers)
            assert not any(peer.server.evicted for peer in world.peers)
            assert not world.suspected

    run(main, limit_s=120)


def test_a_client_that_leaves_leaves_nothing_behind() -> None:
    async def main() -> None:
        async with World(serving_spec(3), 1) as world:
            for left_at in (0, 1, 5):
                async with world.generation() as generation:
                    tokens = aiter(generation)
                    for _ in range(left_at):
                        await anext(tokens)
                await asyncio.sleep(1)
                assert not any(peer.server.sessions for peer in world.peers)
            async with world.generation():
                await asyncio.sleep(0.1)
                world.network.kill(world.client.me)
            await asyncio.sleep(1)
            assert not any(peer.server.sessions for peer in world.peers)
            assert all(peer.transport.counters().streams_in == 0 for peer in world.peers)

    run(main, limit_s=120)


def test_a_client_that_never_reads_costs_what_it_was_charged_and_is_evicted() -> None:
    async def main() -> None:
        spec = serving_spec(1)
        async with World(spec, 1) as probe, probe.generation() as generation:
            await anext(aiter(generation))
            room = int(str(probe.peers[0].server.status()["charged_bytes"]))
        async with World(spec, 1, budget_bytes=2 * room) as world:  # half of it for one token
            server = world.peers[0].server
            opening = OpenSession(b"s" * 16, 0, len(PROMPT) + 64, b"", GREEDY)
            with contextlib.suppress(StreamBroken):
                async with world.client.open(world.peers[0].name, at_stage(0, SESSION)) as stream:
                    await stream.send(opening, torch.tensor(PROMPT, dtype=torch.int32).numpy().tobytes())
                    await asyncio.sleep(EVICT_IDLE_S / 2)
                    (session,) = server.sessions.values()
                    assert session.finish == LENGTH
                    assert server.status()["charged_bytes"] == room
                    with pytest.raises(Busy, match="1 sessions of your token"):
                        async with world.generation(patience_s=1.0) as generation:
                            await anext(aiter(generation))
                    await asyncio.sleep(EVICT_IDLE_S)
                    assert await world.text() == reference(world)
                    assert server.evicted == 1

    run(main, limit_s=200)


def test_the_same_seed_draws_the_same_text_and_another_seed_another() -> None:
    async def main() -> None:
        async with World(serving_spec(2), 2) as world:
            drawn = [
                await world.text(count=30, options=SamplingOptions(temperature=1.0, seed=seed), seed=n)
                for n, seed in enumerate((1, 1, 2))
            ]
            assert drawn[0] == drawn[1] != drawn[2]

    run(main, limit_s=60)


def test_a_route_of_a_lower_epoch_is_passed_over() -> None:
    async def main() -> None:
        async with World(serving_spec(2), 2) as world:
            server = world.peers[0].server
            async with world.client.open(world.peers[0].name, at_stage(0, SESSION)) as stream:
                opening = OpenSession(b"s" * 16, 0, 64, b"")
                await stream.send(opening, torch.tensor(PROMPT, dtype=torch.int32).numpy().tobytes())
                await stream.receive(SessionOpened)
                for epoch in (5, 4):
                    await stream.send(SessionRoute(epoch, 1, world.peers[2].name))
                await asyncio.sleep(0.1)
                (session,) = server.sessions.values()
                assert session.route is not None
                assert session.route.epoch == 5

    run(main, limit_s=60)


async def seconds_of_a_text(stage: int, idle: int) -> float:
    """While as many sessions are open at a stage and get no rows but those they began with, if any."""
    async with World(serving_spec(2), 1, duration_s=0.05) as world, contextlib.AsyncExitStack() as streams:
        for number in range(idle):
            stream = await streams.enter_async_context(
                world.client.open(world.peers[stage].name, at_stage(stage, SESSION))
            )
            opening = OpenSession(bytes([number]) * 16, stage, 64, b"", GREEDY)
            await stream.send(opening, torch.tensor(PROMPT, dtype=torch.int32).numpy().tobytes())
            await stream.receive(SessionOpened)
        await asyncio.sleep(5)
        begun_s = asyncio.get_running_loop().time()
        assert await world.text(count=20) == reference(world, PROMPT, 20)
        return asyncio.get_running_loop().time() - begun_s


def test_a_server_that_was_busy_once_does_not_claim_so_for_ever() -> None:
    async def main() -> None:
        async with World(serving_spec(1), 1) as world:
            engine = world.peers[0].server.engine
            assert engine.claimed_step_s() == 0.0
            await engine.warm(world.peers[0].versions.get(b""))
            world.slower[world.peers[0].name] = 20.0
            await world.text(PROMPT, 10)
            assert engine.claimed_step_s() == pytest.approx(0.1, rel=0.1)
            await asyncio.sleep(31)
            assert engine.claimed_step_s() == pytest.approx(0.005, rel=0.1)

    run(main, limit_s=60)


@pytest.mark.parametrize("stage", [0, 1])
def test_batches_do_not_wait_for_sessions_that_do_not_move(stage: int) -> None:
    alone_s = run(lambda: seconds_of_a_text(stage, 0), limit_s=60)
    assert run(lambda: seconds_of_a_text(stage, 10), limit_s=60) < 1.05 * alone_s


def test_a_session_that_cannot_be_drawn_for_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fragile(logits: torch.Tensor, before: list[int], options: SamplingOptions) -> int:
        return next_token(logits * torch.nan if options.seed == 1 else logits, before, options)

    monkeypatch.setattr("shoal.training.serving.engine.next_token", fragile)

    async def main() -> None:
        async with World(serving_spec(2), 1, duration_s=0.05) as world:
            sound = [asyncio.create_task(world.text(count=30, seed=n)) for n in range(6)]
            await asyncio.sleep(1)
            with pytest.raises(StageEmpty, match="scores are not finite"):
                await world.text(count=30, options=SamplingOptions(seed=1), seed=9, patience_s=1.0)
            assert await asyncio.gather(*sound) == 6 * [reference(world, PROMPT, 30)]
            assert not world.suspected

    run(main, limit_s=60)


def test_a_server_that_leaves_sends_its_sessions_away_and_takes_no_more() -> None:
    async def main() -> None:
        async with World(serving_spec(2), 2) as world:
            text: list[int] = []
            async with world.generation() as generation:
                world.watched = generation
                async for token in generation:
                    text.append(token)
                    if len(text) == 20:
                        left = world.used(1)
                        world.leave(left)
            assert text == reference(world)
            assert generation.figures.longest_gap_s < 1.0  # nobody waited for it in vain
            assert not left.server.sessions
            async with world.client.open(left.name, at_stage(1, SESSION)) as stream:
                opening = OpenSession(b"s" * 16, 1, 64, b"", GREEDY)
                await stream.send(opening, torch.tensor(PROMPT, dtype=torch.int32).numpy().tobytes())
                with pytest.raises(NotHere, match="this peer has left stage 1"):
                    await stream.receive(SessionOpened)

    run(main, limit_s=60)


# --- sampling


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_transformers(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(50, generator=generator)
    before = torch.randint(0, 50, (12,), generator=generator).tolist()
    options = SamplingOptions(temperature=0.7, top_k=17, top_p=0.8, repetition_penalty=1.3)
    scores = logits[None].double()
    for process in (
        logits_process.RepetitionPenaltyLogitsProcessor(1.3),
        logits_process.TemperatureLogitsWarper(0.7),
        logits_process.TopKLogitsWarper(17),
        logits_process.TopPLogitsWarper(0.8),
    ):
        scores = process(torch.tensor([before]), scores)
    ours = filtered(adjusted(logits, before, options).double() / 0.7, options)
    torch.testing.assert_close(ours, scores[0], rtol=1e-5, atol=1e-6)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -torch.inf])
    options = SamplingOptions(temperature=1.0, seed=3)
    counts = torch.zeros(4)
    for position in range(2000):
        counts[next_token(logits, [0] * position, options)] += 1
    assert counts[3] == 0
    torch.testing.assert_close(counts / 2000, torch.softmax(logits, dim=0), rtol=0, atol=0.03)
    assert len({uniform(seed, n) for seed in range(30) for n in range(30)}) == 900


def test_a_bias_can_force_and_forbid() -> None:
    logits = torch.tensor([5.0, 4.0, 0.0])
    forbidden = SamplingOptions(bias=(TokenBias(0, -100.0),))
    forced = SamplingOptions(temperature=1.0, bias=(TokenBias(2, 100.0),))
    assert (next_token(logits, [], forbidden), next_token(logits, [], forced)) == (1, 2)


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-300, 1e-5])
def test_next_to_no_temperature_is_greedy(temperature: float) -> None:
    assert next_token(torch.tensor([1.0, 30.0, 29.9]), [1], SamplingOptions(temperature=temperature)) == 1


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_not_finite_are_an_error(wrong: float, temperature: float) -> None:
    with pytest.raises(NotHere, match="not finite"):
        next_token(torch.tensor([-torch.inf, wrong]), [0], SamplingOptions(temperature=temperature))


# --- policies


def held(name: bytes, size: int = MIB, idle_s: float = 0.0, left_s: float = 1.0, token: str = "a") -> Held:
    return Held(name, token, size, idle_s, left_s)


def test_admission_takes_what_fits_and_evicts_the_longest_idle_only_for_need() -> None:
    idle = [held(b"1", idle_s=EVICT_IDLE_S), held(b"2", idle_s=99.0), *(held(bytes([n])) for n in range(4))]
    assert admit(MIB, "b", idle, 7 * MIB).evict == ()
    assert admit(MIB, "b", idle, 6 * MIB).evict == (b"2",)
    assert admit(2 * MIB, "b", idle, 6 * MIB).evict == (b"2", b"1")
    refused = admit(3 * MIB, "b", idle, 6 * MIB)
    assert refused.refusal
    assert not refused.evict


def test_admission_names_the_time_until_enough_is_free() -> None:
    busy = [held(bytes([n]), 2 * MIB, left_s=left_s) for n, left_s in enumerate((9.0, 2.0, 5.0))]
    assert admit(2 * MIB, "b", busy, 6 * MIB).retry_after_s == 2.0
    assert admit(3 * MIB, "b", busy, 6 * MIB).retry_after_s == 5.0
    assert "ask for fewer tokens" in admit(4 * MIB, "b", busy, 6 * MIB).refusal


def test_admission_bounds_sessions_of_one_token_and_of_all() -> None:
    own = [held(bytes([n]), size=1, token="b") for n in range(SESSIONS_PER_TOKEN)]
    assert "of your token" in admit(1, "b", own, MIB).refusal
    assert not admit(1, "a", own, MIB).refusal
    everybody = [held(n.to_bytes(2), size=1, token=str(n % 50)) for n in range(SESSIONS)]
    assert admit(1, "x", everybody, MIB).refusal
    assert SESSIONS < STREAMS_PER_PEER / 2  # a session holds a stream from a server to the next


def test_admission_leaves_half_of_the_room_to_other_tokens() -> None:
    own = [held(b"1", left_s=4.0, token="b"), held(b"2", left_s=3.0, token="b")]
    refused = admit(MIB, "b", own, 5 * MIB)
    assert "of your token" in refused.refusal
    assert refused.retry_after_s == 3.0
    assert not admit(MIB, "a", own, 5 * MIB).refusal
    own[1] = held(b"2", idle_s=EVICT_IDLE_S, token="b")
    assert admit(MIB, "b", [*own, held(b"3", idle_s=99.0)], 5 * MIB).evict == (b"2",)


def test_peers_of_one_token_share_what_a_token_may_have() -> None:
    async def main() -> None:
        async with World(serving_spec(1), 1) as world, contextlib.AsyncExitStack() as stack:
            names = [PeerId(f"one{n:02}x".ljust(52, "1")) for n in range(SESSIONS_PER_TOKEN + 1)]
            roles, answers = frozenset({Role.INFERENCE}), list[object]()
            for number, name in enumerate(names):
                transport = world.network.transport(name, roles, token_id="shared")
                await transport.start()
                stream = await stack.enter_async_context(
                    transport.open(world.peers[0].name, at_stage(0, SESSION))
                )
                opening = OpenSession(bytes([number]) * 16, 0, 64, b"", GREEDY)
                await stream.send(opening, torch.tensor(PROMPT, dtype=torch.int32).numpy().tobytes())
                try:
                    answers.append((await stream.receive(SessionOpened)).header)
                except Busy as busy:
                    answers.append(busy)
            assert [isinstance(one, Busy) for one in answers] == SESSIONS_PER_TOKEN * [False] + [True]
            assert "of your token" in str(answers[-1])
            assert await world.text() == reference(world)

    run(main, limit_s=60)


def test_steps_go_first_and_prompts_still_get_their_share() -> None:
    prompt = Waiting(0, b"v", 1000, 0.0)
    steps = [Waiting(n, b"v", 1, float(n)) for n in range(1, 200)]
    batch = next_batch([prompt, *steps])
    assert sum(rows for _, rows in batch) == MOST_ROWS
    assert (0, PROMPT_ROWS) in batch
    assert [key for key, _ in batch[:3]] == [1, 2, 3]
    assert next_batch([prompt]) == [(0, MOST_ROWS)]
    assert next_batch([]) == []


def test_a_batch_is_of_one_version_and_nobody_waits_for_ever() -> None:
    waiting = [Waiting(0, b"old", 1, 1.0), Waiting(1, b"new", 1, 0.5), Waiting(2, b"new", 1, 2.0)]
    assert next_batch(waiting) == [(1, 1), (2, 1)]
    assert next_batch([Waiting(0, b"old", 1, 1.0), Waiting(1, b"new", 1, 3.0)]) == [(0, 1)]


# --- beside training


class Everybody:
    """The replicas of a training swarm."""

    def __init__(self, world: TrainerWorld) -> None:
        self._world = world

    def of_stage(self, stage: int) -> list[Replica]:
        return [Replica(one.transport.me, 0.005) for one in self._world.group(stage)]

    def suspect(self, peer: PeerId, reason: str) -> None:
        raise AssertionError(f"{peer}: {reason}")

    def is_gone(self, peer: PeerId) -> bool:
        return False

    async def meet(self, peer: PeerId, chain: Sequence[PeerId]) -> None:
        return

    def record_of(self, peer: PeerId) -> SignedRecord | None:
        return None

    def has_departed(self, peer: PeerId, incarnation: int | None = None) -> bool:
        return False

    async def changed(self) -> None:
        await asyncio.sleep(0.1)


def kept(world: TrainerWorld, stage: int, name: bytes) -> torch.Tensor:
    """The weights of a version of a stage, the same at all its replicas that have it."""
    found = []
    for replica in world.group(stage):
        with contextlib.suppress(VersionRetired):
            weights = replica.trainer.serving.versions.get(name).weights(torch.float32, "cpu")
            found.append(dense(weights, stage_layout(world.spec, stage_ranges(world.spec)[stage])))
    assert all(torch.equal(found[0], other) for other in found)
    return found[0]


@pytest.mark.parametrize(("form", "texts"), [("dtype", 4), ("int8", 2)])
def test_a_swarm_in_training_serves_the_anchors_of_a_version(form: str, texts: int) -> None:
    async def main() -> None:
        spec = round_spec(2, outer={"snapshot_every": 8})
        model = spec.model.model_copy(update={"serving_weights": form})
        spec = spec.model_copy(update={"model": model})
        compared = 0
        async with TrainerWorld(spec) as world:
            for number in range(4):
                await world.add(number, number // 2)
            client = world.network.transport(PeerId("client".ljust(52, "1")), frozenset({Role.INFERENCE}))
            await client.start()
            await world.heights(1)
            begun = world.group(0)[0].trainer.outer.height
            for seed in range(texts):
                everybody, rng = Everybody(world), random.Random(seed)
                async with Generation(spec, client, everybody, [1, 2, 3], 6, GREEDY, rng) as generation:
                    tokens = aiter(generation)
                    text = [await anext(tokens)]
                    weights = [kept(world, stage, name) for stage, name in enumerate(generation.versions())]
                    text += [token async for token in tokens]
                if not generation.figures.restarted:
                    assert text == greedy(spec, weights, [1, 2, 3], 6)
                    compared += 1
            before = world.group(0)[0].trainer.outer.height
            await world.heights(before + 2)
        assert before > begun
        assert compared >= texts // 2

    run(main, limit_s=600)
