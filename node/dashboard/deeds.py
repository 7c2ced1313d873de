"""What a person does on the page: steps of its state, and orders for the daemon after one confirmation.

Refusals of the daemon are shown where the question was asked.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from nicegui import ui

from shoal.node.dashboard.feed import Feed
from shoal.node.dashboard.panels.peers import COLUMNS, as_csv
from shoal.node.dashboard.panels.questions import RATES, REASON_CHARACTERS, question_of
from shoal.node.dashboard.past import Looking
from shoal.node.dashboard.state import Invitation, PageState, Tryout
from shoal.protocol.errors import ShoalError

_FILTER_CHARACTERS = 64
_EVENTS = 1000
_TRYOUT_EVERY_S = 0.2
Values = Mapping[str, object]


class Deeds:
    """See the module. One per tab."""

    def __init__(
        self, feed: Feed, who: str, state: Callable[[], PageState], become: Callable[[PageState], None]
    ) -> None:
        self._feed, self._who, self._state, self._become = feed, who, state, become
        looking = Looking(feed, state, become)
        self._deeds: dict[str, Callable[[Values], Awaitable[None] | None]] = {
            "peer": lambda values: self._step(peer=str(values.get("peer", ""))[:128]),
            "close": lambda values: self._close(),
            "filter": lambda values: self._step(filter=str(values.get("value", ""))[:_FILTER_CHARACTERS]),
            "event-filter": lambda values: self._step(
                event_filter=str(values.get("value", ""))[:_FILTER_CHARACTERS]
            ),
            "sort": self._sort,
            "all-peers": lambda values: self._step(all_peers=True),
            "csv": self._csv,
            "events-file": self._events_file,
            "export": self._export,
            "ask": self._ask,
            "confirm": self._confirm,
            "rates": lambda values: self._step(rates_open=True, refusal=""),
            "set-rates": self._set_rates,
            "token_create": self._create_token,
            "invitation-done": lambda values: self._step(invitation=None),
            "moment": looking.at,
            "window": looking.window,
            "live": looking.live,
            "tryout": self._write,
            "tryout-stop": lambda values: self._step(tryout=replace(self._state().tryout, running=False)),
        }

    async def did(self, values: Values) -> None:
        """Something on the page; what it does not know is nothing."""
        deed = self._deeds.get(str(values.get("do", "")))
        if deed is not None:
            doing = deed(values)
            if doing is not None:
                await doing

    def _step(self, **changes: Any) -> None:
        self._become(replace(self._state(), **changes))

    def _close(self) -> None:
        """The uppermost of what is open."""
        if self._state().question is not None or self._state().rates_open:
            self._step(question=None, rates_open=False, refusal="")
        else:
            self._step(peer="")

    # --- the table

    def _sort(self, values: Values) -> None:
        column, state = str(values.get("column", "")), self._state()
        if column in {one.name for one in COLUMNS}:
            self._step(sort=column, descending=not state.descending if column == state.sort else False)

    def _csv(self, values: Values) -> None:
        past = self._state().past
        shown = past.snapshot if past is not None else self._feed.snapshot
        if shown is not None:
            content = as_csv(shown, self._state()).encode()
            ui.download.content(content, "peers.csv", "text/csv")

    async def _events_file(self, values: Values) -> None:
        """The newest events of the history, one JSON object a line."""
        try:
            told = await self._feed.ask("history", what="events", most=_EVENTS, newest=True)
        except ShoalError as error:
            return self._step(told=str(error))
        lines = "".join(json.dumps(event) + "\n" for event in told["events"])
        ui.download.content(lines.encode(), "events.jsonl", "application/x-ndjson")

    async def _export(self, values: Values) -> None:
        """A checkpoint for transformers, on the owner's disk; the panel says when it is there."""
        try:
            await self._feed.ask("checkpoint_export")
        except ShoalError as error:
            return self._step(told=str(error))
        self._feed.hurry()

    # --- orders

    def _ask(self, values: Values) -> None:
        question = question_of(values, self._feed.snapshot)
        if question is not None and self._state().can(question.do, str(question.arguments.get("what", ""))):
            self._step(question=question, refusal="", told="")

    async def _confirm(self, values: Values) -> None:
        asked = self._state().question
        if asked is None:
            return
        arguments = dict(asked.arguments)
        if asked.asks_reason:
            arguments["reason"] = _field(values, "reason")[:REASON_CHARACTERS]
        if await self._order(asked.do, **arguments):
            self._step(question=None)

    async def _set_rates(self, values: Values) -> None:
        try:
            wanted = {key: _figure(key, _field(values, key)) for key, _ in RATES if _field(values, key)}
        except ValueError:
            return self._step(refusal="These are no numbers.")
        if wanted and await self._order("order", what="set", values=wanted):
            self._step(rates_open=False)

    async def _order(self, do: str, **arguments: object) -> bool:
        """Whether the daemon did it; shows what it said."""
        try:
            entry = await self._feed.ask(do, who=self._who, key=secrets.token_hex(8), **arguments)
        except ShoalError as error:
            self._step(refusal=str(error))
            return False
        text = entry.get("text", "") if isinstance(entry, dict) else ""
        self._step(refusal="", told=str(text) or "Done.")
        self._feed.hurry()
        return True

    async def _create_token(self, values: Values) -> None:
        name = _field(values, "name")
        try:
            made = await self._feed.ask(
                "token_create",
                name=name,
                roles=[_field(values, "role")],
                ttl_s=float(_field(values, "ttl_s")),
                who=self._who,
                key=secrets.token_hex(8),
            )
        except (ShoalError, ValueError) as error:
            return self._step(told=str(error))
        command = str(made.get("command") or f"shoal join {made['token']}")
        invitation = Invitation(str(made["id"]), name, command, float(made["not_after"]))
        self._step(invitation=invitation, told="")
        self._feed.hurry()

    # --- trying the model

    async def _write(self, values: Values) -> None:
        """Begin a text and follow it until it ends or is stopped."""
        if self._state().tryout.running:
            return
        prompt = _field(values, "prompt")
        try:
            asked = {
                "tokens": int(_field(values, "tokens")),
                "temperature": float(_field(values, "temperature")),
            }
            session = (await self._feed.ask("generate_start", prompt=prompt, **asked))["session"]
        except (ShoalError, ValueError) as error:
            return self._step(tryout=Tryout(prompt=prompt, note=str(error)))
        self._step(tryout=Tryout(prompt=prompt, running=True, note="Writing…"))
        try:
            while self._state().tryout.running:
                more = await self._feed.ask("generate_more", session=session)
                box = self._state().tryout
                note = str(more["note"]) or box.note
                running = box.running and not more["done"]
                self._step(tryout=Tryout(prompt, box.written + str(more["text"]), running, note))
                await asyncio.sleep(_TRYOUT_EVERY_S)
        except ShoalError as error:
            self._step(tryout=replace(self._state().tryout, running=False, note=str(error)))
        else:
            await self._stop_writing(session)

    async def _stop_writing(self, session: object) -> None:
        try:
            await self._feed.ask("generate_stop", session=session)
        except ShoalError:
            return  # it ended by itself


def _field(values: Values, name: str) -> str:
    form = values.get("form")
    return str(form.get(name, "")) if isinstance(form, Mapping) else ""


def _figure(key: str, text: str) -> float | int:
    return int(text) if key == "outer.inner_steps" else float(text)
