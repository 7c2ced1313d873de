"""`shoal token create|list|revoke`: invitations. They work beside the owner's daemon, or without one."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from shoal.node.cli.console import note, out, print_json
from shoal.node.cli.units import duration_s
from shoal.node.paths import control_sockets, data_root
from shoal.protocol.errors import PeerUnreachable, UsageError
from shoal.protocol.identity import PeerId, Role

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
    from shoal.node.owner.home import OwnerHome

    home = OwnerHome.choose(data_root(data_dir), run)
    token = home.issue(role, duration_s(ttl), name, time.time())
    if as_json:
        print_json({"id": token.token_id, "roles": sorted(token.roles), "token": token.encode()})
        return
    roles = ", ".join(sorted(token.roles))
    note(f"token {token.token_id} ({roles}), good for {ttl}; one volunteer, one token:")
    typer.echo(token.encode())


@app.command("list")
def list_tokens(run: Run = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show the tokens issued."""
    from shoal.node.owner.home import OwnerHome
    from shoal.protocol.revocation import load_revocations

    home = OwnerHome.choose(data_root(data_dir), run)
    stored = load_revocations(home.key.revocations_path, home.key.run_id, home.key.root_der)
    revoked = stored[1].token_ids if stored else frozenset[str]()
    now = time.time()
    rows = []
    for token in home.key.tokens():
        state = "revoked" if token.token_id in revoked else "expired" if token.not_after < now else "good"
        roles = sorted(role.value for role in token.roles)
        rows.append({"id": token.token_id, "name": token.name, "roles": roles, "state": state,
                     "not_after": token.not_after})  # fmt: skip
    if as_json:
        print_json(rows)
        return
    table = Table(Column("id", no_wrap=True), "name", "roles", "state", "until")
    for row, token in zip(rows, home.key.tokens(), strict=True):
        until = time.strftime("%Y-%m-%d %H:%M", time.gmtime(token.not_after))
        table.add_row(token.token_id, token.name, ", ".join(sorted(token.roles)), str(row["state"]), until)
    out.print(table)


@app.command()
def revoke(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="A token's id, or a peer's.")],
    run: Run = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Shut out a token, or one peer, for good."""
    from shoal.node.owner.home import OwnerHome

    root = data_root(data_dir)
    home = OwnerHome.choose(root, run)
    known = {token.token_id for token in home.key.tokens()}
    if token_id in known:
        signed = home.key.revoke(token_ids=[token_id])
    elif token_id.startswith("12D3"):
        signed = home.key.revoke(peers=[PeerId(token_id)])
    else:
        raise UsageError(f"this owner issued no token {token_id}\nshow them with: shoal token list")
    told = asyncio.run(_tell_daemons(root, home.key.run_id))
    if as_json:
        print_json({"id": token_id, "version": signed.notice.version, "daemons_told": told})
        return
    note(f"{token_id} is shut out (revocation list {signed.notice.version})")
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
