"""The owner's list: nobody else's counts, none takes the place of a newer one, and it stays small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trust_world import RUN, World

from shoal.protocol import limits
from shoal.protocol.admission import OwnerKey
from shoal.protocol.amendments import (
    LABEL,
    PAUSED,
    RUNNING,
    AmendmentBook,
    Amendments,
    Errand,
    Setting,
    SignedAmendments,
    load_amendments,
    sign_amendments,
)
from shoal.protocol.errors import MessageInvalid, RecordInvalid, ShoalError, StorageError
from shoal.protocol.wire import encode


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "owner")


def paused(listed: Amendments) -> Amendments:
    return replace(listed, state=PAUSED)


def resumed(listed: Amendments) -> Amendments:
    return replace(listed, state=RUNNING)


def test_the_newest_list_counts_and_outlives_the_process(world: World, tmp_path: Path) -> None:
    path = tmp_path / "state" / "amendments"
    owner, book = world.owner, AmendmentBook(RUN, world.owner.root_der, path)
    told: list[int] = []
    book.changed.append(lambda: told.append(book.version))
    lists = []
    for change in (paused, resumed, paused):
        owner.amend(change)
        stored = load_amendments(owner.amendments_path, RUN, owner.root_der)
        assert stored is not None
        lists.append(stored[0])

    assert book.adopt(lists[1])
    assert not book.adopt(lists[1]), "a replay"
    assert not book.adopt(lists[0]), "an older one"
    assert (book.version, book.current.state) == (2, RUNNING)
    assert book.adopt(lists[2])
    assert not book.adopt(lists[1])
    assert told == [2, 3]
    again = AmendmentBook(RUN, owner.root_der, path)
    assert (again.version, again.current.state) == (3, PAUSED)
    assert again.signed == lists[2]


def test_an_order_that_changes_nothing_makes_no_version(world: World) -> None:
    assert world.owner.amend(paused).version == 1
    before = world.owner.amendments_path.read_bytes()
    assert world.owner.amend(paused).version == 1
    assert world.owner.amendments_path.read_bytes() == before
    assert world.owner.amend(resumed).version == 2


def test_what_the_owner_did_not_sign_is_refused(world: World, tmp_path: Path) -> None:
    owner = world.owner
    stranger = OwnerKey.create(tmp_path / "stranger", RUN, "another", world.now)
    book = AmendmentBook(RUN, owner.root_der)
    assert book.adopt(sign_amendments(Amendments(RUN, 1, PAUSED), owner.sign))
    newer = Amendments(RUN, 7, RUNNING)
    good = sign_amendments(newer, owner.sign)
    other_body = encode(replace(newer, version=8))
    cases: list[tuple[SignedAmendments, type[ShoalError]]] = [
        (sign_amendments(newer, stranger.sign), RecordInvalid),
        (sign_amendments(newer, lambda label, data: owner.sign(b"revocation list", data)), RecordInvalid),
        (sign_amendments(Amendments(bytes(32), 7), owner.sign), RecordInvalid),
        (replace(good, signature=b""), RecordInvalid),
        (replace(good, signature=good.signature[:-1] + bytes([good.signature[-1] ^ 1])), RecordInvalid),
        (replace(good, body=other_body), RecordInvalid),
        (replace(good, body=b"\xff" * 64), MessageInvalid),
        (SignedAmendments(bytes(limits.AMENDMENTS_BYTES + 1), owner.sign(LABEL, b"")), ShoalError),
    ]
    for signed, kind in cases:
        with pytest.raises(kind):
            book.adopt(signed)
        assert (book.version, book.current.state) == (1, PAUSED)
    assert book.adopt(good)


def test_a_list_has_its_bounds_and_the_largest_one_fits() -> None:
    key = "k" * 64
    most = tuple(Setting(2**53, key, -1.7976e299) for _ in range(limits.AMENDED_SETTINGS))
    peer = "p" * 64
    sent = tuple(Errand(2**53, "drain", peer, 2**64 - 1, "ä" * 256) for _ in range(limits.ERRANDS))
    full = Amendments(RUN, 2**53, PAUSED, most, sent)
    body = encode(full)
    assert len(body) <= limits.AMENDMENTS_BYTES
    assert len(encode(SignedAmendments(body, bytes(80)))) <= limits.HEADER_BYTES
    bad: tuple[Callable[[], object], ...] = (
        lambda: replace(full, settings=(*most, most[0])),
        lambda: replace(full, errands=(*sent, sent[0])),
        lambda: replace(full, state="on fire"),
        lambda: replace(full, settings=(replace(most[0], value=float("nan")),)),
        lambda: replace(full, errands=(replace(sent[0], kind="format the disk"),)),
    )
    for make in bad:
        with pytest.raises(MessageInvalid):
            encode(make())
    for entries in ((Setting(2, key, 0.0), Setting(1, key, 0.0)), (Setting(4, key, 0.0),)):
        with pytest.raises(ValueError, match="out of order or newer"):
            Amendments(RUN, 3, settings=entries)


def test_a_damaged_file_is_told_and_never_passes_for_an_empty_list(world: World, tmp_path: Path) -> None:
    world.owner.amend(paused)
    path = world.owner.amendments_path
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:20], b"\0" * len(whole), b"x" * (limits.AMENDMENTS_BYTES * 2)):
        path.write_bytes(data)
        with pytest.raises(StorageError):
            AmendmentBook(RUN, world.owner.root_der, path)
    path.write_bytes(whole)
    path.chmod(0o644)
    with pytest.raises(StorageError, match="open to other users"):
        AmendmentBook(RUN, world.owner.root_der, path)


@given(body=st.binary(max_size=200), signature=st.binary(max_size=80))
@settings(max_examples=50, deadline=None)
def test_bytes_of_a_stranger_change_nothing(body: bytes, signature: bytes) -> None:
    book = AmendmentBook(RUN, _ROOT)
    with pytest.raises(ShoalError):
        book.adopt(SignedAmendments(body, signature))
    assert book.version == 0


def _root() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return World(Path(folder) / "owner").owner.root_der


_ROOT = _root()
