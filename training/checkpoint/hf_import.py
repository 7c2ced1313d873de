"""Import: a Hugging Face folder of a Llama or Qwen2, or another checkpoint, as one that a run may start from.

Safetensors only: other formats run code when they are read. What a plain Llama does not have is refused by
name. Written to the store like any checkpoint; its digest in a spec's `checkpoint.start` begins a run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from shoal.protocol import limits
from shoal.protocol.errors import StorageError, UsageError
from shoal.training.checkpoint.hf import (
    CONFIG,
    INDEX,
    SINGLE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    model_of,
    their_name,
)
from shoal.training.checkpoint.hf_export import byte_tokenizer
from shoal.training.checkpoint.manifest import SPEC, WEIGHTS, StagePart, slots_of
from shoal.training.checkpoint.read import Checkpoint, Progress, open_checkpoint, silent, verify
from shoal.training.checkpoint.share import find
from shoal.training.checkpoint.write import Writer
from shoal.training.data.tokenizer import FileTokenizer
from shoal.training.model.layout import EMBEDDING, HEAD, Slot
from shoal.training.spec import BYTE_VOCABULARY, RunSpec

KIND = "import"
_CONFIG_BYTES = 1 * limits.MIB
_INDEX_BYTES = 64 * limits.MIB
_NAME_CHARACTERS = 120
_COMPUTED = re.compile(r".*rotary_emb\.inv_freq")  # older versions of transformers saved what they compute


def is_hf(source: Path) -> bool:
    """Whether a folder looks like a Hugging Face model."""
    return os.path.exists(source / CONFIG)


def import_hf(source: Path, store: Path, stages: int, progress: Progress = silent) -> Checkpoint:
    """Take the weights over. Raises UsageError for what is no plain Llama, StorageError for the disk.

    Tied embeddings stay tied in one stage; in several the head becomes a copy, which gives the same logits.
    """
    spec = _spec(source, stages)
    with ExitStack() as stack:
        found = _tensors(source, stack)
        tied = _is_tied(source)
        part = StagePart(stage=0, layers=(0, spec.model.layers), tensors=(WEIGHTS,))
        slots = slots_of(spec, part)
        names = {
            slot.name: their_name(EMBEDDING if tied and slot.name == HEAD else slot.name) for slot in slots
        }
        _require_names(source, found, set(names.values()), tied)
        with Writer(store, KIND) as writer:
            done, total = 0, sum(slot.count for slot in slots)
            for slot in slots:
                writer.add(
                    slot.name, {WEIGHTS: _read(source, found[names[slot.name]], names[slot.name], slot)}
                )
                done += slot.count
                progress(done, total)
            writer.finish(spec, [part])
    return _only_once(writer.path)


def import_checkpoint(
    source: Checkpoint, store: Path, weights_only: bool, progress: Progress = silent
) -> Checkpoint:
    """Another checkpoint as it is, or its weights alone, without what its run had counted."""
    if not source.whole:
        raise UsageError(
            f"{source.path} holds only some of the stages\n"
            "put the parts of all stages together: shoal checkpoint gather"
        )
    verify(source, progress)
    with Writer(store, KIND) as writer:
        if weights_only:
            part = StagePart(stage=0, layers=(0, source.spec.model.layers), tensors=(WEIGHTS,))
            for held in source.manifest.parts:
                for slot in slots_of(source.spec, held):
                    writer.add(slot.name, {WEIGHTS: source.tensors(held, slot)[WEIGHTS]})
            writer.finish(source.spec, [part], source.read(SPEC))
        else:
            for entry in source.manifest.files:
                writer.take_over(entry, source.path / entry.name)
            writer.seal(source.manifest_bytes())
    return _only_once(writer.path)


def _only_once(path: Path) -> Checkpoint:
    """What was just written, or the same from an earlier import."""
    made = open_checkpoint(path)
    earlier = find([path.parent], made.digest)
    if earlier == path:
        return made
    shutil.rmtree(path, ignore_errors=True)
    return open_checkpoint(earlier)


def _spec(source: Path, stages: int) -> RunSpec:
    """The defaults, with this model and its tokenizer."""
    model, vocabulary = model_of(_json(source / CONFIG, _CONFIG_BYTES), str(source / CONFIG))
    model["tie_embeddings"] = model["tie_embeddings"] and stages == 1
    values = {
        "run": {"name": re.sub(r"[^A-Za-z0-9._-]", "-", source.resolve().name)[:32] or "imported"},
        "model": model,
        "data": {"vocabulary": vocabulary, **_tokenizer(source, vocabulary)},
        "stages": {"count": stages},
    }
    try:
        return RunSpec.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(f"{source}: no run can have this model: {place}: {first['msg']}") from None


def _tokenizer(source: Path, vocabulary: int) -> dict[str, str]:
    """Keys of the spec's data section. A tokenizer.json is named as if it lay beside run.toml."""
    path = source / TOKENIZER
    if not os.path.lexists(path) or _bytes(path, _INDEX_BYTES) == byte_tokenizer().to_str().encode():
        if vocabulary < BYTE_VOCABULARY:
            raise UsageError(
                f"{source} has no {TOKENIZER}, and its vocabulary of {vocabulary} has no room for bytes"
            )
        return {}
    said = _json(source / TOKENIZER_CONFIG, _CONFIG_BYTES) if (source / TOKENIZER_CONFIG).exists() else {}
    end = said.get("eos_token") if isinstance(said, dict) else None
    end = end.get("content") if isinstance(end, dict) else end
    found = FileTokenizer(path, "", end if isinstance(end, str) else "")
    return {
        "tokenizer": TOKENIZER,
        "tokenizer_blake3": found.fingerprint,
        "end_of_document": found.end_name,
    }


def _is_tied(source: Path) -> bool:
    model, _ = model_of(_json(source / CONFIG, _CONFIG_BYTES), str(source / CONFIG))
    return bool(model["tie_embeddings"])


def _tensors(source: Path, stack: ExitStack) -> dict[str, Any]:
    """An open file for each tensor's name."""
    if (source / INDEX).exists():
        index = _json(source / INDEX, _INDEX_BYTES)
        listed = index.get("weight_map") if isinstance(index, dict) else None
        named = listed.values() if isinstance(listed, dict) else []
        files = sorted({name if isinstance(name, str) else "" for name in named})
    else:
        files = [SINGLE]
    if not files or not all(_is_plain(name) for name in files):
        raise UsageError(f"{source / INDEX} names files that are not in the folder")
    found: dict[str, Any] = {}
    for name in files:
        if not (source / name).is_file():
            raise UsageError(
                f"{source} has no {name}\nother formats than safetensors run code when they are read; "
                "convert with transformers: model.save_pretrained(FOLDER)"
            )
        try:
            file = stack.enter_context(safe_open(source / name, framework="pt"))
            names = dict.fromkeys(file.keys(), file)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{source / name} cannot be read: {error}") from error
        if twice := sorted(found.keys() & names.keys()):
            raise UsageError(f"{source} has {twice[0]!a} in {name} and in another file: which one counts?")
        found |= names
    return found


def _is_plain(name: str) -> bool:
    """Whether it names a file of the folder itself."""
    return 0 < len(name) <= _NAME_CHARACTERS and name.isprintable() and Path(name).name == name


def _require_names(source: Path, found: dict[str, Any], wanted: set[str], tied: bool) -> None:
    if missing := sorted(wanted - found.keys()):
        raise UsageError(f"{source} has no {missing[0]} ({len(missing)} tensors missing)")
    unused = {their_name(HEAD)} if tied else set[str]()
    extra = [name for name in found.keys() - wanted - unused if not _COMPUTED.fullmatch(name)]
    if extra:
        raise UsageError(f"{source} has {min(extra)!a}, which no plain Llama has ({len(extra)} such tensors)")


def _read(source: Path, file: Any, name: str, slot: Slot) -> torch.Tensor:
    try:
        tensor: torch.Tensor = file.get_tensor(name)
    except SafetensorError as error:
        raise StorageError(f"{source}: {name} cannot be read: {error}") from error
    if not tensor.is_floating_point() or tuple(tensor.shape) != slot.shape:
        raise UsageError(f"{source}: {name} is {tensor.dtype} {tuple(tensor.shape)}, not {slot.shape}")
    tensor = tensor.to(torch.float32)
    if not bool(tensor.isfinite().all()):
        raise UsageError(f"{source}: {name} has values that are not finite")
    return tensor


def _json(path: Path, most_bytes: int) -> object:
    try:
        found: object = json.loads(_bytes(path, most_bytes))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {str(error)[:200]}") from error
    return found


def _bytes(path: Path, most_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > most_bytes:
        raise UsageError(f"{path} is larger than {most_bytes} bytes")
    return data
