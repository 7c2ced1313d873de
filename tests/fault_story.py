"""What a failed fault test shows: what each worker told last, and where its tasks wait."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from fault_replica import Replica

ANSWER_S = 5.0  # for a worker to tell where its tasks wait
_EVENTS = 12  # the last, of each
_ERRORS = 2000  # the last characters


def story(lives: Sequence[Replica], folder: Path) -> str:
    """The last that each life told, and what its worker wrote to standard error."""
    lines = []
    for replica in lives:
        state = "ended" if replica.ended else "frozen" if replica.frozen else "alive"
        lines.append(f"{replica} {replica.peer} {state}, height {replica.height}, {replica.steps} steps")
        lines += [f"    {json.dumps(event)[:300]}" for event in replica.events[-_EVENTS:]]
    for path in sorted(folder.glob("*.errors")):
        lines.append(f"{path.name}: {path.read_text()[-_ERRORS:]}")
    return "\n".join(lines)


async def waits(awake: Sequence[Replica]) -> str:
    """Where every task of these workers waits."""
    asked = [replica.ask("tasks", limit_s=ANSWER_S) for replica in awake]
    lines: list[str] = []
    for replica, found in zip(awake, await asyncio.gather(*asked, return_exceptions=True), strict=True):
        lines.append(f"{replica} waits at")
        lines += [f"    {found!r}"] if isinstance(found, BaseException) else found["tasks"]
    return "\n".join(lines)
