"""What the directory costs each peer of a swarm, as `dht` does it today: for the policy simulation.

Each peer publishes its record, sealed, at a third of its life, and looks all records up every few seconds:
that is what `dht.roster` does, and `dht.hivemind_directory` reads whole buckets, of which a run has one. So
the cost of a peer grows with the swarm. Counted as `MemoryDirectoryHub` counts: values published and values
found. Not in here: what neighbours tell one another of records.
"""

from __future__ import annotations

import statistics

from shoal.dht.directory import PeerRecord
from shoal.dht.neighbours import SMALL_SWARM
from shoal.dht.records import seal, sign_record
from shoal.dht.roster import LARGE_SWARM_TTL_S, REFRESH_S
from shoal.node.simulate.membership import PaperMembership, simulated_key
from shoal.protocol.limits import RECORD_TTL_S

_JITTER = statistics.fmean((0.8, 1.0))  # of both intervals


def directory_bytes_per_s(peers: int) -> float:
    """Of each of so many peers."""
    ttl_s = RECORD_TTL_S if peers <= SMALL_SWARM else LARGE_SWARM_TTL_S
    value = _record_bytes()
    return value / (ttl_s / 3 * _JITTER) + peers * value / (REFRESH_S * _JITTER)


def _record_bytes() -> int:
    """A record as it is stored: chain, signature and seal included."""
    run_id = bytes(32)
    membership = PaperMembership(run_id, simulated_key(0, 0), lambda: 0.0)
    record = PeerRecord(
        peer=membership.key.peer,
        incarnation=1 << 60,
        sequence=1,
        issued_unix_s=1.8e9,
        ttl_s=LARGE_SWARM_TTL_S,
        state="online",
        stages=(0,),
        name="p0",
        addresses=("127.0.0.1:5000",),
        chain=membership.chain,
        device="cpu",
        tokens_per_s=0.0,
        version="0",
        service_s=1.0,
    )
    signed = sign_record(record, membership.key, run_id)
    return len(seal(signed, run_id, membership.sealing_key, bytes))
