"""The demo's figures, and whether they hold. Pure: fed with events and statuses, asked at the end.

A figure that was not measured is None, and a demo with such a figure has failed, whatever the others say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Heads:
    """What every replica said its agreed state was, at every height it was seen at."""

    seen: dict[tuple[int, int], dict[str, tuple[str, str]]] = field(default_factory=dict)
    latest: dict[tuple[int, str], int] = field(default_factory=dict)

    def add(self, peer: str, stage: int, height: int, head: str, state_root: str) -> None:
        self.seen.setdefault((stage, height), {})[peer] = (head, state_root)
        self.latest[stage, peer] = max(height, self.latest.get((stage, peer), 0))

    def differences(self) -> list[str]:
        """Where two replicas disagreed at one height, in words."""
        return [
            f"stage {stage}, height {height}: {states}"
            for (stage, height), states in sorted(self.seen.items())
            if len(set(states.values())) > 1
        ]

    def common_height(self, stage: int, peers: Sequence[str]) -> int | None:
        """The greatest height at which all of `peers` were seen."""
        heights = [h for (s, h), states in self.seen.items() if s == stage and states.keys() >= set(peers)]
        return max(heights, default=None)

    def group_height(self, stage: int, but: str) -> int:
        """The greatest height seen of a stage's replicas other than one."""
        return max((h for (s, peer), h in self.latest.items() if s == stage and peer != but), default=0)


@dataclass
class Figures:
    """Everything the summary says."""

    stages: int
    kill: bool
    tokens: int | None = None
    seconds: float | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    rounds: int | None = None
    replicas: list[int] = field(default_factory=list)
    killed: str | None = None
    reroute_s: float | None = None
    rejoin_s: float | None = None
    heads_equal: bool | None = None
    text: str | None = None
    stopped: list[str] = field(default_factory=list)  # peers that went without being asked
    slow_callbacks: list[str] = field(default_factory=list)  # over 50 ms of CPU time on an event loop

    def summary(self) -> dict[str, object]:
        """The last line of `shoal demo --json`."""
        return {
            "event": "summary",
            "tokens": self.tokens,
            "seconds": _rounded(self.seconds, 1),
            "loss_first": _rounded(self.loss_first, 4),
            "loss_last": _rounded(self.loss_last, 4),
            "rounds": self.rounds,
            "stages": self.stages,
            "replicas": self.replicas,
            "killed": self.killed,
            "reroute_s": _rounded(self.reroute_s, 3),
            "rejoin_s": _rounded(self.rejoin_s, 3),
            "heads_equal": self.heads_equal,
            "text": self.text,
        }

    def failures(self) -> list[str]:
        """Why the demo did not hold; empty if it did."""
        found = [f"{name} was not measured" for name in self._missing()]
        if (
            self.loss_first is not None
            and self.loss_last is not None
            and not self.loss_last < self.loss_first
        ):
            found.append(f"the loss did not fall: {self.loss_first:.3f} to {self.loss_last:.3f}")
        if self.heads_equal is False:
            found.append("replicas of a stage disagree about their anchor")
        if self.rounds == 0:
            found.append("no round was committed")
        found += self.stopped
        found += [f"a callback blocked an event loop: {slow}" for slow in self.slow_callbacks]
        if not self.replicas or min(self.replicas) < 1:
            found.append(f"a stage has no replica left: {self.replicas}")
        return found

    def _missing(self) -> list[str]:
        needed = ["tokens", "seconds", "loss_first", "loss_last", "rounds", "heads_equal"]
        if self.kill:
            needed += ["killed", "reroute_s", "rejoin_s"]
        missing = [name for name in needed if getattr(self, name) is None]
        return missing if self.text else [*missing, "text"]


@dataclass
class Losses:
    """The held-out loss over the log's tokens, as whichever driver scored it."""

    first: float | None = None
    last: float | None = None
    _tokens: float = -math.inf

    def add(self, loss: float, log_tokens: int) -> None:
        if not math.isfinite(loss):
            return
        if self.first is None:
            self.first = loss
        if log_tokens >= self._tokens:
            self.last, self._tokens = loss, log_tokens


def micro_batches(status: Mapping[str, Any]) -> int:
    """Micro-batches a replica applied since it started."""
    return int(status["training"].get("micro_batches", 0))


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
