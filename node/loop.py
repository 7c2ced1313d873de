"""The event loop of a daemon, and what it measures about itself. Made by the daemon; shown in its status.

Two figures, because they have different causes. *Lag*: how late the loop wakes on the wall clock;
it grows when this machine is busy with anything. *Callback time*: CPU time of the loop's thread
inside one callback; it grows only when code on the loop works too long, which is a bug above 50 ms.

Every callback that is scheduled through the loop is wrapped: task steps, timers, done callbacks, readers.
The wrapper reads the thread clock twice, about a microsecond; uvloop has no hook of its own for this. One
over the limit is told with what may not be its own doing: the collection of garbage, which strikes whoever
allocates, and what the system did for this thread in the tick (new pages, say). And it may be the machine: a
CPU that the hypervisor stops is charged to whoever runs there (seen: 177 ms, in 240 ms without one timer tick
on that CPU, while the other went on). So `repeated` tells code that blocks from what merely happens to it.
"""

from __future__ import annotations

import asyncio
import gc
import math
import resource
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

TICK_S = 0.1
WINDOW_TICKS = 600  # a minute of lag samples
LIMIT_S = 0.05  # design section 4
CULPRITS = 8
_SCHEDULERS = {  # methods that take a callback -> its position
    "call_soon": 0,
    "call_soon_threadsafe": 0,
    "call_later": 1,
    "call_at": 1,
    "add_reader": 1,
    "add_writer": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopHealth:
    """What the loop did since it started; lag over the last minute, and the worst since the start."""

    lag_p50_ms: float = 0.0
    lag_p99_ms: float = 0.0
    lag_worst_ms: float = 0.0
    callback_worst_ms: float = 0.0
    callback_worst: str = ""
    callbacks: int = 0
    callbacks_over_limit: int = 0
    over_limit: tuple[tuple[str, int], ...] = ()  # which, and how often
    culprits: tuple[tuple[str, float], ...] = ()  # name and ms of the longest callbacks


class LoopMeter:
    """Collects callback times and lag. One per loop."""

    def __init__(self) -> None:
        self._worst: dict[str, float] = {}
        self._callbacks = 0
        self._over_limit: Counter[str] = Counter()
        self._least_kept_s = 0.001
        self._lags: deque[float] = deque(maxlen=WINDOW_TICKS)
        self._worst_lag_s = 0.0
        self._garbage_s = 0.0  # that this thread spent on collecting it
        self._garbage_since_s = 0.0
        self._at_tick = (0.0, 0.0)  # seconds of garbage and of the system, by then

    def timed(self, callback: Callable[..., object]) -> Callable[..., object]:
        """`callback`, measured."""
        return callback if isinstance(callback, _Timed) else _Timed(self, callback)

    def ran(self, callback: Callable[..., object], spent_s: float) -> None:
        """A callback took this much of the thread's CPU time."""
        self._callbacks += 1
        if spent_s > self._least_kept_s:
            self._keep(callback, spent_s)

    def _keep(self, callback: Callable[..., object], spent_s: float) -> None:
        name = _name(callback)
        if spent_s > LIMIT_S:
            self._over_limit[name] += 1
            garbage, system = (
                1e3 * (now - then) for now, then in zip(self._others(), self._at_tick, strict=True)
            )
            name += f" (garbage {garbage:.0f} ms, system {system:.0f} ms)"
        self._worst[name] = max(self._worst.get(name, 0.0), spent_s)
        if len(self._worst) > CULPRITS:
            least = min(self._worst, key=self._worst.__getitem__)
            self._least_kept_s = max(self._least_kept_s, self._worst.pop(least))

    async def watch_lag(self) -> None:
        """Measure the lag until cancelled, and what this thread does for others."""
        loop, thread = asyncio.get_running_loop(), threading.get_ident()

        def collecting(phase: str, _: dict[str, int]) -> None:
            if threading.get_ident() == thread:
                now_s = time.thread_time()
                self._garbage_s += now_s - self._garbage_since_s if phase == "stop" else 0.0
                self._garbage_since_s = now_s

        gc.callbacks.append(collecting)
        try:
            while True:
                self._at_tick = self._others()
                due = loop.time() + TICK_S
                await asyncio.sleep(TICK_S)
                lag_s = max(0.0, loop.time() - due)
                self._lags.append(lag_s)
                self._worst_lag_s = max(self._worst_lag_s, lag_s)
        finally:
            gc.callbacks.remove(collecting)

    def _others(self) -> tuple[float, float]:
        """Seconds of this thread so far: of garbage, and of the system."""
        return self._garbage_s, resource.getrusage(resource.RUSAGE_THREAD).ru_stime

    def health(self) -> LoopHealth:
        lags = sorted(self._lags)
        culprits = sorted(self._worst.items(), key=lambda item: -item[1])
        name, worst_s = culprits[0] if culprits else ("", 0.0)
        return LoopHealth(
            lag_p50_ms=_ms(_quantile(lags, 0.5)),
            lag_p99_ms=_ms(_quantile(lags, 0.99)),
            lag_worst_ms=_ms(self._worst_lag_s),
            callback_worst_ms=_ms(worst_s),
            callback_worst=name,
            callbacks=self._callbacks,
            callbacks_over_limit=self._over_limit.total(),
            over_limit=tuple(self._over_limit.items()),
            culprits=tuple((name, _ms(spent_s)) for name, spent_s in culprits),
        )


def repeated(loops: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Callbacks that were over the limit twice or more, at one peer or at several; `loops`: as statuses tell.

    Code that works too long does so again, or at every peer.
    """
    times = Counter[str]()
    for loop in loops.values():
        times.update(dict(loop["over_limit"]))
    return [
        f"{peer}: {spent_ms:.1f} ms CPU in {name}"
        for peer, loop in loops.items()
        for name, spent_ms in loop["culprits"]
        if spent_ms > 1e3 * LIMIT_S and times[name.partition(" (")[0]] > 1
    ]


class _Timed:
    """A callback that reports its CPU time to the meter."""

    __slots__ = ("_callback", "_meter")

    def __init__(self, meter: LoopMeter, callback: Callable[..., object]) -> None:
        self._meter = meter
        self._callback = callback

    def __call__(self, *arguments: object) -> object:
        started_s = time.thread_time()
        try:
            return self._callback(*arguments)
        finally:
            self._meter.ran(self._callback, time.thread_time() - started_s)


def new_loop(meter: LoopMeter) -> asyncio.AbstractEventLoop:
    """A measured loop: uvloop's where it is installed, asyncio's otherwise."""
    try:
        import uvloop
    except ImportError:
        loop: asyncio.AbstractEventLoop = asyncio.SelectorEventLoop()
    else:
        loop = uvloop.new_event_loop()
    for name, position in _SCHEDULERS.items():
        setattr(loop, name, _measuring(getattr(loop, name), position, meter))
    return loop


def _measuring(schedule: Callable[..., Any], position: int, meter: LoopMeter) -> Callable[..., Any]:
    """A method of the loop that wraps the callback at `position` of its arguments."""

    def scheduled(*arguments: Any, **options: Any) -> Any:
        callback = meter.timed(arguments[position])
        return schedule(*arguments[:position], callback, *arguments[position + 1 :], **options)

    return scheduled


def _name(callback: Callable[..., object]) -> str:
    """A task step by its coroutine, anything else by its qualified name."""
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        coroutine = owner.get_coro()
        return str(getattr(coroutine, "__qualname__", coroutine))
    return str(getattr(callback, "__qualname__", None) or type(callback).__name__)


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, math.floor(share * len(ordered)))] if ordered else 0.0


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
