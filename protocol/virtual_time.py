"""An asyncio event loop with a virtual clock, for simulations and tests: hours pass in milliseconds.

When nothing is ready the clock jumps to the next timer. Nothing outside takes part (no sockets, threads or
subprocesses), and tasks and futures hash in the order in which they were first hashed, so that sets of them
iterate alike: the same program gives the same trace, unless it iterates over sets of strings itself.
When nothing is ready and no timer is set, a real loop would wait for ever; this one raises Deadlock.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import selectors
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_SHOWN_TASKS = 20
_SWEEP = 200


class Deadlock(RuntimeError):
    """Every task waits and nothing is scheduled; the text lists who waits where."""


class TimeLimit(RuntimeError):
    """The virtual clock passed the limit that `run` was given."""


def run(
    main: Callable[[], Coroutine[Any, Any, T]] | Coroutine[Any, Any, T],
    *,
    start_s: float = 0.0,
    limit_s: float = float("inf"),
) -> T:
    """asyncio.run on a new VirtualTimeLoop. Takes the coroutine or the function that makes it.

    Raises Deadlock, TimeLimit when more than `limit_s` virtual seconds pass, and what `main` raises.
    """
    loop = VirtualTimeLoop(start_s, start_s + limit_s)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main() if callable(main) else main)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """The loop. `time()` starts at `start_s` and moves only when nothing is ready."""

    def __init__(self, start_s: float = 0.0, end_s: float = float("inf")) -> None:
        self._now_s = start_s
        self._end_s = end_s
        self.orders = itertools.count()  # of timers, and of what is hashed
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []  # ties: first set, first due
        self._cancelled = 0  # of them, since they were last swept out
        super().__init__(_NothingFromOutside())
        self.set_task_factory(_make_task)

    def time(self) -> float:
        return self._now_s

    def stand_still(self, seconds: float) -> None:
        """As when the process is stopped for some time: all that falls due meanwhile is due at once."""
        self._now_s += seconds

    def create_future(self) -> asyncio.Future[Any]:
        return _OrderedFuture(loop=self)

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        if threading.get_ident() != self._thread_id:  # type: ignore[attr-defined]
            raise RuntimeError("a thread called into virtual time; its answer would come at a random moment")
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        raise RuntimeError("virtual time has no threads: pass an interface that computes in place instead")

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self.orders), timer))
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """What is cancelled leaves the heap when it is due, or when it is most of the heap."""
        self._cancelled += 1
        if self._cancelled > max(_SWEEP, len(self._timers) // 2):
            self._timers = [entry for entry in self._timers if not entry[2].cancelled()]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def _run_once(self) -> None:
        """One turn, like BaseEventLoop's, without what waits for the world outside."""
        ready: deque[Any] = self._ready  # type: ignore[attr-defined]
        if not ready and not self._stopping:  # type: ignore[attr-defined]
            self._advance()
        timers, now_s = self._timers, self._now_s
        while timers and timers[0][0] <= now_s:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

    def _advance(self) -> None:
        """Jump to the next timer; called when nothing is ready."""
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        if not self._timers:
            raise Deadlock("all tasks wait and nothing is scheduled:\n" + _waiting(self))
        self._now_s = max(self._now_s, self._timers[0][0])
        if self._now_s > self._end_s:
            end_s, self._end_s = self._end_s, float("inf")  # let cleaning up take its time
            raise TimeLimit(f"not done at {end_s:g} virtual seconds:\n" + _waiting(self))


class _OrderedFuture(asyncio.Future[Any]):
    order = -1  # among those that were hashed

    def __hash__(self) -> int:
        if self.order < 0:
            self.order = _next_order(self)
        return self.order


class _OrderedTask(asyncio.Task[Any]):
    order = -1

    def __hash__(self) -> int:  # first called when the new task is registered
        if self.order < 0:
            self.order = _next_order(self)
        return self.order


def _next_order(future: asyncio.Future[Any]) -> int:
    order: int = next(future.get_loop().orders)  # type: ignore[attr-defined]
    return order


def _make_task(
    loop: asyncio.AbstractEventLoop, coroutine: Any, context: Context | None = None, **options: Any
) -> asyncio.Task[Any]:
    return _OrderedTask(coroutine, loop=loop, context=context, **options)


class _NothingFromOutside(selectors.SelectSelector):
    """The selector of a loop that only its own timers wake."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return []


def _waiting(loop: asyncio.AbstractEventLoop) -> str:
    lines = []
    for task in sorted(asyncio.all_tasks(loop), key=hash)[:_SHOWN_TASKS]:
        frames = task.get_stack(limit=1)
        place = f"{frames[-1].f_code.co_filename}:{frames[-1].f_lineno}" if frames else "an unknown place"
        lines.append(f"  {task.get_name()} waits at {place}")
    return "\n".join(lines)
