"""Which sessions' positions are computed next, together. Pure.

Single positions of running texts go first, for somebody reads them; what room is left takes chunks of
prompts, the longest waiting first. A prompt gets PROMPT_ROWS of every batch, however many texts run.

A batch costs about the same whether it has one step or ten. Left alone, sessions come to go round a ring of S
servers in S + 1 groups, one of which always waits; a short wait for more makes it S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MOST_ROWS = 128  # of a batch: what a session adds to the lane's queue before training's next turn
PROMPT_ROWS = 32
STEP_ROWS = 4  # up to so many positions waiting are steps of a text, not a prompt


@dataclass(frozen=True, slots=True)
class Waiting:
    """A session with positions to compute."""

    key: int
    version: bytes
    rows: int
    since_s: float


def patience_s(waiting: int, running: int, servers: int, step_s: float) -> float:
    """How long to wait for more sessions before a batch begins.

    `waiting` of the `running` ones are here; a batch takes `step_s`.
    """
    return 0.0 if waiting * servers >= running else step_s / 2


def next_batch(waiting: Sequence[Waiting], most_rows: int = MOST_ROWS) -> list[tuple[int, int]]:
    """(key, rows) of one batch; all of one version, that of the longest waiting."""
    if not waiting:
        return []
    in_order = sorted(waiting, key=lambda one: (one.since_s, one.key))
    fitting = [one for one in in_order if one.version == in_order[0].version]
    steps = [one for one in fitting if one.rows <= STEP_ROWS]
    prompts = [one for one in fitting if one.rows > STEP_ROWS]
    left = most_rows
    batch: list[tuple[int, int]] = []
    for one in steps:
        if one.rows > left - (PROMPT_ROWS if prompts else 0):
            break
        batch.append((one.key, one.rows))
        left -= one.rows
    for one in prompts:
        if left <= 0:
            break
        batch.append((one.key, min(one.rows, left)))
        left -= batch[-1][1]
    return batch
