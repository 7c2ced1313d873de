"""The client's side of a session: a chain of servers that goes on when servers fail.

`Generation` opens the session at one server for each stage, tells each whom to supply, and takes the tokens.
When a server fails it opens the session at another replica of that stage and names it to the neighbours; they
do the rest. It compares what is with what should be, again and again: opening and mending are the same code.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Self

from shoal.protocol.errors import (
    AccessError,
    Busy,
    MessageInvalid,
    ShoalError,
    StageEmpty,
    VersionRetired,
)
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Transport
from shoal.training.pipeline.payload import PayloadFormat
from shoal.training.pipeline.replicas import Replicas
from shoal.training.serving.candidates import MOST_AVOID_S, Candidates
from shoal.training.serving.draft import Drafting, DraftModel
from shoal.training.serving.link import Link
from shoal.training.serving.messages import (
    LENGTH,
    SHOWN,
    STOP,
    OpenSession,
    SamplingOptions,
    SessionShow,
    SessionToken,
)
from shoal.training.serving.moving import Mover
from shoal.training.serving.prints import Shown
from shoal.training.serving.speculation import Speculation
from shoal.training.serving.stuck import broken, stuck
from shoal.training.serving.written import ChainFigures, Written
from shoal.training.spec import RunSpec

PATIENCE_S = 30.0  # for a stage that nobody serves
_LOOK_S = 0.25
_SHOW_S = 2.0  # for servers to say what went through them
_REROUTE_S = 0.1  # before a supply that broke off is tried again
_MOST_VAIN = 4  # restarts without a token in between


class Generation:
    """One text. Use as `async with`, and iterate for its tokens; `finish` says why it ended."""

    def __init__(
        self,
        spec: RunSpec,
        transport: Transport,
        replicas: Replicas,
        prompt: Sequence[int],
        max_new_tokens: int,
        options: SamplingOptions,
        rng: random.Random,
        *,
        draft: DraftModel | None = None,
        patience_s: float = PATIENCE_S,
        checked: bool = False,
    ) -> None:
        """`draft` guesses ahead: the text is the same, and comes sooner. `checked`: its servers are asked at
        the end what went through them, for `written`.

        Raises MessageInvalid for a prompt that leaves no room in the model's sequence.
        """
        most = spec.model.sequence
        if not 1 <= len(prompt) < most or max_new_tokens < 1:
            raise MessageInvalid(
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones; this model takes 1 to "
                f"{most - 1} tokens of prompt, and at least one new"
            )
        if not all(0 <= token < spec.data.vocabulary for token in prompt):
            raise MessageInvalid(f"the prompt has tokens outside the vocabulary of {spec.data.vocabulary}")
        self.tokens = list(prompt)
        self.finish = ""
        self._enough = False
        self.figures = ChainFigures()
        self.servers: set[PeerId] = set()  # all that had a part in it
        self._capacity = min(len(prompt) + max_new_tokens, most)
        self._prompt = len(prompt)
        self._spec, self._transport = spec, transport
        self._options, self._rng, self._patience_s = options, rng, patience_s
        self._form = PayloadFormat.of_inference(spec)
        self._stages = spec.stages.count
        self._links: list[Link | None] = [None] * self._stages
        self._pins: list[bytes] = [b""] * self._stages
        self._checked, self._shown = checked, tuple[tuple[PeerId, Shown | None], ...]()
        self._empty_since_s: dict[int, float] = {}
        self._reasons: dict[int, ShoalError] = {}
        self._replicas = replicas
        self._candidates = Candidates(replicas, self._stages, rng)
        self._mover = Mover(
            self.tokens, self._capacity, self._take, self._link_to, random.Random(rng.getrandbits(64))
        )
        self._denied: set[PeerId] = set()  # servers that were refused, or refused, for want of access
        self._lacking: set[int] = set()  # stages of which a replica lacks the pinned version
        self._restarted_at, self._vain = -1, 0
        self._epoch = 0
        self._speculation: Speculation | None = None
        if draft is not None:
            drafting = Drafting(draft, options)
            self._speculation = Speculation(
                drafting, self.tokens, self._capacity, self.figures, self._send_draft
            )
        self._wake = asyncio.Event()
        self._news = asyncio.Event()
        self._token_s = 0.0

    async def __aenter__(self) -> Self:
        self._id = self._rng.randbytes(16)
        self._token_s = asyncio.get_running_loop().time()
        self._task = asyncio.create_task(self._run(), name="generation")
        self._task.add_done_callback(lambda task: self._news.set())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.exception()  # told to who iterates, or of no interest any more

    async def __aiter__(self) -> AsyncIterator[int]:
        """New tokens, without one that only ended the text. Raises StageEmpty, Busy, MessageInvalid."""
        at = self._prompt
        while True:
            while at < len(self.tokens):
                yield self.tokens[at]
                at += 1
            if self._task.done():
                self._task.result()
                return
            self._news.clear()
            await self._news.wait()

    async def end(self) -> None:
        """No more of it is wanted. Returns when its servers have said what went through them, if asked."""
        self._enough = True
        self._wake.set()
        await asyncio.wait([self._task])

    def route(self) -> list[PeerId | None]:
        """The server of each stage now."""
        return [link.peer if link is not None else None for link in self._links]

    def standby(self) -> list[PeerId | None]:
        """Who takes over at once where a server fails; if possible none that has a part in the chain."""
        return list(self._candidates.standby)

    def versions(self) -> list[bytes]:
        """What the session is pinned to, one of each stage; empty where it is not open yet."""
        return list(self._pins)

    def written(self) -> Written:
        """What a check needs to know of a text that is complete."""
        return Written(
            tuple(self.tokens),
            self._prompt,
            self._options,
            tuple(self._pins),
            frozenset(self.servers),
            self.finish == STOP,
            self.figures.restarted > 0,
            self._shown,
        )

    # --- the loop

    async def _run(self) -> None:
        speculation = asyncio.create_task(self._speculation.run()) if self._speculation else None
        try:
            while not (self.finish or self._enough):
                self._wake.clear()
                try:
                    await self._mend()
                except VersionRetired as retired:
                    await self._restart(retired)
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await self._wake.wait()
            if self._checked:
                await self._have_shown()
        finally:
            if speculation is not None:
                speculation.cancel()
                await asyncio.wait([speculation])
            await self._close_all()

    async def _have_shown(self) -> None:
        """Ask the servers what went through them; whoever does not say so in time has not."""
        most = len(self.tokens) - 1
        positions = sorted(self._rng.sample(range(most), min(most, SHOWN)))
        asked = SessionShow(tuple(positions), self._rng.getrandbits(64))
        links = [link for link in self._links if link is not None]
        if len(links) < self._stages:  # one died at the very end: what the others show has nobody between
            return
        for link in links:
            link.ask(asked)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SHOW_S):
                while any(link.shown is None and link.down is None for link in links):
                    self._wake.clear()
                    await self._wake.wait()
        self._shown = tuple((link.peer, link.shown) for link in links)

    async def _mend(self) -> None:
        """Bring the chain to what it should be, as far as that can be done now.

        Raises VersionRetired when this version cannot go on, StageEmpty and Busy for good, and AccessError
        when all that are known of a stage gave it.
        """
        now_s = asyncio.get_running_loop().time()
        for stage, link in enumerate(self._links):
            if link is not None:
                link.require_sound()
            if link is not None and (trouble := self._trouble(stage, link, now_s)) is not None:
                await self._close(stage)
                self._note(stage, link, trouble, now_s)
            if self._links[stage] is None:
                self._open(stage, now_s)
        await self._move(now_s)
        self._connect(now_s)
        self._candidates.stand_by(self.route(), now_s)

    def _trouble(self, stage: int, link: Link, now_s: float) -> ShoalError | None:
        """Why a server has to be replaced."""
        if (found := broken(link)) is not None:
            return found
        found = stuck(self._links, stage, len(self.tokens), self.figures.replaced, now_s)
        if found is not None and self._candidates.another(stage, link.peer, now_s) is None:
            return None
        return found

    def _note(self, stage: int, link: Link, trouble: ShoalError, now_s: float) -> None:
        """Remember what a server that is given up has done, so that the next choice is a better one."""
        was_open = link.version is not None
        self._reasons[stage] = trouble
        if isinstance(trouble, VersionRetired) and was_open:
            raise trouble
        if isinstance(trouble, AccessError):  # of one server alone it may be its own certificate
            self._denied.add(link.peer)
            if self._denied.issuperset(one.peer for one in self._candidates.known(stage)):
                raise trouble
        if isinstance(trouble, VersionRetired):
            self._lacking.add(stage)
        self._candidates.failed(link.peer, trouble, now_s)
        self.figures.replaced += was_open

    def _open(self, stage: int, now_s: float) -> None:
        """Begin to open the session at the best server of a stage; raises when none came in time."""
        self._links[stage] = self._mover.take_over(stage)
        if self._links[stage] is not None:
            return
        peer = self._candidates.next(stage, now_s)
        if peer is None:
            if stage in self._lacking:
                raise VersionRetired(f"nobody serves the session's version of stage {stage} any more")
            if now_s - self._empty_since_s.setdefault(stage, now_s) > self._patience_s:
                raise self._given_up(stage)
            return
        self._links[stage] = self._link_to(stage, peer, self._take)

    def _link_to(self, stage: int, peer: PeerId, take: Callable[[SessionToken], None]) -> Link:
        ends = stage in (0, self._stages - 1)
        return Link(
            peer,
            self._transport,
            OpenSession(
                self._id,
                stage,
                self._capacity,
                self._pins[stage],
                self._options if stage == self._stages - 1 else None,
            ),
            self._form.pack_ids(self.tokens) if ends else b"",
            token=take,
            changed=self._wake.set,
            now_s=asyncio.get_running_loop().time(),
            sides=(stage > 0, stage < self._stages - 1),
            width=self._spec.model.width,
            record=self._replicas.record_of(peer),
        )

    def _given_up(self, stage: int) -> ShoalError:
        reason = self._reasons.get(stage)
        if isinstance(reason, Busy):
            return reason
        told = f": {reason}" if reason is not None else "; no replica of it is known"
        return StageEmpty(f"nobody serves stage {stage} since {self._patience_s:g} s{told}")

    def _connect(self, now_s: float) -> None:
        """Tell each server whom to supply, where that changed or broke off."""
        for stage, link in enumerate(self._links):
            if link is None or not link.is_open:
                continue
            self._empty_since_s.pop(stage, None)
            self._denied.discard(link.peer)
            self.servers.add(link.peer)
            self._pins[stage] = link.version or b""
            behind = (stage + 1) % self._stages
            target = self._links[behind]
            if target is None or target is link or not target.is_open:
                continue
            if link.supplies is not target or (link.cut_s is not None and now_s - link.cut_s > _REROUTE_S):
                link.route(self._next_epoch(), behind, target)

    def _next_epoch(self) -> int:
        self._epoch += 1
        return self._epoch

    async def _move(self, now_s: float) -> None:
        """On to a faster server, where there is one."""
        if (vain := self._mover.failed(self._links, now_s)) is not None:
            self._candidates.avoid(vain.peer, now_s + MOST_AVOID_S)
            await vain.close()
        links = [link for link in self._links if link is not None and link.is_open]
        if len(links) == self._stages:
            chain = self.route()
            self._mover.look(links, lambda stage: self._candidates.instead(stage, chain, now_s), now_s)
        stage = self._mover.build(self._links, self._next_epoch, now_s)
        if stage is None or (new := self._mover.take_over(stage)) is None:
            return
        old, self._links[stage] = self._links[stage], new
        self.figures.moved += 1
        if old is not None:
            await old.close()

    async def _close_all(self) -> None:
        for stage in range(self._stages):
            await self._close(stage)
        if (link := self._mover.drop()) is not None:
            await link.close()

    async def _close(self, stage: int) -> None:
        link, self._links[stage] = self._links[stage], None
        if link is not None:
            await link.close()

    async def _restart(self, retired: VersionRetired) -> None:
        """Begin again with the tokens so far, on the versions that are served now. Raises `retired`."""
        if self._restarted_at == len(self.tokens):
            self._vain += 1
            if self._vain > _MOST_VAIN:
                raise retired
        else:
            self._restarted_at, self._vain = len(self.tokens), 0
        self.figures.restarted += 1
        await self._close_all()
        self._id, self._pins = self._rng.randbytes(16), [b""] * self._stages
        self._lacking.clear()
        self._candidates.forgive()

    def _take(self, message: SessionToken) -> None:
        """A token from the last stage. Raises MessageInvalid for one that cannot come now."""
        if message.position != len(self.tokens) or self.finish:
            raise MessageInvalid(f"token {message.position} came where {len(self.tokens)} was due")
        if message.token >= self._spec.data.vocabulary:
            raise MessageInvalid(f"token {message.token} lies outside the vocabulary")
        now_s = asyncio.get_running_loop().time()
        self.figures.longest_gap_s = max(self.figures.longest_gap_s, now_s - self._token_s)
        self._token_s = now_s
        if message.finish != STOP:
            self.tokens.append(message.token)
            if self._speculation is not None:
                self._speculation.confirm(message.token)
        self.finish = LENGTH if len(self.tokens) >= self._capacity else message.finish
        self._news.set()
        self._wake.set()

    def _send_draft(self, start: int, tokens: Sequence[int]) -> None:
        if (first := self._links[0]) is not None:
            first.draft(start, tokens)
