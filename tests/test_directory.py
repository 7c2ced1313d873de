"""The directory: the DHT on real p2pd processes, and its memory twin."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from directory_world import HivemindWorld, MemoryWorld, Person, Run, hivemind_directory

from shoal.dht import buckets, memory_directory
from shoal.dht.addresses import AddressBook
from shoal.dht.bootstrap import Bootstrap
from shoal.dht.buckets import ROOT, Bucket, Spot, path
from shoal.dht.daemon import DaemonState
from shoal.dht.directory import Directory, SignedRecord
from shoal.dht.envelope import BODY_BYTES
from shoal.dht.hivemind_directory import HivemindDirectory
from shoal.dht.hivemind_loading import load_hivemind
from shoal.dht.kademlia import record_storage
from shoal.dht.kademlia.joining import Joiner
from shoal.dht.memory_directory import MemoryDirectory, MemoryDirectoryHub
from shoal.dht.records import seal
from shoal.protocol import limits
from shoal.protocol.errors import (
    AccessError,
    BootstrapFailed,
    PeerSilent,
    ProtocolViolation,
    ShoalError,
    TransportLost,
)
from shoal.protocol.identity import PeerId, PeerKey

World = MemoryWorld | HivemindWorld


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture(params=[MemoryWorld, HivemindWorld])
def world(request: pytest.FixtureRequest, run: Run) -> World:
    made: World = request.param(run)
    return made


async def published(directory: Directory, person: Person, sequence: int = 1) -> SignedRecord:
    signed = person.signed(sequence)
    await directory.publish(signed, time.time() + 29.0)
    return signed


async def until(condition: Callable[[], Awaitable[bool]], within_s: float = 20.0) -> None:
    async with asyncio.timeout(within_s):
        while not await condition():
            await asyncio.sleep(0.05)


# --- both directories


def test_all_find_what_each_published(run: Run, world: World) -> None:
    async def scenario() -> None:
        people = [run.person() for _ in range(3)]
        async with world.directories(*people) as directories:
            said = {await published(d, p) for d, p in zip(directories, people, strict=True)}
            for directory in directories:
                assert set(await directory.lookup()) == said

    asyncio.run(scenario())


def test_the_newest_record_of_a_peer_is_the_one_found(run: Run, world: World) -> None:
    async def scenario() -> None:
        people = [run.person(), run.person()]
        async with world.directories(*people) as (first, second):
            for sequence in range(1, 5):
                newest = await published(second, people[1], sequence)
                assert await first.lookup() == (newest,)

    asyncio.run(scenario())


def test_a_peer_alone_finds_itself(run: Run, world: World) -> None:
    async def scenario() -> None:
        person = run.person()
        async with world.directories(person) as (directory,):
            assert await directory.lookup() == ()
            said = await published(directory, person)
            assert await directory.lookup() == (said,)
            assert len(directory.bootstrap_addresses()) == 1

    asyncio.run(scenario())


def test_a_stranger_neither_reads_nor_writes(run: Run, world: World, tmp_path: Path) -> None:
    """Even one with a token of another run, the address, and this program."""

    async def scenario() -> None:
        people = [run.person(), run.person()]
        stranger = Run(tmp_path).person()
        async with world.directories(*people) as (first, second):
            said = {await published(first, people[0]), await published(second, people[1])}
            with pytest.raises(BootstrapFailed, match="refuse"):
                async with world.directories(stranger):
                    pass
            assert set(await first.lookup()) == said == set(await second.lookup())

    asyncio.run(scenario())


def test_an_oversized_record_is_refused_before_it_is_sent(run: Run, world: World) -> None:
    async def scenario() -> None:
        people = [run.person(), run.person()]
        async with world.directories(*people) as (first, second):
            with pytest.raises(ProtocolViolation):
                await second.publish(SignedRecord(bytes(5 * 1024 * 1024), bytes(64)), time.time() + 29.0)
            said = await published(second, people[1])
            assert await first.lookup() == (said,)

    asyncio.run(scenario())


def test_one_cannot_publish_for_another(run: Run, world: World) -> None:
    async def scenario() -> None:
        people = [run.person(), run.person()]
        async with world.directories(*people) as (first, second):
            with pytest.raises((ProtocolViolation, AccessError)):
                await second.publish(people[0].signed(), time.time() + 29.0)
            assert await first.lookup() == ()

    asyncio.run(scenario())


# --- the memory twin


def test_the_twin_can_be_cut_off_and_healed(run: Run) -> None:
    async def scenario() -> None:
        ann, bob = run.person(), run.person()
        hub = MemoryDirectoryHub(ann.membership, time.time, random.Random(1), call_deadline_s=0.01)
        first, second = (
            hub.directory(ann.key.peer, ann.membership),
            hub.directory(bob.key.peer, bob.membership),
        )
        said = await published(first, ann)
        hub.cut(bob.key.peer)
        with pytest.raises(TransportLost):
            await second.lookup()
        assert await first.lookup() == (said,)
        hub.cut()
        with pytest.raises(TransportLost):
            await first.publish(ann.signed(2), time.time() + 29.0)
        hub.heal()
        assert await second.lookup() == (said,)
        hub.loss = 1.0
        with pytest.raises(PeerSilent):
            await second.lookup()

    asyncio.run(scenario())


# --- strangers and forgers on the real DHT


def test_a_plain_libp2p_caller_is_refused_and_leaves_no_trace(run: Run) -> None:
    async def scenario() -> None:
        ann = run.person()
        async with HivemindWorld(run).directories(ann) as (directory,):
            assert isinstance(directory, HivemindDirectory)
            said = await published(directory, ann)
            async with bare_p2p(run, directory) as (p2p, target):
                from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError
                from hivemind.proto import dht_pb2

                me = dht_pb2.NodeInfo(node_id=bytes(20))
                key = directory._node.protocol.storage.top()[0].to_bytes()
                calls = (
                    ("rpc_ping", dht_pb2.PingRequest(peer=me), dht_pb2.PingResponse),
                    ("rpc_find", dht_pb2.FindRequest(peer=me, keys=[key]), dht_pb2.FindResponse),
                    ("rpc_store", store_request(me, key, b"\xa1x", b"\xc4\x01x"), dht_pb2.StoreResponse),
                )
                for method, request, reply in calls:
                    with pytest.raises(P2PHandlerError, match="refused"):
                        await p2p.call_protobuf_handler(target, f"DHTProtocol.{method}", request, reply)
            assert directory.status().calls_refused == 3
            assert directory.status().peers_known == 0
            assert await directory.lookup() == (said,)

    asyncio.run(scenario())


def store_request(node_info: Any, key: bytes, subkey: bytes, value: bytes) -> Any:
    from hivemind.proto import dht_pb2

    return dht_pb2.StoreRequest(
        peer=node_info,
        keys=[key],
        subkeys=[subkey],
        values=[value],
        expiration_time=[time.time() + 20.0],
        in_cache=[False],
    )


@contextlib.asynccontextmanager
async def bare_p2p(run: Run, directory: HivemindDirectory) -> Any:
    """hivemind's own P2P, without our envelope, connected to a directory."""
    from hivemind.p2p import P2P, PeerID
    from hivemind.utils.multiaddr import Multiaddr

    (address,) = directory.bootstrap_addresses()
    route, _, peer = address.rpartition("/p2p/")
    identity = run.directory / "stranger"
    identity.write_bytes(PeerKey.generate().libp2p_identity())
    p2p = await P2P.create(identity_path=str(identity), nat_port_map=False)
    try:
        await p2p._client.connect(PeerID.from_base58(peer), [Multiaddr(route)])
        yield p2p, PeerID.from_base58(peer)
    finally:
        await p2p.shutdown()


def test_a_member_cannot_forge_replay_or_mask_anothers_record(run: Run) -> None:
    """Not even one whose calls are accepted: each store is judged by what the named peer signed."""

    async def scenario() -> None:
        ann, bob = run.person(), run.person()
        async with HivemindWorld(run).directories(ann, bob) as (first, second):
            assert isinstance(first, HivemindDirectory) and isinstance(second, HivemindDirectory)
            old = await published(first, ann, 1)
            new = await published(first, ann, 2)

            def sealed(signed: SignedRecord) -> bytes:
                return seal(signed, run.owner.run_id, run.owner.sealing_key, os.urandom)

            late = time.time() + 100.0
            for peer, value, expires in (
                (ann, sealed(bob.signed()), time.time() + 29.9),  # his own, under her name
                (ann, sealed(SignedRecord(new.record, bob.signed().signature)), late),
                (ann, sealed(old), late),  # replayed, to outlive the new one
                (ann, b"garbage", late),
                (bob, sealed(bob.signed()), late),  # his own, but for longer than he signed
            ):
                assert await store_at(second, ann.key.peer, peer.key.peer, value, expires) == [False]
            assert await first.lookup() == (new,)

    asyncio.run(scenario())


def test_of_a_whole_dictionary_only_the_good_entries_are_taken(run: Run) -> None:
    async def scenario() -> None:
        ann, bob, eve = run.person(), run.person(), run.person()
        async with HivemindWorld(run).directories(ann, bob) as (first, second):
            assert isinstance(first, HivemindDirectory) and isinstance(second, HivemindDirectory)
            new = await published(first, ann)
            from hivemind.dht.storage import DictionaryDHTValue
            from hivemind.utils import MSGPackSerializer

            said = eve.signed()
            good = seal(said, run.owner.run_id, run.owner.sealing_key, os.urandom)
            dictionary = DictionaryDHTValue()
            dictionary.store(eve.key.peer, MSGPackSerializer.dumps(good), time.time() + 20.0)
            dictionary.store(ann.key.peer, MSGPackSerializer.dumps(b"garbage"), time.time() + 1e9)
            assert await store_at(second, ann.key.peer, None, dictionary, time.time() + 1e9) == [True]
            assert set(await first.lookup()) == {new, said}
            assert first.status().records_refused == 1

    asyncio.run(scenario())


def test_a_record_in_somebody_elses_bucket_is_refused(run: Run) -> None:
    """It is well signed, but of another stage, or of peers with other places."""

    async def scenario() -> None:
        ann, bob = run.person(), run.person()
        async with HivemindWorld(run).directories(ann, bob) as (_, second):
            assert isinstance(second, HivemindDirectory)
            sealed = seal(bob.signed(), run.owner.run_id, run.owner.sealing_key, os.urandom)
            place = Spot.of(bob.key.peer, run.owner.run_id).place
            half = place >> 63
            told = {
                bucket: await store_at(
                    second, ann.key.peer, bob.key.peer, sealed, time.time() + 20.0, bucket=bucket
                )
                for bucket in (Bucket(0), Bucket(0, 1, half), Bucket(1), Bucket(0, 1, 1 - half), Bucket(-1))
            }
            assert list(told.values()) == [[True], [True], [False], [False], [False]]

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", [MemoryWorld, HivemindWorld])
def test_whoever_finds_a_bucket_full_is_filed_deeper_and_found_there(
    run: Run, monkeypatch: pytest.MonkeyPatch, kind: type[World]
) -> None:
    """A token is a signing key: its holder can make any number of peers, and a bucketful hides nobody."""
    for module in (buckets, memory_directory, record_storage):
        monkeypatch.setattr(module, "FULL", 2)
    monkeypatch.setattr(buckets, "_LEAF", 1.0)
    monkeypatch.setattr(buckets, "_AHEAD", 1.0)

    async def scenario() -> None:
        people = [run.person() for _ in range(5)]
        async with kind(run).directories(*people) as directories:
            spots = [Spot.of(person.key.peer, run.owner.run_id) for person in people]
            paths = {bucket for spot in spots for bucket in path((0,), spot) if bucket.bits <= 8}
            for sequence in range(1, 6):  # whoever is pushed out of a bucket finds out the next time
                said = {await published(d, p, sequence) for d, p in zip(directories, people, strict=True)}
            first = directories[0]
            assert isinstance(first, MemoryDirectory | HivemindDirectory)
            shown = first._read(sorted(paths))
            found = set(shown if isinstance(shown, tuple) else await shown)
            assert said == found

    asyncio.run(scenario())


async def stored(directory: HivemindDirectory, filed: list[tuple[Bucket, bytes, bytes]]) -> None:
    """What comes of one call with these (bucket, subkey, value)."""
    from hivemind.proto import dht_pb2

    assert directory._guard is not None
    run_id = directory._membership.run_id
    count = len(filed)
    request = dht_pb2.StoreRequest(
        keys=[bucket.key(run_id) for bucket, _, _ in filed],
        subkeys=[subkey for _, subkey, _ in filed],
        values=[value for _, _, value in filed],
        expiration_time=[time.time() + 25.0] * count,
        in_cache=[False] * count,
    )
    if await directory._guard.allows(request):
        await directory._node.protocol.rpc_store(request, SimpleNamespace(remote_id=None))


def held(directory: HivemindDirectory) -> dict[bytes, set[str]]:
    """Whose records lie at this node, by the keys of their buckets."""
    storage = directory._node.protocol.storage
    return {key.to_bytes(): {peer for peer, _ in found.value.items()} for key, found in storage.items()}


def test_a_token_of_many_peers_fills_no_memory_and_locks_nobody_out(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RECORDS_HELD", 60)

    async def scenario() -> None:
        ann, bob = run.person(), run.person()
        async with HivemindWorld(run).directories(ann) as (directory,):
            assert isinstance(directory, HivemindDirectory)
            from hivemind.utils import MSGPackSerializer

            def everywhere(person: Person, stages: tuple[int, ...]) -> list[tuple[Bucket, bytes, bytes]]:
                said = person.signed(stages=stages)
                value = seal(said, run.owner.run_id, run.owner.sealing_key, os.urandom)
                subkey = MSGPackSerializer.dumps(str(person.key.peer))
                spot = Spot.of(person.key.peer, run.owner.run_id)
                packed = MSGPackSerializer.dumps(value)
                return [(bucket, subkey, packed) for bucket in path(stages, spot)]

            def of(person: Person) -> int:
                return sum(person.key.peer in peers for peers in held(directory).values())

            await stored(directory, everywhere(ann, (0,))[:2])
            for _ in range(4):
                filed = everywhere(run.person(), tuple(range(8)))
                for first in range(0, len(filed), 64):
                    await stored(directory, filed[first : first + 64])
                assert sum(map(len, held(directory).values())) <= 60
            assert of(ann) == 2
            await stored(directory, [one for one in everywhere(bob, (0,)) if one[0].bits <= 1])
            assert of(bob) == 3
            assert sum(map(len, held(directory).values())) == 60

    asyncio.run(scenario())


@pytest.mark.parametrize("whole", [True, False])
def test_one_call_with_many_records_of_a_bucket_leaves_the_lowest_ranks(run: Run, whole: bool) -> None:
    async def scenario() -> None:
        ann = run.person()
        async with HivemindWorld(run).directories(ann) as (directory,):
            assert isinstance(directory, HivemindDirectory)
            from hivemind.utils import MSGPackSerializer

            from shoal.dht.kademlia.values import WHOLE_DICTIONARY, pack

            people = [run.person() for _ in range(buckets.FULL + 8)]
            sealed = {
                person.key.peer: seal(person.signed(), run.owner.run_id, run.owner.sealing_key, os.urandom)
                for person in people
            }
            if whole:
                entries = [(str(peer), value, time.time() + 25.0) for peer, value in sealed.items()]
                await stored(directory, [(ROOT, WHOLE_DICTIONARY, pack(entries))])
            else:
                await stored(
                    directory,
                    [
                        (ROOT, MSGPackSerializer.dumps(str(peer)), MSGPackSerializer.dumps(value))
                        for peer, value in sealed.items()
                    ],
                )
            lowest = sorted(sealed, key=lambda peer: Spot.of(peer, run.owner.run_id).rank)[: buckets.FULL]
            assert held(directory)[ROOT.key(run.owner.run_id)] == set(lowest)

    asyncio.run(scenario())


def test_more_records_than_a_call_takes_are_shown_in_random_parts(run: Run) -> None:
    async def scenario() -> None:
        ann = run.person()
        async with HivemindWorld(run).directories(ann) as (directory,):
            assert isinstance(directory, HivemindDirectory) and directory._guard is not None
            from hivemind.proto import dht_pb2

            from shoal.dht.kademlia.values import pack, unpack

            entries = [(f"peer {n}", bytes(1200), time.time() + 20.0) for n in range(4000)]
            parts = []
            for _ in range(2):
                result = dht_pb2.FindResult(type=dht_pb2.FOUND_DICTIONARY, value=pack(entries))
                response = dht_pb2.FindResponse(results=[result])
                directory._guard.fit(response)
                assert response.ByteSize() <= BODY_BYTES
                parts.append({entry[0] for entry in unpack(response.results[0].value)})
            assert all(len(part) > 1000 for part in parts)
            assert parts[0] != parts[1]

    asyncio.run(scenario())


async def store_at(
    directory: HivemindDirectory,
    at: PeerId,
    under: PeerId | None,
    value: Any,
    expires_unix_s: float,
    bucket: Bucket = ROOT,
) -> list[bool]:
    """What a member's modified program could send: one store to one peer, whatever it holds."""
    from hivemind.dht.node import DHTID
    from hivemind.p2p import PeerID
    from hivemind.utils import MSGPackSerializer

    key = DHTID.from_bytes(bucket.key(directory._membership.run_id))
    packed = MSGPackSerializer.dumps(value) if under is not None else value
    subkeys = None if under is None else [str(under)]
    answer = await directory._node.protocol.call_store(
        PeerID.from_base58(at), [key], [packed], [expires_unix_s], subkeys=subkeys
    )
    return list(answer)


# --- bootstrap


def test_each_bootstrap_address_fails_for_its_own_reason(run: Run) -> None:
    async def scenario() -> None:
        ann, bob = run.person(), run.person()
        async with HivemindWorld(run).directories(ann) as (first,):
            hung = socket.create_server(("127.0.0.1", 0))
            closed = socket.create_server(("127.0.0.1", 0))
            hung_port, closed_port = hung.getsockname()[1], closed.getsockname()[1]
            closed.close()

            def nobody() -> PeerId:
                return PeerKey.generate().peer

            real_route = first.bootstrap_addresses()[0].rpartition("/p2p/")[0]
            addresses = {
                f"/ip4/127.0.0.1/tcp/{closed_port}/p2p/{nobody()}": "refused",
                f"/ip4/127.0.0.1/tcp/{hung_port}/p2p/{nobody()}": "timed out",
                f"{real_route}/p2p/{nobody()}": f"wrong peer id: {ann.key.peer}",
                f"/dns4/no-such-host.invalid/tcp/4001/p2p/{nobody()}": "unknown host",
                "/ip4/127.0.0.1/tcp/4001": "malformed",
                f"/ip4/127.0.0.1.9/tcp/4001/p2p/{nobody()}": "malformed",
            }
            directory = hivemind_directory(run, bob, tuple(addresses), bootstrap_deadline_s=2.0)
            try:
                with pytest.raises(BootstrapFailed) as failed:
                    await directory.start()
            finally:
                await directory.close()
                hung.close()
            for address, reason in addresses.items():
                (line,) = [
                    line for line in str(failed.value).splitlines() if line.strip().startswith(address + ":")
                ]
                assert line.strip().startswith(f"{address}: {reason}")

    asyncio.run(scenario())


def test_one_address_that_answers_is_enough(run: Run) -> None:
    async def scenario() -> None:
        ann, bob = run.person(), run.person()
        async with HivemindWorld(run).directories(ann) as (first,):
            said = await published(first, ann)
            hung = socket.create_server(("127.0.0.1", 0))
            silent = f"/ip4/127.0.0.1/tcp/{hung.getsockname()[1]}/p2p/{PeerKey.generate().peer}"
            directory = hivemind_directory(run, bob, (silent, *first.bootstrap_addresses()))
            try:
                await directory.start()
                assert await directory.lookup() == (said,)
            finally:
                await directory.close()
                hung.close()

    asyncio.run(scenario())


def test_a_peer_joins_by_itself_once_its_bootstrap_peer_is_back(run: Run) -> None:
    """And a peer that comes back listens on its old port, so that tokens stay good."""

    async def scenario() -> None:
        ann, bob = run.person(), run.person()
        async with HivemindWorld(run).directories(ann) as (first,):
            address = first.bootstrap_addresses()
        late = hivemind_directory(run, bob, address)
        try:
            with pytest.raises(BootstrapFailed, match="refused"):
                await late.start()
            async with HivemindWorld(run).directories(ann) as (first,):
                assert first.bootstrap_addresses() == address
                said = await published(first, ann)

                async def found() -> bool:
                    return said in await late.lookup()

                await until(found)
        finally:
            await late.close()

    asyncio.run(scenario())


def test_who_was_met_is_read_and_kept_without_a_thread_in_the_address_book(tmp_path: Path) -> None:
    """The loop learns addresses all the time: a thread that goes through them would trip over that."""
    here, peer = threading.get_ident(), PeerKey.generate().peer

    class Book(AddressBook):
        def __getattribute__(self, name: str) -> Any:
            assert threading.get_ident() == here
            return super().__getattribute__(name)

    async def main() -> None:
        book = Book()
        book.learn(peer, ("/ip4/10.0.0.1/tcp/4000",), by_itself=True)
        for known in (book, Book()):
            nobody: Any = SimpleNamespace(routing_table=SimpleNamespace(peer_id_to_uid={}))
            alone = SimpleNamespace(protocol=nobody, node_id=None)
            node: Any = itertools.repeat(alone).__next__
            daemon: Any = SimpleNamespace(call=lambda function, limit_s: asyncio.sleep(0))
            joiner: Any = Joiner(peer, (), 1.0, daemon, node, known, tmp_path, random.Random(1))
            joiner._greet_met = lambda peer: asyncio.sleep(0, True)
            await joiner.join()
            await joiner.close()
            assert known.routes(peer) == ("/ip4/10.0.0.1/tcp/4000",)

    asyncio.run(main())


def test_the_own_address_is_no_bootstrap_address() -> None:
    async def scenario() -> None:
        me = PeerKey.generate().peer

        async def dial(target: object) -> None:
            raise AssertionError(target)

        await Bootstrap(me, (f"/ip4/127.0.0.1/tcp/4001/p2p/{me}",), dial).once()

    asyncio.run(scenario())


def test_a_peer_without_bootstrap_addresses_comes_back_through_those_it_met(run: Run) -> None:
    """The owner who restarts: nobody gives it an address, and others need not notice that it is back."""

    async def scenario() -> None:
        owner, ann = run.person(), run.person()
        async with HivemindWorld(run).directories(owner, ann) as (first, second):
            said = await published(second, ann)
            await first.close()
            again = hivemind_directory(run, owner, ())
            try:
                await again.start()
                assert await again.lookup() == (said,)
            finally:
                await again.close()

    asyncio.run(scenario())


# --- p2pd


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_calls_fail_soon_when_p2pd_is_lost_and_work_again_after_its_restart(
    run: Run, how: signal.Signals
) -> None:
    async def scenario() -> None:
        ann, bob = run.person(), run.person()
        async with HivemindWorld(run).directories(ann, bob) as (first, second):
            assert isinstance(second, HivemindDirectory) and second._daemon is not None
            addresses = second.bootstrap_addresses()
            await published(second, bob)
            pid = second._daemon.pid
            assert pid is not None

            async def load() -> None:
                sequence = 2
                while True:
                    await asyncio.gather(published(second, bob, sequence), second.lookup())
                    sequence += 1

            loads = [asyncio.create_task(load()) for _ in range(4)]
            await asyncio.sleep(0)
            os.kill(pid, how)
            async with asyncio.timeout(5.0):  # 3 s promised; this machine may be busy
                for outcome in await asyncio.gather(*loads, return_exceptions=True):
                    assert isinstance(outcome, TransportLost)

            async def works() -> bool:
                with contextlib.suppress(ShoalError):
                    said = await published(second, bob, 1000)
                    return said in await first.lookup()
                return False

            await until(works)
            assert second.status().daemon is DaemonState.UP
            assert second.status().restarts == 1
            assert second.bootstrap_addresses() == addresses

    asyncio.run(scenario())


def freeze(pid: int) -> None:
    """SIGSTOP to a child; returns once it stands still: one of its threads may run on for a moment."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


def test_who_hears_nobody_because_its_own_p2pd_froze_is_told_so(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that others are silent: frozen as the record goes out, before the next ping would notice."""

    async def scenario() -> None:
        ann, bob = run.person(), run.person()
        async with HivemindWorld(run, call_deadline_s=0.1).directories(ann, bob) as (_, second):
            assert isinstance(second, HivemindDirectory) and second._daemon is not None
            await published(second, bob)
            pid, find = second._daemon.pid, second._node.find_nearest_nodes
            assert pid is not None

            async def find_and_freeze(*keys: Any, **options: Any) -> Any:
                found = await find(*keys, **options)
                freeze(pid)
                return found

            monkeypatch.setattr(second._node, "find_nearest_nodes", find_and_freeze)
            with pytest.raises(TransportLost, match="p2pd"):
                await published(second, bob, 2)

    asyncio.run(scenario())


def test_calls_cancelled_at_any_moment_do_no_harm(run: Run) -> None:
    """hivemind alone loses its connection to p2pd here, within a hundred calls; and p2pd that is told of a
    cancelled call panics once in some thousands (seen: as the stream opens), so it is never told."""
    rng = random.Random(1)

    async def scenario() -> None:
        ann, bob = run.person(), run.person()
        async with HivemindWorld(run).directories(ann, bob) as (_, second):
            assert isinstance(second, HivemindDirectory) and second._daemon is not None
            from hivemind.p2p import PeerID

            said: list[str] = []
            messages = second._daemon.check()[0]._client.control._pending_messages
            put = messages.put

            async def heard(message: Any) -> None:
                said.append(message.WhichOneof("message"))
                await put(message)

            messages.put = heard
            peer = PeerID.from_base58(ann.key.peer)
            for _ in range(150):
                calls = {asyncio.ensure_future(second._node.protocol.call_ping(peer)) for _ in range(4)}
                await asyncio.wait(calls, timeout=rng.uniform(0, 0.01), return_when=asyncio.FIRST_COMPLETED)
                for call in calls:
                    call.cancel()
                await asyncio.wait(calls)
            second._daemon.check()
            assert second.status().restarts == 0
            assert said.count("callUnary") > 150 and "cancel" not in said

    asyncio.run(scenario())


def test_a_frozen_peer_stops_nobody(run: Run) -> None:
    async def scenario() -> None:
        people = [run.person() for _ in range(3)]
        async with HivemindWorld(run, call_deadline_s=0.5).directories(*people) as (first, second, third):
            assert isinstance(third, HivemindDirectory) and third._daemon is not None
            pid = third._daemon.pid
            assert pid is not None
            third._daemon._watch.cancel()  # type: ignore[union-attr]  # a frozen machine does not notice
            os.kill(pid, signal.SIGSTOP)
            try:
                said = await published(first, people[0])
                assert said in await second.lookup()
            finally:
                os.kill(pid, signal.SIGCONT)

    asyncio.run(scenario())


def test_p2pd_does_not_outlive_a_killed_process(run: Run) -> None:
    program = (
        "import asyncio, sys, time\n"
        "from pathlib import Path\n"
        "from directory_world import HivemindWorld, Run\n"
        "async def main():\n"
        "    run = Run(Path(sys.argv[1]))\n"
        "    async with HivemindWorld(run).directories(run.person()) as (directory,):\n"
        "        print(directory._daemon.pid, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )

    async def scenario() -> None:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            program,
            str(run.directory),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        )
        assert child.stdout is not None
        pid = int(await child.stdout.readline())
        child.kill()
        await child.wait()

        async def gone() -> bool:
            return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

        await until(gone)

    asyncio.run(scenario())


def mode(path: str | Path) -> int:
    return os.stat(path).st_mode & 0o777


def test_files_of_the_directory_are_private_and_sockets_leave_with_it(run: Run) -> None:
    async def scenario() -> None:
        person = run.person()
        async with HivemindWorld(run).directories(person) as (directory,):
            assert isinstance(directory, HivemindDirectory)
            state = directory._settings.state_dir
            sockets = directory._daemon._sockets.name  # type: ignore[union-attr]
            assert mode(state / "p2pd.identity") == 0o600
            assert mode(sockets) == 0o700
            assert any(name.endswith(".sock") for name in os.listdir(sockets))
        assert not any(name.startswith("p2pd-") for name in os.listdir(state))

    asyncio.run(scenario())


def test_loading_hivemind_leaves_this_process_as_it_was() -> None:
    import torch.multiprocessing

    sharing_strategy: Callable[[], str] = torch.multiprocessing.get_sharing_strategy
    before = sharing_strategy()
    asyncio.run(load_hivemind())
    assert sharing_strategy() == before
    assert logging.getLevelName(logging.WARNING) == "WARNING"
    assert logging.getLogger("hivemind").getEffectiveLevel() == logging.WARNING
    assert all(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("hivemind").handlers)
