"""Faults while a stage's state goes from one peer to another amid training: a download, and a whole move.

A newcomer downloads a stage's snapshot and replays its tail (JOIN). Who moves does so beside its work, asks
to be let go, drains and comes in at the other stage (MOVE). Somebody is at a point of that, and there
something happens to it, to a donor or to a bystander. Played by `transfer_cases`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from pipeline_table import DELAY_S, Blow

from shoal.protocol.faults import PLACES


class Scene(enum.Enum):
    """What goes on."""

    JOIN = "join"
    MOVE = "move"


class Role(enum.Enum):
    """Who is struck."""

    ASKER = "asker"  # the newcomer, or who moves
    DONOR = "donor"  # the first that is asked
    OTHER = "other donor"
    BYSTANDER = "bystander"  # of the stage that is left; of the one before, of a joiner's
    STAGE = "stage"  # all replicas of the one that is gone to


_OF_A_PEER = (Blow.KILL, Blow.FREEZE, Blow.SLOW, Blow.LEAVE)
_OF_A_MESSAGE = (Blow.DELAY, Blow.DROP, Blow.CORRUPT)
_SNAPSHOT = {"ManifestRequest": True, "Manifest": False, "ChunkRequest": True, "Chunk": False}  # asker sends
_TAIL = {"EntriesRequest": True, "EntryItem": False, "PartRequest": True}
_LEAVE = ("Answer", "Commit")  # of the round that lets somebody go
_AT_LEADER = ("Answer.received", "Commit.sending", "Commit.sent")
_BOTH_GIVE = ("ChunkRequest", "Chunk")  # a manifest and the tail are one donor's
_STEPS = {
    Scene.JOIN: ("stage.entering", "chunk.placed", "stage.entered"),
    Scene.MOVE: (
        *("chunk.placed", "copy.storing", "copy.stored", "leave.asking", "leave.granted"),
        *("drain.begun", "drain.emptied", "drain.ended", "stage.entering", "stage.entered"),
    ),
}
_OF_A_STEP = {
    Scene.JOIN: (Role.ASKER, Role.DONOR, Role.OTHER),
    Scene.MOVE: (Role.ASKER, Role.DONOR, Role.BYSTANDER),
}
_EMPTIED = ("chunk.placed", "copy.stored", "leave.granted", "drain.emptied", "stage.entering")


@dataclass(frozen=True, slots=True)
class Transfer:
    """A blow at a point of a download or a move."""

    scene: Scene
    point: str
    blow: Blow
    role: Role

    @property
    def message(self) -> str:
        """The part before the dot."""
        return self.point.partition(".")[0]

    @property
    def asker_passes(self) -> bool:
        """Whether it is the newcomer, or who moves, that is at the point; else a peer that it talks to."""
        if self.asks_to_leave:
            return self.role is Role.ASKER
        sends = (_SNAPSHOT | _TAIL).get(self.message)
        return sends is None or sends != self.point.endswith(".received")

    @property
    def strikes_who_passes(self) -> bool:
        """Or somebody else at that moment."""
        return self.asker_passes == (self.role is Role.ASKER)

    @property
    def asks_to_leave(self) -> bool:
        """The message is one of every round; the one meant comes after `leave.asking`."""
        return self.message in _LEAVE

    @property
    def asker_leads(self) -> bool:
        """Whether who moves conducts the round that lets it go: what a leader says to itself passes no point,
        so that who is to be at one, and who at the other end, follows from who leads."""
        return self.asker_passes == (self.point in _AT_LEADER)

    @property
    def needs_disk(self) -> bool:
        return False

    @property
    def tells_lies(self) -> bool:
        """Whether the asker refuses who was struck from then on."""
        return self.blow is Blow.CORRUPT

    @property
    def arming(self) -> str:
        """For `Arming.parse`: what happens to who passes the point."""
        seconds = f" seconds={DELAY_S}" if self.blow is Blow.DELAY else ""
        action = self.blow.action.value if self.strikes_who_passes else "freeze"
        return f"{self.point} {action}{seconds}"

    def __str__(self) -> str:
        return f"{self.scene.value} {self.point} {self.blow.value} of {self.role.value}"


def all_transfers() -> list[Transfer]:
    """The whole matrix."""
    found: list[Transfer] = []
    for scene in Scene:
        for step in _STEPS[scene]:
            found += [Transfer(scene, step, b, role) for role in _OF_A_STEP[scene] for b in _OF_A_PEER]
        for message, asker_sends in (_SNAPSHOT | _TAIL).items():
            for place in PLACES:
                asks = asker_sends != (place == "received")
                roles = [Role.ASKER] if asks else [Role.DONOR]
                if scene is Scene.JOIN and not asks and message in _BOTH_GIVE:
                    roles.append(Role.OTHER)
                blows = [*_OF_A_PEER]
                if scene is Scene.JOIN or message in _TAIL:  # the copy is the same download
                    blows += [b for b in _OF_A_MESSAGE if place != "sent" or b is not Blow.CORRUPT]
                found += [Transfer(scene, f"{message}.{place}", b, role) for role in roles for b in blows]
    asked = [f"{message}.{place}" for message in _LEAVE for place in PLACES]
    either = (Role.ASKER, Role.BYSTANDER)  # leads that round, and so is at the point or at the other end
    found += [Transfer(Scene.MOVE, point, b, role) for point in asked for role in either for b in _OF_A_PEER]
    found += [Transfer(Scene.MOVE, step, Blow.EMPTY, Role.STAGE) for step in _EMPTIED]
    return found
