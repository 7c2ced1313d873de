"""The owner's lists come with heartbeats: they count at once, and reach the disk without holding the loop."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from pathlib import Path

import pytest

from shoal.node.owner.home import OwnerHome
from shoal.node.presence import Listening, present
from shoal.protocol.identity import PeerKey, Role
from shoal.protocol.revocation import RevocationBook
from shoal.protocol.write_behind import WriteBehind
from shoal.training.spec import RunSpec


def test_a_list_that_is_taken_over_is_on_the_disk_in_the_end_and_never_flushed_on_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed_by: list[int] = []
    flush = os.fsync

    def noted(descriptor: int) -> None:
        flushed_by.append(threading.get_ident())
        flush(descriptor)

    async def scene() -> None:
        now = time.time()
        home = OwnerHome.of_run(tmp_path / "owner", RunSpec(), now)
        token = home.key.issue_token([Role.TRAINER], 3600.0, (), "ann", now)
        (tmp_path / "ann").mkdir(mode=0o700)
        lists = [home.key.revoke([f"{number:016x}"]) for number in range(1, 6)]
        async with present(token, PeerKey.generate(), tmp_path / "ann", Listening()) as presence:
            monkeypatch.setattr(os, "fsync", noted)
            for signed in lists:
                assert presence.membership.revocations.adopt(signed)
            assert presence.membership.revocations.version == 5
        stored = RevocationBook(token.run_id, token.root_der, tmp_path / "ann" / "revocations")
        assert stored.version == 5
        assert flushed_by and threading.get_ident() not in flushed_by

    asyncio.run(scene())


def test_what_the_owners_own_command_wrote_is_not_written_again(tmp_path: Path) -> None:
    """Or a slow write of the last list would undo that of the next."""
    home = OwnerHome.of_run(tmp_path, RunSpec(), time.time())
    written: list[Path] = []
    path = home.key.revocations_path
    book = RevocationBook(home.key.run_id, home.key.root_der, path, lambda file, _: written.append(file))
    told: list[int] = []
    book.changed.append(lambda: told.append(book.version))
    home.key.revoke(["ab" * 8])
    assert book.reload() and told == [1]
    assert not written


def test_what_the_disk_refuses_is_told_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        lists = WriteBehind()
        (tmp_path / "file").touch()
        lists(tmp_path / "file" / "revocations", b"1")
        lists(tmp_path / "revocations", b"2")
        await lists.close()

    with caplog.at_level(logging.ERROR):
        asyncio.run(scene())
    assert (tmp_path / "revocations").read_bytes() == b"2"
    (record,) = caplog.records
    assert "revocations" in record.getMessage()
