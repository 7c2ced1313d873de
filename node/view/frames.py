"""Frames: whole Snapshots in the history's file, so that the page can show the run as it was. Blocking.

One with each point of the series; the older, the fewer are kept, and all together within a share of the
file's size. What a frame leaves out is in the file besides (events, losses) or too much (links, rounds).
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from dataclasses import dataclass, replace
from typing import Any

from shoal.node.view.parts import Totals
from shoal.node.view.snapshot import Snapshot

HOUR_S, DAY_S = 3600.0, 86400.0
# Those older than the first are a second number of seconds apart, at least.
THINNED = ((HOUR_S, 60.0), (DAY_S, 600.0), (7 * DAY_S, HOUR_S))
SIZE_SHARE = 0.5  # of the whole file
SCHEMA = "CREATE TABLE IF NOT EXISTS frames (at REAL PRIMARY KEY, body BLOB);"


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The run as it was."""

    snapshot: dict[str, Any]  # as `Snapshot.to_json` writes it
    at: float
    before: float | None  # when the one before it was, if there is one
    after: float | None


def write(db: sqlite3.Connection, snapshot: Snapshot) -> None:
    """Keep one."""
    lean = replace(
        snapshot,
        me=replace(snapshot.me, training={}, others=()),
        loss=(),
        markers=(),
        rounds=(),
        links=(),
        totals=Totals(),
        events=(),
    )
    body = zlib.compress(json.dumps(lean.to_json(), separators=(",", ":")).encode())
    db.execute("INSERT OR REPLACE INTO frames VALUES (?,?)", (snapshot.at, body))


def read(db: sqlite3.Connection, at: float) -> Frame | None:
    """The last one until then, else the first of all; None where there is none."""
    found = db.execute("SELECT at, body FROM frames WHERE at <= ? ORDER BY at DESC LIMIT 1", (at,)).fetchone()
    if found is None:
        found = db.execute("SELECT at, body FROM frames ORDER BY at LIMIT 1").fetchone()
    if found is None:
        return None
    then, body = found
    (before,) = db.execute("SELECT max(at) FROM frames WHERE at < ?", (then,)).fetchone()
    (after,) = db.execute("SELECT min(at) FROM frames WHERE at > ?", (then,)).fetchone()
    return Frame(snapshot=json.loads(zlib.decompress(body)), at=then, before=before, after=after)


def span(db: sqlite3.Connection) -> tuple[float, float] | None:
    """When the first and the last were."""
    first, last = db.execute("SELECT min(at), max(at) FROM frames").fetchone()
    return None if first is None else (first, last)


def thin(db: sqlite3.Connection, now: float, size_bytes: int) -> None:
    """Let go of those too close for their age, and of the oldest beyond the share of `size_bytes`."""
    for age_s, apart_s in THINNED:  # the first of each span of time stays
        db.execute(
            "DELETE FROM frames WHERE at < :until AND at NOT IN "
            "(SELECT min(at) FROM frames WHERE at < :until GROUP BY CAST(at / :apart AS INTEGER))",
            {"until": now - age_s, "apart": apart_s},
        )
    db.execute(
        "DELETE FROM frames WHERE at <= (SELECT max(at) FROM "
        "(SELECT at, sum(length(body)) OVER (ORDER BY at DESC) AS bytes FROM frames) WHERE bytes > ?)",
        (SIZE_SHARE * size_bytes,),
    )
