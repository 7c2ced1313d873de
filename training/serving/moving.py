"""Moves a session from one server of a stage to a faster one while it goes on, between two tokens.

The new server is opened beside the old one and built from what the one before has kept; when it has caught up
it takes the old one's seat, and the neighbours are told by `chain`. The one after passes over what it has
already. So nothing is lost when a move fails, and a server that only claims to be fast never catches up.
Where the old one fails meanwhile, the new one takes over at once. `chain` owns one Mover and asks it again
and again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from shoal.protocol.errors import MessageInvalid
from shoal.protocol.identity import PeerId
from shoal.training.pipeline.replicas import Replica
from shoal.training.serving.link import Link
from shoal.training.serving.messages import STOP, SessionToken
from shoal.training.serving.pace import Seat, Wish, wish

_LOOK_S = 0.25
_BUILD_S = 60.0  # at most, until it has caught up
_CAUGHT_UP = 8  # positions that it may be behind by its last pulse, which is up to half a second old
_MOST_PATIENCE = 1.5

Take = Callable[[SessionToken], None]
Open = Callable[[int, PeerId, Take], Link]


class Mover:
    """Of one text."""

    def __init__(self, text: Sequence[int], most: int, take: Take, open_at: Open, rng: random.Random) -> None:
        """`text` is the chain's, and grows up to `most`; `take` adds to it. `open_at`: at a server."""
        self._text, self._most, self._take, self._open_at = text, most, take, open_at
        self._patience = rng.uniform(1.0, _MOST_PATIENCE)
        self._wish: Wish | None = None
        self._best_s: dict[PeerId, float] = {}
        self._look_s = 0.0
        self._new: _Newcomer | None = None  # at the stage of `_wish`

    def look(self, links: Sequence[Link], replicas: Callable[[int], Sequence[Replica]], now_s: float) -> None:
        """Begin a move if one is due; all links are open."""
        if self._new is not None or now_s < self._look_s:
            return
        self._look_s = now_s + _LOOK_S
        left = self._most - len(self._text)
        known: Mapping[int, Sequence[Replica]] = {stage: replicas(stage) for stage in range(len(links))}
        self._wish = wish(self._wish, [self._seat(link) for link in links], known, left, now_s)
        if self._wish is not None and self._wish.is_due(now_s, self._patience):
            self._patience *= 2.0  # loads that come and go do not chase a text about
            new = self._new = _Newcomer(self._text, self._most, self._take, now_s)
            new.link = self._open_at(self._wish.stage, self._wish.to, new.hear)

    def build(self, links: Sequence[Link | None], next_epoch: Callable[[], int], now_s: float) -> int | None:
        """Have the new server fed, as far as that has not been done; its stage once it may take over."""
        new, move = self._new, self._wish
        if new is None or move is None or not new.link.is_open:
            return None
        before, old = links[move.stage - 1], links[move.stage]
        if before is not None and before is not old and before.is_open and before.beside is not new.link:
            before.route_beside(next_epoch(), move.stage, new.link)
        return move.stage if new.link.computed + _CAUGHT_UP >= len(self._text) else None

    def failed(self, links: Sequence[Link | None], now_s: float) -> Link | None:
        """A new server that will not come to anything; it is to be closed, and let alone for a while."""
        new, move = self._new, self._wish
        if new is None or move is None:
            return None
        new.link.require_sound()
        old, before = links[move.stage], links[move.stage - 1]
        overtaken = old is not None and old.peer != move.seat
        unfed = before is not None and before.beside is new.link and before.beside_cut
        late = now_s - new.since_s >= _BUILD_S
        if new.link.down is None and new.agrees and not (overtaken or unfed or late):
            return None
        return self.drop()

    def take_over(self, stage: int) -> Link | None:
        """The new server of this stage, if there is one and it writes the same text. It is seated then."""
        new, move = self._new, self._wish
        if new is None or move is None or move.stage != stage or not new.link.is_open:
            return None
        self._new = self._wish = None
        new.seat()
        return new.link

    def drop(self) -> Link | None:
        """Give up what is being built; it is to be closed."""
        new, self._new, self._wish = self._new, None, None
        return new.link if new is not None else None

    def _seat(self, link: Link) -> Seat:
        if link.step_s:
            self._best_s[link.peer] = min(link.step_s, self._best_s.get(link.peer, link.step_s))
        return Seat(link.peer, link.step_s, self._best_s.get(link.peer, 0.0))


class _Newcomer:
    """A server that is being built, then seated. It has to write what was written meanwhile."""

    link: Link

    def __init__(self, text: Sequence[int], most: int, take: Take, now_s: float) -> None:
        """`most` tokens there may be."""
        self.since_s = now_s
        self._text, self._take, self._next, self._most = text, take, len(text), most
        self._ahead: list[SessionToken] = []  # of the text, when they came
        self._seated = False

    @property
    def agrees(self) -> bool:
        """Whether what it told is what was written, as far as that goes."""
        return all(self._is_written(one) for one in self._ahead if one.position < len(self._text))

    def hear(self, message: SessionToken) -> None:
        """A token, if it is of the last stage. Raises MessageInvalid for one that cannot come now."""
        if message.position != self._next or message.position >= self._most:
            raise MessageInvalid(f"token {message.position} came where {self._next} was due")
        self._next += 1
        if self._seated:
            self._add(message)
        else:
            self._ahead.append(message)

    def seat(self) -> None:
        """From now on its tokens are the text's, those that it has told already among them."""
        self._seated = True
        ahead, self._ahead = self._ahead, []
        try:
            for message in ahead:
                self._add(message)
        except MessageInvalid as error:
            self.link.down = error

    def _add(self, message: SessionToken) -> None:
        if message.position >= len(self._text):
            self._take(message)
        elif not self._is_written(message):
            raise MessageInvalid(f"token {message.position} was written otherwise before")

    def _is_written(self, message: SessionToken) -> bool:
        return message.finish != STOP and message.token == self._text[message.position]
