"""What codecs between stages cost in loss: `python tests/benchmarks/hop_codecs.py [--tokens N] [--json]`.

The tiny template in four stages (three boundaries), bytes of the standard library, trained micro-batch by
micro-batch through the stages' real compute and the real bytes of every hop; held-out loss is scored through
the same wire. `mixed` draws a codec for every hop of every micro-batch, as links of different speed do.
Every codec sees the same text from the same initial weights; a row has the median and the spread over seeds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from chain_world import Chain, Text, draw

from shoal.training.pipeline.payload import PayloadFormat
from shoal.training.spec import RunSpec
from shoal.training.templates import TEMPLATES

CODECS = ("float32", "bfloat16", "int8", "mixed")
SCORED = 32  # micro-batches
BAND = 0.015  # notes: activation-compression.md, section 6


def spec_of(codec: str, seed: int) -> RunSpec:
    values = TEMPLATES["tiny"].model_dump()
    values["run"]["seed"] = seed
    values["stages"]["count"] = 4
    values["inner"]["total_tokens"] = 1_000_000
    values["compression"]["activations"] = "auto" if codec == "mixed" else codec
    return RunSpec.model_validate(values)


def held_out_loss(codec: str, seed: int, tokens: int, text: Text) -> float:
    spec = spec_of(codec, seed)
    codecs, drawn = list(PayloadFormat.of(spec).codecs), random.Random(seed)
    chain = Chain(spec, lambda: drawn.choice(codecs))
    rng = random.Random(seed)
    while chain.tokens < tokens:
        chain.train(draw(text.training, spec, rng))
    rng = random.Random(0)
    return chain.loss([draw(text.held_out, spec, rng) for _ in range(SCORED)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=460_800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    library = Path(sysconfig.get_path("stdlib"))
    text = Text.of([library, *(library / name for name in ("asyncio", "email", "json", "unittest", "http"))])
    losses: dict[str, list[float]] = {codec: [] for codec in CODECS}
    for seed in range(1, options.seeds + 1):
        for codec in CODECS:
            losses[codec].append(held_out_loss(codec, seed, options.tokens, text))
            if not options.json:
                print(f"seed {seed}, {codec}: {losses[codec][-1]:.4f} nats", flush=True)
    exact = losses["float32"]
    rows = {
        codec: {
            "nats": statistics.median(found),
            "least": min(found),
            "most": max(found),
            "to_float32": statistics.median(one / other for one, other in zip(found, exact, strict=True)) - 1,
        }
        for codec, found in losses.items()
    }
    print(json.dumps(rows, indent=None if options.json else 2))
    return int(any(row["to_float32"] > BAND for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
