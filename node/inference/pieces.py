"""Token ids to text as they come. Pure.

What is not a whole character yet waits for the rest of it, and what may become a stop for what follows.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from shoal.training.data.tokenizer import ByteTokenizer, Tokenizer

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_MOST_WAITING = 8  # tokens that may wait for the rest of a character


class Decoder:
    """Decodes token by token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._begin = self._shown = 0  # of `_ids`: where decoding begins, and what was given out

    def add(self, token: int) -> str:
        """The text that is certain now."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._bytes.decode(bytes((token,)) if token < 256 else b"")
        self._ids.append(token)
        text = self._new()
        if text.endswith(_UNKNOWN) and len(self._ids) - self._shown < _MOST_WAITING:
            return ""
        self._begin, self._shown = self._shown, len(self._ids)
        return text

    def rest(self) -> str:
        """What still waits, at the end."""
        return self._bytes.decode(b"", final=True) + self._new()

    def _new(self) -> str:
        """Decoded with the tokens before, for spaces between words depend on them."""
        before = self._tokenizer.decode(self._ids[self._begin : self._shown])
        return self._tokenizer.decode(self._ids[self._begin :])[len(before) :]


class StopFilter:
    """Passes text on up to the first of some strings; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """The text that certainly comes before a stop."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def rest(self) -> str:
        """What was held back in vain."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` begin `stop`."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)
