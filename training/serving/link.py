"""The client's stream to one server of its chain: opens the session there, hears it, tells it routes.

`chain` makes one for each stage, and another one when a server fails. A link never decides anything: it keeps
what it hears and tells that something changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from shoal.dht.directory import SignedRecord
from shoal.protocol.errors import MessageInvalid, PeerSilent, ShoalError
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Stream, Transport
from shoal.training.methods import at_stage
from shoal.training.serving.messages import (
    SESSION,
    SHOWN,
    OpenSession,
    SessionCut,
    SessionDraft,
    SessionOpened,
    SessionPulse,
    SessionRoute,
    SessionShow,
    SessionShown,
    SessionToken,
)
from shoal.training.serving.prints import Shown, print_bytes
from shoal.training.serving.until import until_first

OPEN_S = 10.0  # for a server to answer that it holds the session


class Link:
    """One server, as the client sees it."""

    def __init__(
        self,
        peer: PeerId,
        transport: Transport,
        opening: OpenSession,
        payload: bytes,
        *,
        token: Callable[[SessionToken], None],
        changed: Callable[[], None],
        now_s: float,
        sides: tuple[bool, bool],
        width: int,
        record: SignedRecord | None = None,
    ) -> None:
        """`token` takes what the last stage tells; it raises MessageInvalid for what cannot be. `sides`:
        whether the server has a stage before it, and one after it, which take hidden states of `width`.
        `record`: of the server, for those who are to supply it."""
        self.peer, self.opening = peer, opening
        self.record = () if record is None else (record,)
        self.version: bytes | None = None  # once open
        self.heard_s = now_s
        self.down: ShoalError | None = None
        self.received = self.computed = 0  # positions, by its last pulse
        self.step_s = 0.0  # of this session there, by its last pulse
        self.moved_s = now_s  # when either of these, or its route, last changed
        self.supplies: Link | None = None  # whom it was told to supply
        self.cut_s: float | None = None  # since when it cannot
        self.cuts, self.cut_reason = 0, ""  # of its own supply, by the server before
        self.shown: Shown | None = None  # once asked
        self._transport, self._payload = transport, payload
        self._sides, self._width = sides, width
        self._token, self._changed = token, changed
        self._epoch, self._route, self._untold = -1, SessionRoute(0, 0, peer), False
        self.beside: Link | None = None  # whom it was told to supply as well
        self.beside_cut = False  # it cannot
        self._beside: SessionRoute | None = None  # the route to it
        self._beside_untold = False
        self._draft: SessionDraft | None = None  # not sent yet
        self._asked: SessionShow | None = None
        self._unasked = False
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"session at {peer}")
        self._task.add_done_callback(lambda task: changed())

    @property
    def is_open(self) -> bool:
        return self.version is not None and self.down is None

    def route(self, epoch: int, stage: int, to: Link) -> None:
        """Tell the server whom to supply from now on."""
        self.supplies, self.cut_s = to, None
        to.moved_s = asyncio.get_running_loop().time()
        self._epoch, self._route = epoch, SessionRoute(epoch, stage, to.peer, record=to.record)
        self._untold, self.beside, self._beside = True, None, None
        self._news.set()

    def route_beside(self, epoch: int, stage: int, to: Link) -> None:
        """Tell the server whom to supply as well, for as long as its route stays."""
        self.beside, self.beside_cut = to, False
        self._beside = SessionRoute(epoch, stage, to.peer, beside=True, record=to.record)
        self._beside_untold = True
        self._news.set()

    def draft(self, start: int, tokens: Sequence[int]) -> None:
        """Tell the first stage what the text may be from `start` on; the latest counts."""
        self._draft = SessionDraft(start, tuple(tokens))
        self._news.set()

    def ask(self, asked: SessionShow) -> None:
        """Have the server show what went through it."""
        self._asked, self._unasked = asked, True
        self._news.set()

    def require_sound(self) -> None:
        """Raises what went wrong on this side of it, which no other server would mend."""
        if self._task.done() and not self._task.cancelled():
            self._task.result()

    async def close(self) -> None:
        """Leave; the server forgets the session."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            async with self._transport.open(self.peer, at_stage(self.opening.stage, SESSION)) as stream:
                async with asyncio.timeout(OPEN_S):
                    await stream.send(self.opening, self._payload)
                    opened: SessionOpened = (await stream.receive(SessionOpened)).header
                if self.opening.version not in (b"", opened.version):
                    raise MessageInvalid(f"{self.peer} serves another version than was asked for")
                self.version = opened.version
                self._hear()
                await until_first(self._listen(stream), self._tell(stream))
        except ShoalError as error:
            self.down = error
        except TimeoutError:
            self.down = PeerSilent(f"{self.peer} did not open the session within {OPEN_S:g} s")

    async def _listen(self, stream: Stream) -> None:
        while True:
            came = await stream.receive(
                *(SessionToken, SessionPulse, SessionCut, SessionShown),
                max_payload_bytes=2 * print_bytes(SHOWN, self._width),
            )
            message = came.header
            if isinstance(message, SessionToken):
                self._token(message)
            elif isinstance(message, SessionCut):
                self._note_cut(message)
            elif isinstance(message, SessionPulse):
                self._note(message)
            elif isinstance(message, SessionShown):
                self._take_shown(message, came.payload)
            self._hear()

    def _take_shown(self, message: SessionShown, payload: memoryview) -> None:
        asked = self._asked
        if asked is None or not set(message.positions) <= set(asked.positions):
            raise MessageInvalid(f"{self.peer} shows positions that it was not asked for")
        positions, seed = message.positions, asked.seed
        self.shown = Shown.unpack(positions, seed, payload, sides=self._sides, width=self._width)

    def _note_cut(self, cut: SessionCut) -> None:
        if self.supplies and cut.epoch == self._epoch:
            self.cut_s = asyncio.get_running_loop().time()
            self.supplies.cuts, self.supplies.cut_reason = self.supplies.cuts + 1, cut.reason
        elif self._beside is not None and cut.epoch == self._beside.epoch:
            self.beside_cut = True

    def _note(self, pulse: SessionPulse) -> None:
        self.step_s = pulse.step_s
        if (pulse.received, pulse.computed) != (self.received, self.computed):
            self.received, self.computed = pulse.received, pulse.computed
            self.moved_s = asyncio.get_running_loop().time()

    def _hear(self) -> None:
        self.heard_s = asyncio.get_running_loop().time()
        self._changed()

    async def _tell(self, stream: Stream) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            if self._untold:
                self._untold = False
                await stream.send(self._route)
            if self._beside is not None and self._beside_untold:
                self._beside_untold = False
                await stream.send(self._beside)
            if self._draft is not None:
                draft, self._draft = self._draft, None
                await stream.send(draft)
            if self._asked is not None and self._unasked:
                self._unasked = False
                await stream.send(self._asked)
