"""`shoal generate`: text from the swarm."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from shoal.node.cli.console import note, print_json
from shoal.node.paths import data_root


def generate(
    token: Annotated[
        str, typer.Argument(metavar="TOKEN", help="An inference token, @FILE, or - for standard input.")
    ],
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, max=4096)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, max=10.0, help="0 takes the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option(help="The same seed draws the same text.")] = 1,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of keys and runs.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Continue a text with the model as the swarm knows it now."""
    from shoal.node.inference.client import Request, generate_text
    from shoal.protocol.admission import read_token

    parsed, warning = read_token(token)
    if warning:
        note(warning)

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    request = Request(prompt, max_new_tokens, temperature, seed)
    if not as_json:
        show(prompt)
    done = generate_text(parsed, data_root(data_dir), request, (lambda piece: None) if as_json else show)
    if as_json:
        print_json(done.to_json())
    else:
        show("\n")
