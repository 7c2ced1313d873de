"""The swarm in Transformers' shape: text, logits, fine-tuning; adapters that go to PEFT and back.

The servers are real, on the memory network, on an event loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_world import World, in_place, serving_spec

from shoal.node.hf import SwarmModelForCausalLM
from shoal.node.inference.writing import Text
from shoal.protocol.errors import StorageError, UsageError
from shoal.training.checkpoint.hf import config_of, their_name
from shoal.training.data.tokenizer import ByteTokenizer
from shoal.training.model.layout import stage_layout
from shoal.training.partition import stage_ranges
from shoal.training.serving.tuner import Tuner

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

PROMPT = torch.tensor([[10, 20, 30, 40, 50]])
ADAPTED = ["q_proj", "v_proj", "down_proj"]


class Served:
    """A world that runs, and a model that asks it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.world: World = self.wait(self._open())
        self.model = self.new_model()

    def new_model(self) -> SwarmModelForCausalLM:
        """One without an adapter."""
        rng, world = random.Random(1), self.world
        text = Text(world.spec, ByteTokenizer(), world.client, world, rng)
        tuner = Tuner(world.spec, world.client, world, rng, offload=in_place)
        return SwarmModelForCausalLM(text, tuner, self.wait)

    def wait(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60.0)

    async def _open(self) -> World:
        return await World(serving_spec(3), 1, duration_s=0.0).__aenter__()

    def close(self) -> None:
        self.wait(self.world.__aexit__())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def theirs(self) -> Any:
        """The same weights in `transformers`."""
        spec = self.world.spec
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = LlamaForCausalLM(LlamaConfig(**config_of(spec, 256, "float32")))
        state = {
            their_name(slot.name): slot.view(weights)
            for layers, weights in zip(stage_ranges(spec), self.world.weights, strict=True)
            for slot in stage_layout(spec, layers).slots
        }
        found.load_state_dict(state, strict=True)
        return found

    def tuned(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's parameters under PEFT's names, B not zero."""
        sides, found = {"a": "lora_A", "b": "lora_B"}, {}
        for name, parameter in self.model.adapter.items():
            slot, _, side = name.replace("/", ".").rpartition(".")
            if side == "b":
                torch.nn.init.normal_(parameter, std=0.2)
            module = their_name(slot).removesuffix(".weight")
            found[f"base_model.model.{module}.{sides[side]}.default.weight"] = parameter
        return found


@pytest.fixture(scope="module")
def running() -> Iterator[Served]:
    found = Served()
    yield found
    found.close()


@pytest.fixture
def served(running: Served) -> Served:
    """The same swarm for all; each test adapts a model of its own."""
    running.model = running.new_model()
    return running


def test_logits_and_text_are_those_of_transformers(served: Served) -> None:
    theirs = served.theirs()
    with torch.no_grad():
        expected = theirs(PROMPT, output_hidden_states=True)
    found = served.model(PROMPT, output_hidden_states=True)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0.0, atol=1e-4)
    for mine, other in zip(found.hidden_states, expected.hidden_states[1:], strict=False):
        torch.testing.assert_close(mine, other, rtol=0.0, atol=1e-4)
    written = served.model.generate(PROMPT.repeat(2, 1), max_new_tokens=20)
    assert torch.equal(written[0], written[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(written[:1], theirs.generate(PROMPT, max_new_tokens=20, do_sample=False))
    assert served.model.config.hidden_size == theirs.config.hidden_size


def test_a_streamer_gets_every_token(served: Served) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, tokens: torch.Tensor) -> None:
            self.tokens += tokens.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    written = served.model.generate(PROMPT, max_new_tokens=8, streamer=streamer)
    assert streamer.tokens == written[0].tolist() and streamer.ended


def test_tuning_has_pefts_gradients_and_lowers_the_loss(served: Served) -> None:
    model = served.model
    plain = model.generate(PROMPT, max_new_tokens=6)
    model.add_adapter(rank=4, alpha=8.0, target_modules=ADAPTED)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=6), plain), "B is zero at first"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=ADAPTED, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.get_peft_model(served.theirs(), config)
    mine, theirs = served.tuned(), dict(other.named_parameters())
    for name, parameter in mine.items():
        theirs[name].data.copy_(parameter.data)
    tokens = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(3))
    labels = tokens.clone()
    labels[1, 8:] = -100  # padding on the right
    loss, expected = model(tokens, labels=labels).loss, other(tokens, labels=labels).loss
    first = float(loss.detach())
    assert abs(first - float(expected.detach())) < 1e-5
    loss.backward()
    expected.backward()
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0.0, atol=1e-5, msg=name)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.9 * first


def test_an_adapter_goes_to_peft_and_comes_back(served: Served, tmp_path: Path) -> None:
    model = served.model
    model.add_adapter(rank=2, alpha=3.0, target_modules=["k_proj", "up_proj"], seed=5)
    served.tuned()
    model.save_adapter(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.PeftModel.from_pretrained(served.theirs(), tmp_path / "ours")
        with torch.no_grad():
            expected = other(PROMPT).logits
        other.save_pretrained(str(tmp_path / "theirs"))
    torch.testing.assert_close(model(PROMPT).logits, expected, rtol=0.0, atol=1e-4)
    held = {name: parameter.detach().clone() for name, parameter in model.adapter.items()}
    model.add_adapter(rank=1)
    model.load_adapter(tmp_path / "theirs")
    assert held.keys() == model.adapter.keys()
    assert all(torch.equal(model.adapter[name], tensor) for name, tensor in held.items())


def test_a_soft_prompt_alone_is_tuned(served: Served) -> None:
    model = served.model
    model.add_adapter(rank=0, target_modules=[], prompt_tokens=4)
    model(PROMPT, labels=PROMPT).loss.backward()
    (parameter,) = model.parameters()
    assert parameter.shape == (4, 16)
    assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0.0
    assert model.generate(PROMPT, max_new_tokens=3).shape == (1, 8)


def test_what_does_not_fit_is_refused_by_name(served: Served, tmp_path: Path) -> None:
    model = served.model
    with pytest.raises(UsageError, match="z_proj"):
        model.add_adapter(target_modules=["z_proj"])
    with pytest.raises(StorageError, match="no adapter"):
        model.load_adapter(tmp_path / "nothing")
    model.add_adapter(rank=2)
    model.save_adapter(tmp_path / "small")
    config = tmp_path / "small" / "adapter_config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"r": 3}))
    with pytest.raises(UsageError, match="does not fit"):
        model.load_adapter(tmp_path / "small")
    config.write_text(json.dumps(said | {"peft_type": "LOHA"}))
    with pytest.raises(UsageError, match="LOHA"):
        model.load_adapter(tmp_path / "small")
    with pytest.raises(UsageError, match="left"):
        model(PROMPT, attention_mask=torch.tensor([[0, 1, 1, 1, 1]]))
    model.add_adapter(rank=0, target_modules=[], prompt_tokens=2)
    with pytest.raises(UsageError, match="soft prompts"):
        model.save_adapter(tmp_path / "prompt")
