"""Join tokens and the owner's key: what is pasted, what lies on disk, what never shows."""

from __future__ import annotations

import io
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trust_world import ADDRESS, DAY, NOW, RUN, World

from shoal.protocol.admission import JoinToken, Membership, OwnerKey, read_token
from shoal.protocol.certificates import (
    verify_owner_signature,
)
from shoal.protocol.errors import (
    RecordInvalid,
    StorageError,
    TokenInvalid,
    UsageError,
)
from shoal.protocol.identity import (
    PeerKey,
    Role,
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "owner")


def test_a_token_survives_the_clipboard(world: World) -> None:
    token = world.token(Role.TRAINER, Role.INFERENCE)
    text = token.encode()
    assert JoinToken.parse(text) == token
    wrapped = " \n" + "\r\n  ".join(text[i : i + 72] for i in range(0, len(text), 72)) + "\n"
    assert JoinToken.parse(wrapped) == token
    assert token.roles == {Role.TRAINER, Role.INFERENCE}
    assert token.bootstrap == (ADDRESS,)
    assert len(text) <= 1100


def test_a_token_cut_anywhere_says_that_it_is_cut(world: World) -> None:
    text = world.token().encode()
    for length in range(len("shoal1-"), len(text)):
        with pytest.raises(TokenInvalid, match=f"cut off: {length} characters"):
            JoinToken.parse(text[:length])
    for start in range(1, len(text)):
        with pytest.raises(TokenInvalid):
            JoinToken.parse(text[start:])
    with pytest.raises(TokenInvalid, match="too long"):
        JoinToken.parse(text + text[-1])


@pytest.mark.parametrize(
    "damaged",
    ['"{}"', "“{}”", "\ufeff{}\n", "<{}>", "`{}`", "\u200b{}\u200b"],
    ids=["quotes", "typographic", "byte-order mark", "angles", "code", "zero width"],
)
def test_what_a_clipboard_adds_around_a_token_does_not_matter(world: World, damaged: str) -> None:
    token = world.token()
    text = token.encode()
    assert JoinToken.parse(damaged.format(text)) == token
    assert JoinToken.parse(damaged.format(text[:300] + "\u00ad\n" + text[300:])) == token


REFUSED = {
    "nothing": (" \n", ["the text is empty", "shoal up"]),
    "garbage": ("shoal1-garbageX", ["cut off: 15 characters, at least 445", "copy it whole"]),
    "no token": ("hello", ["starts with shoal1-", "5 characters", "copy it whole"]),
    "the command, too": ("shoal join {}", ["9 characters stand before the token", "from shoal1- on"]),
    "two dashes made one": ("{}—", ["has no '—', this one has after", "@FILE"]),
    "twice": ("{}{}", ["too long", "copy it whole"]),
    "a sentence": ("{}.", ["has no '.'"]),
    "another version": ("shoal2-abcdef", ["another version", "shoal2-", "install"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_text_says_what_is_wrong_with_it_and_what_helps(world: World, kind: str) -> None:
    """Of a text of 15 characters it said that 54,121 were expected."""
    text, said = REFUSED[kind]
    pasted = text.replace("{}", world.token().encode())
    with pytest.raises(TokenInvalid) as refused:
        JoinToken.parse(pasted)
    for words in said:
        assert words in str(refused.value)


def test_a_token_mistyped_in_its_length_says_so(world: World) -> None:
    text = world.token().encode()
    with pytest.raises(TokenInvalid, match="mistyped at its beginning"):
        JoinToken.parse("shoal1-zz" + text[9:])


def test_the_name_of_a_tokens_file_without_the_at_is_explained(world: World, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(world.token().encode())
    with pytest.raises(TokenInvalid, match=f"@{path}"):
        read_token(str(path))


def test_a_token_with_any_character_mistyped_is_refused(world: World) -> None:
    text = world.token().encode()
    for i in range(len(text)):
        for wrong in {"A", "b", "_", "+", "é"} - {text[i]}:
            with pytest.raises(TokenInvalid):
                JoinToken.parse(text[:i] + wrong + text[i + 1 :])


@given(st.one_of(st.text(max_size=200), st.text("ABCabc019-_", max_size=200).map("shoal1-".__add__)))
@settings(deadline=None)
def test_any_text_is_a_token_or_refused(text: str) -> None:
    with pytest.raises(TokenInvalid):
        JoinToken.parse(text)


def test_a_token_of_the_first_version_stays_readable() -> None:
    token = JoinToken.parse(GOLDEN)
    assert (token.token_id, token.run_id, token.bootstrap) == ("ac70cff397a0b08f", RUN, (ADDRESS,))


def test_a_token_whose_parts_do_not_fit_is_refused(world: World) -> None:
    token, other = world.token(), world.token()
    with pytest.raises(TokenInvalid, match="another key"):
        JoinToken.parse(replace(token, key=other.key).encode())
    with pytest.raises(TokenInvalid, match="contradicts"):
        JoinToken.parse(replace(token, root_der=token.certificate_der).encode())


def test_a_token_is_read_from_an_argument_a_file_or_standard_input(world: World, tmp_path: Path) -> None:
    token = world.token()
    path = tmp_path / "token"
    path.write_text(token.encode() + "\n")
    path.chmod(0o600)
    assert read_token(token.encode()) == (token, None)
    assert read_token(f"@{path}") == (token, None)
    assert read_token("-", io.StringIO(token.encode())) == (token, None)
    path.chmod(0o640)
    read, warning = read_token(f"@{path}")
    assert read == token
    assert warning is not None
    assert "chmod 600" in warning
    with pytest.raises(UsageError):
        read_token(f"@{tmp_path / 'absent'}")


def test_secrets_show_in_no_repr(world: World) -> None:
    token, key = world.token(), PeerKey.generate()
    member = Membership(token, key, lambda: NOW)
    shown = repr([token, key, member, world.owner, member.me, world.owner.tokens()])
    scalar = token.key.private_numbers().private_value
    secrets = (token.sealing_key, scalar.to_bytes(32, "big"), key.libp2p_identity()[4:36])
    for secret in secrets:
        for form in (repr(secret)[2:-1], secret.hex(), str(int.from_bytes(secret, "big"))):
            assert form not in shown
    assert token.encode() not in shown
    assert "PRIVATE" not in shown


def test_the_owners_files_are_private_and_the_register_holds_no_key(world: World) -> None:
    token = world.token(Role.INFERENCE)
    for path in world.owner.directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(world.owner.directory.stat().st_mode) == 0o700
    scalar = token.key.private_numbers().private_value.to_bytes(32, "big")
    register = (world.owner.directory / "tokens.jsonl").read_bytes()
    for form in (scalar, scalar.hex().encode(), token.sealing_key.hex().encode()):
        assert form not in register
    (issued,) = world.owner.tokens()
    assert (issued.token_id, issued.name, issued.roles, issued.not_after) == (
        token.token_id,
        "volunteer",
        frozenset({Role.INFERENCE}),
        NOW + 7 * DAY,
    )


def test_an_owner_reloads_and_is_never_overwritten(world: World) -> None:
    directory = world.owner.directory
    loaded = OwnerKey.load(directory)
    assert (loaded.root_der, loaded.sealing_key, loaded.run_id) == (
        world.owner.root_der,
        world.owner.sealing_key,
        RUN,
    )
    with pytest.raises(StorageError, match="already"):
        OwnerKey.create(directory, RUN, "again", NOW)
    with pytest.raises(StorageError, match="no owner's key"):
        OwnerKey.load(directory.parent)
    (directory / "owner.key").write_bytes(b"\xff" * 40)
    with pytest.raises(StorageError, match="backup"):
        OwnerKey.load(directory)


def test_a_register_line_torn_by_a_crash_spoils_no_other(world: World) -> None:
    first = world.token()
    with open(world.owner.directory / "tokens.jsonl", "ab") as file:
        file.write(b'{"id": "0123')
    second = world.token()
    assert [issued.token_id for issued in world.owner.tokens()] == [first.token_id, second.token_id]


def test_the_owners_signature_counts_for_its_root_label_and_data_only(world: World, tmp_path: Path) -> None:
    stranger = World(tmp_path / "stranger").owner
    signature = world.owner.sign(b"spec", b"data")
    verify_owner_signature(world.owner.root_der, b"spec", b"data", signature)
    for root, label, data in (
        (stranger.root_der, b"spec", b"data"),
        (world.owner.root_der, b"spe", b"cdata"),
        (world.owner.root_der, b"spec", b"Data"),
    ):
        with pytest.raises(RecordInvalid):
            verify_owner_signature(root, label, data, signature)


@pytest.mark.parametrize(("roles", "ttl_s"), [((), DAY), ((Role.TRAINER,), 0.0)])
def test_a_token_for_nothing_is_not_issued(world: World, roles: tuple[Role, ...], ttl_s: float) -> None:
    with pytest.raises(UsageError):
        world.owner.issue_token(roles, ttl_s, (), "", NOW)
    assert world.owner.tokens() == ()


GOLDEN = """
shoal1-Ak_prx3u7Rvj2soEtMEQYWfZ26RZFs6qCcguNUAOTGAIGhoYGRgbyAGD1dzA0NDUwBwarCYQrgWYi10T7rBeKbyk5wmPw
DK7XiYnl90iqr_dHzit2XWM02Ehh-7LK2nnO09vjfTbdr7n7gvjjUtD6-f8v725bILQ4qja4xdlUzgnbsYVV5hBrsAptIjzZONOx
dwXJxm1rjzpXWravlJkt8rWjdPingUZvnQERsr6d3IFljN8gnfP-X-H_8cMV0dx5zuO3y988GCJ7Okt_KggNJMZLXayQ9J6DvjUP
yMn4EBcIyNYwCEnzsRkc4PktDRjS_NEgyQDizQ8AbjintD109mfJfYx3FqSbDRl7sUVf9X-dvFmnL3y55TerLPW3otFWUL4YoQvX
j_v3cH9ap5n4HmL9G63g_nWoptuOd4rWFxokI81UUfiStQOXAoMjEzMLKxs7BycXNw8vHz8AoJCwiKiYuISklLSMrJy8kIcawrOf
56-YEO_FCc82UqxQxMulriJeJnssrzracpBKfb_rHs4-FRm71fn_tnrdXL5Ai2_v9dmAePmSF194sILAjoO_P-fmzwKPxh3UmnZ6
Rus_VKsBsVvtUO5pRS-x19Yty3OKe4XQ9Lt3aHWE_Z_u6Zt9Y5_d8bcbTMPv0vPVlLY5DVx6ue8Gxtm7lgYL7R0gtoOCcVpStmM_
wRE7i-qOXZijVYIONMAowuUgQyN9czNceSggGDvyhAn4zSPghDfYI-CPJOkDDcLx1y_Ko_cMrckY7ew1Lwyd283D_PKlCIA
"""
