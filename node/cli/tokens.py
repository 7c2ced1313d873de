"""`shoal token create|list|revoke`: invitations. They work beside the owner's daemon, or without one."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from shoal.node.cli.console import note, out, print_json
from shoal.node.cli.orders import WHO
from shoal.node.cli.units import duration_s
from shoal.node.paths import control_sockets, data_root
from shoal.protocol.errors import PeerUnreachable
from shoal.protocol.identity import Role

app = typer.Typer(help="Invite people, and shut them out.", no_args_is_help=True)

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Folder of keys and runs.", show_default=False)
]
Run = Annotated[str | None, typer.Option("--run", help="Name or id of the run, where there are several.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]


@app.command()
def create(
    role: Annotated[list[Role], typer.Option(help="What it grants; may be repeated.")] = [Role.TRAINER],  # noqa: B006
    ttl: Annotated[str, typer.Option(help="How long it is good for, like 12h or 7d.")] = "7d",
    name: Annotated[str, typer.Option(help="For whom, as `token list` will show it.")] = "",
    run: Run = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Print a new join token. It is a secret: whoever has it can join."""
    from shoal.node.owner.desk import OrderDesk
    from shoal.node.owner.home import OwnerHome
    from shoal.node.owner.orders import TokenOrder

    home = OwnerHome.choose(data_root(data_dir), run)
    order = TokenOrder(roles=tuple(role), ttl_s=duration_s(ttl), who=WHO, name=name)
    made = OrderDesk(home).create_token(order)
    if as_json:
        print_json(made)
        return
    roles = ", ".join(made["roles"])
    note(f"token {made['id']} ({roles}), good for {ttl}; one volunteer, one token:")
    typer.echo(made["token"])


@app.command("list")
def list_tokens(run: Run = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show the tokens issued."""
    from shoal.node.owner.desk import OrderDesk
    from shoal.node.owner.home import OwnerHome

    home = OwnerHome.choose(data_root(data_dir), run)
    rows = OrderDesk(home).tokens()
    if as_json:
        print_json(rows)
        return
    table = Table(Column("id", no_wrap=True), "name", "roles", "state", "until")
    for row in rows:
        until = time.strftime("%Y-%m-%d %H:%M", time.gmtime(row["not_after"]))
        table.add_row(row["id"], row["name"], ", ".join(row["roles"]), row["state"], until)
    out.print(table)


@app.command()
def revoke(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="A token's id, or a peer's.")],
    run: Run = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Shut out a token for good, or one peer (until shoal peer unban)."""
    from shoal.node.owner.desk import OrderDesk
    from shoal.node.owner.home import OwnerHome
    from shoal.node.owner.orders import parse_order

    root = data_root(data_dir)
    home = OwnerHome.choose(root, run)
    desk = OrderDesk(home)
    if token_id.startswith("12D3"):
        desk.perform(parse_order({"what": "ban", "peer": token_id, "who": WHO}))
    else:
        desk.revoke_token(token_id, WHO)
    version = home.key.revocations().version
    told = asyncio.run(_tell_daemons(root, home.key.run_id))
    if as_json:
        print_json({"id": token_id, "version": version, "daemons_told": told})
        return
    note(f"{token_id} is shut out (revocation list {version})")
    if not told:
        note("no daemon of this run answers here; the list spreads when `shoal up` runs again")


async def _tell_daemons(root: Path, run_id: bytes) -> int:
    """Have this machine's daemons of the run take the new list over and spread it; how many did."""
    from shoal.node.control import ask

    told = 0
    for path in control_sockets(root):
        if path.parent.name == run_id.hex()[:16]:
            try:
                told += bool(await ask(path, "reload_lists"))
            except PeerUnreachable:
                continue  # a socket that a killed daemon left
    return told
