"""What a peer tells the person in front of it: one call, `events(kind, fields)`, and two ways to show it.

With `--json` every event is one line with stable keys (`event`, `at` and the fields). Otherwise people get
sentences: changes of state in words, one line a round, nothing in between. Writing is guarded
by a lock, since the compute lane reports from its own thread.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import TextIO

Fields = Mapping[str, object]
Events = Callable[[str, Fields], None]

_MB = 1e6


def json_events(stream: TextIO, clock: Callable[[], float] = time.time) -> Events:
    """Events as JSON lines."""
    lock = threading.Lock()

    def emit(kind: str, fields: Fields) -> None:
        line = json.dumps({"event": kind, "at": round(clock(), 3), **fields}, default=str)
        with lock:
            stream.write(line + "\n")
            stream.flush()

    return emit


def plain_events(stream: TextIO) -> Events:
    """Events as sentences; those without one stay silent."""
    lock = threading.Lock()

    def emit(kind: str, fields: Fields) -> None:
        text = sentence(kind, fields)
        if text is None:
            return
        with lock:
            stream.write(text + "\n")
            stream.flush()

    return emit


def sentence(kind: str, fields: Fields) -> str | None:
    """An event in words, None for those that only programs want."""
    known = _SENTENCES.get(kind)
    if known is not None:
        return known(fields)
    text = fields.get("text")
    return str(text) if text is not None else None


def _round(fields: Fields) -> str:
    loss = fields.get("loss")
    parts = [f"round {fields.get('height', '?')}"]
    if "inner_step" in fields:
        parts.append(f"step {fields['inner_step']}")
    if isinstance(loss, float):
        parts.append(f"loss {loss:.3f}")
    if isinstance(speed := fields.get("tokens_per_s"), int | float):
        parts.append(f"{speed:,.0f} tok/s")
    if isinstance(sent := fields.get("bytes_out"), int | float):
        parts.append(f"sent {sent / _MB:.1f} MB")
    return "  ".join(parts)


def _peer(verb: str) -> Callable[[Fields], str]:
    def tell(fields: Fields) -> str:
        stage = fields.get("stage")
        where = f" (stage {stage})" if stage is not None else ""
        why = f": {fields['reason']}" if fields.get("reason") else ""
        return f"peer {fields.get('name') or fields.get('peer')}{where} {verb}{why}"

    return tell


def _seconds(fields: Fields) -> str:
    return f"{float(str(fields['seconds'])):.2f} s"


def _checkpoint(fields: Fields) -> str:
    size = float(str(fields["bytes"])) / _MB
    where = f": {fields['path']}" if "path" in fields else ""  # places on a volunteer's disk are told nobody
    return f"checkpoint of {fields['what']}, {size:.1f} MB{where}"


_SENTENCES: dict[str, Callable[[Fields], str | None]] = {
    "round": _round,
    "peer_joined": _peer("joined"),
    "peer_left": _peer("left"),
    "peer_suspect": _peer("is slow to answer"),
    "peer_gone": _peer("is gone"),
    "peer_back": _peer("is back"),
    "held-out": lambda fields: f"held-out loss {float(str(fields['loss'])):.3f}",
    "reroute": lambda fields: f"stage {fields['stage']}: another replica took over after {_seconds(fields)}",
    "checkpoint": _checkpoint,
    "stage-restored": lambda fields: (
        f"stage {fields['stage']} was lost: it goes on from a checkpoint, at height {fields['height']}"
    ),
    "stage-rescued": lambda fields: (
        f"stage {fields['stage']} had no replica left; its guardians had it, at round {fields['height']}"
    ),
    "moments-taken": lambda fields: (
        f"the inner optimizer goes on from {fields['donor']}'s second moments, of {fields['steps']} steps"
    ),
    "guarding": lambda fields: f"keeping a copy of stage {fields['stage']}, from round {fields['height']}",
    "stage-found": lambda fields: f"stage {fields['stage']} is back, at round {fields['height']}",
    "stage-rebuilt": lambda fields: (
        f"stage {fields['stage']} was lost and is rebuilt ({fields['policy']}), from round {fields['height']}"
    ),
    "checkpoint-refused": lambda fields: f"no checkpoint: {fields['why']}",
    "drain-cut": lambda fields: "not everything could be finished in time; what is left is dropped",
}
