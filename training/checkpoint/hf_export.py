"""Export: a checkpoint's weights as a folder that `transformers` loads with no code of ours.

Weights only, in float32 bit for bit or rounded to bfloat16; configuration, and the tokenizer where there is
one. The folder takes its name when all of it is on disk.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import tokenizers
import torch

from shoal.protocol.errors import SpecError, StorageError, UsageError
from shoal.training.checkpoint.hf import (
    CONFIG,
    GENERATION,
    INDEX,
    SINGLE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    config_of,
    their_name,
)
from shoal.training.checkpoint.manifest import WEIGHTS, StagePart, slots_of
from shoal.training.checkpoint.read import Checkpoint, Progress, silent
from shoal.training.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer
from shoal.training.model.layout import Slot
from shoal.training.spec import RunSpec

SHARD_BYTES = 2 << 30  # of one file; held in memory while it is written
END_NAME = "<|endoftext|>"
_Held = tuple[StagePart, Slot]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    path: Path
    size_bytes: int
    files: tuple[str, ...]
    note: str  # what a person should know, empty as a rule


def export(
    checkpoint: Checkpoint,
    target: Path,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> Exported:
    """Raises UsageError for a folder that exists or a checkpoint of some stages, StorageError."""
    if not checkpoint.whole:
        raise UsageError(
            f"{checkpoint.path} holds only some of the stages\n"
            "put the parts of all stages together: shoal checkpoint gather"
        )
    if target.exists():
        raise UsageError(f"{target} exists and is left as it is; name another folder or remove it")
    tokenizer, note = _tokenizer(checkpoint.spec)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            _write_weights(checkpoint, unfinished, dtype, shard_bytes, progress)
            _write_rest(checkpoint.spec, tokenizer, unfinished, str(dtype).removeprefix("torch."))
            unfinished.chmod(0o755)
            unfinished.rename(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"{target}: {error.strerror or error}; free space there or name another"
        ) from error
    files = sorted(target.iterdir())
    return Exported(target, sum(f.stat().st_size for f in files), tuple(f.name for f in files), note)


def byte_tokenizer() -> tokenizers.Tokenizer:
    """The ids of `ByteTokenizer` in the library's terms: byte-level BPE that never merges."""
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=_letters(), merges=[]))
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    found.add_special_tokens([END_NAME])
    return found


def _letters() -> dict[str, int]:
    """The printable character by which byte-level tokenizers stand for each byte (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _tokenizer(spec: RunSpec) -> tuple[Tokenizer | None, str]:
    try:
        return load_tokenizer(spec.data), ""
    except SpecError as error:
        return None, f"exported without a tokenizer: {error}"


def _write_weights(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, shard_bytes: int, progress: Progress
) -> None:
    held = [(part, slot) for part in checkpoint.manifest.parts for slot in slots_of(checkpoint.spec, part)]
    shards = _shards(held, dtype.itemsize, shard_bytes)
    total, done, where = sum(slot.count for _, slot in held), 0, dict[str, str]()
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for part, slot in shard:
            tensors[their_name(slot.name)] = checkpoint.tensors(part, slot)[WEIGHTS].to(dtype)
            done += slot.count
            progress(done, total)
        _save(tensors, folder / name)
        where |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total * dtype.itemsize}, "weight_map": where}
        _write_json(folder / INDEX, index)


def _shards(held: Sequence[_Held], item_bytes: int, shard_bytes: int) -> list[list[_Held]]:
    shards: list[list[_Held]] = [[]]
    size = 0
    for part, slot in held:
        if shards[-1] and size + slot.count * item_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((part, slot))
        size += slot.count * item_bytes
    return shards


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
    except safetensors.SafetensorError as error:  # its own way to say that the disk is full
        raise StorageError(f"{path}: {error}; free space there or name another folder") from error


def _write_rest(spec: RunSpec, tokenizer: Tokenizer | None, folder: Path, dtype: str) -> None:
    end = tokenizer.end_of_document if tokenizer is not None else None
    _write_json(folder / CONFIG, config_of(spec, end, dtype))
    _write_json(folder / GENERATION, {"eos_token_id": end, "_from_model_config": True})
    if isinstance(tokenizer, ByteTokenizer):
        (folder / TOKENIZER).write_text(byte_tokenizer().to_str(), encoding="utf-8")
        end_name = END_NAME
    elif isinstance(tokenizer, FileTokenizer):
        shutil.copyfile(Path(spec.data.tokenizer).expanduser(), folder / TOKENIZER)
        end_name = tokenizer.end_name
    else:
        return
    _write_json(
        folder / TOKENIZER_CONFIG,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end_name,
            "model_max_length": spec.model.sequence,
            "clean_up_tokenization_spaces": False,
        },
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
