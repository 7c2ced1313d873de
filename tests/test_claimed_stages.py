"""Who may not train may not say that it does: training would be led through an inference client's hands."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from directory_world import Run

from shoal.dht.beats import Beat, StageBeat
from shoal.dht.gate import RecordGate
from shoal.dht.records import RecordBook, seal
from shoal.dht.table import MemberTable
from shoal.protocol.errors import WrongRole
from shoal.protocol.identity import HOLDERS, Role, VerifiedPeer


@pytest.mark.parametrize("role", sorted(set(Role) - HOLDERS))
def test_a_record_that_claims_a_stage_without_the_right_to_train_is_refused(
    tmp_path: Path, role: Role
) -> None:
    """In every peer's book and at the directory's gate, so nobody is told of it either."""
    run = Run(tmp_path)
    bob, cheat = run.person().membership, run.person(role)
    signed, now = cheat.signed(stages=(1,)), time.time()
    with pytest.raises(WrongRole, match="does not let it train"):
        RecordBook(bob).admit(signed, now)
    gate = RecordGate(bob, time.time, lowest_port=1024)
    value = seal(signed, bob.run_id, bob.sealing_key, os.urandom)
    with pytest.raises(WrongRole):
        gate.open(cheat.key.peer, value, now + 1.0)
    honest = cheat.signed(2, stages=(), state="observing")
    assert RecordBook(bob).admit(honest, now).peer == cheat.key.peer


@pytest.mark.parametrize("role", sorted(Role))
def test_beats_tell_of_stages_copies_and_streams_only_where_their_peer_may_have_any(
    tmp_path: Path, role: Role
) -> None:
    """The heights, copies and streams that they claim lead joiners, guardians and drivers."""
    peer = Run(tmp_path).person(role)
    table = MemberTable(lambda event: None, lambda: None)
    owner = VerifiedPeer(peer.key.peer, frozenset({role}), "token", math.inf)
    record = replace(peer.record(), stages=())
    table.admit(record, peer.signed(), owner, age_s=0.0, watch=True, now=0.0)
    table.streams(peer.key.peer, 1, 0.0)
    progress = StageBeat(1, height=2**53)
    said = Beat(1, 1, stages=(progress,), guards=(progress,), streams=(7,), spare_bytes=2**53, room=8)
    table.beat(peer.key.peer, said, 1.0, None)
    (member,) = table.members()
    assert member.beat == (said if role in HOLDERS else Beat(1, 1))
    assert (member.progress(1) is not None) == (role in HOLDERS)
