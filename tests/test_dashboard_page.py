"""The page in a real browser, over a daemon that the test answers: reads well, works by keyboard, asks once.

Needs Debian's chromium (`apt-get install chromium`); without it these tests fail and say so.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import pytest
from dashboard_browser import browser, sign_in
from dashboard_world import FakeDaemon, full_snapshot, recorded, served
from playwright.async_api import Browser, Page, expect

from shoal.node.dashboard import snippets, words

AXE = (files("axe_playwright_python") / "axe.min.js").read_text()
MOVED = "(one, at) => { one.value = at; one.dispatchEvent(new Event('input', {bubbles: true})); }"
HOSTILE = "<img src=x onerror=window.pwned=1>\"'><script>window.pwned=1</script>"


class World:
    """One page process and one browser, for all tests of the module."""

    def __init__(self, folder: Path) -> None:
        self.daemon = FakeDaemon(full_snapshot())
        self.runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self.runner.run(self._start(folder))

    async def _start(self, folder: Path) -> None:
        link = await self._stack.enter_async_context(served(folder, self.daemon))
        self.browser: Browser = await self._stack.enter_async_context(browser())
        self.context = await self.browser.new_context(
            viewport={"width": 1280, "height": 900}, reduced_motion="reduce"
        )
        self.page = await sign_in(self.context, link)
        self.daemon.recorded, self.moments = await recorded(folder, time.time())
        self._stack.push_async_callback(self.daemon.recorded.close)

    @asynccontextmanager
    async def fresh(self) -> AsyncIterator[Page]:
        """A new tab, since an old one may be about to load itself again; the daemon as it was at first."""
        self.daemon.snapshot, self.daemon.hidden = full_snapshot(), frozenset()
        self.daemon.did.clear()
        self.daemon.paused = False
        old, self.page = self.page, await self.context.new_page()
        await self.page.goto(old.url)
        await old.close()
        await expect(self.page.locator(".sentence")).to_be_visible()
        yield self.page

    def close(self) -> None:
        self.runner.run(self._stack.aclose())
        self.runner.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("page"))
    yield world
    world.close()


def test_it_reads_well_at_every_width_light_and_dark(world: World) -> None:
    async def story() -> None:
        async with world.fresh() as page:
            await page.evaluate(f"() => {{ {AXE} }}")
            for width in (360, 1280, 1920):
                for theme in ("light", "dark"):
                    await page.set_viewport_size({"width": width, "height": 900})
                    await page.emulate_media(color_scheme=theme, reduced_motion="reduce")
                    wide = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
                    assert wide <= 0, f"{width} px, {theme}: {wide} px too wide"
                    assert not await overlapping(page), f"{width} px, {theme}"
                    if width < 1920:  # the widest has the colours and the order of the one before
                        assert not await serious(page), f"{width} px, {theme}"
            await page.set_viewport_size({"width": 1280, "height": 900})

    world.runner.run(story())


def test_drawer_and_questions_read_well_too(world: World) -> None:
    async def story() -> None:
        async with world.fresh() as page:
            await page.evaluate(f"() => {{ {AXE} }}")
            await page.locator("#peers .link", has_text="peer-2").click()
            await expect(page.locator("dialog.drawer")).to_contain_text("If it leaves")
            assert not await serious(page)
            await page.locator("dialog.drawer button", has_text="Ban").click()
            await expect(page.locator("dialog.question")).to_contain_text("Ban peer-2?")
            assert not await serious(page)

    world.runner.run(story())


def test_it_can_be_used_with_the_keyboard_alone(world: World) -> None:
    async def story() -> None:
        async with world.fresh() as page:
            await page.keyboard.press("Tab")
            assert await page.evaluate("document.activeElement.className") == "skip"
            cell = page.locator("#pipeline .cell").first
            name = await cell.locator(".cell-name").inner_text()
            await cell.focus()
            await page.keyboard.press("Enter")
            await expect(page.locator("dialog.drawer h2")).to_have_text(name.strip())
            await page.keyboard.press("Escape")
            await expect(page.locator("dialog.drawer")).to_have_count(0)
            assert await page.evaluate("document.activeElement.classList.contains('cell')"), (
                "the focus is back"
            )

    world.runner.run(story())


def test_an_action_is_confirmed_once_and_done_once(world: World) -> None:
    async def story() -> None:
        async with world.fresh() as page:
            await page.locator("#verdict button", has_text="Pause").click()
            question = page.locator("dialog.question")
            await question.locator("button", has_text="Cancel").click()
            await expect(question).to_have_count(0)
            assert not world.daemon.did
            await page.locator("#verdict button", has_text="Pause").click()
            await question.locator("button", has_text="Pause").click()
            await expect(page.locator("#verdict button", has_text="Resume")).to_be_visible()
            (did,) = world.daemon.did
            assert did["what"] == "pause" and did["who"].startswith("page:") and did["key"]
            await expect(page.locator("#orders")).to_contain_text("pause")
            await page.locator("#peers .link", has_text="peer-2").click()
            await page.locator("dialog.drawer button", has_text="Kick").click()
            await question.locator("input").fill("too slow")
            await question.locator("button", has_text="Kick").click()
            await expect(question).to_have_count(0)
            assert world.daemon.did[-1]["reason"] == "too slow"
            await page.keyboard.press("Escape")
            await page.locator("#verdict button", has_text="Learning rate").click()
            await question.locator("input").first.fill("0.001")
            await question.locator("button", has_text="Change").click()
            await expect(question).to_have_count(0)
            assert world.daemon.did[-1]["values"] == {"inner.learning_rate": 0.001, "outer.inner_steps": 50}

    world.runner.run(story())


def test_a_token_is_made_copied_and_shown_once(world: World) -> None:
    async def story() -> None:
        async with world.fresh() as page:
            panel = page.locator("#invitations")
            await panel.locator("input[name=name]").fill("ann")
            await panel.locator("button", has_text="Create token").click()
            command = panel.locator("#join-command")
            await expect(command).to_contain_text("shoal join shoal1")
            await world.context.grant_permissions(["clipboard-read", "clipboard-write"])
            await panel.locator("button", has_text="Copy").click()
            await expect(panel.locator("[data-copied]")).to_be_visible()
            assert await page.evaluate("navigator.clipboard.readText()") == await command.inner_text()
            await panel.locator("summary").click()
            assert await panel.locator("img.qr").evaluate("image => image.naturalWidth") > 100
            await panel.locator("button", has_text="Done").click()
            await expect(command).to_have_count(0)
            await expect(panel.locator("tbody")).to_contain_text("ann")

    world.runner.run(story())


def test_the_table_is_filtered_sorted_and_downloaded(world: World) -> None:
    async def story() -> None:
        async with world.fresh() as page:
            rows = page.locator("#peers tbody tr")
            await page.locator("#peers input").fill("stage 3")
            await expect(rows).to_have_count(3)
            await page.locator("#peers th button", has_text="tok/s").click()
            await expect(page.locator("#peers th[aria-sort]")).to_have_attribute("aria-sort", "ascending")
            await page.locator("#peers th button", has_text="tok/s").click()
            await expect(page.locator("#peers th[aria-sort]")).to_have_attribute("aria-sort", "descending")
            async with page.expect_download() as downloading:
                await page.locator("#peers button", has_text="CSV").click()
            content = (await (await downloading.value).path()).read_text()
            assert len(content.splitlines()) == 4

    world.runner.run(story())


def test_cells_follow_the_swarm_within_two_looks(world: World) -> None:
    async def story() -> None:
        async with world.fresh() as page:
            snapshot = world.daemon.snapshot
            mover = snapshot.peers[-2]
            assert mover.stages == (3,)
            moved = dataclasses.replace(mover, stages=(2,))
            peers = (*snapshot.peers[:-2], moved)  # one moved, one left
            world.daemon.snapshot = dataclasses.replace(snapshot, peers=peers)
            await page.emulate_media(reduced_motion="no-preference")
            gliding = page.wait_for_function(
                "document.getAnimations().some(one => one.effect.target.dataset?.flip)", polling="raf"
            )
            seen = asyncio.create_task(gliding)
            weak = page.locator("#pipeline .stage.weakest .cell")
            await expect(weak).to_have_count(2, timeout=3000)
            await expect(page.locator("#pipeline .stage.outside")).to_have_count(0)
            await seen

    world.runner.run(story())


def test_a_peers_name_runs_nothing(world: World) -> None:
    async def story() -> None:
        async with world.fresh() as page:
            snapshot = world.daemon.snapshot
            evil = dataclasses.replace(snapshot.peers[1], name=HOSTILE, reason=HOSTILE, device=HOSTILE)
            world.daemon.snapshot = dataclasses.replace(snapshot, peers=(snapshot.peers[0], evil))
            await expect(page.locator("#peers")).to_contain_text("<img src=x onerror=")
            await page.locator("#peers .link", has_text="<img").click()
            await expect(page.locator("dialog.drawer h2")).to_contain_text("<script>")
            assert await page.evaluate("window.pwned") is None
            blocked = await page.evaluate(  # the second wall: were it not escaped, the policy would stop it
                """() => new Promise(done => {
                    const told = event => done(event.violatedDirective);
                    document.addEventListener("securitypolicyviolation", told);
                    document.body.insertAdjacentHTML("beforeend", "<img src=x onerror=window.pwned=1>");
                })"""
            )
            assert blocked.startswith(("script-src", "img-src"))
            assert await page.evaluate("window.pwned") is None

    world.runner.run(story())


def test_text_is_written_in_the_box(world: World) -> None:
    async def story() -> None:
        async with world.fresh() as page:
            await page.locator("#tryout textarea").fill("def ")
            await page.locator("#tryout button", has_text="Write").click()
            await expect(page.locator("#tryout .written")).to_have_text("def add(a, b):\n    return a + b\n")
            await expect(page.locator("#tryout")).to_contain_text("13 tokens")

    world.runner.run(story())


def test_a_checkpoint_is_exported_and_its_place_told(world: World) -> None:
    async def story() -> None:
        async with world.fresh() as page:
            panel = page.locator("#checkpoints")
            await panel.locator("button", has_text="Export").click()
            await expect(panel).to_contain_text("/home/ann/exports/000041-whole")

    world.runner.run(story())


def test_how_a_program_asks_is_there_to_copy(world: World) -> None:
    async def story() -> None:
        async with world.fresh() as page:
            await world.context.grant_permissions(["clipboard-read", "clipboard-write"])
            box = page.locator("#tryout")
            await box.locator("summary").click()
            for name, snippet in (("curl", snippets.curl), ("python", snippets.python)):
                await box.locator(f"[data-copy=snippet-{name}]").click()
                await expect(box.locator(f"[data-copy=snippet-{name}][data-copied]")).to_be_visible()
                copied = await page.evaluate("navigator.clipboard.readText()")
                assert copied == snippet(world.daemon.snapshot.run.name, "def ")

    world.runner.run(story())


def test_what_the_daemon_cannot_do_is_not_there(world: World) -> None:
    async def story() -> None:
        async with world.fresh() as page:
            world.daemon.hidden = frozenset({"order", "orders", "token_create", "generate_start", "snapshot"})
            await expect(page.locator("#stale")).to_contain_text("does not answer")  # it looks what there is
            world.daemon.hidden -= {"snapshot"}
            await expect(page.locator("#stale")).to_have_text("")
            await expect(page.locator("#verdict .buttons")).to_have_count(0)
            await expect(page.locator("#tryout")).to_be_hidden()
            await expect(page.locator("#invitations form")).to_have_count(0)
            world.daemon.hidden = frozenset({"snapshot"})
            await expect(page.locator("#stale")).to_contain_text("does not answer")
            world.daemon.hidden = frozenset()
            await expect(page.locator("#verdict button", has_text="Pause")).to_be_visible()

    world.runner.run(story())


def test_it_looks_back_at_the_run_as_it_was(world: World) -> None:
    async def story() -> None:
        async with world.fresh() as page:
            slider, scrubber = page.locator("#scrubber input"), page.locator("#scrubber")
            live = world.daemon.snapshot
            then = world.moments[10]
            await expect(slider).to_be_visible()  # once the page knows how far the history reaches
            await slider.evaluate("one => window.held = one")
            for at in (world.moments[2].at, then.at + 5.0):  # the second before the first is answered
                await slider.evaluate(MOVED, at)
            await expect(scrubber).to_contain_text(f"As of {words.clock(then.at)}, not live")
            assert await slider.evaluate("one => window.held === one"), "a drag goes on under the banner"
            await expect(page.locator("h1")).to_have_text("Training. Every stage has two replicas.")
            await expect(page.locator("#pipeline .cell", has_text="lost-later")).to_be_visible()
            await expect(page.locator("#tiles")).to_contain_text(words.number(then.run.tokens))
            await expect(page.locator("#loss .mark.then")).to_have_count(1)
            await expect(page.locator("#events li").first).to_contain_text("note 10")
            await expect(page.locator("#verdict .buttons")).to_have_count(0)  # the past takes no orders
            for gone in ("invitations", "tryout", "links", "rounds"):
                await expect(page.locator(f"#{gone}")).to_be_hidden()
            await page.locator("#peers .link", has_text="lost-later").click()
            await expect(page.locator("dialog.drawer h2")).to_have_text("lost-later")
            await expect(page.locator("dialog.drawer .buttons")).to_have_count(0)
            await page.keyboard.press("Escape")

            await page.evaluate(f"() => {{ {AXE} }}")
            assert not await serious(page)
            assert not await overlapping(page)
            await scrubber.get_by_role("button", name="Later").click()
            await expect(scrubber).to_contain_text(words.clock(world.moments[11].at))
            await slider.evaluate(MOVED, world.moments[25].at)
            await expect(page.locator("#pipeline .cell", has_text="lost-later")).to_have_count(0)

            await scrubber.get_by_role("button", name="Back to live").click()
            await expect(scrubber).not_to_contain_text("not live")
            await expect(page.locator("h1")).to_have_text(live.verdict.text)
            await expect(page.locator("#verdict button", has_text="Pause")).to_be_visible()
            assert await slider.evaluate("one => one.value === one.max")
            await slider.evaluate(MOVED, 0.0)
            await expect(scrubber).to_contain_text(f"As of {words.clock(world.moments[0].at)}")
            await slider.focus()
            await page.keyboard.press("End")  # the right end is now
            await expect(scrubber).not_to_contain_text("not live")

    world.runner.run(story())


def test_a_full_disk_of_the_history_takes_nothing_else_away(world: World) -> None:
    async def story() -> None:
        async with world.fresh() as page:
            world.daemon.disk_full = True
            world.daemon.tokens.append({"id": "0badf00d", "name": "zoe", "roles": [], "state": "good"})
            await expect(page.locator("#invitations tbody")).to_contain_text("zoe")
            await expect(page.locator("#stale")).to_have_text("")
            await page.locator("#events button", has_text="JSON").click()
            await expect(page.locator("#toast")).to_contain_text("no space left")
            world.daemon.disk_full = False
            async with page.expect_download() as downloading:
                await page.locator("#events button", has_text="JSON").click()
            content = (await (await downloading.value).path()).read_text()
            assert [json.loads(line)["text"] for line in content.splitlines()] == ["left"]

    world.runner.run(story())


def test_a_page_that_hears_nothing_says_so_and_comes_back(world: World) -> None:
    async def story() -> None:
        async with world.fresh() as page:
            process = next(
                child
                for child in psutil.Process().children()
                if "shoal.node.dashboard" in " ".join(child.cmdline())
            )
            process.send_signal(signal.SIGSTOP)
            silent = page.locator("html[data-silent]")
            await expect(silent).to_have_count(1, timeout=8000)
            process.send_signal(signal.SIGCONT)
            await expect(silent).to_have_count(0, timeout=20000)
            await page.evaluate("window.before = 1")
            process.send_signal(signal.SIGKILL)  # started again by the daemon; the session is good still
            await page.wait_for_function("window.before === undefined", timeout=20000)
            await expect(page.locator(".sentence")).to_be_visible()

    world.runner.run(story())


async def serious(page: Page) -> list[str]:
    """What axe-core calls serious or critical."""
    found: dict[str, Any] = await page.evaluate("axe.run({resultTypes: ['violations']})")
    return [
        f"{one['id']}: {one['help']}: {json.dumps([node['target'] for node in one['nodes']][:3])}"
        f" {one['nodes'][0].get('failureSummary', '')}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]


async def overlapping(page: Page) -> list[str]:
    """Panels that lie on another, and words that stick out of their panel."""
    found: list[str] = await page.evaluate(
        """() => {
            const found = [], past = (x, y) => x.left < y.right - 1 && x.top < y.bottom - 1;
            const all = [...document.querySelectorAll(".card, .tile, .verdict")];
            const boxes = all.map(one => [one, one.getBoundingClientRect()]).filter(([, box]) => box.height);
            for (const [a, x] of boxes) for (const [b, y] of boxes)
                if (a !== b && past(x, y) && past(y, x)) found.push(`${a.id} lies on ${b.id}`);
            for (const [card, box] of boxes)
                for (const one of card.querySelectorAll("p, h2, h3, dd, dt, b, button")) {
                    if (one.closest(".scroll, .feed, .map, .unseen, pre, .lane")) continue;
                    const own = one.getBoundingClientRect();
                    if (own.width && (own.right > box.right + 1 || own.left < box.left - 1))
                        found.push(`${one.textContent.slice(0, 40)} sticks out of ${card.id}`);
                }
            return found;
        }"""
    )
    return found
