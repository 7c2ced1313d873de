"""The page on the command line: options of `shoal up`, and `shoal dashboard`, which prints a login link."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from shoal.node.cli.console import print_json
from shoal.node.paths import control_sockets, data_root
from shoal.protocol.errors import PeerUnreachable, UsageError

Address = Annotated[
    str | None,
    typer.Option(
        "--dashboard", help="Show the run on a web page there, like 127.0.0.1:8080.", show_default=False
    ),
]
Tls = Annotated[
    tuple[Path, Path] | None,
    typer.Option("--dashboard-tls", help="Certificate and key of the page, as PEM.", show_default=False),
]
WithoutTls = Annotated[
    bool,
    typer.Option("--dashboard-without-tls", help="Serve the page in plain text to other machines as well."),
]


def dashboard(
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Folder of keys and runs.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Print a new link to the page of the run that `shoal up --dashboard` shows; it signs in once."""
    for url in asyncio.run(_links(data_root(data_dir))):
        if as_json:
            print_json({"url": url})
        else:
            typer.echo(url)


async def _links(root: Path) -> list[str]:
    from shoal.node.control import ask

    links = []
    for path in control_sockets(root):
        try:
            if "dashboard_link" in await ask(path, "actions"):
                links.append(str((await ask(path, "dashboard_link"))["url"]))
        except PeerUnreachable:
            continue  # a socket that a killed daemon left
    if not links:
        raise UsageError(
            f"no daemon here shows a page (looked under {root})\n"
            "start one with: shoal up run.toml --dashboard 127.0.0.1:8080"
        )
    return links
