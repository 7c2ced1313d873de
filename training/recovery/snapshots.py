"""Snapshots: takes one at every K-th height, keeps the last two, on disk where there is a directory.

Genesis is the first of them, and never stored: it is a function of the spec. With a directory the journal of
entries beside the snapshots lets a peer come back alone, even when the whole stage was emptied.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shoal.protocol.errors import NotHere, ShoalError, StorageError
from shoal.protocol.faults import define
from shoal.protocol.faulty_transport import point
from shoal.protocol.private_files import write_private
from shoal.training.outer.context import Context
from shoal.training.outer.entry import Entry
from shoal.training.outer.local import LocalWeights
from shoal.training.outer.parts import Fragment
from shoal.training.outer.reduce import Published
from shoal.training.outer.replica import Replica
from shoal.training.outer.snapshot import Snapshot, snapshot_of
from shoal.training.recovery import journal
from shoal.training.recovery.snapshot import load, save
from shoal.training.recovery.whole_file import MEND, UNFINISHED, sweep

KEPT = 2  # a joiner may be half through the one before the newest
CLOSE_S = 60.0  # that who leaves waits for its disk; the write that is under way then ends by itself
QUEUED = 64  # writes; a disk that is slower than the rounds skips entries, and the journal starts anew
VALUE_BYTES = 8  # of a snapshot: anchor and momentum
Written = tuple[int, bytes, Mapping[int, Published]]  # an entry: height, bytes, parts
_WRITING, _WRITTEN = define("disk.writing"), define("disk.written")


class Snapshots:
    """Belongs to one replica; the donor reads from it."""

    def __init__(self, context: Context, replica: Replica, genesis: Snapshot, directory: Path | None) -> None:
        """`genesis`: what the replica begins with, whatever its height."""
        self._context = context
        self._replica = replica
        self.directory = stage_directory(context, directory) if directory else None
        self._kept = {genesis.height: genesis}
        self._watchers: list[Callable[[Snapshot], None]] = []
        self._writes: asyncio.Queue[tuple[Callable[..., None], tuple[Any, ...], int]] = asyncio.Queue(QUEUED)
        self._held_bytes = 0  # by those and the one that is being written
        self._behind = False  # the disk
        self._writer: asyncio.Task[None] | None = None
        self._refused: set[str] = set()  # kinds of writes, by the disk
        self._restoring = False  # entries come from the disk
        replica.applied.append(self._on_entry)

    @property
    def newest_height(self) -> int:
        """0 while there is none but genesis."""
        return max(self._kept)

    @property
    def heights(self) -> list[int]:
        """Of those kept, the newest first."""
        return sorted(self._kept, reverse=True)

    def get(self, height: int) -> Snapshot:
        """The snapshot of a height. Raises NotHere."""
        found = self._kept.get(height)
        if found is None:
            raise NotHere(f"no snapshot of height {height}; kept: {sorted(self._kept)}")
        return found

    async def whole(self, height: int) -> Snapshot:
        """`get`, hashed anew. Raises NotHere, also for one that is not any more what it was."""
        found, context = self.get(height), self._context
        fresh: Snapshot = await context.offload(
            snapshot_of, found.state, found.anchor, found.momentum, context.fragments
        )
        if fresh.state_root != found.state_root:
            raise NotHere(f"the snapshot of height {height} in memory does not fit its state root")
        return found

    def take(self) -> None:
        """Keep the replica's state as it is now."""
        replica = self._replica
        self.keep(Snapshot(replica.log.state(), replica.anchor, replica.momentum, replica.state_root))

    def near(self, height: int) -> Snapshot:
        """That of a height or, where a checkpoint stands in for it, the next one here. Raises NotHere."""
        every = self._context.spec.outer.snapshot_every
        return self.get(next((h for h in sorted(self._kept) if height <= h < height + every), height))

    def watch(self, kept: Callable[[Snapshot], None]) -> None:
        """`kept` gets those that are here, the oldest first, and each one from now on."""
        self._watchers.append(kept)
        for height in sorted(self._kept):
            kept(self._kept[height])

    def keep(self, snapshot: Snapshot) -> None:
        """Hold a snapshot (a joiner's, too, which so becomes a donor) and let older state go."""
        self._hold(snapshot)
        if self.directory is None or not snapshot.height:
            return
        if rewrite.__name__ in self._refused:  # what the disk has is still of a chain that was left
            self.write(rewrite, self.directory, snapshot, ())
        else:
            self.write(store, self.directory, snapshot, min(self._kept))

    def _hold(self, snapshot: Snapshot) -> None:
        self._kept[snapshot.height] = snapshot
        for height in sorted(self._kept)[:-KEPT]:
            del self._kept[height]
        for kept in self._watchers:
            kept(snapshot)
        self._replica.prune(snapshot.height)

    def switch(self, snapshot: Snapshot) -> None:
        """The replica has jumped to where this snapshot and the entries after it lead: forget all others.

        Those entries came to no callback: without them the disk would hold less than the replica.
        """
        self._kept.clear()
        self._hold(snapshot)
        if self.directory is not None:
            log, payloads = self._replica.log, self._replica.payloads
            entries = ((h, log.entry(h)) for h in range(snapshot.height + 1, log.height + 1))
            tail = [(h, data, payloads.parts_at(h)) for h, data in entries if data is not None]
            self.write(rewrite, self.directory, snapshot, tail)

    async def restore(self, local: LocalWeights) -> None:
        """Take up what the disk has: the newest whole snapshot, then the entries after it."""
        if self.directory is None:
            return
        snapshot = await self._context.offload(
            newest_on_disk, self.directory, self._context.size, self._context.fragments
        )
        if snapshot is not None and snapshot.height > self._replica.log.height:
            await self._replica.adopt(Replica(self._context, snapshot), local)
            self._kept[snapshot.height] = snapshot
        entries = journal.read_entries(self.directory, self._replica.log.height + 1)
        self._restoring = True
        try:
            while (entry := await self._context.offload(next, entries, None)) is not None:
                data, parts = entry  # one at a time: all since a snapshot may be more than memory holds
                await self._replica.apply(data, parts, local, None)
        except ShoalError as error:
            self._context.event("journal-cut", {"height": self._replica.log.height, "why": str(error)})
        finally:
            self._restoring = False

    async def close(self) -> None:
        """Finish the writes that are queued, as far as the disk takes them within CLOSE_S, then stop."""
        if self._writer is None:
            return
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._writes.join()
        except TimeoutError:
            left, stage = self._writes.qsize() + 1, self._context.stage
            text = f"the disk is too slow: the last {left} writes of stage {stage} are not waited for"
            self._context.event("disk-behind", {"queued": left, "text": text})
        finally:
            self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)

    def _on_entry(self, entry: Entry, data: bytes, parts: Mapping[int, Published]) -> None:
        if self.directory is not None and not self._restoring:
            self.write(journal.write_entry, self.directory, entry.height, data, parts)
        if entry.height % self._context.spec.outer.snapshot_every == 0:
            self.take()

    def write(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run a write off the loop, after those before it; a disk slower than the rounds skips some.

        Not a `rewrite`: without it the disk would keep a chain that was left. What it replaces is skipped.
        """
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_all())
        size_bytes = bytes_in(arguments)
        while not self._has_room(size_bytes):
            self._tell_that_it_is_behind()
            if function is not rewrite:
                return
            *_, skipped_bytes = self._writes.get_nowait()
            self._held_bytes -= skipped_bytes
            self._writes.task_done()
        self._held_bytes += size_bytes
        self._writes.put_nowait((function, arguments, size_bytes))

    def _has_room(self, size_bytes: int) -> bool:
        """Beside what is being written one more is taken whatever its size, others as memory allows."""
        spec, size = self._context.spec, self._context.size
        most_bytes = max(spec.outer.payload_budget_bytes, KEPT * VALUE_BYTES * size)
        few = self._held_bytes + size_bytes <= most_bytes and not self._writes.full()
        return few or self._writes.empty()

    async def _write_all(self) -> None:
        while True:
            function, arguments, size_bytes = await self._writes.get()
            try:
                await point(self._context.transport, _WRITING)
                await self._context.disk(function, *arguments)
                await point(self._context.transport, _WRITTEN)
                self.tell_of_disk(function)
            except Exception as error:  # the edge of this task: training goes on without the disk
                self.tell_of_disk(function, str(error) or repr(error))
            finally:
                self._held_bytes -= size_bytes
                self._behind = self._behind and not self._writes.empty()
                self._writes.task_done()

    def _tell_that_it_is_behind(self) -> None:
        queued, stage = self._writes.qsize(), self._context.stage
        text = f"the disk is slower than the rounds: some of the state of stage {stage} is not written to it"
        self._context.event("disk-behind", {"queued": queued} | ({} if self._behind else {"text": text}))
        self._behind = True

    def tell_of_disk(self, write: Callable[..., None], why: str = "") -> None:
        """Why it refused a write (or a promise), empty where it took it. In words only what has changed: that
        it takes a small one proves nothing for the large ones."""
        before = bool(self._refused)
        if why:
            self._refused.add(write.__name__)
        elif write in (store, rewrite):
            self._refused &= {write_private.__name__} | ({rewrite.__name__} if write is store else set())
        else:
            self._refused.discard(write.__name__)
        stage = self._context.stage
        if why:
            text = f"the state of stage {stage} is not on disk, training goes on without: {why}"
            self._context.event("disk-refused", {"why": why} if before else {"why": why, "text": text})
        elif before and not self._refused:
            text = f"the disk takes the state of stage {stage} again"
            self._context.event("disk-back", {"stage": stage, "text": text})


def bytes_in(held: object) -> int:
    """What the arguments of a write take of memory while it waits, as far as that is much."""
    match held:
        case torch.Tensor():
            return held.nbytes
        case Snapshot():
            return held.anchor.nbytes + held.momentum.nbytes
        case Published():
            return memoryview(held.encoded).nbytes
        case Mapping():
            return sum(map(bytes_in, held.values()))
        case tuple() | list():
            return sum(map(bytes_in, held))
    return 0


def stage_directory(context: Context, directory: Path) -> Path:
    """Where a stage's snapshots and journal are, in a peer's folder."""
    return directory / context.run_id.hex() / f"stage-{context.stage}"


def snapshot_path(directory: Path, height: int) -> Path:
    """Of one snapshot in a stage's folder."""
    return directory / f"snapshot-{height:012d}.safetensors"


def store(directory: Path, snapshot: Snapshot, oldest: int) -> None:
    """Write a snapshot to a stage's folder, and let go of what is older than height `oldest` there.

    Where there is no room for it, what is older goes first, if that one is there. Raises StorageError.
    """
    path, before = snapshot_path(directory, snapshot.height), snapshot_path(directory, oldest)
    try:
        try:
            save(snapshot, path)
        except StorageError:
            if not before.exists():
                raise
            _let_go(directory, oldest)
            save(snapshot, path)
        _let_go(directory, oldest)
        sweep(directory)
    except OSError as error:
        raise StorageError(f"{directory}: {error}; {MEND}") from error


def _let_go(directory: Path, oldest: int) -> None:
    for path in directory.glob("snapshot-*.safetensors"):
        if path < snapshot_path(directory, oldest):
            path.unlink(missing_ok=True)
    journal.prune(directory, oldest + 1)


def rewrite(directory: Path, snapshot: Snapshot, tail: Sequence[Written]) -> None:
    """Let a stage's folder hold a snapshot, the entries after it, and nothing else. Raises StorageError.

    What it held goes last: a process that is killed amid this leaves more than nothing.
    """
    kept = {snapshot_path(directory, snapshot.height)}
    if snapshot.height:  # genesis is never stored
        save(snapshot, snapshot_path(directory, snapshot.height))
    for height, data, parts in tail:
        journal.write_entry(directory, height, data, parts)
        kept.add(journal.entry_path(directory, height))
    clear(directory, kept)


def has_snapshot(directory: Path) -> bool:
    """Whether a stage's folder has one, whole or not, as far as it can be read."""
    with contextlib.suppress(OSError):
        return any(directory.glob("snapshot-*.safetensors"))
    return False


def clear(directory: Path, but: Collection[Path] = ()) -> None:
    """Forget a stage's state on disk, `but` some files of it. Raises StorageError."""
    try:
        for pattern in ("snapshot-*.safetensors", "entry-*.safetensors", f"{UNFINISHED}/*"):
            for path in directory.glob(pattern):
                if path not in but:
                    path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{directory}: {error}; remove it by hand") from error


def forget(directory: Path) -> None:
    """Remove all that is large of a stage's folder; a promise is kept. Raises StorageError."""
    clear(directory)
    try:
        for path in directory.glob("residual-*.safetensors"):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{directory}: {error}; remove it by hand") from error


def newest_on_disk(directory: Path, size: int, fragments: Sequence[Fragment]) -> Snapshot | None:
    """The highest snapshot in a stage's folder that is whole; for whoever writes there from now on."""
    found: list[Path] = []
    with contextlib.suppress(OSError):  # the first write tells of a disk that refuses
        found = sorted(directory.glob("snapshot-*.safetensors"), reverse=True)
        sweep(directory)
    for path in found:
        try:
            return load(path, size, fragments)
        except StorageError:
            continue  # the one before it, or the group
    return None
