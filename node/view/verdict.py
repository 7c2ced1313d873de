"""The verdict sentence: what would stop the run first. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def verdict(replicas: Sequence[int]) -> tuple[str, str]:
    """State (as in `parts.Verdict`) and sentence, from the live online replicas of every stage."""
    if not replicas:
        return "starting", "Waiting for the spec."
    weakest = min(range(len(replicas)), key=replicas.__getitem__)
    match replicas[weakest]:
        case 0:
            return "waiting", f"Waiting: stage {weakest} has no replica."
        case 1:
            return "training", f"Training. Stage {weakest} has one replica: one loss away from stopping."
        case count:
            return "training", f"Training. Every stage has {count} replicas or more."


def if_leaves(name: str, stage: int, replicas: Sequence[int], guardians: Sequence[int]) -> str:
    """What becomes of the run if this online replica of `stage` goes; `guardians`: copies of each stage."""
    left = replicas[stage] - 1
    if left > 0:
        more = f"{left} other{'s' if left > 1 else ''}"
        also = ": one loss away from stopping" if left == 1 else ""
        return f"If {name} leaves, stage {stage} goes on with {more}{also}."
    copies = guardians[stage]
    if copies:
        kept = f"{copies} {'peer keeps' if copies == 1 else 'peers keep'} a copy"
        return f"If {name} leaves, stage {stage} stops until another peer takes it; {kept}."
    return f"If {name} leaves, stage {stage} stops, and what it learned since its last checkpoint is lost."
