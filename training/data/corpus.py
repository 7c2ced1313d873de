"""The tokens of a corpus on disk: built once, mapped into memory, shared by the peers of a machine.

`open_corpus` blocks for as long as it reads and tokenizes: call it off the event loop. What is held out is
decided by a hash of the text alone, so peers with the same text agree, whichever driver reads what.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from blake3 import blake3

from shoal.protocol.errors import SpecError, StorageError
from shoal.training.data.sources import Piece, Source, open_source
from shoal.training.data.tokenizer import Tokenizer
from shoal.training.spec import RunSpec

Progress = Callable[[int, int], None]
"""(bytes read, bytes in all), about once a megabyte. What it raises ends the building and leaves nothing."""

_FORMAT = 1  # of the files; part of their folder's name
_PROGRESS_BYTES = 1 << 20
_STALE_S = 24 * 3600.0  # an unfinished folder of that age belongs to a process that died
_PARTS = ("training", "held_out")


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Token ids, uint16 or uint32, one dimension each; on disk unless a test hands in arrays."""

    training: np.ndarray
    held_out: np.ndarray


def open_corpus(
    spec: RunSpec, tokenizer: Tokenizer, cache_dir: Path, progress: Progress = lambda done, total: None
) -> Corpus:
    """The corpus of a run, from `cache_dir` if it was built there from the same files, else built now.

    Both parts hold a sequence at least: of a corpus so small that the asked fraction holds out less, more is
    held out. Raises SpecError (no file, wrong field, too little text) and StorageError.
    """
    source = open_source(spec.data)
    try:
        sizes = [path.stat().st_size for path in source.files]
        folder = cache_dir / _name(spec, source, tokenizer)
        corpus = _load(folder)
        if corpus is None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            _Builder(source, sizes, tokenizer, progress).build(spec, folder)
            corpus = _load(folder)
    except OSError as error:
        where = error.filename or cache_dir
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        helps = "\nfree space there, or name another folder with SHOAL_CACHE_DIR" if full else ""
        raise StorageError(f"{where}: {error.strerror or error}; the corpus needs it{helps}") from error
    if corpus is None:
        raise StorageError(f"{folder} cannot be read back after it was written; is the disk sound?")
    return corpus


def _name(spec: RunSpec, source: Source, tokenizer: Tokenizer) -> str:
    """Names the tokens by all that decides them; a file counts by path, size and time of change."""
    data = spec.data
    files = [(str(path.resolve()), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in source.files]
    rest = [
        data.source,
        data.text_field,
        data.held_out_fraction,
        spec.model.sequence,
        tokenizer.end_of_document,
    ]
    text = json.dumps([_FORMAT, tokenizer.fingerprint, *rest, files])
    return blake3(text.encode()).hexdigest()[:32]


def _load(folder: Path) -> Corpus | None:
    """The tokens in a folder, None when they are not there or not whole."""
    try:
        facts = json.loads((folder / "corpus.json").read_bytes())
        dtype = np.dtype(facts["dtype"])
        parts = [np.memmap(folder / f"{part}.tokens", dtype, "r", shape=(facts[part],)) for part in _PARTS]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Corpus(*parts)


class _Builder:
    """Reads, tokenizes and splits a source into the files of a folder."""

    def __init__(self, source: Source, sizes: list[int], tokenizer: Tokenizer, progress: Progress) -> None:
        self._source = source
        self._sizes = sizes
        self._tokenizer = tokenizer
        self._progress = progress
        self._dtype = np.dtype(np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.uint32)

    def build(self, spec: RunSpec, folder: Path) -> None:
        """Make the folder, whole or not at all; another process may make the same one meanwhile."""
        _remove_stale(folder.parent)
        building = Path(tempfile.mkdtemp(prefix="building-", dir=folder.parent))
        try:
            facts = self._write(building, spec.data.held_out_fraction, spec.model.sequence + 1)
            (building / "corpus.json").write_text(json.dumps(facts))
            try:
                building.rename(folder)
            except OSError:
                if _load(folder) is None:  # there, but broken
                    shutil.rmtree(folder, ignore_errors=True)
                    building.rename(folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)

    def _write(self, building: Path, fraction: float, needed: int) -> dict[str, object]:
        """Split at the fraction, or the next larger one (times 1.5) that holds out `needed` tokens."""
        while True:
            with (
                open(building / "training.tokens", "wb") as training,
                open(building / "held_out.tokens", "wb") as held_out,
            ):
                self._split(training, held_out, fraction)
                counts = [file.tell() // self._dtype.itemsize for file in (training, held_out)]
            if min(counts) >= needed:
                return {"dtype": self._dtype.str, **dict(zip(_PARTS, counts, strict=True))}
            if counts[0] < needed or fraction >= 1.0:
                raise SpecError(
                    f"the corpus is too small: {counts[0]} tokens for training and {counts[1]} held out, each"
                    f" must have {needed} for one sequence; add text to data.paths or lower model.sequence"
                )
            fraction = min(1.5 * fraction, 1.0)

    def _split(self, training: BinaryIO, held_out: BinaryIO, fraction: float) -> None:
        """Write each piece's tokens to its side, end-of-document wherever what follows is another text."""
        end = np.array([self._tokenizer.end_of_document], self._dtype).tobytes()
        unfinished: BinaryIO | None = None  # the side whose document goes on
        for piece in self._pieces():
            side = held_out if is_held_out(piece.key, fraction) else training
            if piece.text:
                if unfinished is not None and unfinished is not side:
                    unfinished.write(end)
                side.write(self._tokenizer.encode(piece.text).astype(self._dtype).tobytes())
                unfinished = side
            if piece.last and unfinished is not None:
                unfinished.write(end)
                unfinished = None

    def _pieces(self) -> Iterator[Piece]:
        total, before, told = sum(self._sizes), 0, 0
        for path, size in zip(self._source.files, self._sizes, strict=True):
            here = 0
            for piece in self._source.read(path):
                yield piece
                here += len(piece.text)
                done = before + min(here, size)
                if done - told >= _PROGRESS_BYTES:
                    told = done
                    self._progress(done, total)
            before += size
        self._progress(total, total)


def is_held_out(key: bytes, fraction: float) -> bool:
    """Whether a piece is held out: its hash, as a number in [0, 1), lies below the fraction."""
    return int.from_bytes(blake3(b"held out " + key).digest(length=8), "big") < fraction * 2**64


def _remove_stale(cache_dir: Path) -> None:
    """Remove what processes left that died while building; ages are told by the file system's own clock."""
    with tempfile.NamedTemporaryFile(dir=cache_dir) as file:
        now = Path(file.name).stat().st_mtime
    for folder in cache_dir.glob("building-*"):
        with contextlib.suppress(FileNotFoundError):  # it was finished just now
            if now - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
