"""Speed and accuracy of every codec on one core, by both of its paths.

    python tests/benchmarks/codec_speed.py [--mib 100] [--part-mib 1] [--repeats 7] [--codecs int8,int4,...]

Prints one line of JSON a codec and path: GB/s of fp32 for encode, decode and add_decoded, bits a value, and
what a round of 4 peers makes of the mean (encoded by each, summed, encoded once more): its relative error on
Gaussian, log-normal and Student-t (3 degrees) values, and its bias in standard deviations on one-sided ones
(mean −0.1, deviation 1e-3). Speeds are medians of CPU time, so that other work on the machine counts little,
values are handled in parts, as rounds do, and codecs that need feedback are measured without it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from shoal.compression import kernels
from shoal.compression.codec import Codec
from shoal.compression.fused import FusedCodec
from shoal.compression.registry import codec_for

FAMILIES = "float32,bfloat16,int8,int4,onebit,topk2,topk8,int8+zlib,int4+zlib,topk8+zlib"
PEERS = 4


def gaussian(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def one_sided(count: int, seed: int) -> torch.Tensor:
    return gaussian(count, seed) * 1e-3 - 0.1


def log_normal(count: int, seed: int) -> torch.Tensor:
    return gaussian(count, seed).exp()


def student_t(count: int, seed: int) -> torch.Tensor:
    chi = gaussian(3 * count, 1000 + seed).view(3, -1).square().mean(0)
    return gaussian(count, seed) / chi.sqrt()


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median CPU time of this thread, after one run that warms up."""
    work()
    taken = []
    for _ in range(repeats):
        start = time.thread_time()
        work()
        taken.append(time.thread_time() - start)
    return statistics.median(taken)


def speeds(codec: Codec, count: int, part: int, repeats: int) -> dict[str, float]:
    values = torch.split(gaussian(count, 0), part)
    encoded = [codec.encode(piece) for piece in values]
    totals = torch.split(torch.zeros(count), part)

    def encode() -> None:
        for piece in values:
            codec.encode(piece)

    def decode() -> None:
        for data, piece in zip(encoded, values, strict=True):
            codec.decode(data, piece.numel())

    def add() -> None:
        for data, total in zip(encoded, totals, strict=True):
            codec.add_decoded(data, total.numel(), 0.25, total)

    work = {"encode": encode, "decode": decode, "add": add}
    rates = {f"{name}_gb_per_s": 4e-9 * count / seconds(step, repeats) for name, step in work.items()}
    bits = 8 * sum(memoryview(data).nbytes for data in encoded) / count
    return {name: round(rate, 2) for name, rate in rates.items()} | {"bits_per_value": round(bits, 4)}


def round_error(codec: Codec, draw: Callable[[int, int], torch.Tensor]) -> tuple[float, float]:
    """Relative error of a round's published mean, and its bias in standard deviations of the mean."""
    count = 1 << 20
    total, mean = torch.zeros(count), torch.zeros(count, dtype=torch.float64)
    for seed in range(PEERS):
        values = draw(count, seed)
        mean += values.double() / PEERS
        codec.add_decoded(codec.encode(values), count, 1 / PEERS, total)
    error = codec.decode(codec.encode(total), count).double() - mean
    return float(error.norm() / mean.norm()), float(error.mean() / mean.std())


def row(codec: Codec, path: str, arguments: argparse.Namespace) -> dict[str, object]:
    count, part = (int(mib * (1 << 18)) for mib in (arguments.mib, arguments.part_mib))
    measured: dict[str, object] = {"codec": codec.tag, "path": path}
    measured |= speeds(codec, count, part, arguments.repeats)
    for name, draw in (("gaussian", gaussian), ("log_normal", log_normal), ("student_t", student_t)):
        measured[f"relative_error_{name}"] = float(f"{round_error(codec, draw)[0]:.3g}")
    return measured | {"bias_in_std_one_sided": float(f"{round_error(codec, one_sided)[1]:.2g}")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=float, default=100, help="MiB of fp32 values")
    parser.add_argument("--part-mib", type=float, default=1, help="MiB of fp32 values encoded in one call")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--codecs", default=FAMILIES, help="families, separated by commas")
    parser.add_argument("--block", type=int, default=256, help="of int8")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kernels.warm()
    compiled = kernels.active
    for family in arguments.codecs.split(","):
        codec = codec_for(family, arguments.block)
        kernels.active = compiled
        if isinstance(codec, FusedCodec) and compiled is not None:
            print(json.dumps(row(codec, "compiled", arguments)), flush=True)
            kernels.active = None
        print(json.dumps(row(codec, "portable", arguments)), flush=True)


if __name__ == "__main__":
    main()
