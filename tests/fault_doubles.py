"""Two faults at once on real processes, and a leader's faults amid its COMMITs; the rest is `fault_cases`.

One of the group passes a point and is struck; at that moment another one is killed from outside.
`test_double_faults_real` and `soak/fault_points` play all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from fault_cases import Scene, insist, play_round
from fault_group import FaultGroup
from fault_outcome import Outcome

from shoal.protocol.faults import Action


@dataclass(frozen=True, slots=True)
class Double:
    """Who is struck where, and who dies along. All own parts, so any follower is an owner."""

    name: str
    arming: str
    leader: bool  # strikes the leader; else a follower, the first
    along: str = ""  # "leader", or "follower": another one
    told: bool = False  # of the leader's COMMITs only the one to the first follower arrives

    @property
    def action(self) -> Action:
        return Action(self.arming.split()[1])

    @property
    def needs_joiner(self) -> bool:
        return False

    @property
    def tells_lies(self) -> bool:
        return False

    def __str__(self) -> str:
        return self.name

    async def scene(self, group: FaultGroup) -> Scene:
        """Arm it."""
        leader = group.leader()
        first, *others = [replica for replica in group.members if replica is not leader]
        if self.told:
            for other in others:
                await group.arm(f"Commit.sending drop remote={other.peer}", leader)
        victim = leader if self.leader else first
        await group.arm(self.arming, victim)
        return Scene([victim], group.step, along={"leader": leader, "follower": others[0]}.get(self.along))


DOUBLES = (
    Double("two owners", "ContributedPart.sent kill nth=2", leader=False, along="follower"),
    Double("leader and owner at GO", "Go.sent kill nth=2", leader=True, along="follower"),
    Double("owner and leader amid means", "PublishedPart.sent kill nth=2", leader=False, along="leader"),
    Double("leader and owner at COMMIT", "Commit.sent kill nth=2", leader=True, along="follower"),
    Double("leader amid its COMMITs", "Commit.sent kill nth=3", leader=True),
    Double("leader and the only one it told", "disk.written kill", leader=False, along="leader", told=True),
    Double("leader wakes with an old ballot", "Commit.sending freeze", leader=True),
)


async def play_double(group: FaultGroup, double: Double) -> Outcome:
    """Raises AssertionError when a promise is broken."""
    return await insist(group, lambda: play_round(group, double, lambda: double.scene(group)))
