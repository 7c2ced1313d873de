"""Why a client replaces a server of its chain. Pure: of what its links have heard, and the time."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.protocol.errors import PeerSilent, PeerUnreachable, ShoalError
from shoal.training.serving.link import Link

SILENT_S = 2.0  # four pulses; a server is then replaced if its stage has another one
STARVED_S = 3.0  # without what the server before has; then one of the two is replaced
STALLED_S = 10.0  # without a position computed, while some wait
_MOST_CUTS = 4  # of the supply of a server; then another one is taken


def broken(link: Link) -> ShoalError | None:
    """Whatever else there is, it cannot stay."""
    if link.down is None and link.cuts >= _MOST_CUTS:
        return PeerUnreachable(f"the server before cannot reach it: {link.cut_reason}")
    return link.down


def stuck(
    links: Sequence[Link | None], stage: int, tokens: int, turn: int, now_s: float
) -> ShoalError | None:
    """It can stay if its stage has no other: a slow one is better than none.

    The text has `tokens`; `turn` alternates between two of which one does not get what the other has.
    """
    link = links[stage]
    if link is None:
        return None
    if now_s - link.heard_s > SILENT_S:
        return PeerSilent(f"{link.peer} has said nothing for {now_s - link.heard_s:.1f} s")
    if link.received > link.computed and now_s - link.moved_s > STALLED_S:
        return PeerSilent(f"{link.peer} has computed nothing for {now_s - link.moved_s:.1f} s")
    for end in (stage, (stage + 1) % len(links)):
        if link is _blamed(links, end, tokens, turn, now_s):
            return PeerUnreachable(f"nothing moves between {link.peer} and its neighbour")
    return None


def _blamed(links: Sequence[Link | None], stage: int, tokens: int, turn: int, now_s: float) -> Link | None:
    """Where a server does not get what the one before has for it: in turns that server and the other."""
    link, before = links[stage], links[stage - 1]
    if link is None or before is None or link is before or not (link.is_open and before.is_open):
        return None
    due = tokens if stage == 0 else before.computed
    if link.received >= due or now_s - max(link.moved_s, before.moved_s) < STARVED_S:
        return None
    return before if turn % 2 else link
