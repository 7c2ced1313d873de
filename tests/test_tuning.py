"""Fine-tuning through frozen remote stages: gradients are those of one process, whoever dies on the way."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from held_weights import dense
from serving_world import Peer, World, in_place, serving_spec

from shoal.protocol.errors import Busy, MessageInvalid, ShoalError, StageEmpty, Stale
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.transport import Channel, Message, Stream, call
from shoal.protocol.virtual_time import run
from shoal.training.methods import at_stage
from shoal.training.model.int8 import Int8Weights
from shoal.training.model.layout import stage_layout
from shoal.training.model.lowrank import PROMPT, TARGETS, AdapterForm, LowRank
from shoal.training.model.stage import StageModel
from shoal.training.partition import stage_ranges
from shoal.training.serving.messages import HIDDEN, LOGITS, TUNE, TunedSpan, TuneSpan
from shoal.training.serving.tuner import Tuner

FORMS = {
    "usual": AdapterForm(rank=4, alpha=8.0),
    "all": AdapterForm(rank=3, alpha=6.0, targets=TARGETS),
    "prompt": AdapterForm(rank=0, targets=(), prompt=5),
    "both": AdapterForm(rank=2, alpha=2.0, targets=("attention.k", "feedforward.down"), prompt=3),
}
Tensors = dict[str, torch.Tensor]


def tuner_of(world: World, **options: float) -> Tuner:
    return Tuner(world.spec, world.client, world, random.Random(1), offload=in_place, **options)


def tensors_of(tuner: Tuner, form: AdapterForm, seed: int = 1) -> Tensors:
    """Of all stages; B is not zero, so that A has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: shape for layout in tuner.layouts for name, shape in form.shapes(layout).items()}
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def batch(length: int = 9, sequences: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and labels of which some do not count."""
    tokens = torch.randint(0, 250, (sequences, length), generator=torch.Generator().manual_seed(7))
    labels = tokens.clone()
    labels[0, :4] = -100
    return tokens, labels


def locally(
    world: World, tokens: torch.Tensor, labels: torch.Tensor, form: AdapterForm, tensors: Tensors
) -> tuple[float, torch.Tensor, Tensors]:
    """Loss, logits and gradients by autograd in one process, on the same weights."""
    held = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    hidden = torch.empty(0)
    for layers, weights in zip(stage_ranges(world.spec), world.weights, strict=True):
        layout = stage_layout(world.spec, layers)
        model, adapter = StageModel(world.spec, layout), LowRank(form, layout, held)
        if layout.first:
            hidden = model.embed(weights, tokens)
            if form.prompt:
                hidden = torch.cat((held[PROMPT].expand(len(tokens), -1, -1), hidden), dim=1)
        hidden = model.blocks(weights, hidden, adapter)
        if layout.last:
            hidden = model.logits(weights, hidden, adapter)[:, form.prompt :]
    targets = labels[:, 1:].clamp(min=-1)
    loss = torch.nn.functional.cross_entropy(hidden[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-1)
    found = torch.autograd.grad(loss, list(held.values()))
    return float(loss.detach()), hidden.detach(), dict(zip(held, found, strict=True))


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float(gradient.abs().max()) > 1e-4, f"{name} has a gradient to compare"
        torch.testing.assert_close(found[name], gradient, rtol=0.0, atol=1e-5, msg=name)


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradients_are_those_of_one_process(stages: int, form: AdapterForm) -> None:
    async def main() -> None:
        async with World(serving_spec(stages), 2) as world:
            assert len(await compared(world, form)) == stages - 1

    run(main)


async def compared(world: World, form: AdapterForm) -> Sequence[torch.Tensor]:
    """Loss, gradients and logits of the servers are those of one process; the hidden states between them."""
    tuner = tuner_of(world)
    tensors, (tokens, labels) = tensors_of(tuner, form), batch()
    loss, logits, gradients = locally(world, tokens, labels, form, tensors)
    remote, found = await tuner.loss(tokens, labels, form, tensors, gradients=True)
    assert abs(remote - loss) < 1e-5
    assert_equal(found, gradients)
    answer = await tuner.logits(tokens, form, tensors)
    torch.testing.assert_close(answer.logits, logits, rtol=0.0, atol=1e-4)
    return answer.hidden


@pytest.mark.parametrize("form", [FORMS["all"], FORMS["both"]], ids=["all", "both"])
def test_servers_of_int8_weights_give_gradients_without_a_copy_in_floats(form: AdapterForm) -> None:
    async def main() -> None:
        async with World(serving_spec(2, serving_weights="int8"), 1) as world:
            for peer in world.peers:
                layout = stage_layout(world.spec, stage_ranges(world.spec)[peer.stage])
                held = peer.versions.get(b"").weights(torch.float32, "cpu")
                assert isinstance(held, Int8Weights)
                world.weights[peer.stage] = dense(held, layout)
            await compared(world, form)

    run(main)


class DyingLane:
    """Kills its peer at the `count`-th piece of work that any peer of a stage is given."""

    def __init__(self, world: World, stage: int, count: int) -> None:
        self._given, self._count = 0, count
        for peer in world.peers:
            if peer.stage == stage:
                lane = peer.server.engine._lane
                lane.run = self._killing(world, peer, lane.run)  # type: ignore[method-assign]

    def _killing(self, world: World, peer: Peer, inner: Callable[..., Any]) -> Any:
        async def run(*arguments: Any) -> Any:
            self._given += 1
            if self._given == self._count:
                world.kill(peer)
                await asyncio.Event().wait()
            return await inner(*arguments)

        return run


@pytest.mark.parametrize(("stage", "request_number"), [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1)])
def test_a_server_that_dies_with_a_request_in_hand_is_replaced(stage: int, request_number: int) -> None:
    """On the way there (its first request) and on the way back (its second); the last stage has but one."""
    form = FORMS["usual"]

    async def main() -> None:
        async with World(serving_spec(3), 2) as world:
            DyingLane(world, stage, request_number)
            tuner = tuner_of(world)
            tensors, (tokens, labels) = tensors_of(tuner, form), batch()
            _, found = await tuner.loss(tokens, labels, form, tensors, gradients=True)
            assert tuner.replaced == 1
            assert world.suspected
            assert_equal(found, locally(world, tokens, labels, form, tensors)[2])

    run(main)


def test_adapters_of_several_callers_share_the_base() -> None:
    async def main() -> None:
        async with World(serving_spec(2), 1) as world:
            before = [weights.clone() for weights in world.weights]
            tokens, labels = batch()
            tuners = [tuner_of(world) for _ in range(3)]
            forms = [FORMS["usual"], FORMS["all"], FORMS["both"]]
            held = [tensors_of(t, f, seed) for seed, (t, f) in enumerate(zip(tuners, forms, strict=True))]
            asked = (
                tuner.loss(tokens, labels, form, tensors, gradients=True)
                for tuner, form, tensors in zip(tuners, forms, held, strict=True)
            )
            for (_, found), form, tensors in zip(await asyncio.gather(*asked), forms, held, strict=True):
                assert_equal(found, locally(world, tokens, labels, form, tensors)[2])
            assert all(torch.equal(a, b) for a, b in zip(before, world.weights, strict=True))

    run(main)


def test_a_batch_stays_on_the_version_it_began_with_or_begins_again() -> None:
    form = FORMS["usual"]

    async def main() -> None:
        async with World(serving_spec(2), 1) as world:
            tuner = tuner_of(world)
            tensors, (tokens, labels) = tensors_of(tuner, form), batch()
            asking = asyncio.create_task(tuner.loss(tokens, labels, form, tensors, gradients=True))
            await asyncio.sleep(0.008)  # stage 0 has answered
            world.weights = [weights * 1.1 for weights in world.weights]
            for number in (2, 3):  # twice: the first version goes
                for peer in world.peers:
                    peer.versions.publish(f"v{number}".encode().ljust(32), world.weights[peer.stage])
            _, found = await asking
            assert_equal(found, locally(world, tokens, labels, form, tensors)[2])

    run(main)


def request_of(at: int = 0, **changes: object) -> TuneSpan:
    plain = TuneSpan(stage=at, version=b"", sequences=1, length=4, output=HIDDEN)
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


IDS = b"\1\0\0\0" * 4


@pytest.mark.parametrize(
    ("stage", "changes", "payload", "error", "words"),
    [
        (0, {}, IDS[:-1], MessageInvalid, "bytes came"),
        (0, {}, IDS + b"....", MessageInvalid, "bytes too many"),
        (0, {}, b"\xff" * 16, MessageInvalid, "outside the vocabulary"),
        (0, {"length": 129}, IDS, MessageInvalid, "128 positions"),
        (0, {"length": 100, "prompt": 100}, IDS, MessageInvalid, "128 positions"),
        (0, {"sequences": 256, "length": 128}, IDS, MessageInvalid, "at once"),
        (0, {"output": LOGITS}, IDS, MessageInvalid, "gives no logits"),
        (1, {"output": HIDDEN}, bytes(4 * 4 * 16), MessageInvalid, "gives no hidden"),
        (1, {"output": LOGITS}, b"\xff" * (4 * 4 * 16), MessageInvalid, "NaN"),
        (1, {"output": LOGITS, "back": True}, bytes(4 * 4 * 16), MessageInvalid, "no way back"),
        (0, {"rank": 8, "targets": ("attention.q",)}, IDS, MessageInvalid, "bytes came"),
        (0, {"stage": 1}, IDS, Stale, "holds stage 0"),
    ],
)
def test_requests_that_do_not_fit_are_refused_in_words(
    stage: int, changes: dict[str, object], payload: bytes, error: type[ShoalError], words: str
) -> None:
    async def main() -> None:
        async with World(serving_spec(2), 1) as world:
            peer, request = world.peers[stage].name, request_of(stage, **changes)
            with pytest.raises(error, match=words):
                await ask(world, peer, request, payload, stage)

    run(main)


async def ask(
    world: World, peer: PeerId, request: TuneSpan, payload: bytes, stage: int = 0
) -> Message[TunedSpan]:
    return await call(
        world.client, peer, at_stage(stage, TUNE), request, TunedSpan,
        timeout_s=10.0, payload=payload, max_payload_bytes=1 << 20, channel=Channel.BULK,
    )  # fmt: skip


def test_more_requests_than_fit_are_told_to_come_again() -> None:
    async def main() -> None:
        async with World(serving_spec(1), 1, duration_s=1.0) as world:
            peer, request = world.peers[0].name, request_of(output=LOGITS)
            outcomes = await asyncio.gather(
                *(ask(world, peer, request, IDS) for _ in range(12)), return_exceptions=True
            )
            busy = [outcome for outcome in outcomes if isinstance(outcome, Busy)]
            assert len(busy) == 8 and all(one.retry_after_s > 0.0 for one in busy)

    run(main)


@pytest.mark.parametrize("lie", ["short", "nan", "nothing"])
def test_a_server_that_lies_in_form_is_passed_over(lie: str) -> None:
    async def main() -> None:
        async with World(serving_spec(2), 1) as world:
            liar = world.network.transport(PeerId("12D3KooWliar".ljust(52, "1")), frozenset({Role.TRAINER}))

            async def answer(stream: Stream) -> None:
                request = (await stream.receive(TuneSpan, max_payload_bytes=1 << 20)).header
                values = 3 * 9 * 16 if request.output == HIDDEN else 0
                data = torch.full((values,), float("nan") if lie == "nan" else 0.0).numpy().tobytes()
                await stream.send(TunedSpan(b"x" * 32), data[:-4] if lie == "short" else data)

            for stage in range(2):
                liar.serve(at_stage(stage, TUNE), answer, frozenset(Role))
            await liar.start()
            form, tuner = FORMS["usual"], tuner_of(world)
            tensors, (tokens, labels) = tensors_of(tuner, form), batch()
            world.strangers = {1: [liar.me]} if lie == "nothing" else {0: [liar.me]}
            for _ in range(4):  # whoever is drawn first
                _, found = await tuner.loss(tokens, labels, form, tensors, gradients=True)
                assert_equal(found, locally(world, tokens, labels, form, tensors)[2])
            await liar.close()

    run(main)


def test_nobody_to_tune_with_is_an_empty_stage() -> None:
    async def main() -> None:
        async with World(serving_spec(2), 1) as world:
            world.hidden = {world.peers[1].name}
            tuner = tuner_of(world, patience_s=2.0)
            with pytest.raises(StageEmpty, match="stage 1"):
                await tuner.logits(batch()[0])

    run(main)


def test_labels_that_never_count_are_refused_before_anybody_is_asked() -> None:
    async def main() -> None:
        async with World(serving_spec(1), 1) as world:
            tokens, labels = batch()
            with pytest.raises(MessageInvalid, match="no label counts"):
                await tuner_of(world).loss(tokens, labels.fill_(-100), FORMS["usual"], {}, gradients=True)

    run(main)
