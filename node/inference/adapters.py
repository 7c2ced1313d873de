"""An adapter on disk in PEFT's layout, so that `peft` loads what was tuned here and we load what it saved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from shoal.protocol.errors import StorageError, UsageError
from shoal.training.checkpoint.hf import their_name
from shoal.training.model.layout import StageLayout
from shoal.training.model.lowrank import PROMPT, TARGETS, AdapterForm

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OURS = {
    their_name(f"layers.0.{target}").split(".")[-2]: target for target in TARGETS
}  # q_proj -> attention.q
_SIDES = {"a": "lora_A", "b": "lora_B"}


def targets_of(names: Sequence[str]) -> tuple[str, ...]:
    """`("q_proj", "v_proj")`, or our own names, as ours, in the model's order. Raises UsageError."""
    known = {_OURS.get(name, name) for name in names}
    if wrong := sorted(known - set(TARGETS)):
        raise UsageError(f"there is no matrix {wrong[0]!r} to adapt; there are {', '.join(_OURS)}")
    return tuple(target for target in TARGETS if target in known)


def save_adapter(folder: Path, form: AdapterForm, tensors: Mapping[str, torch.Tensor], base: str) -> None:
    """Write it. Raises UsageError for what PEFT's LoRA has no room for, StorageError for the disk."""
    if form.prompt or not form.rank:
        raise UsageError("PEFT keeps soft prompts in another layout; only LoRA is saved so far")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": form.rank,
        "lora_alpha": form.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": [name for name, target in _OURS.items() if target in form.targets],
    }
    weights = {_their_name(name): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{folder} cannot be written: {error}") from error


def load_adapter(folder: Path, layouts: Sequence[StageLayout]) -> tuple[AdapterForm, dict[str, torch.Tensor]]:
    """What `save_adapter` or PEFT wrote. Raises StorageError, and UsageError for what does not fit."""
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        found = safetensors.torch.load_file(folder / _WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise StorageError(f"{folder} holds no adapter that can be read: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA" or config.get("bias", "none") != "none" or config.get("use_dora"):
        raise UsageError(f"{folder} is no plain LoRA (peft_type {kind!r}); only that is taken")
    form = AdapterForm(int(config["r"]), float(config["lora_alpha"]), targets_of(config["target_modules"]))
    shapes = {name: shape for layout in layouts for name, shape in form.shapes(layout).items()}
    given = {name: tuple(found[_their_name(name)].shape) for name in shapes if _their_name(name) in found}
    wrong = [name for name, shape in shapes.items() if given.get(name) != shape]
    if wrong or len(found) != len(shapes):
        told = _their_name(wrong[0]) if wrong else f"{len(found)} tensors, {len(shapes)} are due"
        raise UsageError(f"{folder} does not fit this model: {told}")
    return form, {name: found[_their_name(name)].float() for name in shapes}


def _their_name(tensor: str) -> str:
    """`layers.7.attention.q.a` -> `base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight`."""
    slot, _, side = tensor.rpartition(".")
    if tensor == PROMPT:
        raise UsageError("a soft prompt has no place in a LoRA file")
    return f"base_model.model.{their_name(slot).removesuffix('.weight')}.{_SIDES[side]}.weight"
