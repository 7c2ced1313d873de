"""Tokens a second: one process, torch's 1F1B, and the swarm at 1, 2 and 4 stages, in one run on one machine.

    python tests/benchmarks/pipeline.py [--seconds 30] [--repeats 3] [--stages 1,2,4] [--json]

The systems take turns, `--repeats` times, so that a machine whose speed drifts treats all alike; medians and
ratios are printed. Same model (small template, 11M parameters), micro-batches, tokens per optimizer step and
cores for all. The swarm is `shoal up` and `shoal join`: processes, mutual TLS, DHT, rounds and all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline_baselines import MICRO_BATCHES

from shoal.node.demo.processes import JsonObject, PeerProcess, run_shoal
from shoal.training import spec_file, spec_text
from shoal.training.spec import RunSpec
from shoal.training.templates import TEMPLATES

BASELINES = Path(__file__).parent / "pipeline_baselines.py"
START_S = 120.0
WARM_UP_S = 15.0  # first micro-batches, first rounds, slow start of routing


def benchmark_spec(stages: int, sequences: int) -> RunSpec:
    """The small template with an optimizer step for every MICRO_BATCHES micro-batches, as in 1F1B."""
    values = TEMPLATES["small"].model_dump()
    values["stages"]["count"] = stages
    values["inner"]["micro_batch_sequences"] = sequences
    values["inner"]["inner_tokens"] = MICRO_BATCHES * sequences * values["model"]["sequence"]
    values["inner"]["in_flight"] = 2 * stages
    return RunSpec.model_validate(values)


def write_spec(folder: Path, stages: int, sequences: int) -> Path:
    path = folder / f"stages-{stages}.toml"
    path.write_text(spec_text.render(benchmark_spec(stages, sequences)))
    spec_file.load(path)
    return path


def one_process(spec: Path, seconds: float) -> float:
    return _baseline("one", "--spec", str(spec), "--seconds", str(seconds))


def torch_1f1b(spec: Path, seconds: float, folder: Path) -> float:
    store = folder / f"store-{time.monotonic_ns()}"
    shared = ["1f1b", "--spec", str(spec), "--seconds", str(seconds), "--store", str(store), "--world", "2"]
    other = subprocess.Popen([sys.executable, str(BASELINES), *shared, "--rank", "1"])
    try:
        return _baseline(*shared, "--rank", "0")
    finally:
        other.wait(timeout=60)


def _baseline(*arguments: str) -> float:
    done = subprocess.run(
        [sys.executable, str(BASELINES), *arguments], check=True, capture_output=True, text=True
    )
    return float(json.loads(done.stdout.splitlines()[-1])["tokens_per_s"])


async def swarm(spec: Path, stages: int, seconds: float, folder: Path) -> float:
    """Committed tokens a second of the driver's ledger, over `seconds` after the warm-up."""
    place = Path(tempfile.mkdtemp(dir=folder))
    cores = os.cpu_count() or 1
    peers: list[PeerProcess] = []

    def heard(peer: PeerProcess, event: JsonObject) -> None:
        del peer, event

    def start(name: str) -> PeerProcess:
        peers.append(PeerProcess(name, place / name, heard, threads=max(1, cores // stages)))
        return peers[-1]

    try:
        owner = start("owner")
        await owner.start("up", str(spec), "--listen", "127.0.0.1")
        await owner.event("invitation", START_S)
        for number in range(1, stages):
            created = await run_shoal(
                "token", "create", "--role", "trainer", "--name", f"peer-{number}", "--json",
                "--data-dir", str(owner.folder / "data"), timeout_s=START_S,
            )  # fmt: skip
            token = place / f"peer-{number}.token"
            token.touch(mode=0o600)
            token.write_text(str(created["token"]))
            await start(f"peer-{number}").start("join", f"@{token}", "--listen", "127.0.0.1")
        await asyncio.gather(*(peer.event("online", START_S) for peer in peers))
        await asyncio.sleep(WARM_UP_S)
        first, begun = await _tokens(owner), time.perf_counter()
        await asyncio.sleep(seconds)
        return (await _tokens(owner) - first) / (time.perf_counter() - begun)
    finally:
        await asyncio.gather(*(peer.stop() for peer in peers))


async def _tokens(owner: PeerProcess) -> int:
    status = await owner.status()
    if status is None:
        raise SystemExit(f"the owner does not answer\n{owner.last_words()}")
    return int(status["training"]["tokens"])


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    stage_counts = [int(count) for count in arguments.stages.split(",")]
    specs = {count: write_spec(folder, count, arguments.sequences) for count in {2, *stage_counts}}
    found: dict[str, list[float]] = {}

    def record(system: str, value: float) -> None:
        found.setdefault(system, []).append(value)
        if not arguments.json:
            print(f"{system}: {value:,.0f} tokens/s", flush=True)

    for _ in range(arguments.repeats):
        record("one process", one_process(specs[2], arguments.seconds))
        record("torch 1F1B, 2 stages", torch_1f1b(specs[2], arguments.seconds, folder))
        for count in stage_counts:
            value = asyncio.run(swarm(specs[count], count, arguments.seconds, folder))
            record(f"shoal, {count} stages", value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stages", default="1,2,4")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="shoal-benchmark-"))
    try:
        found = measure(arguments, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    medians = {system: statistics.median(values) for system, values in found.items()}
    summary = {
        "parameters": "small template, 11M",
        "cores": os.cpu_count(),
        "tokens_per_s": {
            system: {"median": medians[system], "min": min(values), "max": max(values)}
            for system, values in found.items()
        },
        "of_one_process": {system: value / medians["one process"] for system, value in medians.items()},
        "of_torch_1f1b": {
            system: value / medians["torch 1F1B, 2 stages"] for system, value in medians.items()
        },
    }
    print(json.dumps(summary, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
