"""The device a peer trains on: chosen, named and measured before work. Called by the daemon at start."""

from __future__ import annotations

import gc
import os
import platform
from dataclasses import dataclass

import psutil
import torch

from shoal.compression import kernels
from shoal.protocol.errors import HardwareTooSmall, UsageError
from shoal.training.plan import StagePlan

_MIB = 1 << 20
_COMPILED_FROM = 1 << 22  # weights of a stage
_SESSIONS_BESIDE_TRAINING = 512 * _MIB


@dataclass(frozen=True, slots=True)
class Device:
    """A torch device, how people call it, and how much of its memory this peer may use."""

    torch_name: str
    title: str
    memory_bytes: int
    host_optimizer: bool = False  # optimizer and float32 weights are not in this memory

    def needed_bytes(self, stage: StagePlan) -> int:
        """Memory of this device that training a stage takes."""
        memory = stage.memory
        return memory.total if self.torch_name == "cpu" else memory.on_device(self.host_optimizer)


def choose_device(
    wanted: str, memory_bytes: int | None, threads: int | None, host_optimizer: bool = False
) -> Device:
    """`auto`, `cpu`, `cuda` or `cuda:N`. Sets torch's thread count. Raises UsageError or HardwareTooSmall.

    On the CPU `host_optimizer` changes nothing: its memory is the host's.
    """
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0))))
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UsageError(f"{wanted!r} is not a device\nuse auto, cpu, cuda or cuda:N") from error
    match device.type:
        case "cpu":
            found = Device("cpu", _processor_name(), psutil.virtual_memory().available)
        case "cuda":
            found = _cuda(device)
        case kind:
            raise UsageError(f"{kind} devices are not supported\nuse auto, cpu, cuda or cuda:N")
    usable = min(found.memory_bytes, memory_bytes or found.memory_bytes)
    return Device(found.torch_name, found.title, usable, host_optimizer and device.type != "cpu")


def warm_up() -> None:
    """Do now, off the loop, what would else stall it later.

    torch imports its compiler with the first optimizer (0.9 s). A full garbage collection walks
    everything that torch and hivemind brought (0.2 s); frozen, those objects are not walked again.
    Until here `run_daemon` keeps collection off, since it strikes whichever thread allocates: the loop's too.
    """
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True)
    _freeze()


def warm_up_codecs(stage: StagePlan) -> None:
    """Compile the codecs where a stage is large enough: seconds the first time on a machine, off the loop.

    Below _COMPILED_FROM weights rounds are short, and numba's 120 MB are not worth it.
    """
    if stage.parameters >= _COMPILED_FROM:
        gc.disable()
        kernels.warm()
        _freeze()


def _freeze() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


def check_memory(device: Device, stage: StagePlan) -> None:
    """Raises HardwareTooSmall unless the stage fits."""
    needed = device.needed_bytes(stage)
    if needed > device.memory_bytes:
        raise HardwareTooSmall(
            f"stage {stage.stage} needs {needed / _MIB:,.0f} MiB, {device.title} has "
            f"{device.memory_bytes / _MIB:,.0f} MiB for it\nuse a larger machine, raise --memory, "
            f"{'' if device.host_optimizer or device.torch_name == 'cpu' else 'try --host-optimizer, '}"
            "or ask the owner for a run with more stages"
        )


def session_bytes(device: Device, stage: StagePlan, *, trains: bool) -> int:
    """Memory of the device for sessions: half of what the stage leaves, or most where it only serves."""
    left_bytes = max(0, device.memory_bytes - device.needed_bytes(stage))
    return min(left_bytes // 2, _SESSIONS_BESIDE_TRAINING) if trains else left_bytes * 3 // 4


def spare_bytes(device: Device, stage: StagePlan) -> int:
    """Memory of the machine for copies of other stages: half of what the own one and sessions leave."""
    if device.torch_name == "cpu":
        sessions = session_bytes(device, stage, trains=True)
        return max(0, device.memory_bytes - stage.memory.total - sessions) // 2
    return psutil.virtual_memory().available // 2


def _cuda(device: torch.device) -> Device:
    index = device.index or 0
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise HardwareTooSmall(f"there is no {device}; torch finds {count} CUDA devices\ntry --device cpu")
    free_bytes, _ = torch.cuda.mem_get_info(index)
    return Device(f"cuda:{index}", torch.cuda.get_device_name(index), free_bytes)


def _processor_name() -> str:
    cores = len(os.sched_getaffinity(0))
    return f"{platform.processor() or platform.machine()} CPU, {cores} {'core' if cores == 1 else 'cores'}"
