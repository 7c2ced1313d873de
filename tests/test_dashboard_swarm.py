"""The owner's page over a real swarm under churn: invites somebody, sees them come and go, orders, asks the

model, exports it, and is back with its history after the owner's own machine was gone. One swarm, one story.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from dashboard_browser import browser
from dashboard_story import Story, story_spec
from swarm_world import Swarm


@pytest.mark.timeout(420)
def test_an_owner_runs_a_swarm_from_the_page(tmp_path: Path) -> None:
    async def main() -> None:
        async with Swarm(tmp_path / "swarm", story_spec(tmp_path)) as swarm, browser() as chromium:
            try:
                context = await chromium.new_context(
                    viewport={"width": 1280, "height": 900}, reduced_motion="reduce"
                )
                await (await Story.begin(swarm, context)).told()
            except BaseException as error:
                error.add_note(swarm.story())
                raise

    asyncio.run(main())
