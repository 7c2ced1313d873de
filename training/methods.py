"""The transport methods of one stage, under its own names: a peer may hold several stages."""

from __future__ import annotations

from collections.abc import Collection


def at_stage(stage: int, name: str) -> str:
    """A peer that does not hold the stage (any more) does not answer for it."""
    return f"stage.{stage}.{name}"


def of_stage(methods: Collection[str], stage: int) -> set[str]:
    """Those of one stage, rounds and checkpoints included."""
    return {method for method in methods if method.split(".")[1:2] == [str(stage)]}
