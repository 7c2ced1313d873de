"""The device a peer trains on: chosen, named and measured before work. Called by the daemon at start."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch

from shoal.compression import kernels
from shoal.protocol.errors import HardwareTooSmall, UsageError
from shoal.training.plan import StagePlan

_MIB = 1 << 20
_COMPILED_FROM = 1 << 22  # weights of a stage
_SESSIONS_BESIDE_TRAINING = 512 * _MIB
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
)  # of drivers, and of torch on CPUs


@dataclass(frozen=True, slots=True)
class Device:
    """A torch device, how people call it, and how much of its memory this peer may use."""

    torch_name: str
    title: str
    memory_bytes: int
    host_optimizer: bool = False  # optimizer and float32 weights are not in this memory
    others: tuple[str, ...] = ()  # further devices, over which stages are sharded; memory is that of all

    @property
    def names(self) -> tuple[str, ...]:
        return (self.torch_name, *self.others)

    def needed_bytes(self, stage: StagePlan) -> int:
        """Memory of this device that training a stage takes; of several the sum, each like the fullest.

        Several have beside their shards two layers gathered, and one's gradient, in float32 at most; the
        first one serves inference alone.
        """
        memory = stage.memory
        needed = memory.total if self.torch_name == "cpu" else memory.on_device(self.host_optimizer)
        if self.others:
            layer = -(-stage.parameters // len(stage.layers))
            needed += len(self.names) * 3 * 4 * layer
            needed += len(self.others) * memory.serving if self.torch_name != "cpu" else 0
        return needed


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


def choose_devices(
    wanted: Sequence[str], memory_bytes: int | None, threads: int | None, host_optimizer: bool = False
) -> Device:
    """`choose_device`, or several that a peer's stage is sharded over: GPUs, or `cpu` for each process.

    `memory_bytes`, and the CPU's threads, are what all may use together.
    """
    if len(wanted) == 1:
        return choose_device(wanted[0], memory_bytes, threads, host_optimizer)
    found = [choose_device(name, None, threads, host_optimizer) for name in wanted]
    first, names = found[0], [device.torch_name for device in found]
    if len({name.partition(":")[0] for name in names}) > 1:
        raise UsageError(f"--devices {','.join(wanted)}: GPUs or cpu, not both")
    total = first.memory_bytes
    if first.torch_name != "cpu":
        if len(set(names)) < len(names):
            raise UsageError(f"--devices {','.join(wanted)}: each GPU once")
        total = len(found) * min(device.memory_bytes for device in found)
    torch.set_num_threads(max(1, torch.get_num_threads() // len(found)))
    title, usable = f"{len(found)} × {first.title}", min(total, memory_bytes or total)
    return Device(first.torch_name, title, usable, first.host_optimizer, tuple(names[1:]))


def warm_up() -> None:
    """Do now, off the loop, what would else stall it later: torch imports its compiler with the first
    optimizer (0.9 s)."""
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True)


def freeze() -> None:
    """Once everything is imported: a full garbage collection walks what torch and hivemind brought (0.2 s).

    Frozen, those objects are not walked again. Until here `run_daemon` keeps collection off, since it strikes
    whichever thread allocates: the loop's too.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


def warm_up_codecs(stages: Sequence[StagePlan]) -> None:
    """Compile the codecs where a run's stages are large: seconds the first time on a machine, off the loop.

    Below _COMPILED_FROM weights rounds are short, and numba's 120 MB are not worth it. Before the first
    replica is made: what is frozen is not freed when a peer leaves a stage.
    """
    if max(stage.parameters for stage in stages) >= _COMPILED_FROM:
        gc.disable()
        kernels.warm()
        freeze()


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


@contextlib.contextmanager
def within_memory(what: str) -> Iterator[None]:
    """Turns an allocation that failed, in a group of tasks too, into HardwareTooSmall: no plan is exact."""
    try:
        yield
    except (MemoryError, RuntimeError, ExceptionGroup) as error:
        lack = _lack_of_memory(error)
        if lack is None:
            raise
        why = next(iter(str(lack).splitlines()), type(lack).__name__)
        raise HardwareTooSmall(f"no memory for {what}: {why}") from error


def _lack_of_memory(error: BaseException) -> BaseException | None:
    """The allocation that failed, if that is what happened."""
    if isinstance(error, BaseExceptionGroup):
        return next((lack for inner in error.exceptions if (lack := _lack_of_memory(inner))), None)
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    return error if told or isinstance(error, MemoryError | torch.OutOfMemoryError) else None


def session_bytes(device: Device, stage: StagePlan, *, trains: bool) -> int:
    """Memory of the first device for sessions: half of what is left, or most if it only serves."""
    left_bytes = max(0, device.memory_bytes - device.needed_bytes(stage)) // len(device.names)
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
