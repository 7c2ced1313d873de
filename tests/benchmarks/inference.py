"""Tokens a second and time to the first token: one process, `transformers`, and servers at 2 and 4 stages.

    python tests/benchmarks/inference.py [--tokens 32] [--layers 12] [--width 768] [--sessions 8] [--json]

One model with random weights (120M parameters unless told otherwise), one thread of compute each. The servers
run in this process, each with its own lane, over real sockets and mutual TLS on loopback. A hop's overhead is
what a token takes beyond the local process, shared among the hops of the ring. Both write in turns, and the
median of the turns' differences counts: a machine's memory is not equally fast all the time. Then plain
and speculative decoding over hops that are --delay-ms apart (`inference_draft.py`).

Petals 2.2.0 is not among them: its hivemind has no wheel, and building it downloads p2pd from GitHub, which
this was written without access to ("<urlopen error [Errno -2] Name or service not known>").
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from inference_draft import speculation
from inference_swarm import Swarm, run
from transport_world import Run  # the tests' helpers

from shoal.protocol.identity import Role
from shoal.training.model.layout import genesis, stage_layout
from shoal.training.partition import stage_ranges
from shoal.training.serving.cached_stage import CachedStage, Span
from shoal.training.spec import RunSpec

VOCABULARY = 16_384
PROMPT = [(37 * n) % VOCABULARY for n in range(32)]
Speed = tuple[float, float]  # seconds a token after the first (median), seconds to the first


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


class Local:
    """The whole model in one stage, with a cache and without a network."""

    def __init__(self, spec: RunSpec) -> None:
        self.stage = CachedStage(spec, stage_layout(spec, range(spec.model.layers)))
        self.weights = genesis(spec, self.stage.layout)

    def write(self, count: int) -> Speed:
        """In this thread."""
        stage, cache, start, tokens = self.stage, self.stage.cache(self.weights), 0, PROMPT
        times = [time.perf_counter()]
        for _ in range(count):
            hidden = stage.forward(self.weights, torch.tensor(tokens), [Span(cache, start, len(tokens))])
            start += len(tokens)
            tokens = [int(stage.logits(self.weights, hidden[-1:]).argmax())]
            times.append(time.perf_counter())
        each = [late - soon for soon, late in itertools.pairwise(times[1:])]
        return statistics.median(each), times[1] - times[0]


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
    return (times[1] - times[0]) / (count - 1), times[0]


@asynccontextmanager
async def swarm(spec: RunSpec) -> AsyncIterator[Swarm]:
    """Servers and a client over real sockets and mutual TLS."""
    with tempfile.TemporaryDirectory() as folder:
        net = Run(Path(folder))
        client = net.transport(Role.INFERENCE)
        servers = [net.transport(Role.TRAINER) for _ in stage_ranges(spec)]
        weights = [genesis(spec, stage_layout(spec, layers)) for layers in stage_ranges(spec)]
        async with Swarm(spec, weights, client, servers) as found:
            for transport in servers:
                await transport.start()
                net.learn(transport)
            try:
                yield found
            finally:
                await net.close()


async def alone(arguments: argparse.Namespace, local: Local) -> dict[str, list[Speed]]:
    """One session each: the local process and both swarms in turns."""
    found: dict[str, list[Speed]] = {"local": [], "2": [], "4": []}
    async with swarm(spec_of(arguments, 2)) as two, swarm(spec_of(arguments, 4)) as four:
        for servers in (two, four):
            await servers.write(PROMPT, 4)  # connections, first allocations
        for number in range(arguments.rounds):
            found["local"].append(await asyncio.to_thread(local.write, arguments.tokens))
            for name, servers in (("2", two), ("4", four)):
                text = await servers.write(PROMPT, arguments.tokens, number)
                found[name].append((statistics.median(text.each_s), text.first_s))
    return found


def median(speeds: list[Speed]) -> Speed:
    return statistics.median(each for each, _ in speeds), statistics.median(first for _, first in speeds)


async def together(arguments: argparse.Namespace, stages: int) -> float:
    """Tokens a second of several sessions over those of one, on the same servers."""
    async with swarm(spec_of(arguments, stages)) as servers:
        await servers.write(PROMPT, 4)
        one = await servers.write(PROMPT, arguments.tokens)
        texts = await asyncio.gather(
            *(servers.write(PROMPT, arguments.tokens, 2 + n) for n in range(arguments.sessions))
        )
    return common_rate([text.times_s for text in texts]) * statistics.mean(one.each_s)


def common_rate(each: list[list[float]]) -> float:
    """Tokens a second while all sessions write: from the last one's first token to the first one's last."""
    begin, end = max(times[1] for times in each), min(times[-1] for times in each)
    return sum(begin < at <= end for times in each for at in times) / (end - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--delay-ms", type=float, default=50.0, help="One way, of the speculative texts.")
    parser.add_argument(
        "--corpus", type=Path, nargs="+", default=[Path(__file__).parents[2]],
        help="Files, or folders of Python files, that target and draft are trained on; this project's own.",
    )  # fmt: skip
    parser.add_argument("--cache", type=Path, help="Folder that keeps the trained target and draft.")
    parser.add_argument("--only", choices=("swarm", "speculation"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    if arguments.only != "speculation":
        figures |= of_swarms(arguments)
    if arguments.only != "swarm":
        say = functools.partial(print, file=sys.stderr)
        figures |= speculation(arguments.corpus, arguments.cache, 2, arguments.delay_ms / 1000, say)
    if arguments.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:28} {value:14,.3f}")


def of_swarms(arguments: argparse.Namespace) -> dict[str, float]:
    spec = spec_of(arguments, 1)
    local = Local(spec)
    speeds = run(alone(arguments, local))
    their_s, their_first_s = theirs(spec, arguments.tokens)
    local_s, local_first_s = median(speeds["local"])
    figures = {
        "parameters": float(local.stage.layout.size),
        "local_tokens_per_s": 1 / local_s,
        "local_ttft_ms": 1000 * local_first_s,
        "transformers_tokens_per_s": 1 / their_s,
        "transformers_ttft_ms": 1000 * their_first_s,
    }
    for stages in (2, 4):
        each_s, first_s = median(speeds[str(stages)])
        turns = zip(speeds[str(stages)], speeds["local"], strict=True)
        beyond_s = statistics.median(here_s - alone_s for (here_s, _), (alone_s, _) in turns)
        figures |= {
            f"tokens_per_s_{stages}": 1 / each_s,
            f"ttft_ms_{stages}": 1000 * first_s,
            f"per_hop_ms_{stages}": 1000 * beyond_s / stages,
            f"batch{arguments.sessions}_speedup_{stages}": run(together(arguments, stages)),
        }
    return figures | {
        "per_hop_ms": figures["per_hop_ms_4"],
        f"batch{arguments.sessions}_speedup": figures[f"batch{arguments.sessions}_speedup_2"],
        "tokens_per_s": figures["tokens_per_s_2"],
        "ttft_ms": figures["ttft_ms_2"],
    }


if __name__ == "__main__":
    main()
