"""Where text comes from: the standard library on this machine, text files, JSONL, Parquet.

A source lists its files and reads them one after the other, a piece at a time, so memory stays bounded
whatever their size. `corpus` decides by a piece's key whether it is held out, and tokenizes it.
"""

from __future__ import annotations

import glob
import importlib
import itertools
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.protocol.errors import SpecError
from shoal.training.spec import DataSection

PIECE_BYTES = 8 << 10  # of a text file: small enough that a megabyte yields a fair held-out part
DOCUMENT_BYTES = 64 << 20  # of one line of JSONL
STANDARD_LIBRARY_BYTES = 32 << 20  # CPython 3.11 without tests has 12 MB; a distribution may add to it
_PARQUET_ROWS = 256
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of a document. Pieces with equal keys are held out together, on every peer."""

    text: bytes
    key: bytes
    last: bool  # the document ends with it


@dataclass(frozen=True, slots=True)
class Source:
    """Files in a fixed order, and how to read one."""

    files: tuple[Path, ...]
    read: Callable[[Path], Iterator[Piece]]


def open_source(data: DataSection) -> Source:
    """The source a spec names. Raises SpecError when no file matches or an extra is not installed."""
    match data.source:
        case "standard-library":
            return standard_library(Path(sysconfig.get_paths()["stdlib"]))
        case "text":
            return Source(_matching(data.paths), _read_text)
        case "jsonl":
            return Source(_matching(data.paths), lambda path: _read_jsonl(path, data.text_field))
        case "parquet":
            parquet = _parquet()
            return Source(_matching(data.paths), lambda path: _read_parquet(parquet, path, data.text_field))


def standard_library(root: Path) -> Source:
    """Python sources below `root`, without tests and installed packages; a file is a document.

    The key is the path below the root, so a module is held out in every version of Python or in none.
    """
    found: list[tuple[str, Path, int]] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY]
        for name in names:
            path = Path(folder, name)
            if name.endswith(".py") and path.is_file():
                found.append((path.relative_to(root).as_posix(), path, path.stat().st_size))
    found.sort()
    ends = itertools.accumulate(size for _, _, size in found)
    within = zip(found, ends, strict=True)
    kept = {path: name for (name, path, _), end in within if end <= STANDARD_LIBRARY_BYTES}
    if not kept:
        raise SpecError(f"no Python sources under {root}; choose data.source = text and data.paths instead")

    def read(path: Path) -> Iterator[Piece]:
        yield Piece(path.read_bytes(), kept[path].encode(), True)

    return Source(tuple(kept), read)


def _matching(patterns: tuple[str, ...]) -> tuple[Path, ...]:
    """All files that the patterns name, sorted, each once. A pattern without a match is an error."""
    files: set[str] = set()
    for pattern in patterns:
        full = os.path.expanduser(pattern)
        matches = [full] if os.path.isfile(full) else glob.glob(full, recursive=True)
        here = {path for path in matches if os.path.isfile(path)}
        if not here:
            raise SpecError(f"data.paths: no file matches {pattern!r}, seen from {os.getcwd()}")
        files |= here
    return tuple(Path(path) for path in sorted(files))


def _read_text(path: Path) -> Iterator[Piece]:
    """Pieces of at most PIECE_BYTES, cut after a line where there is one, else between characters."""
    with path.open("rb") as file:
        rest = b""
        while block := file.read(PIECE_BYTES - len(rest)):
            rest += block
            if len(rest) < PIECE_BYTES:
                continue
            end = rest.rfind(b"\n", PIECE_BYTES // 2) + 1 or _character_end(rest)
            text, rest = rest[:end], rest[end:]
            yield Piece(text, text, False)
        yield Piece(rest, rest, True)


def _character_end(data: bytes) -> int:
    """Before the UTF-8 character that may be cut off at the end; it begins within the last four bytes."""
    for back in range(1, 4):
        if data[-back] >= 0xC0:
            return len(data) - back
        if data[-back] < 0x80:
            break
    return len(data)


def _read_jsonl(path: Path, field: str) -> Iterator[Piece]:
    """One document a line. Raises SpecError with file and line."""
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(DOCUMENT_BYTES + 1)
            if not line:
                return
            if len(line) > DOCUMENT_BYTES:
                raise SpecError(f"{path}:{number}: a line of more than {DOCUMENT_BYTES} bytes; split it")
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode(errors="replace"))
            except (ValueError, RecursionError) as error:
                raise SpecError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(record, dict) or field not in record:
                has = f"it has: {', '.join(record)}"[:200] if isinstance(record, dict) else "it is no object"
                raise SpecError(f"{path}:{number}: no field {field!r} ({has}); set data.text_field")
            yield from _document(record[field], f"{path}:{number}", field)


def _read_parquet(parquet: Any, path: Path, field: str) -> Iterator[Piece]:
    """One document a row. Raises SpecError with file and row."""
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                has = f"it has: {', '.join(names)}"[:200]
                raise SpecError(f"{path}: no column {field!r} ({has}); set data.text_field")
            row = 0
            for rows in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
                for value in rows.column(0).to_pylist():
                    row += 1
                    yield from _document(value, f"{path}: row {row}", field)
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise SpecError(f"{path} is not a Parquet file that can be read: {error}") from error


def _document(value: object, where: str, field: str) -> Iterator[Piece]:
    if value is None:  # what data sets use for an empty text
        return
    if not isinstance(value, str | bytes):
        raise SpecError(f"{where}: {field!r} is {type(value).__name__}, not text; set data.text_field")
    text = value.encode(errors="replace") if isinstance(value, str) else value
    yield Piece(text, text, True)


def _parquet() -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise SpecError("data.source = parquet needs pyarrow: pip install 'shoal[parquet]'") from error
