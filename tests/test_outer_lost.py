"""Which parts of a lost entry may re-enter: those of which the chain that won has no steps yet (P4)."""

from __future__ import annotations

from collections.abc import Collection

from shoal.protocol.identity import PeerId
from shoal.training.outer.entry import Contributor, Entry, Seat, bitmap
from shoal.training.outer.lost import Lost, LostEntry, last_listed

ME = PeerId("12D3a".ljust(52, "z"))
PROCESS = ME, 1
PARTS = 3


def entry(height: int, first: int, last: int, listed: Collection[int]) -> Entry:
    """A round to which one process contributed these steps, and was listed in some parts."""
    draft = Entry(
        stage=0,
        height=height,
        previous=bytes([height]) * 32,
        ballot=1,
        leader=ME,
        revision=0,
        fragment=0,
        roster=(Seat(ME, 1, 1.0, present=True),),
        contributors=(Contributor(0, first, last, 100, 1.0, 1.0),),
        first_stage_head=b"",
    )
    return draft.finish([(b"\7" * 32, bitmap({0}, 1)) if n in listed else None for n in range(PARTS)], 0)


def test_a_part_holds_the_steps_since_its_chain_last_listed_the_process_there() -> None:
    """Part 1 of the second entry holds steps 0 to 8, its row says 4 to 8: the first one did not list it."""
    first, second = entry(1, 0, 4, [0]), entry(2, 4, 8, range(PARTS))
    lost = Lost()
    lost.add([LostEntry(b"", second, 1.0, {}, last_listed([first], 0, {PROCESS}))], 0.0)
    found = lost.next()
    assert found is not None
    lost.note(entry(1, 0, 4, [0]))
    assert found.welcome == [0, 1, 2], "steps that the lost chain had there before"
    lost.note(entry(2, 0, 4, [1]))
    assert found.welcome == [0, 2], "what was: 4 is not beyond 4, and steps 0 to 4 came in twice"
    assert found.delivered == set(), "steps 4 to 8 are still to be taken back"
    lost.note(entry(3, 4, 8, [1]))
    assert found.delivered_to(PROCESS) == {1}
