"""An owner runs a swarm of six processes from the page under churn: two come, one is killed, one shut out.

`test_dashboard_swarm` asks what happens, `benchmarks/dashboard.py` how long it takes (`Story.seconds`).
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import time
from collections.abc import Awaitable
from pathlib import Path

from dashboard_browser import sign_in
from playwright.async_api import BrowserContext, Locator, Page, expect
from swarm_world import HOST, START_S, Peer, Swarm, swarm_spec, until, write_corpus

from shoal.training.spec import RunSpec

PATIENT_MS = 60_000
SELDOM_S = 3.0  # nobody here asks what the watcher saw
PACE_S = 0.4  # a micro-batch takes so long of a lane, so that two cores can stand for six machines


def story_spec(folder: Path) -> RunSpec:
    """Two small stages, a round every few seconds, a checkpoint only when somebody asks."""
    values = swarm_spec(write_corpus(folder / "corpus.txt"), stages=2).model_dump()
    values["model"] |= {"layers": 2, "width": 64, "feedforward": 128, "sequence": 64}
    values["outer"] |= {"inner_steps": 8}
    values["checkpoint"] |= {"every_s": 0.0}
    return RunSpec.model_validate(values)


class Story:
    """Its scenes in their order; `seconds` says how long what the page promises took."""

    def __init__(self, swarm: Swarm, page: Page) -> None:
        self.swarm, self.page = swarm, page
        self.seconds: dict[str, float] = {}

    @classmethod
    async def begin(cls, swarm: Swarm, context: BrowserContext) -> Story:
        """Four peers that train, and the page behind the owner's link."""
        swarm.options, swarm.poll_s = ("--pace", str(PACE_S)), SELDOM_S
        await swarm.start(2, "--dashboard", f"{HOST}:0")
        await context.grant_permissions(["clipboard-read", "clipboard-write"])
        story = cls(swarm, await sign_in(context, link_of(swarm.peers[0])))
        await expect(story.page.locator("h1")).to_contain_text("Training", timeout=PATIENT_MS)
        return story

    async def told(self) -> None:
        """All scenes."""
        lost = self.swarm.peers[2]
        command = await self.invites()
        invited, _ = await asyncio.gather(self.joined_by(command), self.swarm.join(stage=1))
        assert len(self._alive()) == 6
        await self.asks()
        await self.loses(lost)
        await self.refuses(invited)
        await self.pauses_and_resumes()
        await self.exports()
        await self.is_away_and_back()

    # --- scenes

    async def invites(self) -> str:
        """Makes a token in the page; the command as it lies in the clipboard."""
        panel = self.page.locator("#invitations")
        await panel.locator("input[name=name]").fill("ann")
        await panel.get_by_role("button", name="Create token").click()
        await panel.get_by_role("button", name="Copy").click()
        await expect(panel.locator("[data-copied]")).to_be_visible()
        return str(await self.page.evaluate("navigator.clipboard.readText()"))

    async def joined_by(self, command: str) -> Peer:
        """Somebody does what the command says; the cell is there once that peer works."""
        volunteer = await self._pasted("ann", command)
        await volunteer.event("online", START_S)
        seen = expect(self._cell(volunteer, ".cell-online")).to_be_visible(timeout=PATIENT_MS)
        await self._timed("appears", seen)
        return volunteer

    async def loses(self, volunteer: Peer) -> None:
        """Killed without a word, and not on the map any more."""
        await expect(self._cell(volunteer)).to_be_visible(timeout=PATIENT_MS)
        volunteer.kill()
        await self._timed("goes", expect(self._cell(volunteer)).to_have_count(0, timeout=PATIENT_MS))
        await expect(self.page.locator("#events")).to_contain_text(volunteer.name)

    async def refuses(self, volunteer: Peer) -> None:
        """Its token revoked, it is sent away by everybody, and told why."""
        row = self.page.locator("#invitations tbody tr", has_text="ann")
        await row.get_by_role("button", name="Revoke").click()
        await self._answered("Revoke")
        await expect(row).to_contain_text("revoked")
        assert await volunteer.ended(START_S) == 10
        assert "revocation list" in volunteer.last_words()
        await expect(self._cell(volunteer)).to_have_count(0, timeout=PATIENT_MS)

    async def pauses_and_resumes(self) -> None:
        verdict = self.page.locator("#verdict")
        await verdict.get_by_role("button", name="Pause").click()
        await self._answered("Pause")
        await expect(self.page.locator("h1")).to_contain_text("Paused", timeout=PATIENT_MS)
        await verdict.get_by_role("button", name="Resume").click()
        await self._answered("Resume")
        await expect(self.page.locator("h1")).to_contain_text("Training", timeout=PATIENT_MS)
        await self.swarm.until_training(self._alive())
        await expect(self.page.locator("#orders")).to_contain_text("resume")

    async def asks(self) -> None:
        """A text, which other servers recompute."""
        box = self.page.locator("#tryout")
        await box.locator("textarea").fill("def ")
        await box.locator("input[name=tokens]").fill("12")
        await box.get_by_role("button", name="Write").click()
        told = re.compile(r"[1-9]\d? tokens in \d")  # the end of a document may be drawn before the 12th
        await expect(box).to_contain_text(told, timeout=PATIENT_MS)
        assert (await box.locator(".written").inner_text()).startswith("def ")
        await expect(box).to_contain_text(" → ")  # who wrote it
        recomputed = self.page.locator("#trust .figure", has_text="answers recomputed")
        await expect(recomputed.locator("dd")).to_have_text("1", timeout=PATIENT_MS)

    async def exports(self) -> None:
        """The model, saved and written for others."""
        await self.page.locator("#verdict").get_by_role("button", name="Checkpoint now").click()
        await self._answered("Write it")
        panel = self.page.locator("#checkpoints")
        await expect(panel).to_contain_text("-whole", timeout=PATIENT_MS)
        await panel.get_by_role("button", name="Export").click()
        place = panel.locator("code", has_text="exports")
        await expect(place).to_be_visible(timeout=PATIENT_MS)
        assert (Path(await place.inner_text()) / "model.safetensors").stat().st_size > 100_000

    async def is_away_and_back(self) -> None:
        """The owner's machine goes, training does not care; the page comes back signed in, with what was."""
        owner = self.swarm.peers[0]
        os.kill(owner.pid, signal.SIGKILL)  # its daemon alone: the page's process ends with its parent
        await expect(self.page.locator("html[data-silent]")).to_have_count(1, timeout=PATIENT_MS)
        owner.kill()
        await self.swarm.until_training(self._alive())
        address = link_of(owner).removeprefix("http://").partition("/")[0]
        returned = Peer("owner", owner.folder, self.swarm)
        self.swarm.peers.append(returned)
        run = str(self.swarm.folder / "run.toml")
        options = ("--listen", HOST, "--stage", "0", "--dashboard", address, *self.swarm.options)
        await returned.start("up", run, *options)
        await returned.event("online", START_S)
        begun_s = time.monotonic()
        await until(lambda: returned.alive, "the owner's return", START_S)
        await expect(self.page.locator("html[data-silent]")).to_have_count(0, timeout=PATIENT_MS)

        for peer in self._alive():
            cell = self._cell(peer, ".cell-online")
            await self._timed("complete again", expect(cell).to_be_visible(timeout=PATIENT_MS), begun_s)
        await self.page.reload()
        await expect(self.page.locator("#events")).to_contain_text("ann", timeout=PATIENT_MS)  # from before
        await expect(self.page.locator("#orders")).to_contain_text("pause")
        await expect(self.page.locator("#loss svg").first).to_be_visible(timeout=PATIENT_MS)

    # --- inside

    async def _timed(self, what: str, waiting: Awaitable[None], begun_s: float | None = None) -> None:
        begun_s = time.monotonic() if begun_s is None else begun_s
        await waiting
        self.seconds[what] = max(self.seconds.get(what, 0.0), round(time.monotonic() - begun_s, 2))

    async def _answered(self, button: str) -> None:
        question = self.page.locator("dialog.question")
        await question.get_by_role("button", name=button).click()
        await expect(question).to_have_count(0)

    async def _pasted(self, name: str, command: str) -> Peer:
        """A machine on which somebody pastes the command."""
        program, verb, token = shlex.split(command)
        assert (program, verb) == ("shoal", "join")
        peer = Peer(name, self.swarm.folder / name, self.swarm)
        self.swarm.peers.append(peer)
        await peer.start(verb, token, *self.swarm.options)
        return peer

    def _alive(self) -> list[Peer]:
        return [peer for peer in self.swarm.peers if peer.alive]

    def _cell(self, peer: Peer, kind: str = "") -> Locator:
        return self.page.locator(f'#pipeline {kind}[data-peer="{peer.peer_id}"]')


def link_of(owner: Peer) -> str:
    return next(str(event["url"]) for event in owner.events if event["event"] == "dashboard-link")
