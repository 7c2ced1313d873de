"""Speculative against plain decoding of a target with a smaller draft, both trained here on bytes.

Called by `inference.py`. Servers and client are joined by the memory transport with a delay on every message
one way; it runs in real time, and each server and the draft compute in a thread of their own, so what the
speculation costs is part of what is measured. Texts of both ways must be the same, greedy and drawn ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from inference_swarm import Swarm, run
from safetensors.torch import load_file, save_file

from shoal.protocol.identity import PeerId, Role
from shoal.protocol.memory_transport import Link, MemoryNetwork
from shoal.training.lane import ThreadLane
from shoal.training.model.layout import genesis, stage_layout
from shoal.training.model.stage import StageModel
from shoal.training.partition import stage_ranges
from shoal.training.serving.draft import DraftModel
from shoal.training.serving.messages import SamplingOptions
from shoal.training.spec import RunSpec

SEQUENCE, BATCH = 128, 8
TARGET = {"layers": 4, "width": 128, "heads": 4, "kv_heads": 2, "feedforward": 384}
DRAFT = {"layers": 1, "width": 64, "heads": 2, "kv_heads": 1, "feedforward": 192}
STEPS = {"target": 400, "draft": 1000}
RATE = 2e-3  # of AdamW, after a warm-up and down along a cosine
PROMPT, TOKENS, TEXTS = 64, 48, 6
TEMPERATURE = 0.8  # of the drawn texts; greedy ones of a model trained so shortly repeat themselves
HELD_OUT = 0.05
Corpus = tuple[torch.Tensor, torch.Tensor]  # training and held-out bytes


def spec_of(model: dict[str, int], stages: int = 1) -> RunSpec:
    return RunSpec.model_validate({"model": {**model, "sequence": 512}, "stages": {"count": stages}})


def corpus(paths: Sequence[Path]) -> Corpus:
    """The bytes of files, and of all Python files in folders."""
    files = [one for path in paths for one in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    tokens = torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    cut = int(len(tokens) * (1 - HELD_OUT))
    return tokens[:cut].long(), tokens[cut:].long()


def trained(
    name: str, spec: RunSpec, text: Corpus, cache: Path | None, say: Callable[[str], None]
) -> torch.Tensor:
    """Flat weights [size]; taken from the folder `cache` where they lie from an earlier run."""
    layout = stage_layout(spec, range(spec.model.layers))
    mark = f"{name}-{layout.size}-{STEPS[name]}-{len(text[0])}.safetensors"
    if cache is not None and (cache / mark).exists():
        return load_file(cache / mark)["weights"]
    model, weights = StageModel(spec, layout), genesis(spec, layout).requires_grad_()
    optimizer = torch.optim.AdamW([weights], lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    rng = random.Random(0)
    for step in range(STEPS[name]):
        cosine = 0.5 * (1 + math.cos(math.pi * step / STEPS[name]))
        optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / 50, 0.1 + 0.9 * cosine)
        loss = loss_of(model, weights, text[0], rng)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_([weights], 1.0)
        optimizer.step()
        if step % 100 == 99:
            say(f"{name}: step {step + 1}, loss {float(loss.detach()):.3f}")
    flat = weights.detach()
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        save_file({"weights": flat}, cache / mark)
    return flat


def loss_of(model: StageModel, weights: torch.Tensor, text: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Nats a byte over sequences from random places."""
    starts = [rng.randrange(len(text) - SEQUENCE - 1) for _ in range(BATCH)]
    rows = torch.stack([text[start : start + SEQUENCE + 1] for start in starts])
    hidden = model.blocks(weights, model.embed(weights, rows[:, :-1]), None)
    return model.loss(weights, hidden, rows[:, 1:], None) / rows[:, 1:].numel()


def held_out_loss(spec: RunSpec, weights: torch.Tensor, text: Corpus) -> float:
    model, rng = StageModel(spec, stage_layout(spec, range(spec.model.layers))), random.Random(1)
    with torch.no_grad():
        return sum(float(loss_of(model, weights, text[1], rng)) for _ in range(8)) / 8


def by_stage(spec: RunSpec, whole: torch.Tensor) -> list[torch.Tensor]:
    """The target's weights, cut."""
    slots = {slot.name: slot for slot in stage_layout(spec_of(TARGET), range(spec.model.layers)).slots}
    found = []
    for layers in stage_ranges(spec):
        layout = stage_layout(spec, layers)
        flat = torch.empty(layout.size)
        for slot in layout.slots:
            slot.view(flat).copy_(slots[slot.name].view(whole))
        found.append(flat)
    return found


@asynccontextmanager
async def swarm(stages: int, whole: torch.Tensor, delay_s: float) -> AsyncIterator[Swarm]:
    """Servers and a client, `delay_s` apart one way."""
    network = MemoryNetwork(0, Link(latency_s=delay_s))
    names = [PeerId(f"12D3KooW{n}".ljust(52, "1")) for n in range(stages + 1)]
    client = network.transport(names[0], frozenset({Role.INFERENCE}))
    servers = [network.transport(name, frozenset({Role.TRAINER})) for name in names[1:]]
    spec = spec_of(TARGET, stages)
    async with Swarm(spec, by_stage(spec, whole), client, servers) as found:
        for transport in (client, *servers):
            await transport.start()
        try:
            yield found
        finally:
            for transport in (client, *servers):
                await transport.close()


async def compare(
    stages: int,
    delay_s: float,
    weights: Mapping[str, torch.Tensor],
    text: Corpus,
    options: SamplingOptions,
) -> tuple[float, float, int, int]:
    """Tokens a second without and with the draft, right guesses and wrong ones; held-out prompts."""
    lane = ThreadLane("draft")
    model = DraftModel(spec_of(DRAFT), weights["draft"], lane)
    plain_s = with_draft_s = 0.0
    accepted = refused = 0
    try:
        async with swarm(stages, weights["target"], delay_s) as servers:
            for number in range(TEXTS):
                at = number * (len(text[1]) - PROMPT) // TEXTS
                prompt = text[1][at : at + PROMPT].tolist()
                plain = await servers.write(prompt, TOKENS, options=options)
                with_draft = await servers.write(prompt, TOKENS, draft=model, options=options)
                if with_draft.tokens != plain.tokens:
                    raise RuntimeError("the text with a draft is another one")
                plain_s, with_draft_s = plain_s + sum(plain.each_s), with_draft_s + sum(with_draft.each_s)
                accepted += with_draft.figures.accepted
                refused += with_draft.figures.refused
    finally:
        await lane.close()
    written = TEXTS * (TOKENS - 1)
    return written / plain_s, written / with_draft_s, accepted, refused


def speculation(
    paths: Sequence[Path], cache: Path | None, stages: int, delay_s: float, say: Callable[[str], None]
) -> dict[str, float]:
    """Train both, or take them from `cache`, and measure."""
    text, figures = corpus(paths), dict[str, float]()
    weights = {}
    for name, model in (("target", TARGET), ("draft", DRAFT)):
        spec = spec_of(model)
        weights[name] = trained(name, spec, text, cache, say)
        figures[f"{name}_parameters"] = len(weights[name])
        figures[f"{name}_loss"] = held_out_loss(spec, weights[name], text)
    for suffix, options in (("", SamplingOptions()), ("_drawn", SamplingOptions(temperature=TEMPERATURE))):
        plain, with_draft, accepted, refused = run(compare(stages, delay_s, weights, text, options))
        figures |= {
            f"plain_tokens_per_s{suffix}": plain,
            f"speculative_tokens_per_s{suffix}": with_draft,
            f"speculative_speedup{suffix}": with_draft / plain,
            f"acceptance{suffix}": accepted / max(accepted + refused, 1),
        }
    return figures
