"""How the demo shows itself: a live table on a terminal, lines elsewhere, JSON events on request."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table

from shoal.node.cli.console import notes, out, print_json

PLAIN_EVERY_S = 5.0
_LINES_KEPT = 8


@dataclass(frozen=True, slots=True)
class Progress:
    """The swarm at a moment."""

    elapsed_s: float
    seconds: float
    loss: float | None
    tokens: int
    tokens_per_s: float
    rounds: list[int]
    replicas: list[int]
    peers: int


class Screen:
    """`tell` says that something happened, `progress` how far things are."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._live: Live | None = None
        self._lines: list[str] = []
        self._now: Progress | None = None
        self._shown_s = -PLAIN_EVERY_S

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While the demo runs, draw on the terminal if there is one."""
        if self._as_json or not notes.is_terminal:
            yield
            return
        with Live(console=notes, auto_refresh=False, transient=True) as self._live:
            try:
                yield
            finally:
                self._live = None

    def tell(self, kind: str, text: str, **fields: Any) -> None:
        if self._as_json:
            print_json({"event": kind, "text": text, **fields})
        elif self._live is None:
            notes.print(text, markup=False, soft_wrap=True)
        else:
            self._lines = [*self._lines, text][-_LINES_KEPT:]
            self._draw()

    def progress(self, now: Progress) -> None:
        self._now = now
        if self._as_json:
            print_json({"event": "progress", **asdict(now)})
        elif self._live is not None:
            self._draw()
        elif now.elapsed_s - self._shown_s >= PLAIN_EVERY_S:
            self._shown_s = now.elapsed_s
            notes.print(_line(now), markup=False, soft_wrap=True)

    def result(self, summary: dict[str, Any], prompt: str) -> None:
        """The end: the summary line, or what it says in words."""
        if self._as_json:
            print_json(summary)
            return
        table = Table.grid(padding=(0, 2))
        for key, value in summary.items():
            if key not in ("event", "text"):
                table.add_row(key.replace("_", " "), str(value))
        out.print(table)
        if summary["text"]:
            out.print(f"\n{prompt}{summary['text']}", markup=False, soft_wrap=True)

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)

    def _picture(self) -> RenderableType:
        parts: list[RenderableType] = [*self._lines]
        if self._now is not None:
            parts.append(_table(self._now))
        return Group(*parts)


def _line(now: Progress) -> str:
    loss = "-" if now.loss is None else f"{now.loss:.3f}"
    return (
        f"{now.elapsed_s:4.0f} of {now.seconds:.0f} s  held-out loss {loss}  {now.tokens:,} tokens  "
        f"{now.tokens_per_s:,.0f} tok/s  rounds {now.rounds}  replicas {now.replicas}"
    )


def _table(now: Progress) -> Table:
    table = Table("time", "held-out loss", "tokens", "tok/s", "rounds", "replicas", "peers")
    table.add_row(
        f"{now.elapsed_s:.0f} of {now.seconds:.0f} s",
        "-" if now.loss is None else f"{now.loss:.3f} nats/byte",
        f"{now.tokens:,}",
        f"{now.tokens_per_s:,.0f}",
        " ".join(map(str, now.rounds)),
        " ".join(map(str, now.replicas)),
        str(now.peers),
    )
    return table
