"""`shoal serve-model`: a published model on many machines. Starts a run that trains nothing."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.node.cli import peer
from shoal.node.cli.checkpoint import started_from, taken_in
from shoal.node.cli.console import note
from shoal.node.cli.progress import progress_bar
from shoal.node.paths import PeerFolder, checkpoint_store, data_root
from shoal.protocol.errors import HardwareTooSmall, UsageError

if TYPE_CHECKING:
    from shoal.training.checkpoint.read import Checkpoint
    from shoal.training.spec import RunSpec

AUTO = "auto"
_SHARE = 0.75  # of the machine's memory for weights; sessions need the rest


class Dtype(StrEnum):
    """Weights and activations as they are computed with."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Form(StrEnum):
    """Weights as they are kept."""

    DTYPE = "dtype"
    INT8 = "int8"


def serve_model(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face Llama or Qwen2, or ours.")],
    stages: Annotated[
        str, typer.Option(metavar="N|auto", help="Pieces of the model; auto: as few as fit this machine.")
    ] = AUTO,
    dtype: Annotated[Dtype, typer.Option(help="bfloat16 halves the memory.")] = Dtype.FLOAT32,
    weights: Annotated[Form, typer.Option(help="int8: a byte a weight, slightly worse texts.")] = Form.DTYPE,
    listen: peer.ListenUp = peer.LOOPBACK,
    port: peer.Port = 0,
    dht_port: peer.DhtPort = 0,
    announce: peer.Announce = None,
    device: peer.Device = "auto",
    memory: peer.Memory = None,
    threads: peer.Threads = None,
    upload: peer.Upload = None,
    name: peer.Name = "owner",
    stage: peer.Stage = None,
    metrics: peer.Metrics = None,
    data_dir: peer.DataDir = None,
    as_json: peer.AsJson = False,
) -> None:
    """Serve a model from a folder, and print how others lend their machines to it."""
    from shoal.node.hardware import choose_device
    from shoal.node.owner.home import OwnerHome

    options = peer.peer_options(
        device,
        memory,
        threads,
        upload,
        name,
        stage,
        False,
        listen,
        port,
        dht_port,
        announce,
        1.0,
        0.0,
        None,
        metrics,
    )
    root = data_root(data_dir)
    with progress_bar("importing") as progress:
        made = taken_in(source, checkpoint_store(root), None, True, progress)
    _keep_tokenizer(source, made)
    found = choose_device(device, options.memory_bytes, options.threads)
    spec = _serving_only(made, _count(stages), dtype.value, found.memory_bytes, weights.value)
    home = OwnerHome.of_run(root, spec, time.time())
    pieces = "1 stage" if spec.stages.count == 1 else f"{spec.stages.count} stages"
    kept = "" if weights is Form.DTYPE else f", weights in {weights.value}"
    note(f"{spec.run.name} in {pieces}, {dtype.value}{kept}")
    note(f"for those who ask: shoal token create --role inference --run {spec.run_id().hex()[:8]}")
    with PeerFolder.claim(root) as folder:
        code = peer.run_peer(home.own_token(time.time()), folder, options, as_json, home)
    raise typer.Exit(code)


def _count(stages: str) -> int | None:
    if stages == AUTO:
        return None
    if not stages.isdecimal() or not 1 <= int(stages) <= 256:
        raise UsageError(f"--stages {stages}: a number from 1 to 256, or auto")
    return int(stages)


def _serving_only(
    made: Checkpoint, count: int | None, dtype: str, memory_bytes: int, weights: str = Form.DTYPE.value
) -> RunSpec:
    """The run that serves a checkpoint; without a count, in the fewest stages that fit the memory."""
    from shoal.training.plan import make_plan

    counts = range(1, made.spec.model.layers + 1) if count is None else [count]
    for stages in counts:
        if made.spec.model.tie_embeddings and stages > 1:
            break
        spec = started_from(made, stages, serves_only=True, dtype=dtype, weights=weights)
        largest = max(stage.memory.total for stage in make_plan(spec).stages)
        if count is not None or largest <= _SHARE * memory_bytes:
            return spec
    raise HardwareTooSmall(
        f"no piece of {made.spec.run.name} fits {memory_bytes >> 20:,} MiB, be it ever so small\n"
        "give more with --memory, or take --weights int8"
    )


def _keep_tokenizer(source: Path, made: Checkpoint) -> None:
    """Where this machine's peers hand it out from."""
    from shoal.node.tokenizers import keep_tokenizer

    data = made.spec.data
    if data.tokenizer_blake3 and (path := source / Path(data.tokenizer).name).exists():
        keep_tokenizer(path.read_bytes(), data.tokenizer_blake3)
