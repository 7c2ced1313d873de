"""The daemon's side of the try-it box is bounded in number, length and time. Texts: test_dashboard_swarm."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shoal.node.inference.tryout import AT_ONCE, MOST_TOKENS, PROMPT_CHARACTERS, UNREAD_S, Tryouts
from shoal.node.presence import Presence
from shoal.protocol.errors import Busy, NotHere, ShoalError, UsageError
from shoal.protocol.virtual_time import run


class Silent(Tryouts):
    """Its texts take for ever."""

    async def _write(self, session: Any, prompt: str, options: Any) -> None:
        await asyncio.Event().wait()


def young() -> Presence:
    """A peer that does not know the run yet."""
    return cast(Presence, SimpleNamespace(rng=random.Random(1), spec=None))


def unheard(kind: str, fields: Mapping[str, object]) -> None:
    """Nothing listens."""


async def ask(tryouts: Tryouts, do: str, **request: object) -> dict[str, Any]:
    return cast("dict[str, Any]", await tryouts.actions[do](request))


@pytest.mark.parametrize(
    "request_",
    [
        {"prompt": "x" * (PROMPT_CHARACTERS + 1)},
        {"prompt": 5},
        {"tokens": 0},
        {"tokens": MOST_TOKENS + 1},
        {"tokens": "many"},
        {"temperature": -1},
        {"temperature": "hot"},
    ],
)
def test_what_is_out_of_bounds_is_refused(request_: Mapping[str, object]) -> None:
    async def story() -> None:
        async with Tryouts(young(), unheard) as tryouts:
            with pytest.raises(UsageError):
                await ask(tryouts, "generate_start", **request_)

    run(story)


def test_a_failure_is_told_to_the_reader_once() -> None:
    async def story() -> None:
        async with Tryouts(young(), unheard) as tryouts:
            session = (await ask(tryouts, "generate_start", prompt="a"))["session"]
            await asyncio.sleep(0)
            told = await ask(tryouts, "generate_more", session=session)
            assert told["done"] and "does not know the run yet" in told["note"]
            with pytest.raises(NotHere):
                await ask(tryouts, "generate_more", session=session)

    run(story)


def test_a_few_at_once_and_those_that_nobody_reads_make_room() -> None:
    async def story() -> None:
        async with Silent(young(), unheard) as tryouts:
            begun = [(await ask(tryouts, "generate_start"))["session"] for _ in range(AT_ONCE)]
            with pytest.raises(Busy):
                await ask(tryouts, "generate_start")
            await ask(tryouts, "generate_stop", session=begun[0])
            await ask(tryouts, "generate_start")
            await asyncio.sleep(UNREAD_S / 2)
            assert not (await ask(tryouts, "generate_more", session=begun[1]))["done"]
            await asyncio.sleep(UNREAD_S / 2 + 1)
            await ask(tryouts, "generate_start")
            assert not (await ask(tryouts, "generate_more", session=begun[1]))["done"]
            with pytest.raises(ShoalError):
                await ask(tryouts, "generate_more", session=begun[2])

    run(story)
