"""A plan as a table for people. Called by `shoal plan`."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from shoal.training.plan import Plan, StagePlan

REPLICAS_SHOWN = 2  # bytes a round depend on the group's size; two is the smallest that sends any


def plan_table(plan: Plan) -> RenderableType:
    """Stages, parameters, memory and traffic."""
    table = Table(
        "stage", "layers", "weights", "compute", "memory", "hop on", "hop back",
        "a round",
        title=f"run {plan.run_id.hex()[:8]}: {plan.parameters:,} parameters",
    )  # fmt: skip
    for stage in plan.stages:
        table.add_row(
            str(stage.stage),
            f"{stage.layers.start}-{stage.layers.stop - 1}",
            f"{stage.parameters:,}",
            f"{stage.compute_share:.0%}",
            size(stage.memory.total),
            size(stage.hop_forward_bytes),
            size(stage.hop_backward_bytes),
            size(stage.round_bytes(REPLICAS_SHOWN)),
        )
    facts = (
        f"micro-batch {plan.micro_batch_tokens:,} tokens, inner step {plan.inner_step_tokens:,}, "
        f"round {plan.round_tokens:,} tokens a replica; "
        f"{plan.bytes_per_token:,.0f} bytes a token between stages; "
        f"stage {plan.slowest.stage} sets the pace\n"
        f"bytes a round: up, and as many down, with {REPLICAS_SHOWN} replicas a stage"
    )
    return Group(table, facts)


def plan_json(plan: Plan) -> dict[str, Any]:
    """The same numbers with stable keys."""
    return {
        "run_id": plan.run_id.hex(),
        "parameters": plan.parameters,
        "micro_batch_tokens": plan.micro_batch_tokens,
        "inner_step_tokens": plan.inner_step_tokens,
        "round_tokens": plan.round_tokens,
        "bytes_per_token": plan.bytes_per_token,
        "slowest_stage": plan.slowest.stage,
        "stages": [_stage_json(stage) for stage in plan.stages],
    }


def _stage_json(stage: StagePlan) -> dict[str, Any]:
    values = dataclasses.asdict(stage)
    values["layers"] = [stage.layers.start, stage.layers.stop]
    values["memory_bytes"] = stage.memory.total
    values["round_bytes"] = {str(count): stage.round_bytes(count) for count in (1, 2, 4)}
    return values


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return ""
