"""The simulator's watch over P1 to P5 sees what is broken, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from shoal.node.simulate.promises import BLIND_S, STILL_S, Promises
from shoal.protocol.identity import PeerId
from shoal.training.outer.entry import Contributor, Entry, Seat

A, B = PeerId("a"), PeerId("b")


def peer(stage: int, root: bytes = b"1", head: bytes = b"h", **asked: int) -> Any:
    outer = SimpleNamespace(head=head, state_root=root, height=7)
    trainer = SimpleNamespace(outer=outer, station=SimpleNamespace(under_way=lambda: asked))
    return SimpleNamespace(online=True, replicas={stage: trainer})


def test_replicas_with_one_head_and_two_states_break_p1() -> None:
    promises = Promises(2, 1.0)
    promises.look(0.0, {A: peer(0), B: peer(1, root=b"2")}, 1)
    promises.look(1.0, {A: peer(0), B: peer(0, root=b"2", head=b"g")}, 2)
    assert promises.broken == []
    promises.look(2.0, {A: peer(0), B: peer(0, root=b"2")}, 3)
    assert [what[:2] for what in promises.broken] == ["P1"]


def test_who_waits_for_the_dead_breaks_p3_after_a_while() -> None:
    promises = Promises(2, 1.0)
    promises.died(10.0, B)
    promises.look(10.0 + BLIND_S, {A: peer(0, b=1)}, 1)
    promises.look(11.0 + BLIND_S, {A: peer(0, b=0)}, 2)
    assert promises.broken == []
    promises.look(12.0 + BLIND_S, {A: peer(0, b=2)}, 3)
    assert [what[:2] for what in promises.broken] == ["P3"]


def test_a_standstill_breaks_p5_unless_a_stage_is_empty() -> None:
    promises = Promises(2, 5.0)
    promises.look(0.0, {A: peer(0), B: peer(1)}, 4)
    promises.look(STILL_S, {A: peer(0)}, 4)
    promises.look(2 * STILL_S, {A: peer(0), B: peer(1)}, 4)
    assert promises.broken == []
    promises.look(2 * STILL_S + 6.0, {A: peer(0), B: peer(1)}, 4)
    assert [what[:2] for what in promises.broken] == ["P5"]


def entry(height: int, first: int, last: int) -> Entry:
    row = Contributor(0, first, last, 64, 1.0, 1.0)
    return Entry(0, height, bytes(32), 1, A, 0, 0, (Seat(A, 5, 1.0),), (row,), b"")


def test_steps_that_do_not_tile_break_p4() -> None:
    def log(*entries: Entry | None) -> Any:
        return SimpleNamespace(height=len(entries), entry=lambda height: entries[height - 1])

    promises = Promises(1, 1.0)
    promises.close(A, log(entry(1, 0, 4), entry(2, 4, 9)), 5, 9)
    promises.close(A, log(None, entry(2, 4, 9)), 5, 11)
    assert promises.broken == []
    promises.close(A, log(entry(1, 0, 4), entry(2, 5, 9)), 5, 9)
    promises.close(A, log(entry(1, 0, 4)), 5, 3)
    assert [what[:2] for what in promises.broken] == ["P4", "P4"]
