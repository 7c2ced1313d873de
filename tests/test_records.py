"""Records: who may say what of whom, and in which order."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from directory_world import Person, Run

from shoal.dht.directory import SignedRecord
from shoal.dht.gate import EXPIRY_SLACK_S, RecordGate
from shoal.dht.records import (
    SEALED_BYTES,
    SIGNATURE_LABEL,
    RecordBook,
    check_address,
    seal,
    sign_record,
    unseal,
    verify_record,
)
from shoal.protocol import limits
from shoal.protocol.errors import AccessError, BindingInvalid, MessageTooLarge, RecordInvalid
from shoal.protocol.wire import encode


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture
def ann(run: Run) -> Person:
    return run.person()


@pytest.fixture
def bob(run: Run) -> Person:
    return run.person()


def test_a_member_admits_what_another_signed(ann: Person, bob: Person) -> None:
    record = ann.record(name="ann")
    book = RecordBook(bob.membership)
    assert book.admit(sign_record(record, ann.key, ann.membership.run_id), time.time()) == record
    assert book.get(ann.key.peer) == record
    assert book.live(time.time()) == (record,)


def test_a_record_signed_by_anybody_else_is_refused(ann: Person, bob: Person) -> None:
    with pytest.raises(RecordInvalid, match="can only be signed by it"):
        sign_record(ann.record(), bob.key, bob.membership.run_id)
    encoded = encode(ann.record())
    forged = SignedRecord(encoded, bob.key.sign(SIGNATURE_LABEL, bob.membership.run_id + encoded))
    with pytest.raises(RecordInvalid, match="did not sign"):
        RecordBook(bob.membership).admit(forged, time.time())


def test_a_changed_byte_is_refused(ann: Person, bob: Person) -> None:
    signed = ann.signed(name="ann the first")
    changed = SignedRecord(signed.record.replace(b"ann the", b"amy the"), signed.signature)
    with pytest.raises(RecordInvalid, match="did not sign"):
        RecordBook(bob.membership).admit(changed, time.time())


def test_a_signature_for_another_run_is_refused(ann: Person, bob: Person) -> None:
    elsewhere = sign_record(ann.record(), ann.key, os.urandom(32))
    with pytest.raises(RecordInvalid, match="did not sign"):
        RecordBook(bob.membership).admit(elsewhere, time.time())


def test_a_record_with_another_peers_certificate_is_refused(ann: Person, bob: Person) -> None:
    with pytest.raises(BindingInvalid):
        RecordBook(bob.membership).admit(ann.signed(chain=bob.membership.chain), time.time())


def test_a_record_with_a_certificate_of_another_run_is_refused(tmp_path: Path, bob: Person) -> None:
    stranger = Run(tmp_path).person()
    signed = sign_record(stranger.record(), stranger.key, bob.membership.run_id)
    with pytest.raises(AccessError):
        RecordBook(bob.membership).admit(signed, time.time())


def test_bytes_that_are_no_record_are_refused(bob: Person) -> None:
    for data in (b"\xff" * 40, b"x" * (limits.RECORD_BYTES + 1)):
        with pytest.raises(RecordInvalid):
            RecordBook(bob.membership).admit(SignedRecord(data, bytes(64)), time.time())


def test_a_replayed_record_never_undoes_a_newer_one(ann: Person, bob: Person) -> None:
    book = RecordBook(bob.membership)
    old, new = ann.signed(1, state="joining"), ann.signed(2, state="online")
    book.admit(old, time.time())
    book.admit(new, time.time())
    with pytest.raises(RecordInvalid, match="older than"):
        book.admit(old, time.time())
    held = book.get(ann.key.peer)
    assert held is not None and held.state == "online"


def test_a_restarted_peer_supersedes_its_old_self(ann: Person, bob: Person) -> None:
    book = RecordBook(bob.membership)
    book.admit(ann.signed(500, incarnation=1), time.time())
    assert book.admit(ann.signed(1, incarnation=2), time.time()).incarnation == 2
    with pytest.raises(RecordInvalid, match="older than"):
        book.admit(ann.signed(501, incarnation=1), time.time())


def test_one_sequence_number_stands_for_one_record(ann: Person, bob: Person) -> None:
    book = RecordBook(bob.membership)
    said = ann.signed(1, state="online")
    assert book.admit(said, time.time()) == book.admit(said, time.time())
    with pytest.raises(RecordInvalid, match="different"):
        book.admit(ann.signed(1, state="draining"), time.time())


def test_records_from_the_past_and_the_future_are_refused(ann: Person, bob: Person) -> None:
    book = RecordBook(bob.membership)
    now = time.time()
    with pytest.raises(RecordInvalid, match="expired"):
        book.admit(ann.signed(issued_unix_s=now - 31.0, ttl_s=30.0), now)
    with pytest.raises(RecordInvalid, match="ahead"):
        book.admit(ann.signed(issued_unix_s=now + limits.RECORD_FUTURE_S + 1.0), now)


def test_an_expired_record_is_not_live_and_still_guards_its_sequence(ann: Person, bob: Person) -> None:
    book = RecordBook(bob.membership)
    now = time.time()
    longer = ann.signed(1, issued_unix_s=now, ttl_s=limits.RECORD_TTL_MAX_S)
    book.admit(ann.signed(2, issued_unix_s=now, ttl_s=30.0), now)
    assert book.live(now + 31.0) == ()
    with pytest.raises(RecordInvalid, match="older than"):
        book.admit(longer, now + 31.0)
    book.live(now + limits.RECORD_TTL_MAX_S + 1.0)
    assert len(book) == 0


def test_a_full_book_forgets_the_peer_not_refreshed_for_longest(run: Run) -> None:
    people = [run.person() for _ in range(3)]
    book = RecordBook(people[0].membership, capacity=2)
    for person, sequence in ((people[0], 1), (people[1], 1), (people[0], 2), (people[2], 1)):
        book.admit(person.signed(sequence), time.time())
    assert {record.peer for record in book.live(time.time())} == {people[0].key.peer, people[2].key.peer}


def test_texts_are_stripped_to_what_prints(ann: Person, bob: Person) -> None:
    record = RecordBook(bob.membership).admit(
        ann.signed(name="\x1b[2Jann\u202e ", device="cpu\n"), time.time()
    )
    assert (record.name, record.device) == ("[2Jann", "cpu")


@pytest.mark.parametrize(
    "address", ["10.1.2.3:4000", "[2001:db8::1]:4000", "example.org:65535", "localhost:1024"]
)
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "10.1.2.3",
        "10.1.2.3:",
        "10.1.2.3:22",
        "10.1.2.3:65536",
        "10.1.2.3:99999999999",
        "10.1.2.3:٤٠٠٠",
        "2001:db8::1:4000",
        "[10.1.2.3]:4000",
        "[example.org]:4000",
        "0.0.0.0:4000",
        "224.0.0.1:4000",
        "exa mple:4000",
        "-a:4000",
        "user@host:4000",
        "a/b:4000",
    ],
)
def test_what_should_not_be_dialled_is_refused(address: str, ann: Person, bob: Person) -> None:
    with pytest.raises(RecordInvalid):
        check_address(address)
    if len(address) >= 3:
        with pytest.raises(RecordInvalid):
            verify_record(ann.signed(addresses=(address,)), bob.membership, time.time())


def test_a_sealed_record_opens_with_the_runs_key_only(ann: Person) -> None:
    signed, run_id, key = ann.signed(), ann.membership.run_id, ann.membership.sealing_key
    sealed = seal(signed, run_id, key, os.urandom)
    assert unseal(sealed, run_id, key) == signed
    assert ann.key.peer.encode() not in sealed
    cut, longer, changed = sealed[:-1], sealed + bytes(SEALED_BYTES), sealed[:-1] + bytes([sealed[-1] ^ 1])
    for wrong in (b"", cut, longer, changed):
        with pytest.raises(RecordInvalid):
            unseal(wrong, run_id, key)
    for wrong_run, wrong_key in ((os.urandom(32), key), (run_id, os.urandom(32))):
        with pytest.raises(RecordInvalid):
            unseal(sealed, wrong_run, wrong_key)


def test_the_largest_record_fits_when_sealed_and_a_larger_one_cannot_be_signed(ann: Person) -> None:
    front = (bytes(limits.CERTIFICATE_BYTES - 200), bytes(1000))
    room = limits.RECORD_BYTES - len(encode(ann.record(chain=(*front, bytes(200))))) + 200
    signed = ann.signed(chain=(*front, bytes(room)))
    assert len(signed.record) == limits.RECORD_BYTES
    sealed = seal(signed, ann.membership.run_id, ann.membership.sealing_key, os.urandom)
    assert len(sealed) <= SEALED_BYTES
    with pytest.raises(MessageTooLarge):
        ann.signed(chain=(*front, bytes(room + 1)))


def test_the_gate_lets_nobody_file_a_record_under_another_name_or_for_longer(
    ann: Person, bob: Person
) -> None:
    membership = bob.membership
    gate = RecordGate(membership, time.time, lowest_port=1024)
    record = ann.record()
    signed = sign_record(record, ann.key, membership.run_id)
    value = seal(signed, membership.run_id, membership.sealing_key, os.urandom)
    last = record.issued_unix_s + record.ttl_s
    assert gate.open(ann.key.peer, value, last).signed == signed
    for peer, expires_unix_s in (
        (bob.key.peer, last),
        (ann.key.peer, last + EXPIRY_SLACK_S + 0.1),
        (ann.key.peer, float("nan")),
        (ann.key.peer, float("inf")),
    ):
        with pytest.raises(RecordInvalid):
            gate.open(peer, value, expires_unix_s)
    assert gate.refused == 4


def test_a_revoked_member_is_refused(run: Run, ann: Person, bob: Person) -> None:
    book = RecordBook(bob.membership)
    bob.membership.revocations.adopt(run.owner.revoke([ann.membership.token.token_id]))
    with pytest.raises(AccessError):
        book.admit(ann.signed(), time.time())


def test_a_record_is_bound_to_each_of_its_fields(ann: Person, bob: Person) -> None:
    record = ann.record()
    signed = sign_record(record, ann.key, ann.membership.run_id)
    for lie in (
        replace(record, state="draining"),
        replace(record, sequence=9),
        replace(record, tokens_per_s=1e9),
    ):
        with pytest.raises(RecordInvalid):
            RecordBook(bob.membership).admit(SignedRecord(encode(lie), signed.signature), time.time())
