"""How commands speak: messages and errors for people on stderr, results on stdout, JSON where asked."""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import traceback
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from shoal.node.version import VERSION
from shoal.protocol.errors import ShoalError

out = Console(highlight=False)  # rich honours NO_COLOR and plain pipes by itself
notes = Console(stderr=True, highlight=False)


def print_json(value: object) -> None:
    """One line of JSON on stdout."""
    sys.stdout.write(json.dumps(value, default=str) + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Something a person should know, beside the result."""
    notes.print(_shown(text), soft_wrap=True)


def explain(error: ShoalError) -> None:
    """One readable message: what happened, the evidence, what to do."""
    first, _, rest = str(error).partition("\n")
    notes.print(f"[bold red]error:[/] {_shown(first)}", soft_wrap=True)
    for line in rest.splitlines():
        notes.print(f"  {_shown(line)}", soft_wrap=True)


def _shown(text: str) -> str:
    """Of a text what prints: it may name files of others, and terminals obey what does not print."""
    return escape("".join(mark if mark.isprintable() or mark == "\n" else "?" for mark in text))


def report_bug(error: Exception) -> None:
    """Keep the traceback in a file of its own and say where. Arguments may be secret, so they stay out."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="shoal-report-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write(f"shoal {VERSION}, Python {platform.python_version()}, {platform.platform()}\n\n")
        file.writelines(traceback.format_exception(error))
    notes.print(f"[bold red]error:[/] a bug in shoal: {escape(f'{type(error).__name__}: {error}')}")
    notes.print(f"  the whole story is in {Path(file.name)}; please report it", soft_wrap=True)
