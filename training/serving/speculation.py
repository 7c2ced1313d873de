"""Speculation: a draft goes on writing while the chain still computes what was drafted before.

After PipeInfer (arXiv 2407.11798): guesses are sent as they come, several runs of them under way in the chain
at once. A token that comes back either confirms the oldest guess or refuses all of them; the servers then
forget what they computed from these (`hosted`), and the draft starts anew behind it. `chain` runs one for a
text that has a draft.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence

from shoal.protocol.limits import DRAFT_TOKENS
from shoal.training.serving.ahead import alike
from shoal.training.serving.draft import Drafting
from shoal.training.serving.written import ChainFigures

_log = logging.getLogger(__name__)
RUN_TOKENS = 4  # sent at once: what the draft takes longer for than a message costs
_LEAST_CHANCE = 0.1  # of being needed; a guess of less is not worth the servers' time
_SMOOTHING = 0.1
_FIRST_ACCEPTANCE = 0.7


def most_ahead(acceptance: float) -> int:
    """How many guesses may wait to be confirmed, if each is right with this probability. Pure.

    The n-th is of use if all before it are right as well: acceptance ** n.
    """
    if acceptance >= 1.0:
        return DRAFT_TOKENS
    if acceptance <= _LEAST_CHANCE:
        return 1  # to see when it gets better
    return min(max(int(math.log(_LEAST_CHANCE) / math.log(acceptance)), 1), DRAFT_TOKENS)


class Speculation:
    """Guesses ahead of one text."""

    def __init__(
        self,
        drafting: Drafting,
        tokens: Sequence[int],
        capacity: int,
        figures: ChainFigures,
        send: Callable[[int, Sequence[int]], None],
    ) -> None:
        """`tokens`: the text, which grows; `send` takes a position and what is believed from there on."""
        self._drafting, self._tokens, self._capacity = drafting, tokens, capacity
        self._figures, self._send = figures, send
        self._guesses: list[int] = []  # behind `tokens`
        self._acceptance = _FIRST_ACCEPTANCE
        self._news = asyncio.Event()

    def confirm(self, token: int) -> None:
        """The next token of the text has come."""
        if self._guesses:
            right = self._guesses[0] == token
            self._acceptance += _SMOOTHING * (right - self._acceptance)
            self._figures.accepted += right
            self._figures.refused += not right
            self._guesses = self._guesses[1:] if right else []
        self._news.set()

    async def run(self) -> None:
        """Until cancelled, or the draft fails: then the text goes on without."""
        try:
            while True:
                self._news.clear()
                if not await self._go_on():
                    await self._news.wait()
        except Exception:  # the edge of this task: a draft that fails must cost nobody a text
            _log.exception("the draft of a text failed; it goes on without")

    async def _go_on(self) -> bool:
        """Guess a few more; False if nothing is to be guessed now."""
        # the text's last token is never fed, so a guess of it would be of no use
        room = min(most_ahead(self._acceptance), self._capacity - 1 - len(self._tokens)) - len(self._guesses)
        if room <= 0:
            return False
        believed = [*self._tokens, *self._guesses]
        new = await self._drafting.guess(believed, min(room, RUN_TOKENS))
        self._figures.drafted += len(new)
        believed += new
        present = [*self._tokens, *self._guesses]  # may have moved on meanwhile
        if alike(present, believed) == len(present) < len(believed):
            self._guesses = believed[len(self._tokens) :]
            self._send(len(self._tokens) - 1, believed[len(self._tokens) - 1 :])
        return bool(new)
