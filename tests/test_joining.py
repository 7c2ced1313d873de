"""Joining the directory among peers that answer nonsense, or of whom somebody told some: it goes on."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import pytest
from directory_world import HivemindWorld, Person, Run, hivemind_directory

from shoal.dht.addresses import AddressBook
from shoal.dht.hivemind_directory import HivemindDirectory
from shoal.protocol.errors import BootstrapFailed
from shoal.protocol.identity import PeerId, PeerKey

NONSENSE = "/ip4/127.0.0.1/tcp/4001/no-such-protocol"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def state_dir(run: Run, person: Person) -> Path:
    return run.directory / person.key.peer[-8:]


def remember(run: Run, person: Person, *addresses: str) -> None:
    """As if this peer had met them in an earlier life."""
    state_dir(run, person).mkdir(mode=0o700, parents=True)
    path = state_dir(run, person) / "peers-met"
    path.touch(0o600)
    path.write_text("\n".join(addresses))


def forget_all(directory: HivemindDirectory) -> None:
    """Nobody is left in the routing table: the next `join` dials those it met."""
    table = directory._node.protocol.routing_table
    for node_id in list(table.peer_id_to_uid.values()):
        del table[node_id]


def test_an_address_that_libp2p_does_not_understand_keeps_nobody_from_starting(run: Run) -> None:
    """Any member may claim one as its own, and who met it has it on disk."""

    async def scenario() -> None:
        ann, bob = run.person(), run.person()
        async with HivemindWorld(run).directories(ann) as (first,):
            (address,) = first.bootstrap_addresses()
            remember(run, bob, f"{NONSENSE}/p2p/{PeerKey.generate().peer}", address)
            second = hivemind_directory(run, bob, ())
            try:
                await second.start()
                said = ann.signed()
                await first.publish(said, time.time() + 29.0)
                assert await second.lookup() == (said,)
            finally:
                await second.close()

    asyncio.run(scenario())


def test_a_token_that_names_such_an_address_fails_with_a_reason(run: Run) -> None:
    async def scenario() -> None:
        address = f"{NONSENSE}/p2p/{PeerKey.generate().peer}"
        directory = hivemind_directory(run, run.person(), (address,))
        try:
            with pytest.raises(BootstrapFailed, match="no-such-protocol"):
                await directory.start()
        finally:
            await directory.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "answer", [None, b"", b"garbage", bytes(4 << 20)], ids=["none", "empty", "garbage", "huge"]
)
def test_nonsense_for_an_answer_does_not_end_the_attempts_to_join(run: Run, answer: bytes | None) -> None:
    """None is what hivemind makes of an empty answer."""

    async def scenario() -> None:
        ann, bob = run.person(), run.person()
        async with HivemindWorld(run).directories(ann, bob) as (_, second):
            assert isinstance(second, HivemindDirectory) and second._daemon is not None
            joiner: Any = second._joiner
            joiner.bootstrap._targets = []  # it has only those it met
            client, asked = second._daemon.check()[0]._client, asyncio.Event()
            call = client.call_unary_handler

            async def nonsense(*_: object) -> bytes | None:
                asked.set()
                return answer

            client.call_unary_handler = nonsense
            forget_all(second)
            joiner.restarted.set()  # as after a restart of p2pd
            async with asyncio.timeout(20.0):
                await asked.wait()
                client.call_unary_handler = call
                while not joiner._joined():
                    await asyncio.sleep(0.05)
                assert second._keep_joined is not None and not second._keep_joined.done()

    asyncio.run(scenario())


def test_who_names_no_place_in_the_directory_gets_none(run: Run) -> None:
    """hivemind would file it under 0, for everybody who looks for a key near that."""

    async def scenario() -> None:
        ann, bob = run.person(), run.person()
        async with HivemindWorld(run).directories(ann) as (first,):
            assert isinstance(first, HivemindDirectory)
            first._node.protocol.node_info.ClearField("node_id")
            second = hivemind_directory(run, bob, first.bootstrap_addresses())
            try:
                await second.start()
                assert not second._node.protocol.routing_table.peer_id_to_uid
            finally:
                await second.close()

    asyncio.run(scenario())


def test_who_spoke_for_itself_is_remembered_before_those_others_named() -> None:
    """What is kept for the next start, and what new tokens name, is not for a liar to fill."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng, book = random.Random(seed), AddressBook()
    told: dict[bool, list[PeerId]] = {True: [], False: []}
    for port in range(4000, 4100):
        by_itself = rng.random() < 0.3
        peer = PeerKey.generate().peer
        book.learn(peer, (f"/ip4/10.0.0.1/tcp/{port}",), by_itself=by_itself)
        told[by_itself].append(peer)
    expected = (*reversed(told[True]), *reversed(told[False]))
    assert book.recent(200) == expected
    assert book.recent(8) == expected[:8]
