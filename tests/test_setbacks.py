"""A move that fails: the peer goes back or stays, tries again later, and meanwhile another one goes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_tenure import Slow, at_stages, moving_spec
from trainer_world import TrainerWorld

from shoal.dht.beats import Beat, StageBeat
from shoal.dht.view import Member, SwarmView
from shoal.protocol.errors import HardwareTooSmall, NotHere, ShoalError, StageEmpty, StorageError
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.virtual_time import run
from shoal.training.setbacks import MOST_WINDOWS, Setbacks
from shoal.training.tenure import Tenure
from shoal.training.trainer import Trainer

ME = PeerId("me")


def member(name: str, stage: int, fixed: bool = False) -> Member:
    beat = Beat(stages=(StageBeat(stage, fixed=fixed, service_s=1.0),))
    roles = frozenset({Role.TRAINER})
    return Member(peer=PeerId(name), roles=roles, stages=(stage,), state="online", beat=beat)


class Ground:
    """One peer's tenure, at stage 0 of two with others that stay; stage 1 needs it."""

    def __init__(self, failing: Callable[[int, int], ShoalError | None], prefetch: ShoalError | None = None):
        """`failing`: of a stage and the number of times that it was begun, what its beginning raises."""
        self.begun: list[int] = []
        self.events: list[tuple[float, str, dict[str, Any]]] = []
        self.said: list[dict[int, str]] = []
        self.prefetched_s: list[float] = []
        self._failing = failing
        self._prefetch_error = prefetch
        self.tenure = Tenure(
            moving_spec(2),
            view=self.view,
            begin=self.begin,
            announce=lambda held: self.said.append(dict(held)),
            prefetch=self.prefetch,
            fits=lambda stages: True,
            event=lambda kind, fields: self.events.append((self.now_s(), kind, fields)),
            rng=random.Random(1),
        )

    @staticmethod
    def now_s() -> float:
        return asyncio.get_running_loop().time()

    def view(self) -> SwarmView:
        at = next((stage for stage in (self.said[-1] if self.said else {})), 0)
        others = [member("a", 0, True), member("b", 0, True), member("c", 1, True)]
        return SwarmView(ME, 0.0, (member("me", at), *others))

    @contextlib.asynccontextmanager
    async def begin(self, stage: int) -> AsyncIterator[Slow]:
        self.begun.append(stage)
        error = self._failing(stage, self.begun.count(stage))

        class Term(Slow):
            async def recover(self) -> None:
                if error is not None:
                    raise error

            async def drain(self, deadline_s: float) -> None:
                pass

        yield Term()

    async def prefetch(self, stage: int, donors: Sequence[PeerId]) -> None:
        self.prefetched_s.append(self.now_s())
        if self._prefetch_error is not None:
            raise self._prefetch_error

    def heard(self, kind: str) -> list[tuple[float, dict[str, Any]]]:
        return [(at_s, fields) for at_s, told, fields in self.events if told == kind]

    async def live(self, seconds: float) -> BaseException | None:
        """Its life, cut after a while; what ended it before, if anything did."""
        living = asyncio.create_task(self.tenure.run(0))
        await asyncio.wait({living}, timeout=seconds)
        if living.done():
            return living.exception()
        living.cancel()
        await asyncio.gather(living, return_exceptions=True)
        return None


@pytest.mark.parametrize(
    "error", [StageEmpty("nobody hands it over"), StorageError("disk full"), HardwareTooSmall("no memory")]
)
def test_who_cannot_begin_at_the_stage_it_has_moved_to_goes_back(error: ShoalError) -> None:
    """What was: the error ended the peer's process, while its old stage was one replica short already."""

    async def main() -> None:
        ground = Ground(lambda stage, times: error if stage == 1 else None)
        assert await ground.live(1500.0) is None
        assert ground.begun[:3] == [0, 1, 0]
        assert ground.said[-1] == {0: "online"}
        assert ground.tenure.moves == 0
        (_, fields), *_ = ground.heard("move-failed")
        assert str(error) in fields["text"]
        tried_s = [at_s for at_s, _ in ground.heard("moving")]
        if isinstance(error, HardwareTooSmall):
            assert len(tried_s) == 1, "there will not be more memory"
        else:
            waits_s = [after - before for before, after in itertools.pairwise(tried_s)]
            assert len(waits_s) >= 3, "what failed once may go well later"
            assert min(waits_s) >= 16.0
            assert min(waits_s[3:]) >= 100.0, "not at once, and not as often as before"

    run(main)


def test_who_has_nowhere_else_to_be_tries_some_times_and_then_ends_with_the_cause() -> None:
    async def main() -> None:
        ground = Ground(lambda stage, times: StageEmpty("nobody hands it over") if times < 3 else None)
        assert await ground.live(100.0) is None
        assert ground.begun[:3] == [0, 0, 0]
        assert {0: "online"} in ground.said
        assert len(ground.heard("begin-failed")) == 2
        lost = Ground(lambda stage, times: StageEmpty("nobody hands it over"))
        ended = await lost.live(600.0)
        assert isinstance(ended, ExceptionGroup)
        assert ended.subgroup(StageEmpty) is not None
        assert 3 <= len(lost.begun) <= 6
        small = Ground(lambda stage, times: HardwareTooSmall("no memory"))
        assert isinstance(await small.live(600.0), ExceptionGroup)
        assert small.begun == [0], "what will not be otherwise is not tried again"

    run(main)


def test_a_copy_that_fails_is_tried_again_less_and_less_often() -> None:
    """What was: a whole download every two windows, for as long as it failed."""

    async def main() -> None:
        ground = Ground(lambda stage, times: None, NotHere("a snapshot of stage 1"))
        window_s = moving_spec(2).stages.rebalance_window_s
        assert await ground.live(200 * window_s) is None
        assert ground.begun == [0]
        assert 200 / (2 * MOST_WINDOWS) <= len(ground.prefetched_s) <= 200 / MOST_WINDOWS + 6

    run(main)


def test_where_the_best_mover_cannot_go_the_next_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was: all plans named the same one for ever, and its stage stayed with one replica."""
    refused: list[Trainer] = []
    before = Trainer.prefetch

    async def fails(trainer: Trainer, stage: int, donors: Sequence[PeerId]) -> None:
        if not refused:
            refused.append(trainer)
        if trainer._me == refused[0]._me:
            raise StorageError("its disk is full; free space there")
        await before(trainer, stage, donors)

    monkeypatch.setattr(Trainer, "prefetch", fails)

    async def main() -> None:
        async with TrainerWorld(moving_spec(2), disk=tmp_path, slower=10.0) as world:
            for number in range(4):
                await world.add(number, 0, moves=True)
            await world.add(4, 1, moves=True)
            await at_stages(world, [3, 2])
            (unable,) = (one for one in world.replicas.values() if one.peer == refused[0]._me)
            assert unable.stage == 0
            assert unable.heard("move-cut")

    run(main)


def test_setbacks_double_and_end() -> None:
    setbacks = Setbacks(10.0, random.Random(1))
    assert not setbacks.bar(1, 0.0)
    for _ in range(100):
        setbacks.failed(1, 0.0)
    assert setbacks.bar(1, 10.0 * MOST_WINDOWS - 1.0)
    assert not setbacks.bar(1, 10.0 * MOST_WINDOWS * 1.5 + 1.0)
    assert not setbacks.bar(0, 0.0)
    setbacks.over(1)
    setbacks.failed(1, 0.0)
    assert not setbacks.bar(1, 30.1)
    setbacks.failed(1, 0.0, for_good=True)
    assert setbacks.bar(1, 1e9)
