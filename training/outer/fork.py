"""Fork: which of two chains of one stage wins, and with what weight the lost one's means re-enter. Pure.

Both sides of a healed partition compute this from the same entries, so they agree without a word (design
section 9): more work wins, and a chain that ran under a lost chain of the first stage loses to one that did
not. A tie goes to the higher ballot where the chains part: a leader that stood still amid its COMMIT wakes
with a lower one than those who went on without it, and it is the one to switch. Then to the smaller hash.
`recovery.chain` finds the chains, `recovery.catch_up` acts.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from shoal.training.outer.entry import Entry

# A contributor counts for so many rounds' worth of tokens in one round, so that one boastful entry cannot
# outweigh an honest chain; no honest replica is that much faster than its group's mean.
MOST_ROUNDS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """One side of a fork: what was committed since the last entry that both sides have."""

    head: bytes
    height: int
    work_tokens: int
    ballot: int = 0  # of its first entry
    forsaken: bool = False  # some of it ran under a first-stage head that the first stage has left


def chain_of(
    head: bytes, height: int, entries: Sequence[Entry], most_tokens: int, forsaken: Container[bytes] = ()
) -> Chain:
    """From the entries since the common one. `forsaken`: first-stage heads known to be of a lost chain."""
    return Chain(
        head=head,
        height=height,
        work_tokens=work_tokens(entries, most_tokens),
        ballot=entries[0].ballot if entries else 0,
        forsaken=any(entry.first_stage_head in forsaken for entry in entries),
    )


def most_tokens(inner_steps: int, inner_tokens: int) -> int:
    """What one contributor counts for in one round, at most."""
    return MOST_ROUNDS * inner_steps * inner_tokens


def work_tokens(entries: Iterable[Entry], most: int) -> int:
    """Tokens of all contributions, each capped; those that re-entered count where they re-entered."""
    return sum(min(row.tokens, most) for entry in entries for row in entry.source().contributors)


def wins(one: Chain, other: Chain) -> bool:
    """Whether `one` is the chain that all go on with. For two different heads exactly one of both wins."""
    if one.forsaken != other.forsaken:
        return other.forsaken
    return (one.work_tokens, one.ballot, other.head) > (other.work_tokens, other.ballot, one.head)


def share(lost: Chain, won: Chain) -> float:
    """The factor in (0, 1] on lost means: T_lost / (T_lost + T_win), as if both sides had been one group."""
    total = lost.work_tokens + won.work_tokens
    return max(lost.work_tokens / total, 1e-9) if total else 1.0
