"""Local weights of the workers on a compute lane, as a real replica has them, and a course of inner steps.

An inner step is some pieces of work, as micro-batches are, and a change of the weights after the last. Rounds
copy and rebase between two pieces. `fault_worker` makes the steps.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from shoal.training.lane import ThreadLane
from shoal.training.outer.local import MemoryWeights, Rebase, Sent, Take
from shoal.training.work import Work

Change = Callable[[int], tuple[torch.Tensor, int]]  # of an inner step: what it adds [size], and its tokens
_WAITING = 2  # pieces, so that the lane never waits for the loop


class LaneWeights(MemoryWeights):
    """`training.weights` with a plain vector."""

    def __init__(self, initial: torch.Tensor, lane: ThreadLane, change: Change) -> None:
        super().__init__(initial)
        self.at_work_s = 0.0  # in pieces of inner steps, since the start
        self._lane = lane
        self._change = change

    async def work(self, seconds: float = 0.0, *, last: bool = True) -> None:
        """One piece that keeps the device busy for a time; the `last` one of an inner step makes the step."""
        await self._lane.run(Work.WEIGHT, self._piece, seconds, last)

    async def sent(self, span: slice, take: Take) -> Sent:
        return await self._lane.run(Work.UPDATE, self.sent_now, span, take)

    async def rebase(self, changes: Sequence[Rebase]) -> None:
        await self._lane.run(Work.UPDATE, self.rebase_now, changes)

    def _piece(self, seconds: float, last: bool) -> None:
        begin_s = time.perf_counter()
        time.sleep(seconds)
        if last:
            self.step(*self._change(self.inner_steps))
        self.at_work_s += time.perf_counter() - begin_s


@dataclass(frozen=True, slots=True)
class Course:
    """Inner steps without a pause between them."""

    steps: int
    warm_up: int  # of them, not measured
    pieces: int  # of a step
    piece_s: float
    window_s: float  # in which to look for the most bytes

    async def run(
        self, weights: LaneWeights, stepped: Callable[[], None], standing: Callable[[], tuple[int, int]]
    ) -> dict[str, float]:
        """Make them; `standing`: height, and bytes sent until now.

        Tells the share of the time in which the lane was not at an inner step, how much longer than `piece_s`
        a piece took, the entries committed, and of the bytes the mean and the most in any window.
        """
        waiting: deque[asyncio.Task[None]] = deque()
        seen: list[tuple[float, int, int]] = []  # after each piece: when, height and bytes
        first = self.warm_up * self.pieces
        before_s = 0.0
        for number in range(self.steps * self.pieces):
            last = (number + 1) % self.pieces == 0
            waiting.append(asyncio.create_task(weights.work(self.piece_s, last=last)))
            if len(waiting) < _WAITING:
                continue
            await waiting.popleft()
            if number % self.pieces == 0:  # the piece before that one was a step's last
                stepped()
            if number >= first:
                before_s = before_s if seen else weights.at_work_s
                seen.append((asyncio.get_running_loop().time(), *standing()))
        elapsed_s, entries, sent = (end - begin for begin, end in zip(seen[0], seen[-1], strict=True))
        busy_s = weights.at_work_s - before_s
        await asyncio.gather(*waiting)
        stepped()
        return {
            "idle_share": 1.0 - busy_s / elapsed_s,
            "stretched": busy_s / (self.piece_s * (len(seen) - 1)) - 1.0,
            "entries": entries,
            "window_bytes_mean": sent * self.window_s / elapsed_s,
            "window_bytes_most": float(self._most(seen)),
        }

    def _most(self, seen: Sequence[tuple[float, int, int]]) -> int:
        most = first = 0
        for at_s, _, sent in seen:
            while seen[first][0] < at_s - self.window_s:
                first += 1
            most = max(most, sent - seen[first][2])
        return most
