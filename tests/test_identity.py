"""Peer ids, peer keys and their files."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trust_world import World

from shoal.protocol.errors import (
    RecordInvalid,
    StorageError,
)
from shoal.protocol.identity import (
    PeerId,
    PeerKey,
    peer_of_public_key,
    public_key_of,
    verify_signature,
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "owner")


def test_a_peer_id_is_libp2ps_and_holds_the_public_key() -> None:
    key = PeerKey.from_seed(bytes(32))
    # What p2pd of hivemind 1.1.12 calls itself when it is given this key's file.
    assert key.peer == "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
    assert peer_of_public_key(public_key_of(key.peer)) == key.peer
    identity = key.libp2p_identity()
    assert identity[:4].hex() == "08011240"
    assert identity[4:36] == bytes(32)
    assert identity[36:] == public_key_of(key.peer)


def test_a_signature_counts_for_its_peer_label_and_data_only() -> None:
    key, other = PeerKey.generate(), PeerKey.generate()
    signature = key.sign(b"record", b"data")
    verify_signature(key.peer, b"record", b"data", signature)
    for peer, label, data in (
        (other.peer, b"record", b"data"),
        (key.peer, b"recor", b"ddata"),
        (key.peer, b"record", b"datA"),
    ):
        with pytest.raises(RecordInvalid):
            verify_signature(peer, label, data, signature)


@given(st.text(max_size=80))
@settings(deadline=None)
def test_text_that_is_no_peer_id_is_refused(text: str) -> None:
    with pytest.raises(RecordInvalid):
        public_key_of(PeerId(text))


def test_a_peer_id_has_one_spelling() -> None:
    peer = PeerKey.generate().peer
    for other in (f"{peer} ", f"1{peer}", f"{peer}\n", peer.lower()):
        with pytest.raises(RecordInvalid):
            public_key_of(PeerId(other))


def test_a_peer_key_is_made_once_and_only_its_user_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "home" / "peer.key"
    key = PeerKey.load_or_create(path)
    assert PeerKey.load_or_create(path).peer == key.peer
    assert path.read_bytes() == key.libp2p_identity()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path], "no temporary file stays"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_peer_key_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "peer.key"
    PeerKey.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(StorageError, match="chmod 600"):
        PeerKey.load_or_create(path)


def test_a_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(StorageError, match="chmod go-w"):
        PeerKey.load_or_create(tmp_path / "peer.key")


@pytest.mark.parametrize("damage", [b"", b"\x08", bytes(68), bytes(1000)])
def test_a_damaged_peer_key_is_named_not_replaced(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "peer.key"
    path.write_bytes(damage)
    path.chmod(0o600)
    with pytest.raises(StorageError, match=r"peer\.key"):
        PeerKey.load_or_create(path)
    assert path.read_bytes() == damage
