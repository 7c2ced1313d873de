"""What there is to say of a text that a chain wrote. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.protocol.identity import PeerId
from shoal.training.serving.messages import SamplingOptions
from shoal.training.serving.prints import Shown


@dataclass(slots=True)
class ChainFigures:
    """What became of one generation."""

    replaced: int = 0  # servers
    moved: int = 0  # to a faster server, while the one before went on
    restarted: int = 0  # versions retired under it
    longest_gap_s: float = 0.0  # between two tokens
    drafted: int = 0  # tokens guessed
    accepted: int = 0  # guesses that were right
    refused: int = 0  # guesses that were not; what was guessed after one of these is neither


@dataclass(frozen=True, slots=True)
class Written:
    """A text that is complete: tokens with its prompt's first, and who computed it on which versions."""

    tokens: tuple[int, ...]
    prompt: int
    options: SamplingOptions
    versions: tuple[bytes, ...]  # by stage
    servers: frozenset[PeerId]
    stopped: bool  # by a token that ended it
    restarted: bool = False  # some of it was computed on versions before these
    shown: tuple[tuple[PeerId, Shown | None], ...] = ()  # by stage, if asked: who says what went through it
