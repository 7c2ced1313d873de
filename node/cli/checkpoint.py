"""`shoal checkpoint now|list|verify|gather|export|import`: models on disk, and runs that start from them."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from shoal.node.cli.console import note, out, print_json
from shoal.node.cli.peer import daemons
from shoal.node.cli.progress import progress_bar
from shoal.node.paths import checkpoint_store, data_root
from shoal.protocol.errors import NetworkError, ShoalError, StorageError, UsageError

if TYPE_CHECKING:
    from shoal.training.checkpoint.read import Checkpoint
    from shoal.training.spec import RunSpec

app = typer.Typer(help="Save the model, check what is saved, take it elsewhere.", no_args_is_help=True)

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Folder of keys and runs.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Which = Annotated[
    str | None,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Folder, name, or start of its digest.",
        show_default="the newest whole one",
    ),
]
_MB = 1e6
_LOOK_S = 0.3


class Dtype(StrEnum):
    """Of exported weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@app.command()
def now(
    peer: Annotated[
        str | None, typer.Option(help="Name or id of the peer that gathers.", show_default="any here")
    ] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Gather the whole model from the live swarm onto this machine's disk."""
    with progress_bar("gathering") as progress:
        result = asyncio.run(_gather_now(data_root(data_dir), peer, progress))
    if as_json:
        print_json(result)
        return
    heights = ", ".join(map(str, result["heights"]))
    out.print(f"{result['path']}", soft_wrap=True)
    note(f"{result['bytes'] / _MB:.1f} MB, {result['log_tokens']:,} tokens, heights {heights}")
    note(f"next: shoal checkpoint export {Path(result['path']).name} --to DIR")


@app.command("list")
def list_checkpoints(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show the checkpoints on this machine. Contents are checked by `verify`."""
    from shoal.node.checkpoint_shelf import all_found

    rows = [found.to_json() for found in all_found(data_root(data_dir))]
    if as_json:
        print_json(rows)
        return
    table = Table(
        Column("checkpoint", no_wrap=True), "digest", "run", "stages", "heights", "tokens", "MB", "written"
    )
    for row in rows:
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(str(row["written_unix_s"]))))
        if row["state"] == "damaged":
            table.add_row(Path(str(row["path"])).name, "[red]damaged[/]", "", "", "", "", "", written)
            continue
        some = ",".join(map(str, row["stages"]))  # type: ignore[call-overload]
        table.add_row(
            Path(str(row["path"])).name,
            str(row["digest"])[:12],
            str(row["run"]),
            "all" if row["whole"] else f"{some} of {row['stage_count']}",
            ",".join(map(str, row["heights"])),  # type: ignore[call-overload]
            f"{row['log_tokens']:,}",
            f"{float(str(row['bytes'])) / _MB:.1f}",
            written,
        )
    out.print(table)
    for row in rows:
        if row["fault"]:
            note(str(row["fault"]))


@app.command()
def verify(which: Which = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Read a checkpoint to its last byte; exit 20 names the file that is not as it was written."""
    from shoal.node.checkpoint_shelf import choose, describe
    from shoal.training.checkpoint import read

    checkpoint = choose(data_root(data_dir), which)
    with progress_bar("verifying") as progress:
        read.verify(checkpoint, progress)
    if as_json:
        print_json({**describe(checkpoint), "verified": True})
        return
    out.print(f"{checkpoint.path} is as it was written", soft_wrap=True)
    files = len(checkpoint.manifest.files)
    held = "the whole model" if checkpoint.whole else "stage " + _stages(checkpoint)
    note(f"{held}, {files} files, {checkpoint.manifest.size_bytes / _MB:.1f} MB, digest {checkpoint.digest}")


@app.command()
def gather(
    parts: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PART...", help="Folders.", show_default="all parts on this machine"),
    ] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Put parts of all stages together, as when the swarm is gone; of each stage the highest is taken."""
    from shoal.node.checkpoint_shelf import describe, parts_of_one_run
    from shoal.training.checkpoint.merge import merge

    root = data_root(data_dir)
    with progress_bar("verifying") as progress:
        made = merge(parts or parts_of_one_run(root), checkpoint_store(root), progress)
    if as_json:
        print_json(describe(made))
        return
    out.print(str(made.path), soft_wrap=True)
    note(f"heights {', '.join(str(part.height) for part in made.manifest.parts)}, digest {made.digest}")


@app.command()
def export(
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Folder to make.")],
    which: Which = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights.")] = Dtype.FLOAT32,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Write the weights as a Hugging Face folder, which transformers loads."""
    import torch

    from shoal.node.checkpoint_shelf import choose
    from shoal.training.checkpoint import hf_export

    checkpoint = choose(data_root(data_dir), which)
    with progress_bar("exporting") as progress:
        made = hf_export.export(checkpoint, to, getattr(torch, dtype.value), progress=progress)
    if made.note:
        note(made.note)
    if as_json:
        found = {"path": str(made.path), "bytes": made.size_bytes, "files": made.files, "note": made.note}
        print_json({**found, "digest": checkpoint.digest})
        return
    out.print(
        f"wrote {made.path} ({made.size_bytes / _MB:.1f} MB) from {checkpoint.path.name}", soft_wrap=True
    )
    note(f"next: AutoModelForCausalLM.from_pretrained({str(made.path)!r})")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face Llama or Qwen2, or ours.")],
    to: Annotated[Path, typer.Option("--to", metavar="RUN.TOML", help="File to write.")] = Path("run.toml"),
    stages: Annotated[
        int | None,
        typer.Option(min=1, max=256, help="Stages of the new run.", show_default="as it was, or 1"),
    ] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Of a checkpoint: nothing but weights, counters at zero.")
    ] = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Take a model in, and write a run.toml that starts from it."""
    from shoal.node.checkpoint_shelf import describe
    from shoal.training import spec_file

    if os.path.exists(to):
        raise UsageError(f"{to} exists and is left as it is; name another file with --to")
    with progress_bar("importing") as progress:
        made = taken_in(source, checkpoint_store(data_root(data_dir)), stages, weights_only, progress)
    spec = started_from(made, stages)
    if tokenizer := _bring_tokenizer(source, spec, to.parent):
        note(f"every peer needs {tokenizer} where it is started; its hash is in {to.name}")
    spec_file.write(spec, to)
    if as_json:
        print_json({**describe(made), "run_toml": str(to)})
        return
    out.print(
        f"wrote {to}: a run of {spec.stages.count} stages that starts from {made.digest[:12]}", soft_wrap=True
    )
    out.print(f"next: look through {to}, then: shoal plan {to}    shoal up {to}", soft_wrap=True)


def taken_in(source: Path, store: Path, stages: int | None, weights_only: bool, progress: Any) -> Checkpoint:
    from shoal.training.checkpoint import hf_import
    from shoal.training.checkpoint.manifest import MANIFEST
    from shoal.training.checkpoint.read import open_checkpoint

    if os.path.exists(source / MANIFEST):
        return hf_import.import_checkpoint(open_checkpoint(source), store, weights_only, progress)
    if hf_import.is_hf(source):
        return hf_import.import_hf(source, store, stages or 1, progress)
    raise UsageError(
        f"{source} is neither a checkpoint (no manifest.json) nor a Hugging Face model (no config.json)\n"
        "see the checkpoints on this machine: shoal checkpoint list"
    )


def started_from(
    made: Checkpoint,
    stages: int | None,
    *,
    serves_only: bool = False,
    dtype: str | None = None,
    weights: str | None = None,
) -> RunSpec:
    """The spec of a run that starts from a checkpoint; checked once more, for the stages may not fit."""
    from shoal.training.spec import RunSpec

    values = made.spec.model_dump()
    values["checkpoint"]["start"] = made.digest
    if dtype is not None:
        values["model"]["dtype"] = dtype
    if weights is not None:
        values["model"]["serving_weights"] = weights
    if serves_only:
        values["inner"]["mode"], values["checkpoint"]["every_s"] = "off", 0.0
    if stages is not None and stages != made.spec.stages.count:
        values["stages"] |= {"count": stages, "first_layers": ()}
    try:
        return RunSpec.model_validate(values)
    except ValueError as error:
        raise UsageError(f"--stages {stages}: {error}") from error


def _bring_tokenizer(source: Path, spec: RunSpec, folder: Path) -> Path | None:
    """Copy an imported model's tokenizer.json to where the run's spec looks for it: beside its file. Whatever
    else a spec names is its owner's path, and nothing is written there."""
    from shoal.training.checkpoint.hf import TOKENIZER

    name = spec.data.tokenizer
    if name != TOKENIZER or not spec.data.tokenizer_blake3 or not (source / name).exists():
        return None
    target = folder / name
    if target.exists():
        return target
    try:
        shutil.copyfile(source / name, target)
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error.strerror or error}") from error
    return target


def _stages(checkpoint: Checkpoint) -> str:
    some = ", ".join(str(part.stage) for part in checkpoint.manifest.parts)
    return f"{some} of {checkpoint.spec.stages.count}"


async def _gather_now(root: Path, wanted: str | None, progress: Any) -> dict[str, Any]:
    """Ask a daemon, and wait. Raises what it raised, with its exit code."""
    from shoal.node.control import ask

    here = await daemons(root, "status")
    named = [path for path, found in here if wanted is None or wanted in (found["name"], found["peer"])]
    if not named:
        raise UsageError(f"no peer called {wanted!r} runs from {root}\nsee them with: shoal status")
    number = (await ask(named[0], "checkpoint"))["number"]
    while (state := await ask(named[0], "checkpoint_status"))["finished"] < number:
        if state["asked"] < number:  # nobody there knows of it any more
            raise NetworkError("the peer was started anew meanwhile, and gathers nothing\nask once more")
        progress(state["done_bytes"], state["total_bytes"])
        await asyncio.sleep(_LOOK_S)
    result: dict[str, Any] = state["result"]
    if "error" in result:
        failed = ShoalError(result["error"]) if result["exit_code"] else NetworkError(result["error"])
        failed.exit_code = result["exit_code"]
        raise failed
    return result
