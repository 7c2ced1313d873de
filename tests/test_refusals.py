"""What is refused, with a clear error and no effect: the one place to see promise P8 kept on the real stack.

The tests that show each item. Those without a file are below, on real sockets with mutual TLS; (…) shortens.

no certificate           test_grpc_transport: no_certificate_and_a_certificate_of_another_run_are_refused
forged chain             test_a_forged_leaf_passes_tls_and_nothing_else; test_trust: every byte of a chain
expired leaf, token      test_an_expired_leaf_(…), test_an_expired_token_from_an_open_file_(…)
revoked                  test_a_revoked_peers_streams_(…), test_a_joiner_with_a_revoked_token_is_told_so,
                         test_a_banned_peer_that_comes_back_(…);
                         test_grpc_transport: a_revoked_peer_is_refused_in_words_and_its_streams_end
wrong role               test_roles_are_checked_before_any_handler_of_a_replica_runs
stages without a right   test_claimed_stages: records and beats of who may not train
wrong run                test_grpc_transport: no_certificate_and_a_certificate_of_another_run_are_refused
truncated token          test_a_cut_token_(…); test_tokens: a_token_cut_anywhere_says_that_it_is_cut
wrong peer id            test_grpc_transport: an_impostor_at_the_right_address_is_not_talked_to
posing as another peer   test_a_forged_leaf_passes_tls_and_nothing_else;
                         test_grpc_transport: a_contact_with_somebody_elses_certificates_is_refused
a stranger's DHT call    test_directory: a_plain_libp2p_caller_is_refused_and_leaves_no_trace,
                         a_stranger_neither_reads_nor_writes
forged, replayed orders  test_forged_and_replayed_orders_(…), test_a_spec_that_is_not_(…); test_amendments,
                         test_orders (the control socket's border)
forged, replayed record  test_forged_and_replayed_records_(…); test_records;
                         test_directory: a_member_cannot_forge_replay_or_mask_anothers_record
bad introductions        test_introductions: who_asks_without_end_(…), a_liars_introduction_(…),
                         a_record_that_comes_with_a_name_(…)
ids ground to be near    test_gossip: who_grinds_ids_next_to_a_peer_(…), in swarms of any size
lies of being busy       test_admission: who_is_always_busy_and_lies_(…)
made-up replicas         test_admission: records_that_lead_nowhere_(…)
lies at the door         test_liars_at_the_door
bad frames               test_frames_that_are_cut_oversized_or_out_of_turn_(…); test_framing: every bit
unknown spec keys        test_unknown_keys_of_a_run_file_(…); test_spec, test_cli
another's spec           test_a_spec_that_is_not_the_owners_is_refused_whoever_tells_it
bad training messages    the tests of pipeline and rounds below; for owners and donors that send rubbish in
                         the middle of a round: test_outer_faults, test_recovery
a copy's guardian        test_guardians: what_is_handed_to_a_guardian_(…), a_guardian_that_lies_(…)
bad tuning requests      test_tuning: requests_that_do_not_fit_(…), more_requests_than_fit_(…)
a wrong tokenizer        test_serve_model: a_tokenizer_comes_from_whoever_has_the_right_one
bad sessions             test_session_refusals: sessions_that_do_not_fit_(…), rows_that_do_not_fit_(…),
                         a_thousand_streams_(…); test_sessions: a_client_that_never_reads_(…)
open files               test_an_expired_token_from_an_open_file_(…); test_identity, test_tokens, test_cli
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from members_process import peer as members_peer
from pipeline_world import batches
from refusals_world import (
    GroupPeer,
    Known,
    Peer,
    certified,
    never,
    pipeline_spec,
    raw_call,
    say,
)
from transport_world import ANYBODY, Note, Run, play_run
from xxhash import xxh3_64_digest

from shoal.dht.beats import METHOD as BEAT
from shoal.dht.beats import Beat, RosterRecords
from shoal.dht.directory import PeerRecord, SignedRecord
from shoal.dht.records import sign_record
from shoal.dht.view import SwarmView
from shoal.node import paths
from shoal.node.owner.home import OwnerHome
from shoal.node.presence import Listening, present
from shoal.node.revoked import leave_when_revoked
from shoal.node.signed_spec import LABEL, ROLES, SpecReply, SpecRequest, fetch_spec
from shoal.node.signed_spec import METHOD as SPEC
from shoal.protocol import limits
from shoal.protocol.admission import Membership, OwnerKey
from shoal.protocol.amendments import (
    PAUSED,
    RUNNING,
    STOPPED,
    Amendments,
    SignedAmendments,
    sign_amendments,
)
from shoal.protocol.certificate_form import TokenGrant
from shoal.protocol.certificates import make_leaf, make_token_certificate, pem_of
from shoal.protocol.errors import (
    BindingInvalid,
    Busy,
    ChainInvalid,
    FrameInvalid,
    MessageInvalid,
    MessageTooLarge,
    NotHere,
    ProtocolViolation,
    RecordInvalid,
    ShoalError,
    SpecError,
    StageEmpty,
    Stale,
    StreamBroken,
    StreamEnded,
    TokenExpired,
    TokenRevoked,
    WrongRole,
)
from shoal.protocol.framing import FrameEncoder, FrameKind
from shoal.protocol.grpc_settings import grpc
from shoal.protocol.identity import PeerId, PeerKey, Role
from shoal.protocol.revocation import RevocationBook, RevocationList, file_bytes, sign_revocations
from shoal.protocol.transport import Channel, Stream, Transport, call
from shoal.protocol.wire import decode, encode
from shoal.training.methods import at_stage
from shoal.training.outer import follow
from shoal.training.outer.entry import SKIP, Contributor, Entry, Seat, bitmap, draft_id
from shoal.training.outer.line import Line, lifeline
from shoal.training.outer.messages import (
    Answer,
    ChunkRequest,
    Commit,
    ContributedPart,
    Contributing,
    EntriesRequest,
    Go,
    ManifestRequest,
    OrdersRequest,
    PartRequest,
    Prepare,
    PublishedPart,
    Publishing,
    Report,
    StateRequest,
)
from shoal.training.outer.policy import owners
from shoal.training.pipeline.inference import ask
from shoal.training.pipeline.messages import (
    APPLIED,
    TENTATIVE,
    UNKNOWN,
    Activations,
    Adopt,
    Adopted,
    CommitChain,
    Gradient,
    Infer,
    Inferred,
    Link,
    MicroBatch,
    Propagate,
    QueryChain,
    Verdict,
    Working,
)
from shoal.training.pipeline.settlement import admits
from shoal.training.recovery.moments import MomentsRequest, SecondMoments
from shoal.training.spec import RunSection, RunSpec

HOUR = 3600.0


# --- at the door: certificates, roles, frames


def test_a_forged_leaf_passes_tls_and_nothing_else(tmp_path: Path) -> None:
    """A token's holder can mint any leaf; what he cannot make is the signature of the peer he poses as."""

    async def scene(run: Run) -> None:
        server = run.transport()
        server.serve("work", never, ANYBODY)
        await server.start()
        run.learn(server)
        victim, cheat = run.member(), run.trust.token(Role.OBSERVER)
        key = ec.generate_private_key(ec.SECP256R1())
        key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        posing = PeerKey.generate()
        posing.peer = victim.key.peer
        leaf = make_leaf(cheat.key, cheat.certificate_der, key.public_key(), posing, run.trust.now)
        chain_pem = pem_of(leaf) + pem_of(cheat.certificate_der)
        for told in await raw_call(run, server, chain_pem, key_pem, "work"):
            assert isinstance(told, BindingInvalid)
            assert "posing as another peer" in str(told)
            assert cheat.token_id in str(told), "bans attach to the token"
        grant = TokenGrant(cheat.run_id, bytes.fromhex(cheat.token_id), ("owner",))
        raised = make_token_certificate(
            cheat.key, cheat.root_der, cheat.key.public_key(), grant, run.trust.now, cheat.not_after
        )
        leaf = make_leaf(cheat.key, raised, key.public_key(), PeerKey.generate(), run.trust.now)
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):  # by TLS itself
            await raw_call(run, server, pem_of(leaf) + pem_of(raised), key_pem, "work")
        assert server.counters().refusals == {"BindingInvalid": 2}
        assert server.counters().streams_in == 0

    play_run(scene, tmp_path)


def test_an_expired_leaf_and_an_expired_token_are_refused_with_the_next_step(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        clock = [time.time()]
        member = Membership(run.trust.token(), PeerKey.generate(), lambda: clock[0])
        run.memberships[member.me.peer] = member
        server = run.transport(member=member)
        server.serve("work", never, ANYBODY)
        await server.start()
        run.learn(server)
        short = run.member(token=run.trust.token(ttl_s=2 * HOUR))
        for ahead_s, caller, kind, advice in (
            (3 * HOUR, short, TokenExpired, "shoal token create"),
            (25 * HOUR, run.member(), ChainInvalid, "clock"),
        ):
            clock[0] = time.time() + ahead_s
            with pytest.raises(kind, match=advice):
                await call(run.transport(member=caller), server.me, "work", Note(1), Note, timeout_s=10)
        assert server.counters().refusals == {"TokenExpired": 1, "ChainInvalid": 1}

    play_run(scene, tmp_path)


def test_roles_are_checked_before_any_handler_of_a_replica_runs(tmp_path: Path) -> None:
    """Observers and inference clients reach no training method of a real replica and a real group member."""

    async def scene(run: Run) -> None:
        hop = await Peer(run, pipeline_spec(), 1, Known()).start(run)
        group = await GroupPeer(run).start(run)
        before = hop.state(), group.state()
        names = ("round", "contribute", "publish", "part", "entries", "orders", "manifest", "chunks", "state")
        doors = [
            (hop.me, at_stage(1, "propagate")),
            (hop.me, at_stage(1, "commit")),
            (hop.me, at_stage(1, "moments")),
            *((group.me, f"outer.0.{name}") for name in names),
        ]
        observer, client = run.transport(Role.OBSERVER), run.transport(Role.INFERENCE)
        for caller in (observer, client):
            for target, method in doors:
                with pytest.raises(WrongRole, match=r"is for owner, trainer; the token of .* grants"):
                    await call(caller, target, method, Note(1), Note, timeout_s=10)
        with pytest.raises(WrongRole, match=r"stage\.1\.infer is for owner, trainer"):
            await call(observer, hop.me, at_stage(1, "infer"), Note(1), Note, timeout_s=10)
        assert (hop.state(), group.state()) == before
        assert hop.transport.counters().refusals == {"WrongRole": 7}
        assert group.transport.counters().refusals == {"WrongRole": 2 * len(names)}

    play_run(scene, tmp_path)


def sealed(kind: int, sequence: int, body: bytes) -> bytes:
    """A frame with a right checksum, whatever its body says."""
    prefix = struct.pack("!BI", kind, sequence)
    return prefix + xxh3_64_digest(prefix + body) + body


def test_frames_that_are_cut_oversized_or_out_of_turn_reach_no_handler(tmp_path: Path) -> None:
    """From a member with a good certificate and a modified program."""
    (good,) = FrameEncoder().message(Note(1, "text"), b"payload")
    claim = struct.pack("!BHQ", 4, 0, 1 << 40) + b"Note"
    cases: tuple[tuple[tuple[bytes, ...], type[ShoalError], str], ...] = (
        ((good[:-1],), FrameInvalid, "checksum"),
        ((good[:5],), FrameInvalid, "5 bytes"),
        ((good[:-1] + bytes([good[-1] ^ 1]),), FrameInvalid, "checksum"),
        ((sealed(FrameKind.HEAD, 1, b""),), FrameInvalid, "frames were lost"),
        ((sealed(FrameKind.DATA, 0, b"payload"),), FrameInvalid, "before the message"),
        ((sealed(77, 0, b""),), FrameInvalid, "unknown kind"),
        ((sealed(FrameKind.HEAD, 0, claim),), MessageTooLarge, "1000 are allowed"),
        ((), StreamBroken, "without END"),
    )

    async def scene(run: Run) -> None:
        outcomes: list[ShoalError] = []

        async def handler(stream: Stream) -> None:
            try:
                await stream.receive(Note, max_payload_bytes=1000)
            except ShoalError as error:
                outcomes.append(error)
                raise

        server, member = run.transport(), run.member()
        troubles: list[PeerId] = []
        server.on_trouble = lambda peer, error: troubles.append(peer)
        server.serve("work", handler, ANYBODY)
        await server.start()
        run.learn(server)
        for frames, kind, words in cases:
            hello, told = await raw_call(run, server, *certified(member), "work", *frames)
            assert hello is None, "the member itself is welcome"
            assert type(told) is kind
            assert words in str(told)
            assert type(outcomes.pop()) is kind
        violations = [kind for _, kind, _ in cases if issubclass(kind, ProtocolViolation)]
        assert troubles == [member.me.peer] * len(violations)
        assert not outcomes

        huge = bytes(limits.FRAME_BYTES * 3)
        with pytest.raises(grpc.aio.AioRpcError, match="RESOURCE_EXHAUSTED"):  # gRPC itself
            await raw_call(run, server, *certified(member), "work", huge)
        assert server.counters().bytes_in["work"] < limits.FRAME_BYTES
        # No message came: the handler was cancelled, or saw the stream break before that.
        assert {type(outcome) for outcome in outcomes} <= {StreamBroken}
        while server.counters().streams_in:
            await asyncio.sleep(0.01)

    play_run(scene, tmp_path)


# --- members: revocation and records on live heartbeat streams


def hears(peer: PeerId) -> Callable[[SwarmView], bool]:
    """Whether a view has this peer and a beat of its own."""
    return lambda view: (member := view.get(peer)) is not None and member.beat is not None


def test_a_revoked_peers_streams_are_closed_and_new_ones_refused(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        owner, now = run.trust.owner, run.trust.now
        tokens = [owner.issue_token([Role.TRAINER], HOUR, (), name, now) for name in ("ann", "bob")]
        async with members_peer(tokens[0]) as ann, members_peer(tokens[1]) as bob:
            await ann.learn((bob.own_record()[0],), "the test")
            for one, other in ((ann, bob), (bob, ann)):
                await one.wait_for(hears(other.me), 40.0)
            listed = RevocationList().extended([tokens[1].token_id], [])
            ann.revocations.adopt(sign_revocations(listed, owner.run_id, owner.sign))
            await ann.wait_for(lambda view: view.get(bob.me) is None, 20.0)
            door: Transport = ann._transport
            while door.counters().streams_in or door.counters().streams_out:
                await asyncio.sleep(0.01)
            with pytest.raises(TokenRevoked, match="only a new token helps"):
                await call(bob._transport, ann.me, BEAT, Beat(), Beat, timeout_s=10)
            assert door.counters().refusals["TokenRevoked"] >= 1
            assert ann.view().get(bob.me) is None

    play_run(scene, tmp_path)


def test_forged_and_replayed_records_on_a_heartbeat_stream_change_no_table(tmp_path: Path) -> None:
    """Carol is a member and passes on what Ann never said, and what Ann no longer says."""

    async def scene(run: Run) -> None:
        owner = run.trust.owner
        token = run.trust.token()
        ann, carol = run.member(), run.member()
        sender = run.transport(member=carol)

        def record(sequence: int, **changes: object) -> PeerRecord:
            fields: dict[str, object] = {
                "peer": ann.me.peer,
                "incarnation": 1,
                "sequence": sequence,
                "issued_unix_s": time.time(),
                "ttl_s": 30.0,
                "state": "online",
                "stages": (0,),
                "name": "ann",
                "addresses": ("127.0.0.1:5000",),
                "chain": ann.chain,
                "device": "cpu",
                "tokens_per_s": 0.0,
                "version": "0",
            }
            return PeerRecord(**{**fields, **changes})  # type: ignore[arg-type]

        def signed(sequence: int, **changes: object) -> SignedRecord:
            return sign_record(record(sequence, **changes), ann.key, owner.run_id)

        old, new = signed(1, stages=(1,)), signed(2)
        lie = encode(record(9, addresses=("127.0.0.1:6666",)))
        forged = SignedRecord(lie, carol.key.sign(b"shoal record", owner.run_id + lie))
        borrowed = signed(8, chain=carol.chain)
        stale = signed(7, issued_unix_s=time.time() - 3600.0)
        elsewhere = sign_record(record(6), ann.key, bytes(range(32)))
        async with members_peer(token) as bob:
            await bob.learn((new,), "the test")
            known = bob.own_record()[0]
            run.contacts.learn(decode(PeerRecord, known.record).contact())
            for wrong in (forged, borrowed, stale, elsewhere, old):
                async with sender.open(bob.me, BEAT) as stream:
                    await stream.send(RosterRecords((wrong,)))
                    await stream.end()
                    with contextlib.suppress(ShoalError):
                        while True:
                            await stream.receive(Beat, RosterRecords)
                member = bob.view().get(ann.me.peer)
                assert member is not None
                assert (member.stages, member.incarnation) == ((0,), 1)
            assert bob.health().roster.refused == 4, "an old record is no lie, only no news"
            while bob._transport.counters().streams_in:  # the last one is at its end
                await asyncio.sleep(0.01)

    play_run(scene, tmp_path)


async def beats_with(sender: Transport, peer: PeerId, signed: SignedAmendments) -> None:
    """Say that on a heartbeat stream, and hear the other side out."""
    async with sender.open(peer, BEAT) as stream:
        await stream.send(signed)
        await stream.end()
        while True:
            await stream.receive(Beat, RosterRecords, SignedAmendments)


def test_forged_and_replayed_orders_on_a_heartbeat_stream_change_nothing(tmp_path: Path) -> None:
    """Carol is a member and says what the owner never ordered, or no longer orders."""

    async def scene(run: Run) -> None:
        owner = run.trust.owner
        stranger = OwnerKey.create(tmp_path / "stranger", owner.run_id, "liar", run.trust.now)
        carol = run.member()
        sender = run.transport(member=carol)
        run_id, newer = owner.run_id, Amendments(owner.run_id, 9, STOPPED)
        old = sign_amendments(Amendments(run_id, 1, PAUSED), owner.sign)
        cases = (
            (sign_amendments(newer, stranger.sign), RecordInvalid),
            (sign_amendments(Amendments(bytes(range(32)), 9, STOPPED), owner.sign), RecordInvalid),
            (SignedAmendments(encode(newer), old.signature), RecordInvalid),
            (SignedAmendments(b"\xff" * 100, old.signature), MessageInvalid),
            (old, None),  # a replay is no lie, only no news
        )
        async with members_peer(run.trust.token()) as bob:
            assert bob.amendments.adopt(old)
            assert bob.amendments.adopt(sign_amendments(Amendments(run_id, 2), owner.sign))
            run.contacts.learn(decode(PeerRecord, bob.own_record()[0].record).contact())
            for signed, kind in cases:
                with pytest.raises(kind or StreamEnded):
                    await beats_with(sender, bob.me, signed)
                assert (bob.amendments.version, bob.amendments.current.state) == (2, RUNNING)
            while bob._transport.counters().streams_in:
                await asyncio.sleep(0.01)

    play_run(scene, tmp_path)


# --- the pipeline: what a member with a good token may send to a hop


@contextlib.asynccontextmanager
async def hop_and_caller(run: Run) -> AsyncIterator[tuple[Peer, Transport]]:
    hop = await Peer(run, pipeline_spec(), 1, Known()).start(run)
    yield hop, run.transport()


async def ask_hop(caller: Transport, hop: Peer, request: Propagate, payload: bytes) -> object:
    """A request and its activations; no END, which would say that nobody wants the answer."""
    async with asyncio.timeout(20), caller.open(hop.me, at_stage(1, "propagate"), Channel.BULK) as stream:
        await stream.send(request)
        await stream.send(Activations(), payload)
        return (await stream.receive(Working, Gradient)).header


def test_who_asks_for_moments_in_other_words_or_too_early_is_told_so(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        async with hop_and_caller(run) as (hop, caller):
            before, method = hop.state(), at_stage(1, "moments")
            for request, payload, kind, words in (
                (Note(1), b"", MessageInvalid, "Note"),
                (MomentsRequest(), b"more", MessageTooLarge, "4 payload bytes"),
                (MomentsRequest(), b"", NotHere, "no inner step"),
            ):
                with pytest.raises(kind, match=words):
                    await call(caller, hop.me, method, request, SecondMoments, timeout_s=10, payload=payload)
            assert hop.state() == before

    play_run(scene, tmp_path)


def test_malformed_micro_batches_leave_no_trace_at_a_hop(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        async with hop_and_caller(run) as (hop, caller):
            me, before, good = caller.me, hop.state(), hop.payload()
            nan, huge = float("nan"), 3.0e38
            someone = run.member().me.peer
            cases: tuple[tuple[Propagate, bytes, type[ShoalError], str], ...] = (
                (hop.request(me, stage=0), good, Stale, "holds stage 1"),
                (hop.request(me, stage=2), good, Stale, "holds stage 1"),
                (hop.request(me), good[:-2], MessageInvalid, "hidden states take"),
                (hop.request(me), good[:50], MessageInvalid, "tokens alone take"),
                (hop.request(me), b"", MessageInvalid, "tokens alone take"),
                (hop.request(me), good + bytes(2), MessageTooLarge, "are allowed"),
                (hop.request(me, sequences=1), good, MessageTooLarge, "are allowed"),
                (hop.request(me, sequences=3), good, MessageInvalid, "3 sequences"),
                (hop.request(me, codec="int8"), good, MessageInvalid, "use float32, not int8"),
                (hop.request(me), hop.payload(token=10**6), MessageInvalid, "outside the vocabulary"),
                (hop.request(me), hop.payload(token=-1), MessageInvalid, "outside the vocabulary"),
                (hop.request(me), hop.payload(value=nan), MessageInvalid, "NaN or infinity"),
                (hop.request(me), hop.payload(value=-float("inf")), MessageInvalid, "NaN or infinity"),
                (hop.request(me), hop.payload(value=huge), MessageInvalid, "overflows at stage 1"),
                (hop.request(me, chain=()), good, MessageInvalid, "must lead from driver"),
                (hop.request(me, chain=(Link(1, me, 0),)), good, MessageInvalid, "must lead from driver"),
                (hop.request(me, chain=(Link(0, someone, 0),)), good, MessageInvalid, "must lead from"),
                (hop.request(someone), good, MessageInvalid, "must lead from driver"),
                (hop.request(me, adopt=(Link(2, me, 0),)), good, MessageInvalid, "hops to adopt"),
                (hop.request(me, adopt=(Link(1, me, 0),) * 9), good, MessageInvalid, "hops to adopt"),
                (hop.request(me, adopt=(Link(2, me, 0),) * 257), good, MessageInvalid, "adopt"),
            )
            for request, payload, kind, words in cases:
                with pytest.raises(kind, match=words):
                    await ask_hop(caller, hop, request, payload)
                assert hop.state() == before
            with pytest.raises(MessageInvalid, match="Note"):
                await say(caller, hop.me, at_stage(1, "propagate"), (Note(1), b""), reply=(Gradient,))
            assert hop.state() == before

    play_run(scene, tmp_path)


def test_a_micro_batch_counts_once_and_a_hop_keeps_no_more_than_admission_grants(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        async with hop_and_caller(run) as (hop, caller):
            me = caller.me

            async def propagate(number: int, **changes: object) -> object:
                request = hop.request(me, number, **changes)
                return await ask_hop(caller, hop, request, hop.payload())

            async def commit(number: int, attempt: int) -> object:
                chain = (Link(0, me, 0), Link(1, hop.me, attempt))
                request = CommitChain(MicroBatch(me, 1, number), chain)
                return await say(caller, hop.me, at_stage(1, "commit"), (request, b""), reply=(Verdict,))

            await propagate(0)
            await propagate(0)  # the same attempt twice is one
            assert hop.hop.undecided == 1
            verdict = await commit(0, 100)
            assert isinstance(verdict, Verdict)
            assert verdict.decision == APPLIED
            await hop.hop.drained()
            applied = hop.state()
            assert applied[:3] == (0, 1, hop.spec.micro_batch_tokens)
            assert applied[5] != 0.0
            with pytest.raises(Stale, match="applied here already"):
                await propagate(0, attempt=7)
            assert (await commit(0, 100)) == verdict, "a repeated commit is answered, and changes nothing"
            assert hop.state() == applied
            assert hop.ledger.duplicates_refused == 1

            limit = hop.spec.limits.undecided_micro_batches
            most = next(n for n in range(limit) if not admits(n, n, limit))
            for number in range(1, most + 1):
                await propagate(number)
            with pytest.raises(Busy, match=f"holds {most} micro-batches, {most} of this caller"):
                await propagate(most + 1)
            assert hop.hop.undecided == most
            other = run.transport()
            request = hop.request(other.me)
            await ask_hop(other, hop, request, hop.payload())  # there is room for whoever comes next
            decision = CommitChain(request.micro_batch, (Link(0, other.me, 0),))
            await call(other, hop.me, at_stage(1, "commit"), decision, Verdict, timeout_s=10)

            abandoned = hop.ledger.abandoned
            for number in range(1, most + 1):  # a chain that does not name this attempt
                decided = await commit(number, 1)
                assert isinstance(decided, Verdict)
                assert decided.decision == UNKNOWN
            assert hop.state() == applied
            assert hop.ledger.abandoned == abandoned + most

    play_run(scene, tmp_path)


def test_commits_and_queries_of_unknown_micro_batches_take_no_memory(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        async with hop_and_caller(run) as (hop, caller):
            before = hop.state()
            for number in range(0, 1000, 2):
                micro_batch = MicroBatch(caller.me, number, number)
                chain = (Link(0, caller.me, 0), Link(1, hop.me, 1))
                requests = (CommitChain(micro_batch, chain), QueryChain(micro_batch))
                verdicts = [
                    (await call(caller, hop.me, at_stage(1, "commit"), request, Verdict, timeout_s=10)).header
                    for request in requests
                ]
                assert verdicts == [Verdict(UNKNOWN, ())] * 2
            assert hop.state() == before
            assert not hop.ledger.applied()
            assert not hop.ledger._chains
            assert not hop.hop._applying

    play_run(scene, tmp_path)


def test_nobody_but_its_driver_decides_a_micro_batch(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        async with hop_and_caller(run) as (hop, driver):
            meddler = run.transport()
            await ask_hop(driver, hop, hop.request(driver.me), hop.payload())
            before = hop.state()
            micro_batch = MicroBatch(driver.me, 1, 0)
            for attempt in (100, 1):
                chain = (Link(0, driver.me, 0), Link(1, hop.me, attempt))
                with pytest.raises(MessageInvalid, match="only its driver decides"):
                    await call(
                        *(meddler, hop.me, at_stage(1, "commit"), CommitChain(micro_batch, chain), Verdict),
                        timeout_s=10,
                    )
            asked = await call(
                meddler, hop.me, at_stage(1, "commit"), QueryChain(micro_batch), Verdict, timeout_s=10
            )
            assert asked.header.decision == TENTATIVE
            assert hop.state() == before

    play_run(scene, tmp_path)


def test_a_stranger_takes_over_nobodys_micro_batch(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        async with hop_and_caller(run) as (hop, driver):
            stranger = run.transport()
            await ask_hop(driver, hop, hop.request(driver.me), hop.payload())
            before = hop.state()

            def adopt(**changes: Any) -> Adopt:
                own = (Link(0, driver.me, 0),)
                return replace(Adopt(MicroBatch(driver.me, 1, 0), 1, 100, own), **changes)

            chain = (Link(0, stranger.me, 0),)
            cases: tuple[tuple[Adopt, type[ShoalError], str], ...] = (
                (adopt(), MessageInvalid, "must lead from driver"),
                (adopt(chain=chain), MessageInvalid, "must lead from driver"),
                (adopt(chain=(Link(0, driver.me, 0), *chain)), MessageInvalid, "must lead from driver"),
                (adopt(chain=chain * 257), MessageInvalid, "chain"),
                (adopt(chain=()), MessageInvalid, "must lead from driver"),
                (adopt(stage=2), Stale, "holds stage 1"),
                (adopt(micro_batch=MicroBatch(stranger.me, 1, 0), chain=chain), NotHere, "not known here"),
            )
            for request, kind, words in cases:
                with pytest.raises(kind, match=words):
                    await say(stranger, hop.me, at_stage(1, "propagate"), (request, b""), reply=(Adopted,))
            hop.known.peers.append(stranger.me)  # a replica of that stage, but not of this chain
            with pytest.raises(NotHere, match="not under way here in that attempt"):
                await say(stranger, hop.me, at_stage(1, "propagate"), (cases[-1][0], b""), reply=(Adopted,))
            assert hop.state() == before

    play_run(scene, tmp_path)


def gradient(chain: tuple[Link, ...], payload: bytes) -> Answers:
    return (Gradient(chain, 1.0, 0.0, 0.01), b""), (Activations(), payload)


NAN = b"\xc0\x7f"  # the upper half of a float32
Answers = tuple[tuple[object, bytes], ...]
# What a broken replica may answer, given its own link and the bytes that a whole gradient has.
GARBAGE: dict[str, Callable[[Link, int], Answers]] = {
    "a gradient too short": lambda own, size: gradient((own,), bytes(size - 2)),
    "a gradient too long": lambda own, size: gradient((own,), bytes(size + 2)),
    "no gradient": lambda own, size: gradient((own,), b""),
    "a gradient of NaN": lambda own, size: gradient((own,), bytes(size - 2) + NAN),
    "no chain": lambda own, size: gradient((), bytes(size)),
    "another attempt": lambda own, size: gradient((replace(own, attempt=1),), bytes(size)),
    "another peer's chain": lambda own, size: gradient((replace(own, peer=PeerId("z" * 52)),), bytes(size)),
    "a chain too long": lambda own, size: gradient((own, replace(own, stage=2)), bytes(size)),
    "another message": lambda own, size: ((Note(1), bytes(size)),),
    "hops behind the last": lambda own, size: ((Working(1, chain=(replace(own, stage=2),)), b""),),
    "hops of its own stage": lambda own, size: ((Working(1, chain=(own,)), b""),),
    "adoption of what was sent": lambda own, size: ((Adopted("float32"), b""),),
    "work without result": lambda own, size: ((Working(1), b""),),
    "no values": lambda own, size: gradient((own,), b"")[:1],
}


@pytest.mark.parametrize("wrong", GARBAGE.values(), ids=GARBAGE)
def test_a_replica_that_answers_garbage_is_counted_and_another_one_asked(
    tmp_path: Path, wrong: Callable[[Link, int], Answers]
) -> None:
    async def scene(run: Run) -> None:
        spec = pipeline_spec()
        liar = run.transport()

        async def answer(stream: Stream) -> None:
            asked: Propagate = (await stream.receive(Propagate)).header
            await stream.receive(Activations, max_payload_bytes=1 << 20)
            size = honest.format.hidden_bytes(asked.sequences, asked.codec)
            for header, payload in wrong(Link(1, liar.me, asked.attempt), size):
                await stream.send(header, payload)

        liar.serve(at_stage(1, "propagate"), answer, ANYBODY)
        liar.serve(at_stage(1, "commit"), never, ANYBODY)
        await liar.start()
        run.learn(liar)
        honest = await Peer(run, spec, 1, Known()).start(run)
        known = Known(liar.me, after=[honest.me])
        driver = await Peer(run, spec, 0, known).start(run)
        (tokens,) = batches(spec, 1)
        async with asyncio.timeout(20):
            await driver.driver.train([tokens])
            await honest.hop.drained()
        assert [peer for peer, _ in known.suspected] == [liar.me], "and nobody else"
        assert driver.downstream.successors.retries == 1
        assert driver.driver.figures.restarted == 0, "the caller repairs it, the chain does not begin anew"
        assert [kind for kind, _ in driver.events] == ["retry", "reroute"]
        assert len(driver.ledger) == len(honest.ledger) == 1
        assert driver.weights.gradient.isfinite().all()

    play_run(scene, tmp_path)


def test_a_replica_that_works_for_ever_does_not_hold_a_micro_batch_for_ever(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        spec = pipeline_spec()
        limits = spec.limits.model_copy(update={"hop_timeout_s": 1.0})
        spec = spec.model_copy(update={"limits": limits})
        busybody = run.transport()

        async def work(stream: Stream) -> None:
            await stream.receive(Propagate)
            while True:
                await stream.send(Working(1))
                await asyncio.sleep(0.1)

        busybody.serve(at_stage(1, "propagate"), work, ANYBODY)
        await busybody.start()
        run.learn(busybody)
        honest = await Peer(run, spec, 1, Known()).start(run)
        known = Known(busybody.me, after=[honest.me])
        driver = await Peer(run, spec, 0, known).start(run)
        async with asyncio.timeout(30):
            await driver.driver.train(batches(spec, 1))
            await honest.hop.drained()
        assert known.suspected[0][0] == busybody.me
        assert "time was over" in known.suspected[0][1]
        assert driver.driver.figures.restarted >= 1
        assert len(driver.ledger) == len(honest.ledger) == 1

    play_run(scene, tmp_path)


def test_what_cannot_be_scored_and_answers_that_are_too_long_are_refused(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        async with hop_and_caller(run) as (hop, _):
            client = run.transport()
            length, good = hop.format.length, hop.payload()
            cases: tuple[tuple[Infer, bytes, type[ShoalError], str], ...] = (
                (Infer(1, 1, length + 1, True), b"", MessageInvalid, f"at most 2 of {length}"),
                (Infer(1, 3, 1, True), b"", MessageInvalid, "3 sequences"),
                (Infer(1, 1, 1, False), b"", MessageInvalid, "texts are written in sessions"),
                (Infer(0, 1, 1, True), b"", Stale, "holds stage 1"),
                (Infer(1, 2, length, True), good[:-1], MessageInvalid, "hidden states take"),
                (Infer(1, 2, length, True), hop.payload(token=300), MessageInvalid, "vocabulary"),
                (Infer(1, 2, length, True), hop.payload(value=float("nan")), MessageInvalid, "NaN"),
                (Infer(1, 2, length, True), good + bytes(1 << 16), MessageTooLarge, "are allowed"),
            )
            before = hop.state()
            for request, payload, kind, words in cases:
                with pytest.raises(kind, match=words):
                    await say(client, hop.me, at_stage(1, "infer"), (request, payload), reply=(Inferred,))
            assert hop.state() == before

            async def lie(stream: Stream) -> None:
                await stream.receive(Infer, max_payload_bytes=1 << 20)
                await stream.send(Inferred(0.0, 0), bytes(12))

            liar = run.transport()
            liar.serve(at_stage(1, "infer"), lie, ANYBODY)
            await liar.start()
            run.learn(liar)
            known = Known(liar.me)
            with pytest.raises(StageEmpty, match="12 payload bytes; 0 are allowed"):
                await ask(client, known, Infer(1, 2, length, True), memoryview(good), random.Random(1))
            assert {peer for peer, _ in known.suspected} == {liar.me}

    play_run(scene, tmp_path)


# --- rounds: what a member with a good token may send to a group


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine must not make this test's leader look silent."""
    monkeypatch.setattr(follow, "LEADER_SILENCE_S", 30.0)


Malformed = tuple[object, bytes, type[ShoalError], str]  # what is sent, and what it raises


class Tyrant:
    """A member that opens a round, without having anything to contribute."""

    def __init__(self, run: Run, victim: GroupPeer) -> None:
        self.transport = run.transport()
        self.me = self.transport.me
        self.victim = victim
        self.ballot = 1

    def roster(self) -> list[PeerId]:
        return sorted((self.victim.me, self.me))

    def next_draft(self) -> bytes:
        """Of a new attempt at the height."""
        self.ballot += 1
        return self.draft().encode()

    def draft(self, **changes: object) -> Entry:
        """A good draft of both, to which this peer alone contributes, but for `changes`."""
        victim, me = self.victim, self.me
        seats = tuple(Seat(peer, 1, 1.0, present=True) for peer in self.roster())
        mine = self.roster().index(me)
        fields: dict[str, object] = {
            "stage": 0,
            "height": 1,
            "previous": victim.outer.head,
            "ballot": self.ballot,
            "leader": me,
            "revision": 0,
            "fragment": 0,
            "roster": seats,
            "contributors": (Contributor(mine, 0, 1, 100, 1.0, 1.0),),
            "first_stage_head": b"",
            "contribution": "float32",
            "published": "float32",
            **changes,
        }
        return Entry(**fields)  # type: ignore[arg-type]

    @contextlib.asynccontextmanager
    async def round(self, data: bytes) -> AsyncIterator[Line]:
        """A round under way at the victim, GO said."""
        method = "outer.0.round"
        async with (
            self.transport.open(self.victim.me, method) as stream,
            lifeline(stream, 10.0) as line,
        ):
            line.post(Prepare(1, self.victim.outer.head, self.ballot), self.draft().encode())
            await line.receive(Answer, max_payload_bytes=1 << 20)
            line.post(Go(4.0), data)
            yield line

    async def end_of_round(self, draft: bytes, entry: bytes | None = None) -> None:
        """Raises why the victim ends a round of this draft, in which this entry is committed."""
        async with self.round(draft) as line:
            if entry is not None:
                line.post(Commit(), entry)
            await line.receive(Report, max_payload_bytes=1 << 20)

    async def send(self, method: str, *messages: tuple[object, bytes]) -> None:
        await say(self.transport, self.victim.me, f"outer.0.{method}", *messages)


@pytest.mark.usefixtures("patient")
def test_malformed_contributions_and_parts_are_refused_and_counted(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        victim = await GroupPeer(run).start(run)
        tyrant = Tyrant(run, victim)
        before = victim.state()
        (fragment,) = victim.outer._context.fragments
        parts = fragment.parts
        owner_of = owners(victim.outer._context.run_id, 0, range(len(parts)), tyrant.roster(), (1.0, 1.0))
        drawn = [tyrant.roster()[owner] for owner in owner_of]
        theirs, mine = drawn.index(victim.me), drawn.index(tyrant.me)
        whole = 4 * parts[0].count
        assert all(parts[part].count == parts[0].count for part in (theirs, mine))
        not_finite = bytes(whole - 4) + struct.pack("<f", float("nan"))
        seat = tyrant.roster().index(victim.me)
        listed, other = bitmap({1 - seat}, 2), bitmap({seat}, 2)  # it contributes alone
        contributed: tuple[Malformed, ...] = (
            (ContributedPart(theirs), bytes(whole - 4), MessageInvalid, f"part {theirs}"),
            (ContributedPart(theirs), bytes(whole + 4), MessageTooLarge, "are allowed"),
            (ContributedPart(99), bytes(whole), MessageInvalid, "part 99 of 5"),
            (PublishedPart(0, b"\1"), b"", MessageInvalid, "PublishedPart"),
        )
        published: tuple[Malformed, ...] = (
            (PublishedPart(mine, listed), not_finite, MessageInvalid, f"part {mine}: "),
            (PublishedPart(mine, listed + b"\0"), bytes(whole), MessageInvalid, "in 2 bytes"),
            (PublishedPart(mine, other), bytes(whole), MessageInvalid, f"part {mine} lists"),
            (PublishedPart(mine, b"\0"), bytes(whole), MessageInvalid, f"part {mine} lists"),
            (PublishedPart(mine, listed), bytes(whole + 4), MessageTooLarge, "are allowed"),
            (PublishedPart(99, b"\1"), bytes(whole), MessageInvalid, "part 99 of 5"),
        )
        both = (("contribute", Contributing, contributed), ("publish", Publishing, published))
        for method, opening, cases in both:
            for header, payload, kind, words in cases:  # in a round of its own: one refusal ends a sender's
                draft = tyrant.next_draft()
                async with tyrant.round(draft):
                    with pytest.raises(kind, match=words):
                        await tyrant.send(method, (opening(draft_id(draft)), b""), (header, payload))
        draft = tyrant.next_draft()
        async with tyrant.round(draft):  # what does not decode is found out when it is summed
            await tyrant.send(
                "contribute",
                (Contributing(draft_id(draft)), b""),
                (ContributedPart(theirs), not_finite),
            )
            async with asyncio.timeout(10):
                while victim.refused()[tyrant.me] <= len(contributed) + len(published):
                    await asyncio.sleep(0.01)
        stranger = Tyrant(run, victim)
        for method, opening, _ in both:
            draft = tyrant.next_draft()
            async with tyrant.round(draft):
                with pytest.raises(Stale, match=f"{stranger.me} (does not contribute|has no seat)"):
                    await stranger.send(method, (opening(draft_id(draft)), b""))
        assert victim.refused() == {tyrant.me: len(contributed) + len(published) + 1}
        assert {peer for peer, _ in victim.suspected} == {tyrant.me}
        assert victim.state() == before

    play_run(scene, tmp_path)


@pytest.mark.usefixtures("patient")
def test_drafts_and_entries_that_do_not_hold_change_no_log(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        victim = await GroupPeer(run).start(run)
        tyrant = Tyrant(run, victim)
        before = victim.state()
        good = tyrant.draft()
        parts = len(victim.outer._context.fragments[0].parts)

        def entry(digest: bytes, **changes: object) -> bytes:
            drafted = tyrant.draft(**changes)
            mine = bitmap({tyrant.roster().index(tyrant.me)}, 2)
            return drafted.finish([(digest, mine)] * parts, 0).encode()

        absent = tuple(replace(seat, present=False) for seat in good.roster)
        drafts: tuple[tuple[bytes, type[ShoalError], str], ...] = (
            (b"garbage", MessageInvalid, "Entry"),
            (b"", MessageInvalid, "Entry"),
            (good.encode() + b"\x08\x00", MessageInvalid, "canonical"),
            (tyrant.draft(height=7).encode(), Stale, "entry 7 after"),
            (tyrant.draft(previous=bytes(32)).encode(), Stale, "entry 1 after 00000000"),
            (entry(SKIP), MessageInvalid, f"a draft with {parts} parts"),  # decided already: no draft
            (tyrant.draft(stage=1).encode(), MessageInvalid, "stage 1"),
            (tyrant.draft(roster=absent).encode(), MessageInvalid, "nobody present"),
            (tyrant.draft(fragment=1).encode(), MessageInvalid, "fragment 0"),
            (tyrant.draft(published="int7").encode(), MessageInvalid, "no codec"),
        )
        for data, kind, words in drafts:
            with pytest.raises(kind, match=words):
                await tyrant.end_of_round(data)
        commits: tuple[tuple[bytes, type[ShoalError], str], ...] = (
            (b"garbage", MessageInvalid, "Entry"),
            (entry(SKIP, height=2), Stale, "does not continue"),
            (entry(SKIP, stage=1), MessageInvalid, "stage 1"),
            (good.encode(), MessageInvalid, "0 parts"),
            (entry(bytes(range(32))), NotHere, "found nowhere"),  # a digest of what nobody has
        )
        for data, kind, words in commits:
            with pytest.raises(kind, match=words):
                await tyrant.end_of_round(good.encode(), data)
        prepare, offer = Prepare(9, victim.outer.head, 1), tyrant.draft(height=9, ballot=1)
        with pytest.raises(Stale, match="has to catch up"):
            await tyrant.send("round", (prepare, offer.encode()))
        for changes in ({"height": 1}, {"ballot": 2}, {"stage": 1}, {"leader": victim.me}):
            with pytest.raises(MessageInvalid, match="is not what its PREPARE says"):
                await tyrant.send("round", (prepare, replace(offer, **changes).encode()))
        with pytest.raises(MessageInvalid, match="Commit"):
            await tyrant.send("round", (Commit(), b""))
        requests: tuple[tuple[str, object, type[ShoalError]], ...] = (
            ("part", PartRequest(0, bytes(32)), NotHere),
            ("orders", OrdersRequest(), NotHere),
            ("orders", PartRequest(0, bytes(32)), MessageInvalid),
            ("manifest", ManifestRequest(8), NotHere),
            ("chunks", ChunkRequest(0, bytes(32), (0,)), Stale),
            ("chunks", ChunkRequest(8, bytes(32), (2**32,)), NotHere),
            ("state", StateRequest(bytes(32), victim.outer.state_root), Stale),
            ("state", StateRequest(victim.outer.head, bytes(32), (0,)), Stale),
            ("state", StateRequest(victim.outer.head, victim.outer.state_root, (2**32,)), MessageInvalid),
        )
        for method, request, kind in requests:
            with pytest.raises(kind):
                await tyrant.send(method, (request, b""))
        assert (
            await say(tyrant.transport, victim.me, "outer.0.entries", (EntriesRequest(1, 2**53), b"")) is None
        )
        assert victim.state() == before

    play_run(scene, tmp_path)


# --- the spec


def test_a_spec_that_is_not_the_owners_is_refused_whoever_tells_it(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        spec = RunSpec()
        owner = OwnerKey.create(tmp_path / "owner", spec.run_id(), "test", run.trust.now)
        run.trust.owner = owner
        canonical, signature = spec.canonical(), owner.sign(LABEL, spec.canonical())
        other = RunSpec(run=RunSection(name="other")).canonical()
        listed = RevocationList().extended([run.trust.token().token_id], [])
        forged_list = sign_revocations(listed, owner.run_id, lambda label, data: bytes(70))
        forged_orders = sign_amendments(Amendments(owner.run_id, 1, STOPPED), lambda label, data: bytes(70))
        own_key = OwnerKey.create(tmp_path / "liar", spec.run_id(), "liar", run.trust.now)
        answers: tuple[tuple[SpecReply, bytes, type[ShoalError], str], ...] = (
            (SpecReply(own_key.sign(LABEL, canonical), False), canonical, RecordInvalid, "did not sign"),
            (SpecReply(owner.sign(b"label", canonical), False), canonical, RecordInvalid, "did not sign"),
            (SpecReply(signature, False), other, SpecError, "is of run"),
            (SpecReply(signature, False), canonical + b" ", SpecError, "canonical form"),
            (SpecReply(signature, False), b"[1, 2]", SpecError, "not valid"),
            (SpecReply(signature, False), bytes(limits.SPEC_BYTES + 1), MessageTooLarge, "are allowed"),
            (SpecReply(signature, True), canonical, RecordInvalid, "did not sign"),
            (SpecReply(signature, False, True), canonical, RecordInvalid, "did not sign"),
        )
        remaining = list(answers)

        async def lie(stream: Stream) -> None:
            await stream.receive(SpecRequest)
            reply, payload, _, _ = remaining.pop(0)
            await stream.send(reply, payload)
            if reply.revocations:
                await stream.send(forged_list.notice, forged_list.entries)
            if reply.amendments:
                await stream.send(forged_orders)

        liar, joiner = run.transport(), run.transport()
        liar.serve(SPEC, lie, ROLES)
        await liar.start()
        run.learn(liar)
        membership = run.memberships[joiner.me]
        for _, _, kind, words in answers:
            with pytest.raises(kind, match=words):
                await fetch_spec(joiner, liar.me, membership)
        assert not remaining
        assert membership.revocations.version == 0
        assert membership.revocations.signed is None
        assert membership.amendments.signed is None

    play_run(scene, tmp_path)


# --- the command line, as a user meets it


def shoal(data_dir: Path, *arguments: object) -> subprocess.Popen[str]:
    """The real program with a data folder of its own."""
    environment = {**os.environ, paths.ENVIRONMENT_KEY: str(data_dir), "COLUMNS": "200"}
    command = [sys.executable, "-m", "shoal.node.cli", *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def refusal(process: subprocess.Popen[str], code: int) -> str:
    """What a refused command says: one readable message, and no traceback."""
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert said.count("error:") == 1
    return said


def open_to_others(folder: Path) -> list[Path]:
    """Files with something in them that other users of this machine may read or write."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    return [path for path in files if path.stat().st_mode & 0o077]


def test_a_cut_token_is_refused_by_the_program(tmp_path: Path) -> None:
    token = OwnerHome.of_run(tmp_path / "owner", RunSpec(), time.time()).own_token(time.time()).encode()
    said = refusal(shoal(tmp_path / "data", "join", token[:-7]), 10)
    assert "cut off" in said
    assert "copy it whole" in said
    assert token[20:60] not in said
    assert not list((tmp_path / "data").rglob("*")), "nothing was made for it"


def test_unknown_keys_of_a_run_file_are_all_refused_with_line_and_nearest_match(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[inner]\nlearning_rte = 0.1\n\n[stagse]\ncount = 2\n")
    for command in ("plan", "up"):
        said = refusal(shoal(tmp_path / "data", command, path), 15)
        assert "run.toml:2: inner.learning_rte is not a key; did you mean learning_rate?" in said
        assert "run.toml:4: stagse is not a section; did you mean stages?" in said
    assert not list((tmp_path / "data").rglob("owner.key")), "no run was begun"


def test_an_expired_token_from_an_open_file_is_refused_with_a_warning(tmp_path: Path) -> None:
    home = OwnerHome.of_run(tmp_path / "owner", RunSpec(), time.time() - HOUR)
    home.keep_addresses(("/ip4/127.0.0.1/tcp/9/p2p/12D3KooWPSKyTB3fHpTMSHpn4bhF8AmNzHmvFb3FVenvGKFH7ydr",))
    token = home.issue((Role.TRAINER,), 60.0, "late", time.time() - HOUR)
    path = tmp_path / "token"
    path.write_text(token.encode())
    path.chmod(0o644)
    said = refusal(shoal(tmp_path / "data", "join", f"@{path}"), 10)
    assert f"your token {token.token_id} expired" in said
    assert "shoal token create" in said
    assert f"chmod 600 {path}" in said
    assert list((tmp_path / "data").rglob("identity*")), "the peer has a key"
    assert not open_to_others(tmp_path / "data")
    assert not open_to_others(tmp_path / "owner")


def test_a_banned_peer_that_comes_back_is_refused_until_it_is_pardoned(tmp_path: Path) -> None:
    """Its own list names it still, so it asks first whether there is a newer one."""

    async def scene() -> None:
        now = time.time()
        home = OwnerHome.of_run(tmp_path / "owner", RunSpec(), now)
        for name in ("peer", "bob"):
            (tmp_path / name).mkdir(mode=0o700)
        revocations_path = home.key.revocations_path
        async with present(
            *(home.own_token(now), PeerKey.generate(), tmp_path / "peer", Listening()),
            revocations_path=revocations_path,
            alone_is_fine=True,
        ) as presence:
            presence.spec = home.spec
            presence.announce("online", (0,))
            home.keep_addresses(presence.directory.bootstrap_addresses())
            token, bob = home.issue((Role.TRAINER,), HOUR, "bob", now), PeerKey.generate()
            banned = home.key.revoke(peers=[bob.peer])
            home.key.pardon(bob.peer)
            assert presence.membership.revocations.reload()
            path = tmp_path / "bob" / "revocations"
            RevocationBook(home.key.run_id, home.key.root_der, path).adopt(banned)
            async with present(token, bob, tmp_path / "bob", Listening()) as back:
                book = back.membership.revocations
                assert book.is_revoked(back.membership.me)
                waiting = asyncio.create_task(leave_when_revoked(back))
                while book.version < 2:
                    await asyncio.sleep(0.01)
                await back.members.wait_for(hears(presence.transport.me), 20.0)
                assert not waiting.done()
                home.key.revoke(peers=[bob.peer])
                assert presence.membership.revocations.reload()
                with pytest.raises(TokenRevoked, match="only a new token"):
                    await waiting
            path.write_bytes(file_bytes(banned))
            with pytest.raises(TokenRevoked):
                async with present(token, bob, tmp_path / "bob", Listening()) as back:
                    await leave_when_revoked(back)

    asyncio.run(scene())


def test_a_joiner_with_a_revoked_token_is_told_so(tmp_path: Path) -> None:
    """By the peers it dials: it has the run's sealing key and finds them, and none of them talks to it."""

    async def scene() -> None:
        now = time.time()
        spec = RunSpec()
        home = OwnerHome.of_run(tmp_path / "owner", spec, now)
        (folder := tmp_path / "peer").mkdir(mode=0o700)
        key = PeerKey.generate()
        revocations_path = home.key.revocations_path
        async with present(
            *(home.own_token(now), key, folder, Listening()),
            revocations_path=revocations_path,
            alone_is_fine=True,
        ) as presence:
            presence.spec = home.spec
            presence.announce("online", (0,))
            home.keep_addresses(presence.directory.bootstrap_addresses())
            token = home.issue((Role.TRAINER,), HOUR, "unwanted", now)
            home.key.revoke([token.token_id])
            assert presence.membership.revocations.reload()
            process = shoal(tmp_path / "data", "join", token.encode(), "--device", "cpu", "--json")
            said = await asyncio.to_thread(refusal, process, 10)
            assert "revoked by the run's owner" in said
            assert "only a new token helps" in said
            assert [member.peer for member in presence.members.view().members] == [key.peer]
            refusals = presence.transport.counters().refusals
            assert set(refusals) == {"TokenRevoked"}
        assert not list((tmp_path / "data").rglob("spec.json")), "it learned nothing"
        assert not open_to_others(tmp_path / "data")

    asyncio.run(scene())
