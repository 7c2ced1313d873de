"""Round policies: who leads, who owns, when to open, when to close, whom to clip."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.compression.int8 import Int8
from shoal.protocol import limits
from shoal.protocol.identity import PeerId
from shoal.training.outer.fork import Chain, wins
from shoal.training.outer.parts import cut
from shoal.training.outer.policy import (
    BEHIND_S,
    GRACE_MIN_S,
    TAKEOVER_S,
    CatchUp,
    GroupMember,
    Lead,
    Position,
    Wait,
    clip_factors,
    closes_at,
    counted_tokens,
    holds_quorum,
    next_action,
    owners,
    should_open,
    succession,
)
from shoal.training.recovery.policy import choose_target, prefers_snapshot

RUN = bytes(32)


def peers(count: int) -> list[PeerId]:
    return [PeerId(f"peer{n}") for n in range(count)]


@given(
    st.integers(1, 3_000_000),
    st.integers(1024, 1 << 20),
    st.sampled_from([256, 512, 1024]),
    st.integers(1, 32),
)
def test_parts_cover_the_vector_once_in_equal_blocks(
    size: int, part_bytes: int, block: int, number: int
) -> None:
    fragments = cut(size, part_bytes, block, number)
    parts = [part for fragment in fragments for part in fragment.parts]
    assert [part.index for part in parts] == list(range(len(parts)))
    assert parts[0].start == 0
    assert sum(part.count for part in parts) == sum(fragment.count for fragment in fragments) == size
    assert all(a.start + a.count == b.start for a, b in itertools.pairwise(parts))
    assert all(part.count > 0 and part.start % block == 0 for part in parts)
    for fragment in fragments:
        first = fragment.parts[0].count
        assert all(part.count == first for part in fragment.parts[:-1])
        assert len(fragment.parts) <= 4096
    sizes = [fragment.count for fragment in fragments]
    assert max(sizes) - min(sizes) < 2 * block, "balanced by bytes"


@pytest.mark.parametrize("mib", [2, 10, 25, 100, 400])
@pytest.mark.parametrize("count", [2, 3, 4, 6, 8])
def test_equal_owners_have_equal_parts(mib: int, count: int) -> None:
    """The busiest owner's link holds up everybody."""
    (fragment,) = cut(mib << 18, 4 << 20, 256)
    parts = [part.index for part in fragment.parts]
    drawn = owners(b"run", 0, parts, peers(count), [1.0] * count)
    assert {drawn.count(index) for index in range(count)} == {len(parts) // count}


@pytest.mark.parametrize(("mib", "parts"), [(96, 24), (100, 24), (101, 48), (200, 48), (400, 96)])
def test_a_part_may_be_a_little_larger_than_asked_for_but_goes_in_one_frame(mib: int, parts: int) -> None:
    """25 parts would have to become 48, and every message costs both ends."""
    (fragment,) = cut(mib << 18, 4 << 20, 256)
    assert len(fragment.parts) == parts
    assert Int8(256).encoded_bytes(fragment.parts[0].count) <= limits.FRAME_BYTES


def test_every_peer_draws_the_same_succession_and_leaders_change() -> None:
    group = peers(5)
    assert succession(RUN, 1, 7, group) == succession(RUN, 1, 7, group[::-1])
    leaders = [succession(RUN, 1, height, group)[0] for height in range(500)]
    assert min(leaders.count(peer) for peer in group) > 60


def test_a_lost_leader_leaves_the_rest_of_the_order_as_it_was() -> None:
    first, *rest = succession(RUN, 0, 3, peers(6))
    assert succession(RUN, 0, 3, rest) == tuple(rest)
    assert first not in rest


def test_parts_go_to_owners_by_uplink() -> None:
    drawn = owners(RUN, 0, range(4096), peers(3), [1.0, 2.0, 5.0])
    shares = [drawn.count(i) / 4096 for i in range(3)]
    assert shares == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=1 / 4096)


@given(st.integers(1, 200), st.lists(st.floats(1.0, 1e9), min_size=1, max_size=12))
def test_nobody_owns_more_than_its_share_rounded_up(parts: int, uplinks: list[float]) -> None:
    drawn = owners(RUN, 1, range(parts), peers(len(uplinks)), uplinks)
    for index, uplink in enumerate(uplinks):
        assert drawn.count(index) <= parts * uplink / sum(uplinks) + 1


def test_a_departed_owner_moves_few_parts_but_its_own() -> None:
    four = [peers(4)[i] for i in owners(RUN, 0, range(1000), peers(4), [1.0] * 4)]
    left = [*peers(4)[:2], peers(4)[3]]
    three = [left[i] for i in owners(RUN, 0, range(1000), left, [1.0] * 3)]
    moved = sum(now != then for now, then in zip(three, four, strict=True) if then != "peer2")
    assert moved <= 20


def quorum(last: list[PeerId], here: list[PeerId], departed: int = 0, contested: bool = False) -> bool:
    return holds_quorum(last, set(last[:departed]), here, RUN, contested).yes


def test_quorum_is_half_of_the_last_round_with_one_winner_at_exactly_half() -> None:
    last = peers(4)
    assert quorum(last, last[:3])
    assert not quorum(last, last[:1])
    assert sorted([quorum(last, last[:2]), quorum(last, last[2:])]) == [False, True]
    assert quorum([], last[:1])
    assert not quorum(last, peers(9)[4:]), "newcomers alone are no quorum"


def test_departed_members_do_not_count_unless_the_round_is_contested() -> None:
    last = peers(4)
    assert quorum(last, last[2:], departed=2)
    assert quorum(last, last[3:], departed=3)
    assert not quorum(last, last[2:], departed=2, contested=True)
    assert quorum(last, last[1:], departed=1, contested=True)


def member(n: int, steps: int, height: int = 3) -> GroupMember:
    return GroupMember(peer=peers(9)[n], incarnation=1, height=height, steps_since_round=steps)


@pytest.mark.parametrize(
    ("group", "due"),
    [
        ([member(0, 10)], True),
        ([member(0, 9)], False),
        ([member(0, 19), member(1, 1)], True),
        ([member(0, 10), member(1, 0)], False),
        ([member(0, 10), member(1, 10, height=2)], False),  # counted before its last COMMIT
        ([member(0, 2), member(1, 2), member(2, 2**53)], False),
        ([member(0, 1), member(1, 19)], False),  # it will say so itself
        ([member(0, 4), member(1, 2), member(2, 24)], True),  # what others can have done counts for all of it
    ],
)
def test_a_round_opens_on_the_groups_work(group: list[GroupMember], due: bool) -> None:
    assert should_open(10, group[0], group).yes is due


def test_nobody_counts_for_more_than_its_group_can_have_done() -> None:
    for members, tokens in ((2, 100), (8, 4096)):
        due = members * tokens
        fast = [due - members + 1, *[1] * (members - 1)]  # one that did nearly all of the round's work
        assert counted_tokens(fast, members, tokens) == fast
        late = [100 * due, *[10 * tokens] * (members - 1)]  # the round comes ten times later than it was due
        assert counted_tokens(late, members, tokens) == [20 * due, *late[1:]]
    assert counted_tokens([2**53, 90, 110], 3, 100) == [660, 90, 110]
    assert counted_tokens([2**53], 3, 100) == [600], "nobody else made a step"
    assert counted_tokens([], 3, 100) == []


def test_only_outliers_are_clipped() -> None:
    assert clip_factors([1.0, 1.1, 0.9, 30.0], [100] * 4) == pytest.approx([1, 1, 1, 3 * 1.05 / 30])
    assert clip_factors([1.0, 1000.0], [100, 100]) == [1.0, 1.0]
    assert clip_factors([1.0, 1.0, 5.0], [100, 100, 2500]) == [1.0, 1.0, 1.0], "more steps, not a louder peer"
    assert clip_factors([0.0, 0.0], [1, 1]) == [1.0, 1.0]
    assert clip_factors([], []) == []


def test_waiting_ends_at_the_deadline_or_a_grace_after_quorum() -> None:
    assert closes_at(100.0, None, 10.0) == 110.0
    assert closes_at(100.0, 100.1, 10.0) == pytest.approx(100.1 + GRACE_MIN_S)
    assert closes_at(100.0, 103.0, 10.0) == 106.0
    assert closes_at(100.0, 109.0, 10.0) == 110.0


IDLE = Position(
    now_s=50.0,
    me=PeerId("b"),
    group=(),
    order=(PeerId("a"), PeerId("b"), PeerId("c")),
    height=3,
    engaged=False,
    behind_since_s=None,
    wanted_since_s=None,
    not_before_s=0.0,
)


@pytest.mark.parametrize(
    ("change", "action"),
    [
        ({}, Wait(None)),
        ({"wanted_since_s": 50.0}, Wait(50.0 + TAKEOVER_S)),
        ({"wanted_since_s": 50.0 - TAKEOVER_S}, Lead()),
        ({"wanted_since_s": 50.0, "me": PeerId("a")}, Lead()),
        ({"wanted_since_s": 50.0, "me": PeerId("a"), "not_before_s": 51.0}, Wait(51.0)),
        ({"wanted_since_s": 10.0, "engaged": True}, Wait(None)),
        ({"wanted_since_s": 50.0, "urgent": True}, Lead()),
        ({"behind_since_s": 50.0, "wanted_since_s": 10.0}, Wait(50.0 + BEHIND_S)),
        ({"behind_since_s": 40.0, "engaged": True}, CatchUp()),
    ],
)
def test_next_action(change: dict[str, object], action: object) -> None:
    assert next_action(dataclasses.replace(IDLE, **change)) == action  # type: ignore[arg-type]


def ahead(n: int, height: int, head: bytes) -> GroupMember:
    return GroupMember(peer=peers(9)[n], incarnation=1, height=height, head=head * 32)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Chain(head=b"b", height=3, work_tokens=5), Chain(head=b"a", height=9, work_tokens=4, ballot=7)),
        (
            Chain(head=b"b", height=3, work_tokens=5, ballot=2),
            Chain(head=b"a", height=3, work_tokens=5, ballot=1),
        ),
        (
            Chain(head=b"a", height=3, work_tokens=5, ballot=1),
            Chain(head=b"b", height=4, work_tokens=5, ballot=1),
        ),
        (Chain(head=b"b", height=3, work_tokens=1), Chain(head=b"a", height=3, work_tokens=5, forsaken=True)),
    ],
    ids=["more work", "higher ballot, where work is equal", "smaller hash, where both are", "not forsaken"],
)
def test_of_two_chains_one_wins(one: Chain, other: Chain) -> None:
    assert wins(one, other)
    assert not wins(other, one)


def test_a_joiner_follows_the_state_that_most_announce() -> None:
    group = [ahead(0, 5, b"a"), ahead(1, 5, b"a"), ahead(2, 9, b"x"), ahead(3, 0, b"g")]
    target = choose_target(group)
    assert target is not None
    assert (target.height, target.head) == (5, b"a" * 32)
    assert target.donors == ("peer0", "peer1", "peer2")
    assert choose_target([]) is None


def test_snapshot_or_replay_is_a_matter_of_bytes() -> None:
    assert not prefers_snapshot(0, 7, 8, 400, 100), "no snapshot yet"
    assert not prefers_snapshot(4, 9, 8, 400, 100), "five entries are less"
    assert prefers_snapshot(0, 17, 8, 400, 100), "two tensors and one entry against 17"
