"""A run with an owner and members, and their directories, real or in memory."""

from __future__ import annotations

import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shoal.dht.directory import Directory, PeerRecord, SignedRecord
from shoal.dht.hivemind_directory import DirectorySettings, HivemindDirectory
from shoal.dht.memory_directory import MemoryDirectoryHub
from shoal.dht.records import sign_record
from shoal.protocol.admission import Membership, OwnerKey
from shoal.protocol.identity import PeerKey, Role


@dataclass(frozen=True)
class Person:
    key: PeerKey
    membership: Membership

    def record(self, sequence: int = 1, **changes: Any) -> PeerRecord:
        plain = PeerRecord(
            peer=self.key.peer,
            incarnation=1,
            sequence=sequence,
            issued_unix_s=time.time(),
            ttl_s=30.0,
            state="online",
            stages=(0,),
            name="",
            addresses=("127.0.0.1:5000",),
            chain=self.membership.chain,
            device="cpu",
            tokens_per_s=0.0,
            version="0",
        )
        return replace(plain, **changes)

    def signed(self, sequence: int = 1, **changes: Any) -> SignedRecord:
        return sign_record(self.record(sequence, **changes), self.key, self.membership.run_id)


class Run:
    """Members of one run; each `Run` has its own owner, so members of two are strangers to each other."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / os.urandom(4).hex()
        self.owner = OwnerKey.create(self.directory / "owner", os.urandom(32), "test", time.time())
        self.members = 0

    def person(self, role: Role = Role.TRAINER) -> Person:
        token = self.owner.issue_token([role], 3600.0, (), "volunteer", time.time())
        key = PeerKey.generate()
        self.members += 1
        return Person(key, Membership(token, key, time.time))


class MemoryWorld:
    """Directories on one hub."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._hub: MemoryDirectoryHub | None = None

    @asynccontextmanager
    async def directories(self, *people: Person) -> AsyncIterator[list[Directory]]:
        if self._hub is None:
            rng = random.Random(1)
            self._hub = MemoryDirectoryHub(
                people[0].membership, time.time, rng, delay_s=0.001, call_deadline_s=0.05
            )
        async with AsyncExitStack() as stack:
            opened: list[Directory] = []
            for person in people:
                directory = self._hub.directory(person.key.peer, person.membership)
                stack.push_async_callback(directory.close)
                await directory.start()
                opened.append(directory)
            yield opened


class HivemindWorld:
    """Directories with a p2pd each on loopback; the first is everybody's bootstrap peer."""

    def __init__(self, run: Run, **settings_changed: Any) -> None:
        self._run = run
        self._settings_changed = settings_changed
        self._bootstrap: tuple[str, ...] = ()

    @asynccontextmanager
    async def directories(self, *people: Person) -> AsyncIterator[list[Directory]]:
        async with AsyncExitStack() as stack:
            opened: list[Directory] = []
            for person in people:
                directory = hivemind_directory(self._run, person, self._bootstrap, **self._settings_changed)
                stack.push_async_callback(directory.close)
                await directory.start()
                self._bootstrap = self._bootstrap or directory.bootstrap_addresses()
                opened.append(directory)
            yield opened


def hivemind_directory(
    run: Run, person: Person, bootstrap: tuple[str, ...], **settings_changed: Any
) -> HivemindDirectory:
    settings = DirectorySettings(run.directory / person.key.peer[-8:], bootstrap=bootstrap)
    settings = replace(settings, **settings_changed)
    return HivemindDirectory(person.key, person.membership, settings, rng=random.Random(1))
