"""What neighbours tell one another, by size of the swarm: `python tests/benchmarks/gossip.py --peers 50,100`.

Peers with nothing but membership (directory, heartbeat links) come and go in virtual time, for 30 minutes
each on average. Prints bytes a second and peer, counted where they are sent, by kind of message, and how many
others a peer knows. With smaller circles (--limit, --near, --anybody, --everybody) few peers are many.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gossip_world import Crowd

from shoal.dht.interest import KNOWN, Known
from shoal.protocol import virtual_time


async def measure(peers: int, options: argparse.Namespace) -> dict[str, object]:
    known_to_each = Known(near=options.near, anybody=options.anybody, everybody=options.everybody)
    async with Crowd(
        peers,
        options.stages,
        session_s=options.session_s,
        limit=options.limit,
        known=known_to_each,
        heartbeat_s=options.heartbeat_s,
    ) as crowd:
        rates = await crowd.measured(options.warm, options.seconds)
        known = [len(peer.members.view().here()) - 1 for peer in crowd.peers.values()]
        streams = [peer.members.health().streams for peer in crowd.peers.values()]
        return {
            "peers": peers,
            "bytes_per_peer_s": round(sum(rates.values())),
            **{kind: round(rate) for kind, rate in sorted(rates.items())},
            "known": round(statistics.fmean(known), 1),
            "streams": round(statistics.fmean(streams), 1),
            "directory": round(crowd.hub.bytes / peers / (10.0 + options.warm + options.seconds)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", default="25,50,100,200")
    parser.add_argument("--stages", type=int, default=24)
    parser.add_argument("--session-s", type=float, default=1800.0)
    parser.add_argument("--limit", type=int, default=32, help="neighbours of a peer")
    parser.add_argument("--near", type=int, default=KNOWN.near, help="records kept of each near stage, about")
    parser.add_argument("--anybody", type=int, default=KNOWN.anybody, help="of all peers, about")
    parser.add_argument("--everybody", type=int, default=KNOWN.everybody, help="a swarm known whole")
    parser.add_argument("--heartbeat-s", type=float, default=1.0)
    parser.add_argument("--warm", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    for peers in map(int, options.peers.split(",")):
        begun = time.process_time()
        figures = virtual_time.run(measure(peers, options))
        print(json.dumps({**figures, "cpu_s": round(time.process_time() - begun, 1)}), flush=True)


if __name__ == "__main__":
    main()
