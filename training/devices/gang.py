"""Rank 0's hold on the other ranks of its peer: what it does, they do, told by a line on each one's pipe.

Commands go by pipe and tensors by `torch.distributed`: a pipe may be quiet for an hour without anybody being
late, and its end tells a child that the peer is gone. In a collective nobody may be later than
`ranks.ANSWER_S`. Whatever goes wrong between them, the ranks are out of step for good: the gang has failed,
and the peer with it (`lost`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from shoal.protocol.errors import DeviceLost
from shoal.training.devices.ranks import Ranks
from shoal.training.devices.replica import Follower, RankReplica, ShardedCompute
from shoal.training.lane import Lane
from shoal.training.pipeline.compute import StageCompute
from shoal.training.spec import RunSpec


class Gang:
    """One per peer; replicas of it may come one after another, or be there at once."""

    def __init__(self, ranks: Ranks, pipes: Sequence[int], lost: Callable[[DeviceLost], None]) -> None:
        """`pipes`: file descriptors to write to, of ranks 1 and on. `lost` is called from any thread."""
        self._ranks = ranks
        self._pipes = pipes
        self._lost = lost
        self._turn = threading.RLock()  # one command at a time, from whatever thread
        self._over: deque[tuple[int, str, tuple[object, ...]]] = deque()  # what children may let go of
        self._replicas = itertools.count()

    def replica(
        self,
        spec: RunSpec,
        stage: int,
        initial: torch.Tensor,
        lane: Lane,
        learning_rate: Callable[[], float],
        *,
        host_optimizer: bool,
    ) -> StageCompute:
        """A replica over all devices. It ends on the others when nobody holds it here any more."""
        number = next(self._replicas)
        command = functools.partial(self._command, number)
        with command("open", spec.model_dump(mode="json"), stage, host_optimizer):
            mine = RankReplica(spec, stage, self._ranks, initial, lane, command, host_optimizer)
        forget = functools.partial(self._let_go, number, "forget")
        compute = ShardedCompute(spec, mine, command, forget, learning_rate)
        weakref.finalize(compute, self._let_go, number, "close")
        return compute

    def _let_go(self, replica: int, do: str, *arguments: object) -> None:
        """From a finalizer, hence told with the next command."""
        self._over.append((replica, do, arguments))

    @contextlib.contextmanager
    def _command(self, replica: int, do: str, *arguments: object) -> Iterator[None]:
        """The others do it while the body does. Raises DeviceLost whatever goes wrong in it."""
        with self._turn:
            lines = [(replica, do, arguments)]
            while self._over:
                lines.insert(0, self._over.popleft())
            try:
                self._ranks.use()
                for pipe in self._pipes:
                    os.write(pipe, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
                yield
            except Exception as error:  # a rank fails as its library likes; none goes on without the others
                failure = DeviceLost(f"{self._ranks.count} devices of this peer broke off {do!r}: {error}")
                self._lost(failure)
                raise failure from error


def follow(ranks: Ranks, lines: Iterable[str]) -> None:
    """A child's life: what rank 0 says, until it says no more."""
    follower = Follower(ranks)
    for line in lines:
        replica, do, arguments = json.loads(line)
        follower.obey(replica, do, arguments)
