"""The owner's page over a real swarm: invites somebody, sees them come and go, orders, asks the model, and

is back with its history after the owner's own machine was gone. One swarm, one story.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from pathlib import Path

import pytest
from dashboard_browser import browser, sign_in
from playwright.async_api import Locator, Page, expect
from swarm_world import HOST, START_S, Peer, Swarm, swarm_spec, until, write_corpus

COMES_MS, GOES_MS = 3_000, 6_000  # what the page promises
PATIENT_MS = 60_000


@pytest.mark.timeout(420)
def test_an_owner_runs_a_swarm_from_the_page(tmp_path: Path) -> None:
    async def story() -> None:
        spec = swarm_spec(write_corpus(tmp_path / "corpus.txt"), stages=2)
        async with Swarm(tmp_path / "swarm", spec) as swarm:
            try:
                await swarm.start(1, "--dashboard", f"{HOST}:0")
                await owned(swarm)
            except BaseException as error:
                error.add_note(swarm.story())
                raise

    asyncio.run(story())


async def owned(swarm: Swarm) -> None:
    owner = swarm.peers[0]
    link = next(str(event["url"]) for event in owner.events if event["event"] == "dashboard-link")
    async with browser() as chromium:
        context = await chromium.new_context(viewport={"width": 1280, "height": 900})
        await context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = await sign_in(context, link)
        await expect(page.locator("h1")).to_contain_text("one replica")

        command = await invited(page)
        volunteer = await joined(swarm, page, command)
        await killed(page, volunteer)
        await refused(swarm, page, command)
        await paused_and_resumed(swarm, page)
        await asked(page)
        await back_after_a_restart(swarm, page, link)


async def invited(page: Page) -> str:
    """Makes a token in the page; the command as it lies in the clipboard."""
    panel = page.locator("#invitations")
    await panel.locator("input[name=name]").fill("ann")
    await panel.get_by_role("button", name="Create token").click()
    await panel.get_by_role("button", name="Copy").click()
    await expect(panel.locator("[data-copied]")).to_be_visible()
    return str(await page.evaluate("navigator.clipboard.readText()"))


async def joined(swarm: Swarm, page: Page, command: str) -> Peer:
    """Does what the command says; its cell is there soon after it has come."""
    volunteer = await started(swarm, "ann", command)
    await volunteer.event("online", START_S)
    await expect(cell(page, volunteer)).to_be_visible(timeout=COMES_MS)
    return volunteer


async def killed(page: Page, volunteer: Peer) -> None:
    volunteer.kill()
    await expect(cell(page, volunteer)).to_have_count(0, timeout=GOES_MS)
    await expect(page.locator("#events")).to_contain_text("ann")


async def refused(swarm: Swarm, page: Page, command: str) -> None:
    """Its token revoked, the same command leads nowhere."""
    row = page.locator("#invitations tbody tr", has_text="ann")
    await row.get_by_role("button", name="Revoke").click()
    await page.locator("dialog.question").get_by_role("button", name="Revoke").click()
    await expect(row).to_contain_text("revoked")
    again = await started(swarm, "ann-again", command)
    assert await again.ended(START_S) == 10
    assert "revoked" in again.last_words()


async def paused_and_resumed(swarm: Swarm, page: Page) -> None:
    await page.locator("#verdict").get_by_role("button", name="Pause").click()
    await page.locator("dialog.question").get_by_role("button", name="Pause").click()
    await expect(page.locator("h1")).to_contain_text("Paused", timeout=PATIENT_MS)
    await page.locator("#verdict").get_by_role("button", name="Resume").click()
    await page.locator("dialog.question").get_by_role("button", name="Resume").click()
    await expect(page.locator("h1")).to_contain_text("Training", timeout=PATIENT_MS)
    await swarm.until_training([peer for peer in swarm.peers if peer.alive])
    await expect(page.locator("#orders")).to_contain_text("resume")


async def asked(page: Page) -> None:
    box = page.locator("#tryout")
    await box.locator("textarea").fill("def ")
    await box.locator("input[name=tokens]").fill("12")
    await box.get_by_role("button", name="Write").click()
    await expect(box).to_contain_text("12 tokens in", timeout=PATIENT_MS)
    assert (await box.locator(".written").inner_text()).startswith("def ")
    await expect(box).to_contain_text("owner → peer-1")  # who wrote it


async def back_after_a_restart(swarm: Swarm, page: Page, link: str) -> None:
    """The owner's machine goes; training does not care, and the page comes back signed in, with what was."""
    owner = swarm.peers[0]
    os.kill(owner.pid, signal.SIGKILL)  # its daemon alone: the page's process ends with its parent
    await expect(page.locator("html[data-silent]")).to_have_count(1, timeout=PATIENT_MS)
    owner.kill()
    address = link.removeprefix("http://").partition("/")[0]
    returned = Peer("owner", owner.folder, swarm)
    swarm.peers.append(returned)
    await returned.start(
        "up", str(swarm.folder / "run.toml"), "--listen", HOST, "--stage", "0", "--dashboard", address
    )
    await returned.event("online", START_S)
    await until(lambda: returned.alive, "the owner's return", START_S)
    await expect(page.locator("html[data-silent]")).to_have_count(0, timeout=PATIENT_MS)
    await expect(page.locator("h1")).to_contain_text("Training", timeout=PATIENT_MS)
    await page.reload()
    await expect(page.locator("#events")).to_contain_text("ann", timeout=PATIENT_MS)  # from before
    await expect(page.locator("#orders")).to_contain_text("pause")
    await expect(page.locator("#loss svg").first).to_be_visible(timeout=PATIENT_MS)


async def started(swarm: Swarm, name: str, command: str) -> Peer:
    """A machine on which somebody pastes the command."""
    program, verb, token = shlex.split(command)
    assert (program, verb) == ("shoal", "join")
    peer = Peer(name, swarm.folder / name, swarm)
    swarm.peers.append(peer)
    await peer.start(verb, token)
    return peer


def cell(page: Page, peer: Peer) -> Locator:
    return page.locator(f'#pipeline [data-peer="{peer.peer_id}"]')
