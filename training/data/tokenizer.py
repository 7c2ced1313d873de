"""Text to token ids and back: bytes, or any Hugging Face `tokenizer.json`.

The corpus encodes with it, inference decodes with it. Every peer of a run must have the same one; the spec
can name the file's hash.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from blake3 import blake3

from shoal.protocol import limits
from shoal.protocol.errors import SpecError
from shoal.training.spec import BYTE_VOCABULARY, DataSection

_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
_MOST_BYTES = 256 * limits.MIB


class Tokenizer(Protocol):
    """What the project needs of a tokenizer."""

    @property
    def vocabulary(self) -> int:
        """Ids lie in [0, vocabulary)."""

    @property
    def end_of_document(self) -> int:
        """The id between documents; `encode` never yields it."""

    @property
    def fingerprint(self) -> str:
        """Changes when `encode` would."""

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids int32 [n]. Bytes that are not UTF-8 are kept (bytes) or replaced by U+FFFD (tokenizer.json)."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text without end-of-document; bytes that form no character become U+FFFD."""


class ByteTokenizer:
    """256 bytes and end-of-document."""

    vocabulary = BYTE_VOCABULARY
    end_of_document = 256
    fingerprint = "bytes"

    def encode(self, text: str | bytes) -> np.ndarray:
        data = text.encode(errors="replace") if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if 0 <= i < 256).decode(errors="replace")


class FileTokenizer:
    """A Hugging Face tokenizer.json. Special tokens that occur in a text are encoded as ordinary text."""

    def __init__(self, path: Path, digest: str = "", end_of_document: str = "") -> None:
        """Raises SpecError when the file is not there, not a tokenizer, or not the one with this BLAKE3."""
        try:
            if path.exists() and not path.is_file():  # a device gives bytes for ever
                raise SpecError(f"data.tokenizer = {str(path)!r} is no file")
            with path.open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise SpecError(f"data.tokenizer = {str(path)!r} cannot be read: {reason}") from error
        if len(data) > _MOST_BYTES:
            raise SpecError(f"data.tokenizer = {str(path)!r} has more than {_MOST_BYTES} bytes")
        self.fingerprint = blake3(data).hexdigest()
        if digest and digest != self.fingerprint:
            raise SpecError(
                f"{path} has BLAKE3 {self.fingerprint}, the run asks for {digest}:"
                " take the owner's tokenizer.json"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises no narrower class, whatever is wrong in the file
            raise SpecError(f"{path} is not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary = max(ids.values(), default=-1) + 1
        names = (end_of_document,) if end_of_document else _END_NAMES
        known = [ids[name] for name in names if name in ids]
        if not known:
            raise SpecError(
                f"{path} has no token {' or '.join(names)};"
                " name the one that ends a document in data.end_of_document"
            )
        self.end_of_document = known[0]
        self.end_name = next(name for name in names if ids.get(name) == known[0])

    def encode(self, text: str | bytes) -> np.ndarray:
        # By way of bytes, for a lone surrogate in a str would be refused by the library.
        data = text.encode(errors="replace") if isinstance(text, str) else text
        encoding = self._tokenizer.encode(data.decode(errors="replace"), add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        shown = [int(i) for i in ids if 0 <= i < self.vocabulary and i != self.end_of_document]
        text: str = self._tokenizer.decode(shown, skip_special_tokens=True)
        return text


def load_tokenizer(data: DataSection) -> Tokenizer:
    """The run's tokenizer. Raises SpecError when it cannot be used or has more ids than the model rows."""
    if data.tokenizer == "bytes":
        return ByteTokenizer()
    try:
        path = Path(data.tokenizer).expanduser()
    except RuntimeError as error:  # a user who is not here
        raise SpecError(f"data.tokenizer = {data.tokenizer!r}: {error}") from error
    tokenizer = FileTokenizer(path, data.tokenizer_blake3, data.end_of_document)
    if tokenizer.vocabulary > data.vocabulary:
        raise SpecError(
            f"{path} has {tokenizer.vocabulary} tokens, data.vocabulary = {data.vocabulary}:"
            f" set it to {tokenizer.vocabulary} or more"
        )
    return tokenizer
