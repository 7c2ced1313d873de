"""Tokens a second and time to the first token: one process, `transformers`, and servers at 2 and 4 stages.

    python tests/benchmarks/inference.py [--tokens 48] [--layers 12] [--width 768] [--sessions 8] [--json]

One model with random weights (120M parameters unless told otherwise), one thread of compute each. The servers
run in this process, each with its own lane, over real sockets and mutual TLS on loopback. A hop's overhead is
what a token takes beyond the local process, shared among the hops of the ring.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from transport_world import Run  # the tests' helpers

from shoal.protocol.identity import PeerId, Role
from shoal.training.lane import ThreadLane
from shoal.training.model.layout import genesis, stage_layout
from shoal.training.partition import stage_ranges
from shoal.training.pipeline.replicas import Replica
from shoal.training.serving.cached_stage import CachedStage, Span
from shoal.training.serving.chain import Generation
from shoal.training.serving.messages import SamplingOptions
from shoal.training.serving.server import SessionServer
from shoal.training.serving.versions import Versions
from shoal.training.spec import RunSpec

VOCABULARY = 16_384
PROMPT = [(37 * n) % VOCABULARY for n in range(32)]
Speed = tuple[float, float]  # tokens a second after the first, seconds to the first


class Peers:
    """One server of each stage."""

    def __init__(self) -> None:
        self.servers: list[PeerId] = []

    def of_stage(self, stage: int) -> list[Replica]:
        return [Replica(self.servers[stage], 0.001)]

    def suspect(self, peer: PeerId, reason: str) -> None:
        print(f"suspected: {peer}: {reason}", file=sys.stderr)

    def is_gone(self, peer: PeerId) -> bool:
        return False

    def has_departed(self, peer: PeerId, incarnation: int | None = None) -> bool:
        return False

    async def changed(self) -> None:
        await asyncio.sleep(0.1)


def spec_of(arguments: argparse.Namespace, stages: int) -> RunSpec:
    width = arguments.width
    model = {
        "layers": arguments.layers,
        "width": width,
        "heads": width // 64,
        "kv_heads": width // 64 // 2,
        "feedforward": 8 * width // 3 // 64 * 64,
        "sequence": 512,
    }
    data = {"vocabulary": VOCABULARY}
    return RunSpec.model_validate({"model": model, "data": data, "stages": {"count": stages}})


def local(spec: RunSpec, count: int) -> Speed:
    """One stage in this thread, with a cache."""
    stage = CachedStage(spec, stage_layout(spec, range(spec.model.layers)))
    weights = genesis(spec, stage.layout)
    cache, tokens, times = stage.cache(weights), PROMPT, [time.perf_counter()]
    for at in itertools.islice(itertools.count(), count):
        start = 0 if at == 0 else len(PROMPT) + at - 1
        hidden = stage.forward(weights, torch.tensor(tokens), [Span(cache, start, len(tokens))])
        tokens = [int(stage.logits(weights, hidden[-1:]).argmax())]
        times.append(time.perf_counter())
    return (count - 1) / (times[-1] - times[1]), times[1] - times[0]


def theirs(spec: RunSpec, count: int) -> Speed:
    """The same shape in `transformers`, its own random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaConfig, LlamaForCausalLM

        model = spec.model
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=model.width,
            intermediate_size=model.feedforward,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads,
            max_position_embeddings=model.sequence,
        )
        found: Any = LlamaForCausalLM(config)
        times: list[float] = []
        ids = torch.tensor([PROMPT])
        with torch.no_grad():
            for new in (1, count):
                begun = time.perf_counter()
                found.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                    do_sample=False, pad_token_id=0,
                )  # fmt: skip
                times.append(time.perf_counter() - begun)
    return (count - 1) / (times[1] - times[0]), times[0]


async def served(spec: RunSpec, count: int, sessions: int) -> tuple[Speed, float]:
    """(speed of one session, tokens a second of several together)."""
    with tempfile.TemporaryDirectory() as folder:
        net, peers = Run(Path(folder)), Peers()
        running: list[tuple[asyncio.Task[None], ThreadLane]] = []
        for stage, layers in enumerate(stage_ranges(spec)):
            layout = stage_layout(spec, layers)
            transport, versions, lane = net.transport(Role.TRAINER), Versions(), ThreadLane()
            versions.publish(bytes(32), genesis(spec, layout))
            server = SessionServer(
                spec, stage, layout, transport=transport, lane=lane, versions=versions, budget_bytes=512 << 20
            )
            server.serve()
            await transport.start()
            net.learn(transport)
            peers.servers.append(transport.me)
            running.append((asyncio.create_task(server.run()), lane))
        client = net.transport(Role.INFERENCE)

        async def write(number: int) -> list[float]:
            rng, options = random.Random(number), SamplingOptions()
            times = [time.perf_counter()]
            async with Generation(spec, client, peers, PROMPT, count, options, rng) as generation:
                async for _ in generation:
                    times.append(time.perf_counter())
            return times

        try:
            await write(0)  # connections, first allocations
            times = await write(1)
            each = await asyncio.gather(*(write(2 + n) for n in range(sessions)))
            together = common_rate(each)
        finally:
            for task, lane in running:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await lane.close()
            await net.close()
    return ((count - 1) / (times[-1] - times[1]), times[1] - times[0]), together


def common_rate(each: list[list[float]]) -> float:
    """Tokens a second while all sessions write: from the last one's first token to the first one's last."""
    begin, end = max(times[1] for times in each), min(times[-1] for times in each)
    return sum(begin < at <= end for times in each for at in times) / (end - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    spec = spec_of(arguments, 1)
    size = stage_layout(spec, range(spec.model.layers)).size
    figures: dict[str, float] = {"parameters": size}
    figures["local_tokens_per_s"], figures["local_ttft_s"] = local(spec, arguments.tokens)
    figures["transformers_tokens_per_s"], figures["transformers_ttft_s"] = theirs(spec, arguments.tokens)
    for stages in (2, 4):
        one, together = asyncio.run(served(spec_of(arguments, stages), arguments.tokens, arguments.sessions))
        beyond_s = 1 / one[0] - 1 / figures["local_tokens_per_s"]
        figures |= {
            f"tokens_per_s_{stages}": one[0],
            f"ttft_s_{stages}": one[1],
            f"per_hop_ms_{stages}": 1000 * beyond_s / stages,
            f"batch{arguments.sessions}_speedup_{stages}": together / one[0],
        }
    figures |= {
        "per_hop_ms": figures["per_hop_ms_4"],
        f"batch{arguments.sessions}_speedup": figures[f"batch{arguments.sessions}_speedup_2"],
        "tokens_per_s": figures["tokens_per_s_2"],
        "ttft_ms": 1000 * figures["ttft_s_2"],
    }
    if arguments.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:28} {value:14,.3f}")


if __name__ == "__main__":
    main()
