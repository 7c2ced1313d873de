"""A bar on stderr for what takes longer than two seconds; a line now and then where stderr is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from shoal.node.cli.console import note, notes

_PATIENCE_S = 2.0
_LINE_S = 10.0  # between lines where stderr is no terminal


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Gives what is to be called with (bytes done, of all)."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=notes, transient=True)
    task = bar.add_task(title, total=None)
    next_s = time.monotonic() + _PATIENCE_S

    def update(done: int, total: int) -> None:
        nonlocal next_s
        bar.update(task, completed=done, total=total)
        if time.monotonic() < next_s:
            return
        if notes.is_terminal:
            bar.start()
        else:
            note(f"{title}: {100 * done // max(total, 1)} %")
            next_s = time.monotonic() + _LINE_S

    try:
        yield update
    finally:
        bar.stop()
