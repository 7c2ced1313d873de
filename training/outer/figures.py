"""What one replica's rounds came to, for `shoal status`. Kept by `turns` and `service`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Figures:
    """Counters for status."""

    rounds: int = 0
    led: int = 0
    failed: int = 0
    caught_up: int = 0
    switches: int = 0  # of chains, after a fork
    reentering: int = 0  # lost entries still to bring back
    repaired_parts: int = 0  # whose state was another than the group's at the same head
    listed: int = 0
    skipped_parts: int = 0
    last_round_s: float = 0.0
    overlap_steps: int = 0  # made here while the last round was under way
    bytes_out: int = 0
    contributors: int = 0
    last_reason: str = ""
    refused: dict[str, int] = field(default_factory=dict)
