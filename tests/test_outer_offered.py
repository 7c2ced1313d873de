"""Which offers of a process are kept: those that say what has to go back after a switch of chains (P4)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from shoal.protocol.identity import PeerId
from shoal.training.outer.codecs import RoundCodecs, codec_of
from shoal.training.outer.contribution import Contribution
from shoal.training.outer.entry import Contributor, Entry, Seat, bitmap
from shoal.training.outer.local import Sent
from shoal.training.outer.offered import MOST, Offered
from shoal.training.outer.parts import Fragment, Part
from shoal.training.outer.policy import GroupMember

ME, GONE, NEAR, FAR = (PeerId(name.ljust(52, "z")) for name in ("12D3a", "12D3b", "12D3c", "12D3d"))
PARTS = 3
FRAGMENT = Fragment(0, tuple(Part(n, n, 1) for n in range(PARTS)))
EVERY = range(PARTS)


def head(height: int) -> bytes:
    return bytes([height]) * 32


def member(peer: PeerId, height: int, *, silent: bool = False, reentering: int = 0) -> GroupMember:
    return GroupMember(
        peer=peer, incarnation=1, height=height, head=head(height), silent=silent, reentering=reentering
    )


class Process:
    """One process and the rounds it contributes to, an inner step before each."""

    def __init__(self) -> None:
        self.offered = Offered(ME, 1, 1 << 20)
        self.height = 0
        self.now_s = 0.0

    def mine(self) -> Contribution:
        codec = codec_of("float32")
        sent = Sent(torch.zeros(PARTS), self.height + 1, 100 * (self.height + 1))
        return Contribution(FRAGMENT, RoundCodecs((codec, codec)), torch.zeros(PARTS), sent, {}, 1.0)

    def draft(self, peers: Sequence[PeerId]) -> Entry:
        return Entry(
            stage=0,
            height=self.height + 1,
            previous=head(self.height),
            ballot=1,
            leader=ME,
            revision=0,
            fragment=0,
            roster=tuple(Seat(peer, 1, 1.0, present=True) for peer in sorted([ME, *peers])),
            contributors=(Contributor(0, self.height, self.height + 1, 100, 1.0, 1.0),),
            first_stage_head=b"",
        )

    def round(self, peers: Sequence[PeerId], listed: Collection[int]) -> None:
        """It ends, and lists this process in some parts."""
        draft = self.draft(peers)
        results = [(b"\7" * 32, bitmap({0}, len(draft.roster))) if n in listed else None for n in EVERY]
        entry = draft.finish(results, 0)
        self.offered.note(entry, self.mine(), frozenset(peers), self.now_s)
        self.height += 1

    def hear(self, *others: GroupMember) -> None:
        self.now_s += 1.0
        self.offered.hear([member(ME, self.height), *others], lambda height: head(height), self.now_s)

    def kept(self, height: int) -> bool:
        """Whether the offer to the round after a height is still there."""
        return head(height) in self.offered.previous()


def test_what_one_waits_for_who_is_gone_for_good_does_not_push_out_what_came_after_a_later_cut() -> None:
    """An earlier round that lists all parts stands for a later one only to those who have not seen it."""
    process = Process()
    process.round([GONE, NEAR, FAR], EVERY)
    process.hear(member(NEAR, 1), member(FAR, 1), member(GONE, 0, silent=True))
    process.hear(member(NEAR, 1), member(FAR, 1))
    process.round([NEAR, FAR], [0])
    cut = [member(NEAR, 1, silent=True), member(FAR, 1, silent=True)]
    for number in range(2 * MOST):
        process.hear(*cut)
        process.round([], EVERY)
        if number == 0:
            cut = []  # they have departed
    assert process.kept(1), "the last that the others have seen"
    assert process.kept(2), "and the first of which they do not have all"


def test_what_others_never_saw_goes_before_what_they_may_list() -> None:
    """What was: of rounds that do not list this process the oldest went, which the others may list."""
    process = Process()
    process.round([NEAR], ())
    process.hear(member(NEAR, 0, silent=True))
    for _ in range(2 * MOST):
        process.round([], ())
        process.hear(member(NEAR, 0, silent=True))
    assert process.kept(0)


def test_who_goes_with_entries_to_bring_back_may_bring_them_back_elsewhere() -> None:
    """What was: it had been on this chain, so nobody waited for it; and with the next round that listed all
    parts the open offer was forgotten, and that round itself had nobody to wait for."""
    process = Process()
    process.offered.note_open(process.draft([NEAR]), process.mine(), process.now_s)
    process.height += 1
    process.hear(member(NEAR, 1, reentering=3))
    process.hear(member(NEAR, 1, reentering=3, silent=True))
    process.hear()
    for _ in range(2 * MOST):
        process.round([], EVERY)
        process.hear()
    assert process.kept(0), "it may be in by then"
    assert process.kept(1), "which has its steps, too"
    process.hear(member(NEAR, process.height))
    assert not len(process.offered)


def test_what_all_are_known_to_share_is_let_go_of() -> None:
    process = Process()
    for _ in range(3):
        process.round([NEAR, FAR], EVERY)
        process.hear(member(NEAR, process.height), member(FAR, process.height))
        assert not len(process.offered)
