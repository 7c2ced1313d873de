"""Who gets in and who does not: chains, roles, bindings, expiry, renewal (design section 5)."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st
from trust_world import DAY, NOW, RUN, World, forged_leaf

from shoal.protocol import limits
from shoal.protocol.admission import JoinToken, Membership
from shoal.protocol.certificate_form import BINDING_OID, TokenGrant
from shoal.protocol.certificates import (
    chain_of_pem,
    leaf_dns_name,
    make_leaf,
    make_token_certificate,
    verify_chain,
)
from shoal.protocol.errors import (
    AccessError,
    BindingInvalid,
    ChainInvalid,
    TokenExpired,
    TokenInvalid,
    UsageError,
    WrongRun,
)
from shoal.protocol.identity import (
    Contact,
    PeerKey,
    Role,
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "owner")


def test_members_recognise_each_other_with_the_roles_of_their_tokens(world: World) -> None:
    alice, bob = world.member(world.token(Role.TRAINER)), world.member(world.token(Role.OBSERVER))
    seen = bob.verify(alice.chain)
    assert seen == alice.me
    assert (seen.peer, seen.roles, seen.token_id) == (
        alice.key.peer,
        frozenset({Role.TRAINER}),
        alice.token.token_id,
    )
    assert seen.not_after == NOW + DAY
    assert bob.verify((*alice.chain, alice.token.root_der)) == seen
    pin = bob.verify_leaf_for_dial(Contact(alice.key.peer, ("a:1",), alice.chain))
    assert (pin.leaf_pem, pin.dns_name) == (alice.leaf_pem, leaf_dns_name(alice.key.peer))


def test_no_chain_or_one_of_another_length_is_refused(world: World, tmp_path: Path) -> None:
    alice, bob = world.member(), world.member()
    stranger_root = World(tmp_path / "stranger").owner.root_der
    leaf, token = alice.chain
    for chain in ((), (leaf,), (token, leaf), (leaf, leaf), (leaf, token, stranger_root), (leaf, token) * 2):
        with pytest.raises(ChainInvalid):
            bob.verify(chain)


def test_a_chain_under_another_root_is_refused(world: World, tmp_path: Path) -> None:
    stranger = World(tmp_path / "same run id, other root").member()
    with pytest.raises(ChainInvalid, match="forged"):
        world.member().verify(stranger.chain)


def test_a_chain_of_another_run_is_refused(world: World, tmp_path: Path) -> None:
    other = World(tmp_path / "other", run_id=bytes(32)).member()
    with pytest.raises(WrongRun):
        world.member().verify(other.chain)


def test_a_chain_with_any_byte_changed_is_refused(world: World) -> None:
    """Roles, run, expiry, names, keys and bindings are all under a signature."""
    alice, bob = world.member(), world.member()
    for which, der in enumerate(alice.chain):
        for i in range(len(der)):
            changed = list(alice.chain)
            changed[which] = der[:i] + bytes((der[i] ^ 1,)) + der[i + 1 :]
            with pytest.raises(AccessError):
                bob.verify(changed)


def test_a_volunteer_cannot_grant_himself_a_role(world: World) -> None:
    token = world.token(Role.OBSERVER)
    grant = TokenGrant(RUN, bytes.fromhex(token.token_id), ("owner",))
    raised = make_token_certificate(token.key, token.root_der, token.key.public_key(), grant, NOW, NOW + DAY)
    leaf_key = ec.generate_private_key(ec.SECP256R1()).public_key()
    leaf = make_leaf(token.key, raised, leaf_key, PeerKey.generate(), NOW)
    with pytest.raises(ChainInvalid):
        world.member().verify((leaf, raised))


def test_a_role_of_a_later_version_grants_nothing(world: World) -> None:
    root_key = world.owner._key  # only an owner of that later version could issue it
    token_key = ec.generate_private_key(ec.SECP256R1())
    grant = TokenGrant(RUN, bytes(8), ("juggler", "observer"))
    certificate = make_token_certificate(
        root_key, world.owner.root_der, token_key.public_key(), grant, NOW, NOW + DAY
    )
    leaf_key = ec.generate_private_key(ec.SECP256R1()).public_key()
    leaf = make_leaf(token_key, certificate, leaf_key, PeerKey.generate(), NOW)
    assert world.member().verify((leaf, certificate)).roles == {Role.OBSERVER}


def test_a_token_holder_cannot_pose_as_another_peer(world: World) -> None:
    """Everything but the victim's Ed25519 signature can be forged under a token of one's own."""
    victim, cheat, judge = world.member(), world.token(), world.member()
    posing = PeerKey.generate()
    posing.peer = victim.key.peer
    leaf_key = ec.generate_private_key(ec.SECP256R1()).public_key()
    leaf = make_leaf(cheat.key, cheat.certificate_der, leaf_key, posing, NOW)
    with pytest.raises(BindingInvalid):
        judge.verify((leaf, cheat.certificate_der))

    own = world.member(cheat)
    with pytest.raises(BindingInvalid):
        judge.verify_leaf_for_dial(Contact(victim.key.peer, ("a:1",), own.chain))


def test_a_binding_copied_under_another_token_is_refused(world: World) -> None:
    victim, cheat = world.member(), world.token()
    leaf = x509.load_der_x509_certificate(victim.chain[0])
    binding = leaf.extensions.get_extension_for_oid(BINDING_OID).value
    assert isinstance(binding, x509.UnrecognizedExtension)
    issuer = x509.load_der_x509_certificate(cheat.certificate_der)
    builder = (
        x509.CertificateBuilder()
        .subject_name(leaf.subject)
        .issuer_name(issuer.subject)
        .public_key(leaf.public_key())
        .serial_number(7)
        .not_valid_before(leaf.not_valid_before_utc)
        .not_valid_after(leaf.not_valid_after_utc)
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(leaf_dns_name(victim.key.peer))]), critical=False
        )
        .add_extension(binding, critical=False)
    )
    copied = builder.sign(cheat.key, hashes.SHA256()).public_bytes(Encoding.DER)
    with pytest.raises(BindingInvalid):
        world.member().verify((copied, cheat.certificate_der))


def test_a_leaf_may_not_sign_leaves_nor_outlive_its_day(world: World) -> None:
    token, judge = world.token(), world.member()
    peer = PeerKey.generate().peer
    for leaf, reason in (
        (forged_leaf(token, peer, bytes(64), ca=True), "CA certificate"),
        (forged_leaf(token, peer, bytes(64), days=2.0), "more than 24 hours"),
        (forged_leaf(token, peer, bytes(64), days=9.0), "outlives"),
    ):
        with pytest.raises(ChainInvalid, match=reason):
            judge.verify((leaf, token.certificate_der))
    with pytest.raises(BindingInvalid):
        judge.verify((forged_leaf(token, peer, bytes(64)), token.certificate_der))


def test_an_expired_leaf_is_refused_though_it_was_known(world: World) -> None:
    alice, bob = world.member(), world.member()
    bob.verify(alice.chain)
    world.now = NOW + DAY - 1
    bob.verify(alice.chain)
    world.now = NOW + DAY
    with pytest.raises(ChainInvalid, match="clock"):
        bob.verify(alice.chain)


def test_a_leaf_made_by_a_clock_an_hour_ahead_is_accepted(world: World) -> None:
    ahead, far_ahead = world.token(), world.token()
    hour = limits.CLOCK_SKEW_S
    early = Membership(ahead, PeerKey.generate(), lambda: NOW + hour)
    too_early = Membership(far_ahead, PeerKey.generate(), lambda: NOW + hour + 1)
    world.member().verify(early.chain)
    with pytest.raises(ChainInvalid, match="clock"):
        world.member().verify(too_early.chain)


def test_an_expired_token_is_refused_and_says_what_to_do(world: World) -> None:
    short = world.token(ttl_s=3600)
    alice, bob = world.member(short), world.member()
    assert alice.me.not_after == NOW + 3600, "a leaf never outlives its token"
    world.now = NOW + 3600
    with pytest.raises(TokenExpired, match="shoal token create"):
        bob.verify(alice.chain)
    with pytest.raises(TokenExpired, match="shoal token create"):
        world.member(short)


def test_verified_chains_are_remembered_within_a_bound(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "VERIFIED_CHAINS", 3)
    judge, token = world.member(), world.token()
    chains = [world.member(token).chain for _ in range(5)]
    for chain in chains * 2:
        judge.verify(chain)
    assert len(judge._known) == 3


@given(leaf=st.binary(max_size=600), token=st.binary(max_size=600))
@settings(deadline=None, max_examples=200)
def test_arbitrary_bytes_raise_access_errors_only(leaf: bytes, token: bytes) -> None:
    with pytest.raises(AccessError):
        verify_chain((leaf, token), token, RUN, NOW)
    with pytest.raises(AccessError):
        chain_of_pem(leaf + b"-----BEGIN CERTIFICATE-----\n" + token)


def test_mangled_certificates_raise_access_errors_only(world: World) -> None:
    """Cuts, overwrites and splices of real chains: they get deep into the parser."""
    alice, judge = world.member(), world.member()

    @given(st.data())
    @settings(deadline=None, max_examples=300)
    def mangle(data: st.DataObject) -> None:
        chain = list(alice.chain)
        which = data.draw(st.integers(0, 1))
        der = chain[which]
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(der))] * 2)))
        chain[which] = der[:start] + data.draw(st.binary(max_size=40)) + der[end:]
        if chain[which] != der:
            with pytest.raises(AccessError):
                judge.verify(chain)
            with pytest.raises(AccessError):
                verify_chain(chain, chain[1], RUN, NOW)

    mangle()


def test_a_certificate_over_the_size_limit_is_not_parsed(world: World) -> None:
    alice, bob = world.member(), world.member()
    for chain in (
        (alice.chain[0], bytes(limits.CERTIFICATE_BYTES + 1)),
        (bytes(limits.CERTIFICATE_BYTES + 1), alice.chain[1]),
    ):
        with pytest.raises(ChainInvalid, match="allowed"):
            bob.verify(chain)


def test_a_leaf_is_renewed_after_two_thirds_of_its_life(world: World) -> None:
    alice, bob = world.member(), world.member()
    before, key_before = alice.chain, alice.leaf_key_pem
    told: list[tuple[bytes, ...]] = []
    alice.renewed.append(lambda: told.append(alice.chain))
    world.now = NOW + 16 * 3600 - 1
    assert not alice.renew_due()
    world.now += 1
    assert alice.renew_due()
    alice.renew()
    assert told == [alice.chain]
    assert alice.chain != before
    assert alice.leaf_key_pem != key_before
    assert bob.verify(alice.chain).not_after == world.now + DAY
    bob.verify(before)  # the old one holds until it expires, so nothing breaks meanwhile
    assert not alice.renew_due()


def test_a_leaf_that_ends_with_its_token_is_not_renewed_in_vain(world: World) -> None:
    alice = world.member(world.token(ttl_s=3600))
    world.now = NOW + 3599
    assert not alice.renew_due()


def test_an_extended_token_lives_on_without_its_key_being_sent(world: World) -> None:
    token = world.token(ttl_s=3600)
    alice, bob = world.member(token), world.member()
    certificate = world.owner.extend_token(token.token_id, 30 * DAY, NOW)
    told: list[int] = []
    alice.renewed.append(lambda: told.append(1))
    assert alice.adopt_token_certificate(certificate)
    assert not alice.adopt_token_certificate(certificate)
    assert told == [1]
    world.now = NOW + 3601
    seen = bob.verify(alice.chain)
    assert (seen.token_id, seen.roles) == (token.token_id, token.roles)
    assert JoinToken.parse(alice.token.encode()).not_after == NOW + 30 * DAY
    assert [t.not_after for t in world.owner.tokens() if t.token_id == token.token_id] == [NOW + 30 * DAY]


def test_only_an_extension_of_the_own_token_by_the_owner_is_adopted(world: World, tmp_path: Path) -> None:
    alice, other = world.member(), world.token()
    stranger = World(tmp_path / "stranger")
    foreign = stranger.owner.extend_token(stranger.token().token_id, 99 * DAY, NOW)
    with pytest.raises(TokenInvalid):
        alice.adopt_token_certificate(world.owner.extend_token(other.token_id, 99 * DAY, NOW))
    with pytest.raises(ChainInvalid):
        alice.adopt_token_certificate(foreign)
    with pytest.raises(ChainInvalid):
        alice.adopt_token_certificate(b"anything")
    with pytest.raises(UsageError):
        world.owner.extend_token("00" * 8, DAY, NOW)
    assert alice.token.not_after == NOW + 7 * DAY
