"""The spec as the owner has amended it: at each revision of its settings, the same on every peer.

A stage's log says which revision is in force (each entry names one), the owner's list what it holds. So all
members use the same values for the same round, whenever each of them heard of the order. Used by the rounds
(`outer`), the trainer, and by the owner's daemon to check an order before it is signed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager

from shoal.protocol.amendments import RUNNING, AmendmentBook, Setting, SignedAmendments
from shoal.protocol.errors import StorageError
from shoal.training.spec import RunSpec

# What may change while a run goes on: nothing that decides the form of what is sent or kept.
AMENDABLE = (
    "inner.learning_rate",
    "inner.final_learning_rate_fraction",
    "inner.total_tokens",
    "outer.inner_steps",
)
_SPECS_KEPT = 16

log = logging.getLogger(__name__)


class Amended:
    """One peer's view of the orders that concern training."""

    def __init__(self, spec: RunSpec, book: AmendmentBook | None = None) -> None:
        self._spec = spec
        self._book = book or AmendmentBook(bytes(32), b"")
        self._specs: dict[tuple[int, int], RunSpec] = {}  # (version of the list, revision)

    @property
    def revision(self) -> int:
        """The newest known here."""
        return self._book.current.revision

    @property
    def signed(self) -> SignedAmendments | None:
        """What to give to others; None while nothing was ordered."""
        return self._book.signed

    def adopt(self, signed: SignedAmendments) -> bool:
        """Take a list over if it is newer; whether it was. Raises ProtocolViolation for a forged one."""
        try:
            return self._book.adopt(signed)
        except StorageError as error:  # it counts all the same, until this process ends
            log.error("the owner's orders were not stored", extra={"error": str(error)})
            return True

    @property
    def paused(self) -> bool:
        """Whether no work is to be begun."""
        return self._book.current.state != RUNNING

    def at(self, revision: int) -> RunSpec:
        """The spec at a revision; of one that is not known here yet, at the newest that is."""
        listed = self._book.current
        key = listed.version, min(revision, listed.revision)
        found = self._specs.get(key)
        if found is None:
            found = amended(self._spec, (s for s in listed.settings if s.revision <= revision))
            if len(self._specs) >= _SPECS_KEPT:
                self._specs.clear()
            self._specs[key] = found
        return found

    async def known(self, revision: int, within_s: float) -> bool:
        """Whether the settings of a revision are known here, or come to be in that time."""
        if revision <= self.revision:
            return True
        with self._book.watch() as changed:
            try:
                async with asyncio.timeout(within_s):
                    while self.revision < revision:
                        changed.clear()
                        await changed.wait()
            except TimeoutError:
                return False
        return True

    def watch(self) -> AbstractContextManager[asyncio.Event]:
        """See `SignedBook.watch`."""
        return self._book.watch()


def amended(spec: RunSpec, settings: Iterable[Setting]) -> RunSpec:
    """The spec with these settings, in their order. What this version does not know or allow is left out."""
    values = spec.model_dump()
    for setting in settings:
        section, _, key = setting.key.partition(".")
        if setting.key not in AMENDABLE:
            log.warning("unknown amendment", extra={"key": setting.key})
            continue
        before = values[section][key]
        values[section][key] = type(before)(setting.value)
        try:
            RunSpec.model_validate(values)
        except ValueError as error:
            log.warning("amendment out of bounds", extra={"key": setting.key, "error": str(error)})
            values[section][key] = before
    return RunSpec.model_validate(values)


def checked(spec: RunSpec, key: str, value: float) -> float:
    """A value that an order may give to a key of this spec. Raises ValueError with what is wrong."""
    if key not in AMENDABLE:
        raise ValueError(f"{key} cannot be changed in a run; these can: {', '.join(AMENDABLE)}")
    section, _, name = key.partition(".")
    values = spec.model_dump()
    values[section][name] = value
    RunSpec.model_validate(values)
    return value
