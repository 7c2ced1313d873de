"""The held-out loss: one driver of the swarm, the one of lowest id, scores the same text now and then.

It is scored on the anchors of all stages, along the pipeline (`InferenceHop`). The trainer of a first stage
runs one.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable

import torch

from shoal.protocol.errors import ShoalError
from shoal.training.pipeline.successors import Event

_EVERY_S = 5.0  # at most so often, and for at most so much of the time
_SHARE = 0.04
_AGAIN_S = (
    1.0  # until the first has been possible: the curve begins with the weights that the run begins with
)


class HeldOut:
    """See the module."""

    def __init__(
        self,
        tokens: torch.Tensor,
        score: Callable[[torch.Tensor], Awaitable[float]],
        is_mine: Callable[[], bool],
        log_tokens: Callable[[], int],
        event: Event,
        rng: random.Random,
    ) -> None:
        """`tokens`: int64 [N, T+1], for `score`; `is_mine`: whether it is for this driver to do it now."""
        self._tokens = tokens
        self._score = score
        self._is_mine = is_mine
        self._log_tokens = log_tokens
        self._event = event
        self._rng = rng
        self.loss = math.nan  # nats a token, as of the last time

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        pause_s, warm = _AGAIN_S, False
        while True:
            await asyncio.sleep(pause_s * self._rng.uniform(0.9, 1.1))
            if not self._is_mine():
                continue
            begun_s = loop.time()
            try:
                self.loss = await self._score(self._tokens)
            except ShoalError:  # a stage is empty for now
                continue
            self._event("held-out", {"loss": self.loss, "log_tokens": self._log_tokens()})
            took_s = loop.time() - begun_s if warm else 0.0  # the first waits for a swarm that starts up
            pause_s, warm = max(_EVERY_S, took_s / _SHARE), True
