"""`shoal peers`, `shoal peer show|drain|kick|ban|unban`: who is in the swarm, and the owner's word on it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from shoal.node.cli.console import out, print_json
from shoal.node.cli.orders import AsJson, DataDir, Reason, Run, Yes, order
from shoal.node.cli.peer import daemons
from shoal.node.paths import data_root
from shoal.protocol.errors import UsageError

if TYPE_CHECKING:
    from shoal.node.view.parts import Peer
    from shoal.node.view.snapshot import Snapshot

app = typer.Typer(help="One peer of the swarm.", no_args_is_help=True)
Who = Annotated[str, typer.Argument(metavar="PEER", help="Its name or its id.")]


class Sort(StrEnum):
    """By what peers are listed; rates with the largest first."""

    STAGE = "stage"
    NAME = "name"
    RATE = "rate"
    BACKLOG = "backlog"
    RTT = "rtt"


_ORDERS: dict[Sort, Callable[[Peer], Any]] = {
    Sort.STAGE: lambda peer: (peer.stages or (1 << 30,), peer.name),
    Sort.NAME: lambda peer: peer.name,
    Sort.RATE: lambda peer: -(peer.tokens_per_s or 0.0),
    Sort.BACKLOG: lambda peer: -(peer.backlog_s or 0.0),
    Sort.RTT: lambda peer: -(peer.rtt_ms or 0.0),
}


def peers(
    stage: Annotated[int | None, typer.Option(min=0, help="Only this stage.", show_default="all")] = None,
    sort: Annotated[Sort, typer.Option(help="By what.")] = Sort.STAGE,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List the swarm's peers, as a peer on this machine sees them."""
    found = [peer for peer in _seen(data_dir).peers if stage is None or stage in peer.stages]
    found.sort(key=_ORDERS[sort])
    if as_json:
        print_json([dataclasses.asdict(peer) for peer in found])
        return
    table = Table(
        Column("peer", no_wrap=True), "id", "stage", "state", "tokens/s", "backlog s", "rtt ms", "height"
    )
    for peer in found:
        table.add_row(*_row(peer))
    out.print(table)


@app.command()
def show(peer: Who, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show all that is known of one peer."""
    found = _named(_seen(data_dir).peers, peer)
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    table = Table(show_header=False, box=None)
    for name, value in dataclasses.asdict(found).items():
        if value not in (None, "", [], ()):
            table.add_row(name.replace("_", " "), escape(str(value)))
    out.print(table)


def _about(what: str, question: str, told: str) -> None:
    """A command that gives one order about one peer."""

    def command(
        peer: Who,
        reason: Reason = "",
        run: Run = None,
        yes: Yes = False,
        data_dir: DataDir = None,
        as_json: AsJson = False,
    ) -> None:
        asked = question.format(peer)
        order(what, asked, run=run, data_dir=data_dir, yes=yes, as_json=as_json, peer=peer, reason=reason)

    app.command(what, help=told)(command)


_about("drain", "Let {} finish and leave", "Ask a peer to finish what it holds, contribute it, and leave.")
_about(
    "kick",
    "Send {} away",
    "Ask a peer to leave at once; it may come back. What it had not contributed is lost.",
)
_about(
    "ban",
    "Shut {} out",
    "Shut a peer out until `unban`; all others refuse it. Its token is good for other keys still.",
)
_about("unban", "Let {} come back", "Let a peer that was shut out come back. Takes its id.")


def _seen(data_dir: Path | None) -> Snapshot:
    from shoal.node.view.snapshot import Snapshot

    found = asyncio.run(daemons(data_root(data_dir), "snapshot"))
    return Snapshot.from_json(found[0][1])


def _named(found: Sequence[Peer], wanted: str) -> Peer:
    """The one peer of that name or id. Raises UsageError."""
    named = [peer for peer in found if wanted in (peer.name, peer.peer)]
    if len(named) != 1:
        what = f"{len(named)} peers are called" if named else "no peer is called"
        raise UsageError(f"{what} {wanted!r}\nsee them with: shoal peers")
    return named[0]


def _row(peer: Peer) -> list[str]:
    return [
        escape(peer.name),
        peer.peer[-8:],
        ",".join(map(str, peer.stages)),
        peer.state if peer.liveness == "alive" else f"{peer.state}, {peer.liveness}",
        f"{peer.tokens_per_s:,.0f}",
        f"{peer.backlog_s:.1f}",
        "" if peer.rtt_ms is None else f"{peer.rtt_ms:.0f}",
        ",".join(map(str, peer.heights)),
    ]
