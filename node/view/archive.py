"""The history's file: events, series, contributors and frames in SQLite. Blocking; `history` calls it.

Bounded in age and size. A damaged file is put aside and a new one begun; anything else that the disk refuses
raises StorageError, and the next call tries again.
"""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.node.view import frames
from shoal.node.view.parts import EventRow
from shoal.node.view.snapshot import Snapshot
from shoal.protocol.errors import StorageError
from shoal.protocol.limits import MIB

KEPT_S = 90 * 86400.0
SIZE_BYTES = 256 * MIB
CONTRIBUTORS = 20_000  # processes; of more, those heard of longest ago go
PAGE = 1000  # most rows of one answer
_DAMAGED = ("malformed", "not a database")  # as SQLite says it
_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (number INTEGER PRIMARY KEY, at REAL, kind TEXT, peer TEXT, name TEXT,
    text TEXT, fields TEXT, process TEXT, theirs INTEGER);
CREATE UNIQUE INDEX IF NOT EXISTS events_once ON events (peer, process, theirs);
CREATE INDEX IF NOT EXISTS events_at ON events (at);
CREATE TABLE IF NOT EXISTS heard (peer TEXT PRIMARY KEY, process TEXT, theirs INTEGER, at REAL);
CREATE TABLE IF NOT EXISTS series (name TEXT, at REAL, value REAL, PRIMARY KEY (name, at)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS contributors (peer TEXT, process TEXT, name TEXT, tokens INTEGER, uptime_s REAL,
    micro_batches INTEGER, first_at REAL, last_at REAL, PRIMARY KEY (peer, process)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS contributors_at ON contributors (last_at);
"""
_CONTRIBUTED = """
INSERT INTO contributors VALUES (?,?,?,?,?,?,?,?) ON CONFLICT DO UPDATE SET name=excluded.name,
    tokens=max(tokens, excluded.tokens), uptime_s=max(uptime_s, excluded.uptime_s),
    micro_batches=max(micro_batches, excluded.micro_batches), last_at=excluded.last_at
"""

_AGEING = (("events", "at"), ("series", "at"), ("contributors", "last_at"), ("frames", "at"))  # table, time

LOSSES = 800
_LOSSES = """
SELECT * FROM events WHERE kind IN ('round', 'held-out') AND number % max(1,
    (SELECT count(*) FROM events WHERE kind IN ('round', 'held-out')) / ?) = 0 ORDER BY number DESC LIMIT ?
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An event, with what makes it the same when it is told twice."""

    row: EventRow
    process: int
    theirs: int  # its number there


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """What one process of a peer has done so far."""

    peer: str
    process: int
    name: str
    tokens: int
    uptime_s: float
    micro_batches: int
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """What goes to the disk at once."""

    entries: tuple[Entry, ...] = ()
    samples: tuple[tuple[str, float, float], ...] = ()  # series, Unix seconds, value
    contributions: tuple[Contribution, ...] = ()
    frames: tuple[Snapshot, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a coordinator goes on from."""

    number: int  # of the last event
    heard: dict[str, tuple[int, int]]  # peer -> process and its last event's number
    events: tuple[EventRow, ...]  # the newest last
    losses: tuple[EventRow, ...] = ()  # some that tell of losses, over the whole run
    rates: tuple[float, ...] = ()  # tokens a second, of the last hour
    best: float | None = None


class Archive:
    """One file. One thread at a time."""

    def __init__(self, path: Path, kept_s: float = KEPT_S, size_bytes: int = SIZE_BYTES) -> None:
        self.path = path
        self._kept_s = kept_s
        self._size_bytes = size_bytes
        self._connection: sqlite3.Connection | None = None

    def start(self, events: int, now: float) -> Start:
        """Open or begin the file. `events`: how many of the last are wanted."""
        with self._open() as db:
            number = db.execute("SELECT max(number) FROM events").fetchone()[0] or 0
            heard = {peer: (int(process), theirs) for peer, process, theirs in db.execute(
                "SELECT peer, process, theirs FROM heard")}  # fmt: skip
            rows = db.execute("SELECT * FROM events ORDER BY number DESC LIMIT ?", (events,)).fetchall()
            losses = db.execute(_LOSSES, (LOSSES, LOSSES)).fetchall()
            rates = db.execute(
                "SELECT value FROM series WHERE name = 'tokens_per_s' AND at >= ? ORDER BY at",
                (now - 3600.0,),
            ).fetchall()
            best = db.execute("SELECT max(value) FROM series WHERE name = 'tokens_per_s'").fetchone()[0]
        return Start(
            number=number,
            heard=heard,
            events=tuple(_row(row) for row in reversed(rows)),
            losses=tuple(_row(row) for row in losses),
            rates=tuple(rate for (rate,) in rates),
            best=best,
        )

    def write(self, what: Write) -> int:
        """All or nothing; the bytes that the file takes then."""
        with self._open() as db, db:
            for entry in what.entries:
                row, process = entry.row, str(entry.process)
                fields = json.dumps(dict(row.fields), separators=(",", ":"))
                db.execute(
                    "INSERT OR IGNORE INTO events VALUES (?,?,?,?,?,?,?,?,?)",
                    (
                        row.number,
                        row.at,
                        row.kind,
                        row.peer,
                        row.name,
                        row.text,
                        fields,
                        process,
                        entry.theirs,
                    ),
                )
                db.execute(
                    "INSERT OR REPLACE INTO heard VALUES (?,?,?,?)", (row.peer, process, entry.theirs, row.at)
                )
            db.executemany("INSERT OR REPLACE INTO series VALUES (?,?,?)", what.samples)
            for done in what.contributions:
                who = (done.peer, str(done.process), done.name)
                what_done = (done.tokens, done.uptime_s, done.micro_batches)
                db.execute(_CONTRIBUTED, (*who, *what_done, done.at, done.at))
            for snapshot in what.frames:
                frames.write(db, snapshot)
        return self.used_bytes()

    def tidy(self, now: float) -> int:
        """Let go of what is too old, and of the oldest while the file is too large; its bytes then."""
        with self._open() as db:
            with db:
                for table, column in _AGEING:
                    db.execute(f"DELETE FROM {table} WHERE {column} < ?", (now - self._kept_s,))
                db.execute("DELETE FROM heard WHERE at < ?", (now - self._kept_s,))
                db.execute(
                    "DELETE FROM contributors WHERE (peer, process) IN "
                    "(SELECT peer, process FROM contributors ORDER BY last_at DESC LIMIT -1 OFFSET ?)",
                    (CONTRIBUTORS,),
                )
                frames.thin(db, now, self._size_bytes)
            while self._shrunk_bytes(db) > self._size_bytes and self._drop_oldest(db):
                pass
        return self.used_bytes()

    def _shrunk_bytes(self, db: sqlite3.Connection) -> int:
        """Give free pages back, and the log's into the file."""
        db.executescript("PRAGMA incremental_vacuum")  # `execute` steps once, which frees one page
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return self.used_bytes()

    def used_bytes(self) -> int:
        """Of the file and its log."""
        files = (self.path, self.path.with_name(self.path.name + "-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def events(
        self,
        after: int,
        kind: str | None,
        peer: str | None,
        most: int,
        *,
        newest: bool,
        until: float | None = None,
    ) -> list[EventRow]:
        """Those numbered above `after`, ascending: the first `most` of them, or the last if `newest`.

        `until`: none that happened later, Unix seconds.
        """
        wanted, values = ["number > ?"], list[object]([after])
        if until is not None:
            wanted.append("at <= ?")
            values.append(until)
        if kind:
            wanted.append("kind = ?")
            values.append(kind)
        if peer:
            wanted.append("(peer = ? OR name = ?)")
            values += [peer, peer]
        order = "DESC" if newest else "ASC"
        query = f"SELECT * FROM events WHERE {' AND '.join(wanted)} ORDER BY number {order} LIMIT ?"
        with self._open() as db:
            rows = [_row(row) for row in db.execute(query, (*values, min(most, PAGE)))]
        return rows[::-1] if newest else rows

    def frame(self, at: float) -> frames.Frame | None:
        """The run as it was then; see `frames.read`."""
        with self._open() as db:
            return frames.read(db, at)

    def span(self) -> tuple[float, float] | None:
        """The times of the first and of the last frame."""
        with self._open() as db:
            return frames.span(db)

    def series(
        self, name: str, since: float, points: int, until: float = math.inf
    ) -> list[tuple[float, float]]:
        """(Unix seconds, mean), at most `points`, evenly cut in time."""
        points = max(1, min(points, PAGE))
        with self._open() as db:
            span = db.execute(
                "SELECT min(at), max(at) FROM series WHERE name = ? AND at BETWEEN ? AND ?",
                (name, since, until),
            ).fetchone()
            if span[0] is None:
                return []
            width = max(1e-3, (span[1] - span[0]) / points)
            found = db.execute(
                "SELECT max(at), avg(value) FROM series WHERE name = ? AND at BETWEEN ? AND ? "
                "GROUP BY min(CAST((at - ?) / ? AS INTEGER), ?) ORDER BY 1",
                (name, since, until, span[0], width, points - 1),
            )
            return [(at, value) for at, value in found]

    def series_names(self) -> list[str]:
        with self._open() as db:
            return [name for (name,) in db.execute("SELECT DISTINCT name FROM series ORDER BY name")]

    def contributors(self, most: int) -> list[dict[str, object]]:
        """By tokens; what all processes of a peer did."""
        keys = ("peer", "name", "tokens", "uptime_s", "micro_batches", "first_at", "last_at")
        with self._open() as db:
            found = db.execute(
                "SELECT peer, name, sum(tokens), sum(uptime_s), sum(micro_batches), min(first_at), "
                "max(last_at) FROM contributors GROUP BY peer ORDER BY 3 DESC, 4 DESC LIMIT ?",
                (min(most, PAGE),),
            )
            return [dict(zip(keys, row, strict=True)) for row in found]

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _drop_oldest(self, db: sqlite3.Connection) -> bool:
        """A tenth of what is there; whether there was anything."""
        with db:
            gone = 0
            for table, order in (("events", "number"), ("series", "at"), ("frames", "at")):
                count = db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
                where = f"SELECT {order} FROM {table} ORDER BY {order} LIMIT 1 OFFSET ?"
                if count:
                    db.execute(
                        f"DELETE FROM {table} WHERE {order} < coalesce(({where}), 1e300)", (1 + count // 10,)
                    )
                    gone += count
        return gone > 0

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            if self._connection is None:
                self._connection = self._connect()
            yield self._connection
        except (sqlite3.Error, OSError) as error:
            self.close()
            if any(sign in str(error) for sign in _DAMAGED):
                self._put_aside()
            raise StorageError(f"{self.path}: {error}\nmake room, or give it back its rights") from error

    def _connect(self) -> sqlite3.Connection:
        """Raises sqlite3.Error."""
        self.path.touch(mode=0o600)
        db = sqlite3.connect(self.path, check_same_thread=False, timeout=5.0)
        try:
            db.execute("PRAGMA auto_vacuum=INCREMENTAL")
            db.execute("PRAGMA journal_mode=WAL").fetchall()
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute("PRAGMA journal_size_limit=8388608").fetchall()
            db.executescript(_SCHEMA + frames.SCHEMA)
        except BaseException:
            db.close()
            raise
        return db

    def _put_aside(self) -> None:
        for suffix in ("-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.replace(self.path.with_suffix(".damaged"))


def _row(values: Sequence[object]) -> EventRow:
    number, at, kind, peer, name, text, fields, *_ = values
    return EventRow(
        number=int(str(number)),
        at=float(str(at)),
        kind=str(kind),
        peer=str(peer),
        name=str(name),
        text=str(text),
        fields=json.loads(str(fields)),
    )
