"""What the pipeline benchmark compares with: one process with all cores, and torch's 1F1B over gloo.

Run by `pipeline.py`, one process each; prints one JSON line. The model is the plain one of
`reference_llama.py`, the optimizer torch's fused AdamW, the data random: only speed is looked at.

    python pipeline_baselines.py one --spec run.toml --seconds 20
    python pipeline_baselines.py 1f1b --spec run.toml --seconds 20 --rank 0 --world 2 --store FILE
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from reference_llama import Reference, summed_loss

from shoal.training import spec_file
from shoal.training.partition import stage_ranges
from shoal.training.spec import RunSpec

MICRO_BATCHES = 8  # of one 1F1B step, as in the issue


def optimizer(model: torch.nn.Module, spec: RunSpec) -> torch.optim.Optimizer:
    inner = spec.inner
    return torch.optim.AdamW(
        model.parameters(), lr=inner.learning_rate, betas=(inner.beta1, inner.beta2), fused=True
    )


def tokens(spec: RunSpec, sequences: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, spec.data.vocabulary, (sequences, spec.model.sequence + 1), generator=generator)


def report(system: str, counted: int, seconds: float) -> None:
    print(json.dumps({"system": system, "tokens_per_s": counted / seconds, "seconds": seconds}), flush=True)


def one_process(spec: RunSpec, seconds: float) -> None:
    """The same micro-batches, gradients accumulated to the same step, on all cores."""
    model = Reference(spec)
    steps = optimizer(model, spec)
    batch = tokens(spec, spec.inner.micro_batch_sequences)
    per_step = max(1, spec.inner.inner_tokens // spec.micro_batch_tokens)

    def step() -> None:
        for _ in range(per_step):
            torch.autograd.backward(summed_loss(model(batch[:, :-1]), batch[:, 1:]))
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.div_(per_step * spec.micro_batch_tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.step()
        steps.zero_grad()

    step()
    begun, counted = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        step()
        counted += per_step * spec.micro_batch_tokens
    report("one process", counted, time.perf_counter() - begun)


def schedule_1f1b(spec: RunSpec, seconds: float, rank: int, world: int, store: str) -> None:
    """torch.distributed.pipelining, 1F1B, gloo, one thread a process."""
    import torch.distributed as distributed
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    torch.set_num_threads(max(1, torch.get_num_threads() // world))
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    module = Reference(spec, stage_ranges(spec)[rank])
    steps = optimizer(module, spec)
    stage = PipelineStage(module, rank, world, torch.device("cpu"))
    schedule = Schedule1F1B(stage, n_microbatches=MICRO_BATCHES, loss_fn=summed_loss)
    batch = tokens(spec, spec.inner.micro_batch_sequences * MICRO_BATCHES)
    inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    counted_per_step = inputs.numel()

    def step() -> None:
        if rank == 0:
            schedule.step(inputs)
        elif rank == world - 1:
            schedule.step(target=targets)
        else:
            schedule.step()
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(counted_per_step)
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        steps.step()
        steps.zero_grad()

    step()
    more = torch.ones(1)
    begun, counted = time.perf_counter(), 0
    while True:
        step()
        counted += counted_per_step
        if rank == 0:
            more[0] = time.perf_counter() - begun < seconds
        distributed.broadcast(more, 0)
        if not more.item():
            break
    if rank == 0:
        report("torch 1F1B", counted, time.perf_counter() - begun)
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("which", choices=["one", "1f1b"])
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--store", default="")
    arguments = parser.parse_args()
    spec = spec_file.load(arguments.spec)
    if arguments.which == "one":
        one_process(spec, arguments.seconds)
    else:
        schedule_1f1b(spec, arguments.seconds, arguments.rank, arguments.world, arguments.store)


if __name__ == "__main__":
    main()
