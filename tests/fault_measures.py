"""What the fault tests measure in a group of workers: bytes, seconds, stalls, and how somebody came back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fault_group import FaultGroup
from fault_orders import JsonObject
from fault_replica import Replica

OF_ROUNDS = ("round", "contribute", "publish", "part")  # methods
Bytes = dict[Replica, Counter[str]]  # by method


async def bytes_out(group: FaultGroup) -> Bytes:
    """All that those who are awake have sent so far, frames and all, by method."""
    said = {replica: await replica.ask("status") for replica in group.awake()}
    return {
        replica: Counter({method.rpartition(".")[2]: n for method, n in status["bytes_out"].items()})
        for replica, status in said.items()
    }


async def spent_since(group: FaultGroup, before: Bytes) -> Bytes:
    """The same, since then."""
    return {r: sent - before.get(r, Counter()) for r, sent in (await bytes_out(group)).items()}


def total(spent: Bytes, replicas: Sequence[Replica], methods: Sequence[str]) -> int:
    """Of some workers, by some methods."""
    return sum(spent[replica][method] for replica in replicas for method in methods)


def seconds_of(others: Sequence[Replica], height: int, struck_s: float) -> float:
    """From the blow to the last COMMIT; none if that was first."""
    return max(0.0, *(replica.reached_s[height] - struck_s for replica in others))


def longest_stall_s(replicas: Sequence[Replica]) -> float:
    """The longest that the machine let one of them stand still."""
    return max((seconds for replica in replicas for seconds in replica.stalls), default=0.0)


async def way_back(victim: Replica, before: JsonObject) -> str:
    """How somebody who was struck came by the round that it missed; `before`: its status earlier."""
    if victim.ended:
        return "new process"
    after = await victim.ask("status")
    chunks = [method for method in after["bytes_in"] if "chunks" in method]
    if any(after["bytes_in"][method] > before["bytes_in"].get(method, 0) for method in chunks):
        return "snapshot"
    if after["outer"]["switches"] > before["outer"]["switches"]:
        return "switch"
    return "replay" if after["outer"]["caught_up"] > before["outer"]["caught_up"] else "in time"
