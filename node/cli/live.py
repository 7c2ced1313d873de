"""`shoal status --watch`: a live view on a terminal, a line a change elsewhere.

Both are made of Snapshots alone. What counts as a change: the verdict, who is here and in which state, the
rounds, and what diagnosis names; figures that move all the time do not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shoal.node.view.parts import Peer
from shoal.node.view.snapshot import Snapshot

_COLOURS = {"ok": "green", "warn": "yellow", "bad": "bold red"}
_PEERS, _EVENTS = 24, 6
_BAR = 20


def live_view(snapshot: Snapshot) -> RenderableType:
    """One screen."""
    return Group(*_screen(snapshot))


def change(snapshot: Snapshot) -> tuple[object, ...]:
    """Equal for two snapshots between which nothing happened that a line should tell."""
    return (
        snapshot.verdict.text,
        tuple((finding.kind, finding.peer, finding.stage) for finding in snapshot.verdict.findings),
        tuple((peer.peer, peer.state, peer.liveness, peer.stages) for peer in snapshot.peers),
        tuple(stage.height for stage in snapshot.stages),
        snapshot.me.state,
        snapshot.me.trouble,
    )


def line(snapshot: Snapshot) -> str:
    """A snapshot in one line of plain text."""
    run, loss = snapshot.run, last_loss(snapshot)
    parts = [
        time.strftime("%H:%M:%S", time.localtime(snapshot.at)),
        snapshot.verdict.text,
        f"round {run.height}",
        f"{run.tokens:,} tokens",
        f"{snapshot.throughput.now:,.0f} tok/s",
        f"loss {loss:.3f}" if loss is not None else "",
        f"{len(snapshot.peers)} peer{'s' if len(snapshot.peers) != 1 else ''}",
        *(finding.text for finding in snapshot.verdict.findings),
    ]
    return "  ".join(part for part in parts if part)


def last_loss(snapshot: Snapshot) -> float | None:
    """The newest held-out loss; before there is one, the newest of training."""
    held_out = [point.held_out for point in snapshot.loss if point.held_out is not None]
    train = [point.train for point in snapshot.loss if point.train is not None]
    return next((losses[-1] for losses in (held_out, train) if losses), None)


def _screen(snapshot: Snapshot) -> Iterator[RenderableType]:
    run, verdict = snapshot.run, snapshot.verdict
    yield Text(verdict.text, style=_COLOURS.get(verdict.level, ""))
    for finding in verdict.findings:
        yield Text(finding.text, style="yellow")
    if snapshot.me.trouble:
        yield Text(snapshot.me.trouble, style="bold red")
    yield _progress(snapshot)
    stages = Table("stage", "layers", "replicas", "round", "of this round", "tok/s", "could", title=run.name)
    for stage in snapshot.stages:
        share = stage.round_share
        stages.add_row(
            f"{stage.stage}{' weakest' if stage.weakest else ''}",
            "-" if stage.layers is None else f"{stage.layers[0]}-{stage.layers[1]}",
            str(stage.replicas),
            str(stage.height),
            "-" if share is None else ProgressBar(total=1.0, completed=share, width=_BAR),
            f"{stage.tokens_per_s:,.0f}",
            "-" if stage.could_tokens_per_s is None else f"{stage.could_tokens_per_s:,.0f}",
        )
    yield stages
    yield _peers(snapshot.peers)
    for event in snapshot.events[-_EVENTS:]:
        when = time.strftime("%H:%M:%S", time.localtime(event.at))
        yield Text(f"{when}  {event.name}: {event.text}", style="dim", no_wrap=True, overflow="ellipsis")


def _progress(snapshot: Snapshot) -> RenderableType:
    run, loss = snapshot.run, last_loss(snapshot)
    grid = Table.grid(padding=(0, 2))
    told = [f"{run.tokens:,} tokens", f"{snapshot.throughput.now:,.0f} tok/s"]
    if loss is not None:
        told.append(f"loss {loss:.3f}")
    if run.eta_s is not None:
        told.append(f"{_duration(run.eta_s)} to go")
    if run.goal_tokens:
        share = min(1.0, run.tokens / run.goal_tokens)
        grid.add_row(ProgressBar(total=1.0, completed=share, width=2 * _BAR), f"{share:.1%}", *told)
    else:
        grid.add_row(*told)
    return grid


def _peers(peers: tuple[Peer, ...]) -> RenderableType:
    table = Table("peer", "stage", "state", "tok/s", "busy", "rtt", "up", "down", "accepted")
    for peer in peers[:_PEERS]:
        state = peer.state if peer.liveness == "alive" else f"{peer.liveness}: {peer.reason}"
        table.add_row(
            escape(peer.name),
            ", ".join(map(str, peer.stages)) or "-",
            escape(", ".join((state, *peer.findings))),
            f"{peer.tokens_per_s:,.0f}",
            "-" if peer.busy_share is None else f"{peer.busy_share:.0%}",
            "-" if peer.rtt_ms is None else f"{peer.rtt_ms:.1f} ms",
            _rate(peer.up_bytes_per_s),
            _rate(peer.down_bytes_per_s),
            "-" if peer.micro_batches is None else f"{peer.micro_batches:,}",
        )
    left = len(peers) - _PEERS
    if left > 0:
        table.caption = f"and {left} more"
    return table


def _rate(bytes_per_s: float | None) -> str:
    return "-" if bytes_per_s is None else f"{bytes_per_s / 1e6:.2f} MB/s"


def _duration(seconds: float) -> str:
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
