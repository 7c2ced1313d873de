"""`shoal demo`: the whole thing on one machine, in two minutes."""

from __future__ import annotations

from typing import Annotated

import typer


def demo(
    stages: Annotated[int, typer.Option(min=1, max=4, help="Slices of the model.")] = 2,
    replicas: Annotated[int, typer.Option(min=1, max=8, help="Peers a stage.")] = 2,
    seconds: Annotated[float, typer.Option(min=30, help="How long to train.")] = 120,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines; the last is the summary.")] = False,
    no_kill: Annotated[bool, typer.Option("--no-kill", help="Let every peer live.")] = False,
) -> None:
    """Train one model with several peer processes, kill one, and let the model write."""
    from shoal.node.demo.show import DemoOptions, run_demo

    raise typer.Exit(run_demo(DemoOptions(stages, replicas, seconds, kill=not no_kill), as_json))
