"""A terminal shows what is under way in one bar below the words; what is no terminal shows none."""

from __future__ import annotations

import asyncio
import io
from types import SimpleNamespace
from typing import Any, cast

from members_world import RUN
from rich.console import Console
from view_world import a_spec

from shoal.dht.beats import Beat, StageBeat
from shoal.node.cli.terminal import Terminal
from shoal.node.presence import Presence
from shoal.node.progress import Progress, show_progress
from shoal.node.worker import Worker
from shoal.protocol.amendments import Amendments, Setting
from shoal.protocol.virtual_time import run

MIB = 1 << 20


def test_words_stay_and_the_bar_below_them_goes() -> None:
    written = io.StringIO()
    with Terminal(Console(file=written, force_terminal=True, width=80)) as terminal:
        terminal.show(Progress("fetching stage 1", 3 * MIB, 12 * MIB, of_bytes=True))
        terminal.tell("joining", {"text": "[bold]to stage 1[/] :smile:"})
        terminal.tell("round-open", {})
        terminal.show(Progress("round 4", 7, 20))
        assert "3.1/12.6 MB" in written.getvalue() and "7/20" in written.getvalue()
        assert "[bold]to stage 1[/] :smile:" in written.getvalue()
        terminal.show(None)
    assert written.getvalue().endswith("\x1b[1A\x1b[2K"), "its line is cleared"
    assert written.getvalue().count("\x1b[?25l") == written.getvalue().count("\x1b[?25h") == 2, "the cursor"


def test_a_joiner_sees_its_stage_come_and_then_the_steps_of_each_round() -> None:
    """As many steps as the owner has ordered last."""
    spec = a_spec()
    book = SimpleNamespace(current=Amendments(RUN, 1, settings=(Setting(1, "outer.inner_steps", 9.0),)))
    received = {"outer.1.chunks": 5}  # when it held that stage before
    presence: Any = SimpleNamespace(
        state="joining",
        spec=SimpleNamespace(spec=spec),
        membership=SimpleNamespace(amendments=book),
        transport=SimpleNamespace(counters=lambda: SimpleNamespace(bytes_in=dict(received))),
    )
    worker: Any = SimpleNamespace(trainee=None, beat=Beat)
    shown: list[Progress | None] = []

    async def story() -> None:
        showing = asyncio.create_task(
            show_progress(cast(Presence, presence), cast(Worker, worker), shown.append)
        )
        await asyncio.sleep(1.0)
        assert shown[-1] is None
        worker.trainee = SimpleNamespace(stage=1)
        await asyncio.sleep(1.0)
        received["outer.1.chunks"] += 1000
        await asyncio.sleep(1.0)
        found = shown[-1]
        assert found is not None and found.of_bytes and (found.done, found.what) == (1000, "fetching stage 1")
        assert found.total > 1000
        presence.state = "online"
        worker.beat = lambda: Beat(stages=(StageBeat(1, height=3, head=bytes(32), steps_since_round=4),))
        await asyncio.sleep(1.0)
        assert shown[-1] == Progress("round 4", 4, 9)
        showing.cancel()

    run(story)
