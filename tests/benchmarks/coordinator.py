"""What the owner's view of many peers takes of one core: python tests/benchmarks/coordinator.py --peers 200

An hour of telemetry, figures every 5 s and a round a minute from each peer, is decoded, taken, written to the
history, and shown in a snapshot a second as JSON. CPU time of the one thread, by part; streams and TLS are
not in it (`transport.py` has those).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil
from view_crowd import ROUND_S, Crowd
from view_peers import World, clock
from view_world import replica

from shoal.node.view.figures import Told
from shoal.node.view.messages import TelemetryBatch
from shoal.node.view.push import FIGURES_S
from shoal.protocol import virtual_time
from shoal.protocol.identity import PeerId, VerifiedPeer
from shoal.protocol.wire import decode, encode

Spent = defaultdict[str, float]


def spent(figures: Spent, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` gives; its CPU time is added."""
    begun_s = time.thread_time()
    try:
        return function(*arguments)
    finally:
        figures[what] += time.thread_time() - begun_s


async def hour(peers: int, seconds: int, folder: Path) -> dict[str, object]:
    """The figures of `seconds` of virtual time."""
    world, crowd, figures = World(1, stages=4), Crowd(peers, 4, seed=1), Spent(float)
    owner = await world.add("owner", owner=True, folder=folder)
    observer = owner.observer
    intake = observer._intake
    assert intake is not None
    senders = {name: VerifiedPeer(PeerId(name), frozenset(), name, 0.0) for name in crowd.names}
    for name, sender in senders.items():
        told = intake._admit(sender, 1)
        assert isinstance(told, Told)
        world.members[name] = replica(name, crowd.stage(name))
    memory, longest_s = [], 0.0
    loop_s = time.thread_time()
    for second in range(1, seconds + 1):
        crowd.now = clock()
        for index, name in enumerate(crowd.names):
            if (second + index) % ROUND_S == 0:
                height = 1 + second // ROUND_S
                crowd.happens(name, height)
                world.members[name] = replica(name, crowd.stage(name), height=height)
            if (second + index) % FIGURES_S == 0:
                data = encode(crowd.batch(name, float(second)))
                begun_s = time.thread_time()
                batch = decode(TelemetryBatch, data)
                intake._file(senders[name], intake.told[PeerId(name)], batch)
                figures["take"] += time.thread_time() - begun_s
        begun_s = time.thread_time()
        text = json.dumps(spent(figures, "snapshot", observer.snapshot).to_json())
        longest_s = max(longest_s, time.thread_time() - begun_s)
        figures["snapshot and JSON"] += time.thread_time() - begun_s
        begun_s = time.thread_time()
        await asyncio.sleep(1.0)
        figures["watch, sample, history"] += time.thread_time() - begun_s
        if second % (seconds // 6) == 0:
            gc.collect()
            memory.append(psutil.Process().memory_info().rss >> 20)
    await world.close()
    parts = ("take", "snapshot and JSON", "watch, sample, history")
    return {
        "peers": peers,
        "virtual_s": seconds,
        "share_of_a_core": round(sum(figures[part] for part in parts) / seconds, 4),
        **{part: round(figures[part] / seconds, 4) for part in (*parts, "snapshot")},
        "longest_snapshot_ms": round(longest_s * 1e3, 1),
        "snapshot_kb": len(text) // 1000,
        "rss_mib_over_time": memory,
        "whole_process_s": round(time.thread_time() - loop_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=3600)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = virtual_time.run(hour(options.peers, options.seconds, Path(folder)))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
