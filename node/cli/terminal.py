"""What a peer tells on a terminal: sentences that stay, and one bar below them that comes and goes."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from shoal.node.events import Fields, sentence
from shoal.node.progress import Progress


class Terminal:
    """Use as `with`. `tell` is an `Events`, from any thread; `show` a `Show`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._bars: dict[bool, Bar] = {}
        for of_bytes, amount in ((True, DownloadColumn()), (False, MofNCompleteColumn())):
            columns = (TextColumn("{task.description}"), BarColumn(), amount)
            self._bars[of_bytes] = Bar(*columns, console=console, transient=True, auto_refresh=False)
        self._shown: Bar | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.show(None)

    def tell(self, kind: str, fields: Fields) -> None:
        """Print the event above the bar, if it has words."""
        if (text := sentence(kind, fields)) is not None:
            with self._lock:
                self._console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def show(self, progress: Progress | None) -> None:
        """Draw the bar anew."""
        with self._lock:
            bar = self._bars[progress.of_bytes] if progress is not None else None
            if bar is not self._shown and self._shown is not None:
                self._shown.stop()
            if bar is not None and progress is not None:
                task = bar.task_ids[0] if bar.task_ids else bar.add_task("")
                bar.update(task, description=progress.what, completed=progress.done, total=progress.total)
                if bar is not self._shown:
                    bar.start()
                bar.refresh()
            self._shown = bar
