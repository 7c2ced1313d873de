"""A bar on stderr for what takes longer than two seconds; a line now and then where stderr is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from shoal.node.cli.console import note, notes

_PATIENCE_S = 2.0
_LINE_S = 10.0  # between lines where stderr is no terminal


@contextmanager
def progress_bar(title: str, *, of_bytes: bool = True) -> Iterator[Callable[[float, float], None]]:
    """Gives what is to be called with (done, of all): bytes, or anything that is shown in per cent."""
    amount = DownloadColumn() if of_bytes else TaskProgressColumn()
    columns = (TextColumn(title), BarColumn(), amount, TimeRemainingColumn())
    bar = Progress(*columns, console=notes, transient=True)
    task = bar.add_task(title, total=None)
    next_s = time.monotonic() + _PATIENCE_S

    def update(done: float, total: float) -> None:
        nonlocal next_s
        bar.update(task, completed=done, total=total)
        if time.monotonic() < next_s:
            return
        if notes.is_terminal:
            bar.start()
        else:
            note(f"{title}: {100 * done // max(total, 1):.0f} %")
            next_s = time.monotonic() + _LINE_S

    try:
        yield update
    finally:
        bar.stop()
