"""Who is shut out stays shut out."""

from __future__ import annotations

import contextlib
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from trust_world import NOW, RUN, World

from shoal.protocol import limits
from shoal.protocol.admission import Membership, OwnerKey
from shoal.protocol.errors import (
    MessageTooLarge,
    RecordInvalid,
    ShoalError,
    StorageError,
    TokenRevoked,
    UsageError,
)
from shoal.protocol.identity import (
    PeerId,
    PeerKey,
    VerifiedPeer,
)
from shoal.protocol.revocation import (
    LABEL,
    RevocationBook,
    RevocationList,
    RevocationNotice,
    SignedRevocations,
    sign_revocations,
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "owner")


def test_a_revoked_token_or_peer_is_refused_at_once_and_for_good(world: World, tmp_path: Path) -> None:
    by_token, by_peer, spared = world.member(), world.member(), world.member()
    path = tmp_path / "state" / "revocations"
    book = RevocationBook(RUN, world.owner.root_der, path)
    judge = Membership(world.token(), PeerKey.generate(), lambda: world.now, book)
    for member in (by_token, by_peer, spared):
        judge.verify(member.chain)
    told: list[int] = []
    book.changed.append(lambda: told.append(book.version))

    assert book.adopt(world.owner.revoke([by_token.token.token_id]))
    assert book.adopt(world.owner.revoke(peers=[by_peer.key.peer]))
    assert told == [1, 2]
    for member in (by_token, by_peer):
        with pytest.raises(TokenRevoked):
            judge.verify(member.chain)
    judge.verify(spared.chain)
    by_token.renew()
    with pytest.raises(TokenRevoked):
        judge.verify(by_token.chain)

    restarted = RevocationBook(RUN, world.owner.root_der, path)
    assert restarted.current == book.current
    assert restarted.signed == book.signed
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_only_a_newer_list_that_keeps_all_entries_is_adopted(world: World, tmp_path: Path) -> None:
    owner = world.owner
    first = owner.revoke([world.token().token_id])
    second = owner.revoke([world.token().token_id])
    book = RevocationBook(RUN, owner.root_der)
    assert book.adopt(second)
    assert not book.adopt(first), "an old list cannot bring anybody back"
    assert not book.adopt(second)
    forgetful = sign_revocations(RevocationList(3), RUN, owner.sign)
    with pytest.raises(RecordInvalid, match="lacks"):
        book.adopt(forgetful)
    stranger = World(tmp_path / "stranger").owner
    with pytest.raises(RecordInvalid, match="owner"):
        book.adopt(sign_revocations(RevocationList(9), RUN, stranger.sign))
    with pytest.raises(RecordInvalid, match="another run"):
        book.adopt(sign_revocations(RevocationList(9), bytes(32), owner.sign))
    with pytest.raises(RecordInvalid):
        book.adopt(replace(second, notice=replace(second.notice, version=9)))
    with pytest.raises(RecordInvalid):
        book.adopt(SignedRevocations(replace(second.notice, version=9), second.entries + b"t00\n"))
    assert book.version == 2


def test_a_list_is_bounded_and_the_longest_one_passes(world: World) -> None:
    full = RevocationList(1, frozenset(f"{i:016x}" for i in range(limits.REVOCATIONS)))
    book = RevocationBook(RUN, world.owner.root_der)
    assert book.adopt(sign_revocations(full, RUN, world.owner.sign))
    with pytest.raises(MessageTooLarge):
        sign_revocations(full.extended([], [PeerKey.generate().peer]), RUN, world.owner.sign)
    assert book.signed is not None
    with pytest.raises(MessageTooLarge):
        book.adopt(SignedRevocations(replace(book.signed.notice, version=2), bytes(10**6)))


def test_the_owners_daemon_sees_what_the_command_line_revoked(world: World) -> None:
    book = RevocationBook(RUN, world.owner.root_der, world.owner.revocations_path)
    assert not book.reload()
    OwnerKey.load(world.owner.directory).revoke(["ab" * 8])
    assert book.reload()
    assert not book.reload()
    assert VerifiedPeer(PeerId("p"), frozenset(), "ab" * 8, NOW) in book.current


def test_a_pardoned_peer_is_let_back_by_newer_lists_only(world: World) -> None:
    judge = Membership(world.token(), PeerKey.generate(), lambda: world.now)
    ann, bob = world.member(), world.member()
    book, owner = judge.revocations, world.owner
    banned = owner.revoke([bob.token.token_id], [ann.key.peer])
    assert book.adopt(banned)
    pardon = owner.pardon(ann.key.peer)
    assert book.adopt(pardon)
    judge.verify(ann.chain)
    assert not book.adopt(banned), "a replay of the ban"
    with pytest.raises(TokenRevoked):
        judge.verify(bob.chain)

    assert book.adopt(owner.revoke(peers=[ann.key.peer]))
    with pytest.raises(TokenRevoked):
        judge.verify(ann.chain)
    old_copy = RevocationList(9, frozenset(), frozenset(), frozenset({(ann.key.peer, 2)}))
    with pytest.raises(RecordInvalid, match="lacks entries"):
        book.adopt(sign_revocations(old_copy, RUN, owner.sign))
    late = RevocationBook(RUN, owner.root_der)  # has missed all in between
    assert late.adopt(banned)
    assert late.adopt(owner.pardon(ann.key.peer))
    assert ann.me not in late.current
    again = RevocationBook(RUN, owner.root_der, owner.revocations_path)
    assert again.current == late.current


@pytest.mark.parametrize("entry", ["", " 3", " 0", " x", " 2 2", "  1", " 1.0", " -1"])
def test_a_pardon_that_cannot_be_is_refused(world: World, entry: str) -> None:
    peer = PeerKey.generate().peer
    for entries in (f"a{peer}{entry}\n", f"a{peer} 1\np{peer}\n"):
        bare = RevocationNotice(RUN, 2, blake3(entries.encode()).digest(), b"")
        notice = replace(bare, signature=world.owner.sign(LABEL, bare.signed_bytes()))
        with pytest.raises(RecordInvalid):
            RevocationBook(RUN, world.owner.root_der).adopt(SignedRevocations(notice, entries.encode()))


@pytest.mark.parametrize("wrong", ["", "zz", "AB" * 8, "ab" * 7, " " + "ab" * 8, "ab\n" * 8])
def test_what_is_no_id_is_not_revoked(world: World, wrong: str) -> None:
    with pytest.raises(UsageError):
        world.owner.revoke([wrong])
    with pytest.raises(UsageError):
        world.owner.revoke(peers=[PeerId(wrong)])


def test_a_damaged_list_on_disk_does_not_pass_for_an_empty_one(world: World) -> None:
    world.owner.revoke(["ab" * 8])
    path = world.owner.revocations_path
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:20], bytes(len(whole))):
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match="damaged"):
            RevocationBook(RUN, world.owner.root_der, path)


def test_entries_of_any_bytes_raise_errors_of_the_tree_only(world: World) -> None:
    """Signed by the owner even, so that they reach the parser."""
    book = RevocationBook(RUN, world.owner.root_der)

    @given(st.one_of(st.binary(max_size=200), st.text("pt0af\n", max_size=40).map(str.encode)))
    @settings(deadline=None)
    def fuzz(entries: bytes) -> None:
        notice = RevocationNotice(RUN, book.version + 1, blake3(entries).digest(), b"")
        signature = world.owner.sign(LABEL, notice.signed_bytes())
        with contextlib.suppress(ShoalError):
            book.adopt(SignedRevocations(replace(notice, signature=signature), entries))
        with pytest.raises(ShoalError):
            book.adopt(SignedRevocations(replace(notice, version=99, signature=signature), entries))

    fuzz()


def test_a_list_counts_even_if_the_disk_refuses_it(world: World, tmp_path: Path) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise StorageError(f"no room for {path}")

    book = RevocationBook(RUN, world.owner.root_der, tmp_path / "revocations", refuse)
    told: list[int] = []
    book.changed.append(lambda: told.append(book.version))
    with pytest.raises(StorageError):
        book.adopt(world.owner.revoke(["ab" * 8]))
    assert told == [1]
    assert book.is_revoked(VerifiedPeer(PeerId("p"), frozenset(), "ab" * 8, NOW))
