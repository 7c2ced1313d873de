"""`shoal serve`: the swarm behind the HTTP API that developers know from OpenAI."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.node.cli.console import note, print_json
from shoal.node.cli.inference import Draft

if TYPE_CHECKING:
    from shoal.protocol.admission import JoinToken


def serve(
    token: Annotated[
        str, typer.Argument(metavar="TOKEN", help="An inference token, @FILE, or - for standard input.")
    ],
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where programs find the API.")
    ] = "127.0.0.1:8000",
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="Keys that callers may show, one a line; needed to listen on other addresses."),
    ] = None,
    verify: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the answers that a second chain recomputes.")
    ] = 0.0,
    draft: Draft = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of keys and runs.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Answer /v1/models, /v1/completions and /v1/chat/completions until interrupted."""
    from shoal.node.gateway.server import bind, read_keys
    from shoal.protocol.admission import read_token

    parsed, warning = read_token(token)
    if warning:
        note(warning)
    keys = read_keys(api_key_file)
    with bind(listen, keys) as bound:
        asyncio.run(_serve(parsed, data_dir, bound, keys, verify, draft, as_json))


async def _serve(
    token: JoinToken,
    data_dir: Path | None,
    bound: socket.socket,
    keys: tuple[str, ...],
    verify: float,
    draft: Path | None,
    as_json: bool,
) -> None:
    from shoal.node.gateway.app import Gateway
    from shoal.node.gateway.server import server_of
    from shoal.node.inference.client import AsyncClient

    async with AsyncClient(token, data_dir=data_dir, verify=verify, draft=draft) as client:
        gateway = Gateway(client, client.model, int(time.time()), time.time, keys)
        host, port = bound.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        if as_json:
            print_json({"event": "serving", "address": address, "model": client.model, "keys": len(keys)})
        else:
            note(f"serving {client.model} at {address}\ntry: curl {address}/models\nstop with Ctrl-C")
        await server_of(gateway.app).serve(sockets=[bound])
