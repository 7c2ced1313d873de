"""Offered: what this process contributed to recent rounds, while they may turn out otherwise elsewhere.

An entry takes listed steps out of the local weights (`w - a`). When this peer leaves its chain for another,
on which the same round ended otherwise or not at all, those steps have to go back, or others have to go, part
by part: `settle` says what changes. A round is kept until everybody who was present is known to be on the
same chain, and everybody else who fell silent; so are later ones, which carry on what it had not listed:
another chain may hold that as well. And while somebody brings back entries of a lost chain nothing is let go
of: they may list this process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from shoal.protocol.identity import PeerId
from shoal.training.outer.contribution import Contribution
from shoal.training.outer.entry import Entry, seats_in
from shoal.training.outer.local import Rebase
from shoal.training.outer.log import Log
from shoal.training.outer.policy import GroupMember

MOST = 6  # rounds of a fragment
_BYTES = 8  # a value: anchor and sent, fp32
UNCERTAIN_S = 3600.0  # a partition may last; whoever is not back by then is taken for dead


@dataclass(slots=True, eq=False)
class Offer:
    """One contribution and where it is now."""

    height: int
    previous: bytes  # head of the log at the round
    mine: Contribution
    listed: set[int]  # parts, counted within the fragment, that the agreed state holds
    present: frozenset[PeerId]  # others who took part, or in earlier attempts at the round
    waiting: set[PeerId]  # those of them, of earlier rounds, and of the silent whose outcome may differ
    since_s: float
    open: bool = False  # its outcome is not known: some other chain may list it


class Offered:
    """Of one replica, to a byte budget."""

    def __init__(self, me: PeerId, incarnation: int, budget_bytes: int) -> None:
        self._me = me
        self._incarnation = incarnation
        self._budget_bytes = budget_bytes
        self._offers: list[Offer] = []
        self._fell_silent: dict[PeerId, float] = {}  # or was never heard; when it was last so
        self._reentering = False  # somebody has lost entries to bring back

    def __len__(self) -> int:
        return len(self._offers)

    def previous(self) -> list[bytes]:
        """The heads whose next entry this process offered something to."""
        return [offer.previous for offer in self._offers]

    def lists(self, entry: Entry) -> set[int]:
        """Parts that list this process, in a round (not a re-entry)."""
        seat = entry.seat_of(self._me, self._incarnation)
        if seat is None or entry.row_of(seat) is None:
            return set()
        return {part for part in range(entry.parts) if seat in seats_in(entry.listed_in(part))}

    # -- what comes in

    def note(self, entry: Entry, mine: Contribution | None, reached: frozenset[PeerId], now_s: float) -> None:
        """A round has been applied; `mine` is what this process sent, listed or not.

        `reached` are those who may hold another outcome of it: who got some of `mine`, or of another member's
        contribution in an earlier attempt, and so whoever could decide the round.
        """
        present = {entry.roster[seat].peer for seat in entry.present()}
        others = (present | reached) - {self._me}
        waiting = set(others)
        for offer in self._offers:
            offer.waiting -= present
            waiting |= offer.waiting
        self._release(now_s)
        if mine is None:
            return
        listed = self.lists(entry)
        if len(listed) == entry.parts:  # later steps, in all parts: here what is open can re-enter no more
            for offer in self._offers:
                offer.open &= offer.mine.fragment.index != entry.fragment
        self._add(Offer(entry.height, entry.previous, mine, listed, frozenset(others), waiting, now_s))

    def note_open(self, draft: Entry, mine: Contribution, now_s: float) -> None:
        """This peer switches chains amid a round whose outcome it does not know."""
        others = frozenset(draft.roster[seat].peer for seat in draft.present()) - {self._me}
        self._add(Offer(draft.height, draft.previous, mine, set(), others, set(others), now_s, open=True))

    def switched(self) -> None:
        """This peer is on another chain now: of nobody is known whether it shares the outcome."""
        self._reentering = True  # until `hear` knows better
        for offer in self._offers:
            offer.waiting |= offer.present

    def hear(
        self, peers: Sequence[GroupMember], head_at: Callable[[int], bytes | None], now_s: float
    ) -> None:
        """What membership knows now: who is on this chain, and who went while it was heard.

        `head_at` is the own chain's head at a height.
        """
        here = {member.peer: member for member in peers}
        self._reentering = any(member.reentering for member in peers)
        for peer, known in here.items():
            if known.silent or not known.heard:  # a fresh record is no word of its own
                self._fell_silent[peer] = now_s
            elif self._fell_silent:
                self._fell_silent.pop(peer, None)
        for peer in [p for p, at_s in self._fell_silent.items() if now_s - at_s > UNCERTAIN_S]:
            del self._fell_silent[peer]
        for offer in self._offers:  # what a silent one had to bring back it may bring elsewhere
            offer.waiting |= {peer for peer, known in here.items() if known.silent and known.reentering}
            for peer in list(offer.waiting):
                member = here.get(peer)
                if member is None and peer not in self._fell_silent:
                    offer.waiting.discard(peer)  # it is dead, and has decided nothing
                elif (
                    member is not None
                    and not member.silent
                    and member.height >= offer.height
                    and member.head == head_at(member.height)
                ):
                    offer.waiting.discard(peer)
        self._release(now_s)

    def _release(self, now_s: float) -> None:
        self._offers = [
            offer
            for offer in self._offers
            if (offer.open or offer.waiting or self._reentering) and now_s - offer.since_s < UNCERTAIN_S
        ]

    def _add(self, offer: Offer) -> None:
        offer.mine = offer.mine.taken()
        offer.waiting |= self._fell_silent.keys()
        self._offers.append(offer)
        same = [kept for kept in self._offers if kept.mine.fragment.index == offer.mine.fragment.index]
        if len(same) > MOST:
            self._offers.remove(_least(same))
        while sum(_BYTES * kept.mine.fragment.count for kept in self._offers) > self._budget_bytes:
            self._offers.remove(_least(self._offers))

    # -- what follows

    def amend(self, previous: bytes, out: Collection[int], into: Collection[int]) -> list[Rebase]:
        """Of what was offered after that head the agreed state holds no parts `out`, and does `into`."""
        now = (offer.listed for offer in self._offers if offer.previous == previous)
        return [change for listed in now for change in self.settle(previous, listed - {*out} | {*into})]

    def found(self, log: Log, passed: Sequence[Entry], settled: int | None) -> list[Rebase]:
        """This peer comes to a chain of which it knows no beginning: where that log's count of its steps ends
        with what is open here, it holds that; in all parts, where none of the entries `passed` tells which.

        Who lists a process lists nearly always all that it sent, and what was not is missed once. `settled`:
        of this fragment the round under way has the same steps, and settles them.
        """
        changes = []
        for offer in self._offers:
            index = offer.mine.fragment.index
            step, _ = log.end_of(self._me, self._incarnation, index)
            if not offer.open or offer.mine.sent.inner_step != step:
                continue
            told = [self.lists(entry) for entry in passed if entry.previous == offer.previous]
            if index != settled:
                every = range(len(offer.mine.fragment.parts))
                changes += self.settle(offer.previous, told[0] if told else every)
            for other in self._offers:  # the same steps
                other.open &= other.mine.fragment.index != index
        return changes

    def settle(self, previous: bytes, listed: Collection[int]) -> list[Rebase]:
        """The agreed state now holds just these parts of what was offered after that head."""
        changes = []
        for offer in self._offers:
            if offer.previous != previous:
                continue
            for number, part in enumerate(offer.mine.fragment.parts):
                within = offer.mine.fragment.within(part)
                anchor, sent = offer.mine.anchor[within], offer.mine.sent.weights[within]
                if number in offer.listed and number not in listed:
                    changes.append(Rebase(part.start, anchor, sent))
                elif number in listed and number not in offer.listed:
                    changes.append(Rebase(part.start, sent, anchor))
            offer.listed, offer.open = set(listed), False
        return changes


def _least(offers: Sequence[Offer]) -> Offer:
    """Which of them is missed least, in the order of their rounds.

    Who is waited for may be on another chain, with what was offered last before it went: that round, and of
    each part the first one since that lists this process, say what has to go back. An offer that waits for
    nobody else than those before it, and lists no more, goes first; else the oldest.
    """
    for number, offer in enumerate(offers[:-1]):
        same = [kept for kept in offers[:number] if kept.mine.fragment.index == offer.mine.fragment.index]
        before = [kept.listed for kept in same if kept.waiting >= offer.waiting]
        elsewhere = offer.open or not offer.present.isdisjoint(offer.waiting)  # it may be listed
        if before and offer.listed <= set[int]().union(*before) and (offer.listed or not elsewhere):
            return offer
    return offers[0]
