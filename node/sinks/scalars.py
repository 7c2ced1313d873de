"""What sinks are told of a Snapshot: its figures, as named numbers over tokens. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from shoal.node.view.snapshot import Snapshot

SETTLED_S = 15.0  # drivers tell of one round's loss within this time


class Scalar(NamedTuple):
    """One point of a curve."""

    name: str
    value: float
    tokens: int  # in the log of the first stage
    at: float  # Unix seconds


class Scalars:
    """Makes them of one Snapshot after the other; a point of the loss curve comes once."""

    def __init__(self, *, from_the_start: bool) -> None:
        """`from_the_start`: the loss curve as far as it is known, not what comes from now on."""
        self._losses_to: dict[str, int] | None = {} if from_the_start else None  # curve -> tokens

    def of(self, snapshot: Snapshot, *, last: bool = False) -> list[Scalar]:
        """What is new. `last`: the same Snapshot again, for what waited for others to tell of it."""
        losses = list(self._losses(snapshot, 0.0 if last else SETTLED_S))
        tokens, at = snapshot.run.tokens, snapshot.at
        if last:
            return losses
        return [*losses, *(Scalar(name, value, tokens, at) for name, value in _figures(snapshot))]

    def _losses(self, snapshot: Snapshot, settled_s: float) -> Iterator[Scalar]:
        if self._losses_to is None:
            self._losses_to = dict.fromkeys(("loss/train", "loss/held_out"), snapshot.run.tokens)
        for point in snapshot.loss:
            if point.at > snapshot.at - settled_s:
                continue
            for name, value in (("loss/train", point.train), ("loss/held_out", point.held_out)):
                if value is not None and point.tokens > self._losses_to.get(name, -1):
                    self._losses_to[name] = point.tokens
                    yield Scalar(name, value, point.tokens, point.at)


def _figures(snapshot: Snapshot) -> Iterator[tuple[str, float]]:
    """What was measured, now."""
    for name, value in _measured(snapshot):
        if value is not None:
            yield name, float(value)


def _measured(snapshot: Snapshot) -> Iterator[tuple[str, float | None]]:
    run, throughput, churn = snapshot.run, snapshot.throughput, snapshot.churn
    yield "run/rounds", run.height
    yield "run/learning_rate", run.learning_rate
    yield "run/inner_steps", run.inner_steps
    yield "throughput/tokens_per_s", throughput.now
    for lost in throughput.lost:
        yield f"throughput/lost_{lost.what}", lost.share
    yield "peers/here", len(snapshot.peers)
    yield "peers/online", snapshot.online
    yield "peers/joins_last_hour", churn.joins
    yield "peers/leaves_last_hour", churn.leaves
    yield "peers/reroute_p95_s", churn.reroute_p95_s
    for stage in snapshot.stages:
        yield f"stage_{stage.stage}/replicas", stage.replicas
        yield f"stage_{stage.stage}/tokens_per_s", stage.tokens_per_s
        yield f"stage_{stage.stage}/balance", stage.balance
    for found in snapshot.compression:
        yield f"stage_{found.stage}/round_bytes", found.round_bytes
        yield f"stage_{found.stage}/bits_per_value", found.bits_per_value
        yield f"stage_{found.stage}/residual_norm", found.residual_norm
        yield f"stage_{found.stage}/update_norm", found.update_norm
    yield "checkpoint/age_s", snapshot.checkpoints.age_s
    for result, count in snapshot.trust.audits.items():
        yield f"trust/audits_{result}", count
