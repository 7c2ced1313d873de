"""The verdict sentence: what would stop the run first; and what would become of it without a peer. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.node.view.parts import Verdict


def verdict(replicas: Sequence[int], standing: str = "running", *, trains: bool = True) -> Verdict:
    """From the live online replicas of every stage; `standing` is what the owner has ordered."""
    if not replicas:
        return Verdict()
    if standing == "stopped":
        return Verdict(state="stopped", level="warn", text="Stopped by the owner.")
    weakest = min(range(len(replicas)), key=replicas.__getitem__)
    paused = standing == "paused"
    match replicas[weakest]:
        case 0:
            text = f"stage {weakest} has no replica."
            state, level = ("paused", "bad") if paused else ("waiting", "bad")
            return Verdict(state=state, level=level, text=f"{'Paused' if paused else 'Waiting'}: {text}")
        case 1:
            level, text = "warn", f"Stage {weakest} has one replica: one loss away from stopping."
        case count:
            level, text = "ok", f"Every stage has {count} replicas or more."
    if paused:
        return Verdict(state="paused", level="warn", text=f"Paused by the owner. {text}")
    does = "Training" if trains else "Serving"
    return Verdict(state=does.lower(), level=level, text=f"{does}. {text}")


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
