"""Which head to catch up or compare with, and whether by replay or by snapshot. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.protocol.identity import PeerId
from shoal.training.outer.policy import GroupMember


@dataclass(frozen=True, slots=True)
class Target:
    """A state that live members announce, and who of them can give it."""

    height: int
    head: bytes
    state_root: bytes
    donors: tuple[PeerId, ...]  # at that height or above it
    log_tokens: int = 0  # as they say


def choose_target(group: Sequence[GroupMember]) -> Target | None:
    """The state that most of the members who are elsewhere announce; among equals the highest.

    One member alone must not lead a joiner astray while several agree on another state.
    """
    votes = Counter((m.height, m.head, m.state_root) for m in group)
    if not votes:
        return None
    (at, head, root), _ = max(votes.items(), key=lambda item: (item[1], item[0]))
    agreeing = [m.peer for m in group if (m.height, m.head) == (at, head)]
    beyond = [m.peer for m in group if m.height > at]
    tokens = max(m.log_tokens for m in group if (m.height, m.head) == (at, head))
    return Target(at, head, root, (*agreeing, *beyond), tokens)


@dataclass(frozen=True, slots=True)
class Dissent:
    """Members at the own head who agree on a state that is not the own one."""

    members: tuple[GroupMember, ...]
    outvoted: bool  # they are more than those with the own state; else just as many


def dissent(head: bytes, own_root: bytes, group: Sequence[GroupMember]) -> Dissent | None:
    """Who differs, if they may be right by their number. `group` holds this peer, too."""
    here = [member for member in group if member.head == head]
    if all(member.state_root == own_root for member in here):
        return None
    votes = Counter(member.state_root for member in here)
    others = [root for root in votes if root != own_root]
    root = max(others, key=lambda root: (votes[root], root), default=own_root)
    if root == own_root or votes[root] < votes[own_root]:
        return None
    members = tuple(member for member in here if member.state_root == root)
    return Dissent(members, votes[root] > votes[own_root])


def prefers_snapshot(height: int, target: int, every: int, size_bytes: int, published_bytes: int) -> bool:
    """Whether a snapshot and its tail are fewer bytes than all entries since `height`.

    A snapshot holds anchors and momentum, 2 × size; an entry one published mean.
    """
    newest = target // every * every
    if newest <= height:
        return False
    return 2 * size_bytes + (target - newest) * published_bytes < (target - height) * published_bytes
