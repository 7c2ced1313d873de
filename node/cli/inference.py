"""`shoal generate` and `shoal chat`: text from the swarm."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.node.cli.console import note, print_json

if TYPE_CHECKING:
    from shoal.node.inference.client import AsyncClient, Options
    from shoal.protocol.admission import JoinToken

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and new lines
Token = Annotated[
    str, typer.Argument(metavar="TOKEN", help="An inference token, @FILE, or - for standard input.")
]
NewTokens = Annotated[int, typer.Option(min=1, max=1 << 20)]
Temperature = Annotated[float, typer.Option(min=0.0, max=100.0, help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option(min=1e-6, max=1.0, help="Only the likeliest tokens of this share.")]
TopK = Annotated[int, typer.Option(min=0, max=1 << 20, help="Only so many of the likeliest tokens; 0: all.")]
Penalty = Annotated[float, typer.Option(min=0.01, max=100.0, help="Above 1: what was said is less likely.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed draws the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="The text ends before this; may be given again.")]
Draft = Annotated[
    Path | None,
    typer.Option(
        help="Folder of a small model (Llama layout, same tokens) that guesses ahead: the same text, sooner.",
        show_default=False,
    ),
]
DataDir = Annotated[Path | None, typer.Option(help="Folder of keys and runs.", show_default=False)]


def generate(
    token: Token,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="Text to continue.")],
    max_new_tokens: NewTokens = 64,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 1,
    stop: Stop = None,
    draft: Draft = None,
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Continue a text with the model as the swarm knows it now."""
    from shoal.node.inference.client import AsyncClient, Options

    options = Options(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed, tuple(stop or ()))

    async def write() -> None:
        async with AsyncClient(_read(token), data_dir=data_dir, draft=draft) as client:
            if as_json:
                print_json((await client.generate(prompt, options)).to_json())
            else:
                _show(prompt)
                await _stream(client, prompt, options)

    asyncio.run(write())


def chat(
    token: Token,
    system: Annotated[str, typer.Option(help="What the assistant is told before the first turn.")] = "",
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    repetition_penalty: Penalty = 1.1,
    seed: Seed = 1,
    draft: Draft = None,
    data_dir: DataDir = None,
) -> None:
    """Talk with the model; an empty line ends it."""
    from shoal.node.inference.client import AsyncClient, Options, Turn, transcript

    options = Options(max_new_tokens, temperature, top_p, 0, repetition_penalty, seed)
    turns = [Turn("system", system)] if system else []

    async def talk() -> None:
        async with AsyncClient(_read(token), data_dir=data_dir, draft=draft) as client:
            while said := (await asyncio.to_thread(_ask)).strip():
                turns.append(Turn("user", said))
                answer = await _stream(client, *transcript(turns, options))
                turns.append(Turn("assistant", answer.strip()))

    asyncio.run(talk())


async def _stream(client: AsyncClient, prompt: str, options: Options) -> str:
    """Show a text as it comes, and return it."""
    async with client.writing(prompt, options) as writing:
        async for piece in writing:
            _show(piece.text)
    _show("\n")
    if drafted := writing.figures.drafted:
        note(f"of {drafted} tokens that the draft guessed {writing.figures.accepted} were right")
    return writing.text


def _read(token: str) -> JoinToken:
    from shoal.protocol.admission import read_token

    parsed, warning = read_token(token)
    if warning:
        note(warning)
    return parsed


def _ask() -> str:
    _show("> ")
    return sys.stdin.readline()


def _show(text: str) -> None:
    """On a terminal without what that would obey: servers draw the tokens, and any of them may mean ill."""
    if sys.stdout.isatty():
        text = _CONTROLS.sub("", text)
    sys.stdout.write(text)
    sys.stdout.flush()
