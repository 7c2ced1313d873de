"""The processes of a benchmark's peers: starts them, releases them at one instant, measures their rounds.

Used by `allreduce.py` and `slow_link.py`; the workers' side is `allreduce_harness.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

START_S = 0.1  # between the last "ready" and the release
ANSWER_S = 180.0  # of a worker that hangs
END_S = 20.0


@dataclass
class Measured:
    """Rounds of one system at one number of peers; `others` are the figures of single workers."""

    seconds: list[float] = field(default_factory=list)
    wire_bytes: list[list[int]] = field(default_factory=list)  # of each round, of each counted device
    parts: list[dict[str, float]] = field(default_factory=list)  # of each round, the most of any worker
    closing: list[dict[str, float]] = field(default_factory=list)  # of each worker

    def frame_bytes_per_peer(self, rounds: int) -> int:
        """What Shoal's transport counted, of one of all its `rounds`."""
        return round(
            sum(closing["transport_bytes_out"] for closing in self.closing) / len(self.closing) / rounds
        )


class Workers:
    """The processes of one system. Use as a context; leaving it ends them."""

    def __init__(self, commands: list[list[str]], configs: list[dict[str, Any]]) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "HIVEMIND_LOGLEVEL": "ERROR"}
        for command, config in zip(commands, configs, strict=True):
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
            self._processes.append(process)
            self._tell(process, config)

    def __enter__(self) -> Workers:
        try:
            self.tell([reply["hello"] for reply in self.hear()])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        limit_s = time.monotonic() + END_S
        for process in self._processes:
            try:
                process.wait(timeout=max(0.1, limit_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def hear(self) -> list[dict[str, Any]]:
        """A line of each worker."""
        return [self._line(process) for process in self._processes]

    def tell(self, message: object) -> None:
        """A line to each worker."""
        for process in self._processes:
            self._tell(process, message)

    def round(self) -> tuple[float, list[dict[str, Any]]]:
        """Release all at one instant: seconds until the last one ended, and what each said."""
        self.hear()
        release_s = time.monotonic() + START_S
        self.tell({"release_s": release_s})
        replies = self.hear()
        return max(reply["ended_s"] for reply in replies) - release_s, replies

    def finish(self) -> list[dict[str, float]]:
        """End in peace; figures of each worker."""
        self.hear()
        self.tell({"finish": True})
        return self.hear()

    def _tell(self, process: subprocess.Popen[str], message: object) -> None:
        if process.stdin is None:
            raise RuntimeError("a worker has no pipes")
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()

    def _line(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        if process.stdout is None:
            raise RuntimeError("a worker has no pipes")
        guard = threading.Timer(ANSWER_S, process.kill)
        guard.start()
        line = process.stdout.readline()
        guard.cancel()
        if not line:
            raise RuntimeError(f"a worker ended: exit status {process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        return reply


def measure(workers: Workers, warm_up: int, rounds: int, sent_bytes: Callable[[], list[int]]) -> Measured:
    """All rounds of one system; `sent_bytes` reads the counters of the devices that carry it."""
    found = Measured()
    for number in range(warm_up + rounds):
        before = sent_bytes()
        seconds, replies = workers.round()
        carried = [after - earlier for after, earlier in zip(sent_bytes(), before, strict=True)]
        if number >= warm_up:
            found.seconds.append(seconds)
            found.wire_bytes.append(carried)
            keys = replies[0].keys() - {"ended_s"}
            found.parts.append({key: max(reply[key] for reply in replies) for key in keys})
    found.closing = workers.finish()
    return found
