"""`shoal events` and `shoal replay`: what happened in a run, from the history that the owner's peer keeps."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from shoal.node.cli.console import note, out, print_json
from shoal.node.paths import control_sockets, data_root
from shoal.protocol.errors import PeerUnreachable, StorageError, UsageError

FOLLOW_S = 1.0
PAGE = 500
LONGEST_PAUSE_S = 10.0  # of a replay
_LINE_CHARACTERS = 1 << 20

Kind = Annotated[str | None, typer.Option(help="Only this kind, like reroute.", show_default=False)]
OfPeer = Annotated[
    str | None, typer.Option("--peer", help="Only this peer, by name or id.", show_default=False)
]


def events(
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what comes.")] = False,
    kind: Kind = None,
    peer: OfPeer = None,
    most: Annotated[int, typer.Option(min=1, max=1000, help="How many of the last.")] = 50,
    export: Annotated[
        Path | None,
        typer.Option(help="Write the whole history there, as JSON lines.", show_default=False),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Folder of keys and runs.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Show what happened in the run, as far as the owner's peer on this machine was told."""
    root = data_root(data_dir)
    if export is not None:
        try:
            with open(export, "x", encoding="utf-8", opener=_private) as file:
                count = asyncio.run(_export(root, file))
        except OSError as error:
            raise StorageError(f"cannot write {export}: {error.strerror}") from error
        note(f"wrote {count} lines to {export}")
        return
    asyncio.run(_show(root, kind, peer, most, follow, as_json))


def replay(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="What shoal events --export wrote.")],
    speed: Annotated[
        float, typer.Option(min=0.0, help="Times as fast as it happened; 0: without a pause.")
    ] = 60.0,
    kind: Kind = None,
    peer: OfPeer = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Tell an exported history again, in its rhythm."""
    before: float | None = None
    for event in read_events(path):
        if (kind and event["kind"] != kind) or (peer and peer not in (event["peer"], event["name"])):
            continue
        if before is not None and speed > 0:
            time.sleep(min(LONGEST_PAUSE_S, max(0.0, event["at"] - before) / speed))
        before = event["at"]
        _print(event, as_json)


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of an exported history. Raises StorageError and UsageError."""
    keys = {"number": int, "at": float, "kind": str, "peer": str, "name": str, "text": str}
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(_lines(file), start=1):
                line = json.loads(text)
                if not isinstance(line, dict):
                    raise UsageError(f"{path}:{number} is no object")
                if line.get("what") != "event":
                    continue
                if any(type(line.get(key)) is not of for key, of in keys.items()):
                    raise UsageError(f"{path}:{number} is no event")
                yield line
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # JSON, or not UTF-8
        raise UsageError(f"{path} is not what shoal events --export writes: {error}") from error


def _lines(file: TextIO) -> Iterator[str]:
    while text := file.readline(_LINE_CHARACTERS):
        yield text


async def _show(
    root: Path, kind: str | None, peer: str | None, most: int, follow: bool, as_json: bool
) -> None:
    socket = await _historian(root)
    number, newest = 0, True
    while True:
        wanted = {"after": number, "kind": kind, "peer": peer, "most": most, "newest": newest}
        found = await _ask(socket, what="events", **wanted)
        for event in found["events"]:
            number = event["number"]
            _print(event, as_json)
        if not follow:
            return
        newest, most = False, PAGE
        await asyncio.sleep(FOLLOW_S)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


async def _export(root: Path, file: TextIO) -> int:
    socket, count = await _historian(root), 0
    async for line in _everything(socket):
        file.write(json.dumps(line, separators=(",", ":")) + "\n")
        count += 1
    return count


async def _everything(socket: Path) -> AsyncIterator[dict[str, Any]]:
    """Contributors, series and events, one object each."""
    for one in (await _ask(socket, what="contributors", most=1000))["contributors"]:
        yield {"what": "contributor", **one}
    for name in (await _ask(socket, what="names"))["names"]:
        for at, value in (await _ask(socket, what="series", name=name, points=1000))["points"]:
            yield {"what": "series", "name": name, "at": at, "value": value}
    number = 0
    while page := (await _ask(socket, what="events", after=number, most=PAGE))["events"]:
        for event in page:
            number = event["number"]
            yield {"what": "event", **event}


async def _historian(root: Path) -> Path:
    """The daemon of this machine that keeps a history. Raises PeerUnreachable and UsageError."""
    refused: UsageError | None = None
    for path in control_sockets(root):
        try:
            await _ask(path, what="names")
        except PeerUnreachable:
            continue
        except UsageError as error:
            refused = error
        else:
            return path
    if refused is not None:
        raise refused
    raise PeerUnreachable(f"no peer runs from {root}\nstart one with: shoal up run.toml")


async def _ask(path: Path, **request: object) -> Any:
    from shoal.node.control import ask
    from shoal.protocol.errors import ShoalError

    try:
        return await ask(path, "history", **request)
    except ShoalError as error:
        if error.exit_code == UsageError.exit_code:
            raise UsageError(str(error)) from error
        raise


def _print(event: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(event)
        return
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["at"]))
    out.print(f"{when}  {event['name']}: {event['text']}", markup=False, soft_wrap=True)
