"""Since when a stage is missed: whoever lives on tells it, and a few liars neither shorten nor stretch it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.dht.absence import Absences
from shoal.dht.beats import ABSENCES, Absence, Beat, StageBeat
from shoal.dht.liveness import Liveness
from shoal.dht.view import Member
from shoal.protocol import wire
from shoal.protocol.identity import PeerId, Role

LOST = 1


def holder(stage: int, **changes: Any) -> Member:
    known = Member(peer=PeerId(f"holder-{stage}"), token_id=f"h{stage}", stages=(stage,), beat=Beat())
    return dataclasses.replace(known, **changes)


def witness(name: str, for_s: float, token_id: str = "", stage: int = LOST) -> Member:
    beat = Beat(absences=(Absence(stage, for_s),))
    return Member(peer=PeerId(name), token_id=token_id or name, stages=(0,), beat=beat)


def newcomer(*others: Member, now_s: float = 1000.0, sampled: bool = False) -> float | None:
    """For how long one that came five seconds ago and waits for the stage takes it for absent."""
    absences = Absences("mine")
    absences.begin(now_s - 5.0)
    absences.look(others, [LOST], now_s - 5.0, sampled)
    absences.look(others, [LOST], now_s, sampled)
    since_s = absences.since_s.get(LOST)
    return None if since_s is None else now_s - since_s


def test_what_most_of_those_say_who_live_on_counts_and_not_when_the_newcomer_came() -> None:
    assert newcomer() == 5.0
    assert newcomer(witness("a", 100.0), witness("b", 98.0)) == 98.0
    assert newcomer(witness("a", 100.0), witness("b", 98.0), witness("c", 1.0)) == 98.0, "it came late itself"
    assert newcomer(witness("a", 100.0), witness("b", 98.0), holder(LOST)) is None, "it is here"
    guards = Beat(guards=(StageBeat(LOST, height=3),))
    assert newcomer(witness("a", 100.0), witness("b", 98.0), holder(0, beat=guards)) is None, "a copy is"
    assert newcomer(witness("a", 100.0), witness("b", 98.0), holder(LOST, state="joining")) == 98.0
    gone = holder(LOST, liveness=Liveness.GONE)
    assert newcomer(witness("a", 100.0), witness("b", 98.0), gone) == 98.0


def test_liars_neither_shorten_nor_stretch_it() -> None:
    honest = [witness("a", 30.0), witness("b", 30.0), witness("c", 30.0)]
    assert newcomer(*honest, witness("liar", 1e9)) == 30.0
    assert newcomer(*honest, witness("liar", 0.0)) == 30.0
    assert newcomer(witness("liar", 1e9)) == 5.0, "one alone is not believed"
    crowd = [witness(f"liar-{number}", 1e9, token_id="t") for number in range(50)]
    assert newcomer(*crowd) == 5.0, "ids cost nothing, and a token has one vote"
    assert newcomer(*honest, *crowd) == 30.0
    siblings = [witness(f"sibling-{number}", 30.0, token_id="mine") for number in range(2)]
    assert newcomer(*siblings) == 30.0, "but this volunteer's own peers have one each"


def test_the_owners_peer_alone_is_believed() -> None:
    """What was: beside it alone volunteers with short sessions waited anew each, never for long enough."""
    owner = dataclasses.replace(witness("owner", 100.0), roles=frozenset({Role.TRAINER, Role.OWNER}))
    assert newcomer(owner) == 100.0
    assert newcomer(owner, witness("liar", 1e9)) == 100.0
    assert newcomer(owner, holder(LOST)) is None, "it is here"


def test_who_met_it_itself_counts_from_there_whatever_others_say() -> None:
    absences = Absences("mine")
    absences.begin(0.0)
    absences.look([holder(LOST)], [], 10.0, False)
    assert absences.told(10.0) == ()
    absences.look([witness("a", 500.0), witness("b", 500.0)], [], 50.0, False)
    assert absences.told(50.0) == (Absence(LOST, 40.0),)
    absences.look([witness("a", 0.0), witness("b", 0.0), holder(LOST)], [], 51.0, False)
    assert absences.told(51.0) == (Absence(LOST, 0.0),), "whoever misses it hears that it is here"


def test_it_is_handed_on_when_all_have_gone_that_met_it() -> None:
    second = Absences("two")
    second.begin(100.0)
    second.look([witness("one", 60.0), witness("other", 60.0)], [], 100.0, False)
    (told,) = second.told(130.0)
    assert told == Absence(LOST, 90.0)
    assert newcomer(witness("two", told.for_s), witness("three", told.for_s)) == 90.0


def test_a_process_that_stood_still_would_have_met_nobody() -> None:
    absences = Absences("mine")
    absences.begin(0.0)
    absences.look([holder(2)], [LOST], 0.0, False)
    absences.excuse(600.0)
    absences.look([], [LOST], 605.0, False)
    assert absences.told(605.0) == (Absence(LOST, 5.0), Absence(2, 5.0))


def test_of_a_swarm_known_in_part_only_the_stage_is_missed_that_is_looked_for() -> None:
    assert newcomer(holder(2), sampled=True) == 5.0
    absences = Absences("mine")
    absences.begin(0.0)
    absences.look([holder(2)], [], 0.0, True)
    absences.look([witness("a", 60.0, stage=3)], [], 60.0, True)
    assert absences.told(60.0) == ()


@given(
    st.lists(st.tuples(st.integers(0, 255), st.floats(0.0, 1e9), st.sampled_from("abc")), max_size=60),
    st.floats(0.0, 1e6),
)
@pytest.mark.filterwarnings("error")
def test_whatever_others_claim_fits_into_a_beat(claims: list[tuple[int, float, str]], now_s: float) -> None:
    absences = Absences("mine")
    absences.begin(now_s)
    others = [witness(f"{n}", for_s, token, stage) for n, (stage, for_s, token) in enumerate(claims)]
    absences.look([*others, holder(200)], [LOST], now_s, False)
    told = absences.told(now_s + 1.0)
    assert len(told) <= ABSENCES
    assert LOST in [absence.stage for absence in told], "what this peer waits for itself comes first"
    wire.encode(Beat(absences=told))
