"""What one browser page is in the middle of: filter, order of the table, the open drawer, a question asked.

Frozen: a step makes a new one. Panels draw a Snapshot under it; `page` takes the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal.node.dashboard.words import count
from shoal.node.view.snapshot import Snapshot

PEERS_SHOWN = 50


@dataclass(frozen=True, slots=True)
class Question:
    """An action that waits for its confirmation: what the daemon would be asked, and in words."""

    title: str
    words: str
    button: str
    do: str  # action of the control socket
    arguments: Mapping[str, object]
    danger: bool = False
    asks_reason: bool = False


@dataclass(frozen=True, slots=True)
class Invitation:
    """A token that was just made. Shown once."""

    token_id: str
    name: str
    command: str
    until: float


@dataclass(frozen=True, slots=True)
class Tryout:
    """The try-it box."""

    prompt: str = ""
    written: str = ""
    running: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """A moment of the history, shown instead of now."""

    snapshot: Snapshot
    before: float | None  # the kept moments beside it, Unix seconds
    after: float | None
    window_s: float  # what the scrubber reaches over
    until: float  # its right end: when the page was live last
    curve: tuple[tuple[float, float], ...] = ()  # Unix seconds, tokens a second


@dataclass(frozen=True, slots=True)
class PageState:
    """See the module."""

    now: float = 0.0  # Unix seconds
    actions: frozenset[str] = frozenset()  # what the daemon can be asked
    tokens: tuple[Mapping[str, object], ...] = ()
    orders: Mapping[str, object] = field(default_factory=dict)
    contributors: tuple[Mapping[str, object], ...] = ()
    exported: Mapping[str, object] = field(default_factory=dict)  # the newest export of a checkpoint
    rates: tuple[tuple[float, float], ...] = ()  # Unix seconds, tokens a second; of a day
    trouble: str = ""  # why the daemon does not answer
    filter: str = ""
    sort: str = "stage"
    descending: bool = False
    all_peers: bool = False
    peer: str = ""  # whose drawer is open
    rates_open: bool = False
    question: Question | None = None
    refusal: str = ""  # why the last action was not done
    told: str = ""  # what the last action did
    invitation: Invitation | None = None
    event_filter: str = ""
    tryout: Tryout = Tryout()
    span: tuple[float, float] | None = None  # of the history that can be looked at, Unix seconds
    window_s: float = 3600.0
    past: Past | None = None  # what is shown; None: now

    def can(self, action: str, what: str = "") -> bool:
        """Whether the daemon knows this action, and this order; what it does not know has no button.

        The past cannot be acted upon.
        """
        kinds = self.orders.get("kinds")
        ordered = not what or action != "order" or (isinstance(kinds, list) and what in kinds)
        return self.past is None and action in self.actions and ordered


def stage_word(stages: tuple[int, ...]) -> str:
    return ", ".join(map(str, stages)) if stages else "–"


def replicas_word(number: int) -> str:
    return count(number, "replica")
