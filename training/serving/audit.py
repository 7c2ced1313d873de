"""Checks of answers: a share of texts goes through a second chain, of servers that did not write them.

What comes next follows from logits, options, seed and position alone, drawn tokens too, so every token of a
text can be recomputed, all at once. Servers differ by rounding: a token next to the border of what was drawn
is no disagreement. And at a few positions the servers' hidden states are compared by fingerprints (`prints`),
for those that were shaken a little may still give the same tokens; these also tell which stage it was. The
client runs it beside its texts; a disagreement names what was said, what would be, and by whom.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from shoal.protocol.errors import ShoalError
from shoal.protocol.identity import PeerId
from shoal.training.pipeline.payload import PayloadFormat
from shoal.training.serving.messages import SamplingOptions
from shoal.training.serving.prints import first_strange
from shoal.training.serving.sampling import adjusted, filtered, next_token, uniform
from shoal.training.serving.tuner import Answer, Tuner
from shoal.training.serving.written import Written
from shoal.training.spec import RunSpec

NEAR_SCORE = (
    1e-3  # of float32, times the largest score: logits of two servers differ by less (fp32: 1e-5, bf16: 1e-2)
)
NEAR_DRAW = 1e-3  # of probability
NEAR_HIDDEN = 1e-3  # of each value, for float32: see `prints`
_PENDING = 8  # texts that wait for their check; more are not checked
_GREEDY_BELOW = 1e-4


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Two chains do not agree on a token, or on what led to it. One of them lies, or computes wrongly."""

    position: int
    said: int  # -1: that the text ends here
    recomputed: int  # the same, where only hidden states differ
    servers: tuple[PeerId, ...]
    checked_by: tuple[PeerId, ...]
    stage: int | None = None  # the first whose hidden states differ, if they do
    off: float = 0.0  # by how much, in shares of what is there
    suspects: tuple[PeerId, ...] = ()  # its servers in both chains, or neighbours who contradict each other

    def to_json(self) -> dict[str, object]:
        """Evidence, for reports."""
        return {
            "position": self.position,
            "said": self.said,
            "recomputed": self.recomputed,
            "servers": list(self.servers),
            "checked_by": list(self.checked_by),
            "stage": self.stage,
            "off": self.off,
            "suspects": list(self.suspects),
        }


@dataclass(slots=True)
class AuditFigures:
    """Since the start."""

    agreed: int = 0
    disagreed: int = 0
    unchecked: int = 0  # due, and no second chain could be had
    unshown: int = 0  # servers that did not say what went through them
    why_unchecked: str = ""
    evidence: list[Disagreement] = field(default_factory=list)  # the last few

    def counts(self) -> dict[str, int]:
        """Texts by result; empty where none was due."""
        found = {"agreed": self.agreed, "disagreed": self.disagreed, "unchecked": self.unchecked}
        return found if any(found.values()) else {}


def coarsest(spec: RunSpec) -> str:
    """The type with the fewest digits that a text's hidden states are rounded to."""
    types = {spec.model.dtype, PayloadFormat.of_inference(spec).widest}
    return "float32" if types == {"float32"} else "bfloat16"


def near_score(dtype: str) -> float:
    """By how much logits of two honest servers of this type may differ, in shares of the largest."""
    return NEAR_SCORE if dtype == "float32" else 100 * NEAR_SCORE


def near_hidden(dtype: str) -> float:
    """By how much their hidden states may, in shares of each value. Measured on 8 layers, one position at a
    time against all at once: fp32 1e-6, bf16 1.3e-2."""
    return NEAR_HIDDEN if dtype == "float32" else 50 * NEAR_HIDDEN


def first_wrong(written: Written, logits: torch.Tensor, near_score: float) -> tuple[int, int] | None:
    """Position and token of the first disagreement; logits fp32 [T, vocabulary] of all tokens."""
    options, tokens = written.options, written.tokens
    for at in range(written.prompt, len(tokens) + written.stopped):
        before, scores = tokens[:at], logits[at - 1]
        said = tokens[at : at + 1] or options.stop  # where it ended it was one of these
        mine = next_token(scores, before, options)
        if mine not in said and not any(_is_near(scores, before, one, options, near_score) for one in said):
            return at, mine
    return None


def _is_near(
    logits: torch.Tensor, before: Sequence[int], said: int, options: SamplingOptions, near_score: float
) -> bool:
    """Whether rounding could have led to `said`."""
    scores = adjusted(logits, before, options)
    if options.temperature < _GREEDY_BELOW:
        most = float(scores.max())
        return most - float(scores[said]) <= near_score * max(abs(most), 1.0)
    kept = filtered(scores.double() / options.temperature, options)
    cumulative = torch.softmax(kept, dim=0).cumsum(dim=0)
    drawn = uniform(options.seed, len(before)) * float(cumulative[-1])
    low = float(cumulative[said - 1]) if said else 0.0
    return low - NEAR_DRAW <= drawn <= float(cumulative[said]) + NEAR_DRAW


class Auditor:
    """Use as `async with`; checks that run are given up at its end."""

    def __init__(
        self,
        tuner: Tuner,
        share: float,
        rng: random.Random,
        report: Callable[[Disagreement], None] = lambda found: None,
        dtype: str = "float32",
    ) -> None:
        """`share` of the texts, from 0 to 1, is checked. `dtype`: the coarsest that they are computed in."""
        self.figures = AuditFigures()
        self._tuner, self._share, self._rng, self._report = tuner, share, rng, report
        self._near_score, self._near_hidden = near_score(dtype), near_hidden(dtype)
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def draw(self) -> bool:
        """Whether a text that begins is to be checked at its end."""
        return self._rng.random() < self._share

    def ended(self, written: Written) -> None:
        """A text that was drawn is complete."""
        if written.restarted:
            self._not_checked("the model changed while the text was written")
            return
        if len(self._tasks) >= _PENDING:
            self._not_checked(f"{_PENDING} checks are under way")
            return
        task = asyncio.create_task(self.check(written), name="audit")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def idle(self) -> None:
        """Returns when no check is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def check(self, written: Written) -> None:
        """Send it through another chain, and compare."""
        tokens = torch.tensor([written.tokens])
        try:
            answer = await self._tuner.again(tokens, dict(enumerate(written.versions)), written.servers)
        except ShoalError as error:
            self._not_checked(str(error))
            return
        self.figures.unshown += sum(shown is None for _, shown in written.shown)
        found: Disagreement | None = await self._tuner.offload(self._compare, written, answer)
        if found is None:
            self.figures.agreed += 1
            return
        self.figures.disagreed += 1
        self.figures.evidence = [*self.figures.evidence, found][-_PENDING:]
        self._report(found)

    def _compare(self, written: Written, answer: Answer) -> Disagreement | None:
        """In a thread."""
        wrong = first_wrong(written, answer.logits[0], self._near_score)
        strange = None
        if written.shown:
            reference = [entered[0] for entered in answer.hidden]
            strange = first_strange([shown for _, shown in written.shown], reference, self._near_hidden)
        if wrong is None and strange is None:
            return None
        at = wrong[0] if wrong is not None else strange.position + 1 if strange is not None else 0
        said = written.tokens[at] if at < len(written.tokens) else -1
        servers, mine = tuple(sorted(written.servers)), wrong[1] if wrong is not None else said
        found = Disagreement(at, said, mine, servers, answer.servers)
        if strange is None:
            return found
        suspects = [written.shown[stage][0] for stage in strange.writers]
        suspects += [answer.servers[strange.stage]] if strange.compared else []
        return replace(found, stage=strange.stage, off=strange.off, suspects=tuple(suspects))

    def status(self) -> dict[str, object]:
        """JSON-able."""
        figures = self.figures
        return {
            "agreed": figures.agreed,
            "disagreed": figures.disagreed,
            "unchecked": figures.unchecked,
            "unshown": figures.unshown,
            "why_unchecked": figures.why_unchecked,
            "evidence": [one.to_json() for one in figures.evidence],
        }

    def _not_checked(self, why: str) -> None:
        self.figures.unchecked += 1
        self.figures.why_unchecked = why
