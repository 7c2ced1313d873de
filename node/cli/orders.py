"""How the owner's commands reach the run: through the owner's daemon, or on its folder where none runs."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.node.cli.console import note, print_json
from shoal.node.paths import control_sockets, data_root
from shoal.protocol.errors import PeerUnreachable, ShoalError, UsageError

if TYPE_CHECKING:
    from shoal.node.owner.home import OwnerHome

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Folder of keys and runs.", show_default=False)
]
Run = Annotated[str | None, typer.Option("--run", help="Name or id of the run, where there are several.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Reason = Annotated[str, typer.Option(help="Why, for the peer and the log.", show_default=False)]
WHO = "command line"


def order(
    what: str, question: str, *, run: str | None, data_dir: Path | None, yes: bool, as_json: bool, **more: Any
) -> None:
    """Ask once, have it performed, and say what came of it."""
    home = _home(data_dir, run)
    confirm(f"{question} (run {home.key.run_name})", yes)
    request = {"what": what, "who": WHO, **more}
    socket = asyncio.run(owners_socket(data_root(data_dir), home.key.run_id))
    if socket is not None:
        entry = asyncio.run(_ask(socket, "order", **request))
    else:
        from shoal.node.owner.desk import OrderDesk
        from shoal.node.owner.orders import parse_order

        entry = OrderDesk(home).perform(parse_order(request)).to_json()
    if as_json:
        print_json({**entry, "spread": socket is not None})
        return
    note(str(entry["text"]))
    if socket is None:
        note("the owner's peer does not run here; peers hear of it when `shoal up` runs again")


def overview(run: str | None, data_dir: Path | None, most: int = 10) -> dict[str, Any]:
    """What is in force, and the last orders."""
    home = _home(data_dir, run)
    socket = asyncio.run(owners_socket(data_root(data_dir), home.key.run_id))
    if socket is not None:
        found: dict[str, Any] = asyncio.run(_ask(socket, "orders", most=most))
    else:
        from shoal.node.owner.desk import OrderDesk

        found = OrderDesk(home).overview(most, None)
    return {
        "run": home.key.run_name,
        "run_id": home.key.run_id.hex(),
        "owner_runs": socket is not None,
        **found,
    }


def confirm(question: str, yes: bool) -> None:
    """Once, on a terminal. Raises UsageError where nobody can answer."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("nobody can be asked here, so nothing was done\nto do it without asking: --yes")
    if not typer.confirm(f"{question}?", default=False, err=True):
        raise typer.Exit(1)


async def owners_socket(root: Path, run_id: bytes) -> Path | None:
    """The control socket of the owner's daemon of a run, None where none runs."""
    for path in control_sockets(root):
        if path.parent.name == run_id.hex()[:16]:
            try:
                await _ask(path, "orders", most=0)
            except PeerUnreachable:
                continue  # a socket that a killed daemon left
            except ShoalError as error:
                if error.exit_code != UsageError.exit_code:
                    raise
                continue  # a volunteer's peer beside the owner's
            return path
    return None


async def _ask(path: Path, do: str, **arguments: object) -> Any:
    from shoal.node.control import ask

    return await ask(path, do, **arguments)


def _home(data_dir: Path | None, run: str | None) -> OwnerHome:
    from shoal.node.owner.home import OwnerHome

    return OwnerHome.choose(data_root(data_dir), run)
