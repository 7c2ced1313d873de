"""What the page knows: the daemon's newest Snapshot, asked for again and again while anybody looks.

One for the whole process, however many browsers are open. Called by `server`, read by `page`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

from shoal.node.control import ask
from shoal.node.view.snapshot import Snapshot
from shoal.protocol.errors import ShoalError

EVERY_S = 0.6  # so that what is new is on the page within a second
SELDOM = 7  # looks
CONTRIBUTORS, ORDERS = 30, 20  # shown
RATES_S = 24 * 3600.0  # back in time
IDLE_S = 5.0  # so long after the last page was there, nobody looks any more


class Feed:
    """See the module."""

    def __init__(self, control: Path) -> None:
        self._control = control
        self._wanted_at = 0.0
        self._wanted = asyncio.Event()
        self._hurry = asyncio.Event()
        self.snapshot: Snapshot | None = None
        self.looks = 0  # at the daemon; grows whether it answers or not
        self.trouble = ""  # why the daemon does not answer, "" when it does
        self.actions: frozenset[str] = frozenset()  # what the daemon can be asked
        self.tokens: list[dict[str, Any]] = []
        self.orders: dict[str, Any] = {}
        self.contributors: list[dict[str, Any]] = []
        self.exported: dict[str, Any] = {}  # what became of the last export of a checkpoint
        self.rates: list[tuple[float, float]] = []  # Unix seconds, tokens a second
        self.span: tuple[float, float] | None = None  # of the history, Unix seconds

    def wanted(self) -> None:
        """A page is there."""
        self._wanted_at = asyncio.get_running_loop().time()
        self._wanted.set()

    def hurry(self) -> None:
        """Something was just done: look now."""
        self._hurry.set()

    async def run(self) -> None:
        """Follow the daemon until cancelled."""
        while True:
            await self._wanted.wait()
            await self._look()
            self._hurry.clear()
            self.looks += 1
            if asyncio.get_running_loop().time() - self._wanted_at > IDLE_S:
                self._wanted.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), EVERY_S)

    async def _look(self) -> None:
        try:
            if self.trouble or not self.actions:
                self.actions = frozenset(await self.ask("actions"))
            self.snapshot = Snapshot.from_json(await self.ask("snapshot"))
            if self._hurry.is_set() or self.looks % SELDOM == 0 or self.trouble:
                await self._look_at_papers()
            self.trouble = ""
        except (ShoalError, ValueError) as error:
            self.trouble = str(error).partition("\n")[0]

    async def _look_at_papers(self) -> None:
        """What changes seldom, or when the owner does something; on the command line as well."""
        since = time.time() - RATES_S
        self.tokens = await self._paper("tokens", self.tokens)
        self.orders = await self._paper("orders", self.orders, most=ORDERS)
        self.exported = await self._paper("checkpoint_exported", self.exported)
        told = await self._paper("history", {}, what="contributors", most=CONTRIBUTORS)
        self.contributors = told.get("contributors", self.contributors)
        told = await self._paper("history", {}, what="series", name="tokens_per_s", since=since)
        self.rates = told.get("points", self.rates)
        told = await self._paper("history", {}, what="span")
        self.span = tuple(told["span"]) if told.get("span") else self.span

    async def _paper(self, do: str, known: Any, **arguments: object) -> Any:
        """What the daemon says, or what was known: a full disk, for one, is no reason to show nothing."""
        try:
            return await self.ask(do, **arguments) if do in self.actions else known
        except ShoalError:
            return known

    async def ask(self, do: str, **arguments: object) -> Any:
        """An action of the daemon. Raises ShoalError with its text."""
        return await ask(self._control, do, **arguments)
