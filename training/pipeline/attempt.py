"""One replica asked for one micro-batch: sends, listens, measures, and notices silence and standstill.

`Downstream` makes attempts, one and at most one more for a micro-batch. An attempt tells apart what the
replica itself takes from what the stages behind it take: only its direct caller may hold it against it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from shoal.protocol.errors import Busy, MessageInvalid, PeerSilent, ShoalError, StreamBroken
from shoal.protocol.identity import PeerId
from shoal.protocol.limits import SUSPECT_AFTER_S
from shoal.protocol.transport import Channel, Message, Stream, Transport
from shoal.training.methods import at_stage
from shoal.training.pipeline.messages import (
    Activations,
    Adopt,
    Adopted,
    Gradient,
    HedgeSpent,
    Link,
    Propagate,
    Working,
    begins,
    spans,
)
from shoal.training.pipeline.routing import stands_still
from shoal.training.pipeline.standing import UNKNOWN_SERVICE_S, Report

WORKING_EVERY_S = 0.5  # four times within SUSPECT_AFTER_S
_PARTING_S = 0.1  # for the last word to a replica whose answer nobody wants
_GUILTY = 4.0  # times what was expected of a replica, before it is to blame for a lack of time
_LISTENED_S = WORKING_EVERY_S  # the last of a silence that counts: awake, with time to read what has come
_MISSED_S = 2 * WORKING_EVERY_S  # of silence: enough to hedge, not to give up


@dataclass(slots=True, eq=False)
class Journey:
    """What one hop knows of a micro-batch that it has passed on."""

    stage: int  # that has it now
    hedged: bool = False  # the chain's one hedge is spent
    behind: tuple[Link, ...] = ()  # the hops behind this one, as far as it is known
    unwanted: bool = False  # nobody wants an answer: those behind are to know
    orphaned: bool = False  # nobody waits for an answer now, but somebody may yet


@dataclass(frozen=True, slots=True)
class Pick:
    """A replica to ask now, in which codec, and what is expected of it."""

    peer: PeerId
    codec: str
    rtt_s: float
    service_s: float  # lane time of a micro-batch
    expected_s: float  # for its own part, transfers included


@dataclass(frozen=True, slots=True)
class Answer:
    """The gradient of a micro-batch and the chain that made it."""

    chain: tuple[Link, ...]
    loss: float
    gradient: memoryview
    codec: str  # of the gradient
    report: Report
    own_s: float  # what the replica and the link to it took, without the stages behind; 0 if not known
    waited_s: float  # for those


class Attempt:
    """See the module. One use; `run` is the work, `stalled` is set when a hedge would be in place."""

    def __init__(
        self,
        transport: Transport,
        request: Propagate | Adopt,
        stages: range,
        journey: Journey,
        pick: Pick,
        passed: Callable[[], None],
        gone: Callable[[], bool],
        hedge_after_s: Callable[[float], float],
    ) -> None:
        """`passed`: called once, when the replica is known to be through with its forward; `gone`: whether
        nobody hears of it any more. `hedge_after_s`: how long its own part may take, as it is known now and
        given how long the request took to be sent."""
        self.peer = pick.peer
        self.adopts = isinstance(request, Adopt)
        self.unwanted = False  # another one was faster
        self._link = Link(request.stage, pick.peer, request.attempt)
        self._behind: tuple[Link, ...] = ()
        self._passed = passed
        self._gone = gone
        self._hedge_after_s = hedge_after_s
        self._asking_s = 0.0  # how long the request took to be sent
        self._has_passed = False
        self.sent_s = self._now()
        self.stalled = asyncio.Event()
        self._transport = transport
        self._request = request
        self._stages = stages
        self._journey = journey
        self._pick = pick
        self._stream: Stream | None = None
        self._heard_s = self.sent_s
        self._own_since_s: float | None = self.sent_s  # None: it waits for the stages behind
        self._own_before_s = 0.0
        self._finished = -1
        self._finished_s = self.sent_s
        self._gap_s = 0.0  # between two pieces that its lane finished, at most

    async def run(self, payload: memoryview, gradient_bytes: Callable[[str], int], deadline: float) -> Answer:
        """The answer. Raises Busy, PeerSilent after `deadline` (loop time), and what streams raise.

        `payload`: the activations; empty for an adoption. `gradient_bytes`: of the answer, by codec.
        Left in order (END) when nobody wants the answer; left without, what is behind may be adopted.
        """
        left: BaseException | None = None
        try:
            async with (
                asyncio.timeout_at(deadline),  # Working keeps a caller patient, but not for ever
                self._transport.open(
                    self.peer, at_stage(self._request.stage, "propagate"), Channel.BULK
                ) as self._stream,
            ):
                try:
                    codec = await self._ask(self._stream, payload)
                    self._heard_s = self._now()
                    self._asking_s = self._heard_s - self.sent_s
                    header = await self._listen(self._stream)
                    self._check(header)
                    size = gradient_bytes(codec)
                    message = await self._values(self._stream, size)
                except (asyncio.CancelledError, ShoalError) as error:
                    if not self._is_unwanted(error) or not await self._parted(self._stream):
                        raise
                    left = error
        except TimeoutError:
            text = f"{self.peer} was still at it when the micro-batch's time was over"
            if self._now() - self.sent_s < _GUILTY * self._pick.expected_s:
                raise Busy(text, retry_after_s=0.0) from None  # the time went elsewhere
            raise PeerSilent(text) from None
        if left is not None:
            raise left
        elapsed_s, own_s = self._now() - self.sent_s, 0.0
        report = Report(header.service_s, header.backlog_s, 0.0)
        if not self.adopts:
            transfer_s = max(0.0, elapsed_s - header.held_s - self._pick.rtt_s)
            report = report._replace(seconds_per_byte=transfer_s / (payload.nbytes + message.payload.nbytes))
            own_s = max(0.0, elapsed_s - header.waited_s)
        return Answer(header.chain, header.loss, message.payload, codec, report, own_s, header.waited_s)

    async def _ask(self, stream: Stream, payload: memoryview) -> str:
        """Returns the codec in which the gradient comes."""
        await stream.send(self._request)
        if isinstance(self._request, Propagate):
            await stream.send(Activations(), payload)
            return self._request.codec
        try:
            async with asyncio.timeout(SUSPECT_AFTER_S + self._pick.rtt_s):
                header: Adopted = (await stream.receive(Adopted)).header
        except TimeoutError:
            raise PeerSilent(f"{self.peer} did not say within {SUSPECT_AFTER_S:.1f} s what it has") from None
        return header.codec

    def _is_unwanted(self, error: BaseException) -> bool:
        """Whether the replica is to know that nobody wants its answer."""
        if isinstance(error, asyncio.CancelledError):
            return self.unwanted or self._journey.unwanted
        return not self._behind  # else who takes its place adopts them

    @staticmethod
    async def _parted(stream: Stream) -> bool:
        """Whether END went out: a replica that has frozen takes nothing, and nobody is to wait for that."""
        try:
            async with asyncio.timeout(_PARTING_S):
                await stream.end()
        except (TimeoutError, ShoalError):
            return False
        return True

    async def tell_hedge(self) -> None:
        """Another replica is asked, too: nobody behind this one may do the same."""
        if self._stream is not None:
            try:
                await self._stream.send(HedgeSpent())
            except StreamBroken:
                return  # `run` hears of it, too

    async def _listen(self, stream: Stream) -> Gradient:
        """Where this process stood still others were not silent: it listens for a while before it judges."""
        doubted_s: float | None = None
        while True:
            silent_s = self._heard_s + SUSPECT_AFTER_S + self._pick.rtt_s - _LISTENED_S
            if doubted_s is not None:
                silent_s = doubted_s + _LISTENED_S
            try:
                async with asyncio.timeout_at(min(silent_s, self._hedge_s())):
                    message = await stream.receive(Working, Gradient)
            except TimeoutError:
                if self._now() < silent_s:
                    self.stalled.set()
                elif doubted_s is None:
                    doubted_s = self._now()
                else:
                    text = f"{self.peer} said nothing for {SUSPECT_AFTER_S:.1f} s while computing"
                    raise PeerSilent(text) from None
                continue
            before_s, self._heard_s, doubted_s = self._heard_s, self._now(), None
            if isinstance(message.header, Gradient):
                return message.header
            self._working(message.header, before_s)

    async def _values(self, stream: Stream, most_bytes: int) -> Message[Activations]:
        """What follows the Gradient: at once, or when a slow uplink has time, but not from one that is gone.

        It may have frozen between the two, and says Working no more.
        """
        look_s = self._now() + SUSPECT_AFTER_S
        if self._own_since_s is None:
            self._own_since_s = self._now()
        while True:
            try:
                async with asyncio.timeout_at(min(look_s, self._hedge_s())):
                    return await stream.receive(Activations, max_payload_bytes=most_bytes)
            except TimeoutError:
                if self._now() < look_s:
                    self.stalled.set()
                elif self._gone():
                    text = f"{self.peer} is gone, and its gradient was only announced"
                    raise PeerSilent(text) from None
                else:
                    look_s = self._now() + SUSPECT_AFTER_S

    def _hedge_s(self) -> float:
        """When to speak up though nothing is heard: past the percentile, and Working is overdue."""
        if self.stalled.is_set() or self._own_since_s is None:
            return float("inf")
        after_s = self._hedge_after_s(self._asking_s)
        return max(self._own_since_s + after_s - self._own_before_s, self._heard_s + _MISSED_S)

    def is_late(self) -> bool:
        """Whether the replica's own part takes so long that another one should be asked, too."""
        if self._own_since_s is None:
            return False
        own_s = self._own_before_s + self._now() - self._own_since_s
        return own_s >= self._hedge_after_s(self._asking_s)

    def _working(self, word: Working, before_s: float) -> None:
        """`before_s`: when its last word came, since when it may have passed the micro-batch on."""
        now = self._heard_s
        self._journey.stage = word.stage
        self._journey.hedged |= word.hedged
        if word.chain:
            if not begins(word.chain, self._stages[1:]):
                raise MessageInvalid(f"{self.peer} tells of hops behind it that are not of the next stages")
            self._behind = word.chain
        self._journey.behind = (self._link, *self._behind)
        if word.finished != self._finished:
            if self._finished >= 0 and self._own_since_s is not None:
                self._gap_s = max(self._gap_s, now - self._finished_s)
            self._finished, self._finished_s = word.finished, now
        if word.stage > self._request.stage:
            if not self._has_passed:
                self._has_passed = True
                self._passed()
            if self._own_since_s is not None:
                self._own_before_s += max(0.0, before_s - self._own_since_s)
                self._own_since_s = None
            return
        if self._own_since_s is None or now - before_s > SUSPECT_AFTER_S + self._pick.rtt_s + _LISTENED_S:
            self._own_since_s = self._finished_s = now  # it has just come back, or this process has
        idle_s = now - self._finished_s
        known = word.finished > 0 and self._pick.service_s != UNKNOWN_SERVICE_S
        if stands_still(idle_s, max(self._pick.service_s, self._gap_s), known):
            raise PeerSilent(f"{self.peer} answers, but its lane finished nothing for {idle_s:.1f} s")
        if self.is_late():
            self.stalled.set()

    def _check(self, header: Gradient) -> None:
        if not spans(header.chain, self._stages) or header.chain[0] != self._link:
            raise MessageInvalid(
                f"{self.peer} answered with a chain that does not lead from it over stages "
                f"{self._stages.start} to {self._stages.stop - 1}"
            )

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
