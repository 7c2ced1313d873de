"""Where a machine keeps what Shoal writes. Called by the daemon, the owner's commands and `shoal status`.

    <root>/                       --data-dir, else $SHOAL_DATA_DIR, else the user's data folder
      checkpoints/                imported ones, from which runs start, and those put together by hand
      owner/                      never read by a volunteer's commands
        <run>/                    root key, spec, tokens, the owner's lists, bootstrap addresses of one run
      peer-0/                     one peer of this machine: identity.key and the lock that says who uses it
        <run>/                    one run as this peer knows it: spec, the owner's lists, log, checkpoints,
                                  control socket
      peer-1/ ...                 the second daemon on the same machine

Every folder is 0700. A peer folder is claimed by an exclusive lock that the kernel drops with the process,
so two daemons never share one identity and a crash leaves nothing to clean up.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import platformdirs

from shoal.protocol.errors import StorageError
from shoal.protocol.private_files import private_directory

ENVIRONMENT_KEY = "SHOAL_DATA_DIR"
CACHE_KEY = "SHOAL_CACHE_DIR"
PEERS_PER_MACHINE = 256


def data_root(chosen: Path | None = None) -> Path:
    """The folder for everything: the argument, the environment, or the platform's user data folder."""
    value = os.environ.get(ENVIRONMENT_KEY)
    if chosen is None and value:
        chosen = Path(value)
    root = platformdirs.user_data_path("shoal") if chosen is None else chosen.expanduser().absolute()
    return _folder(root)


def cache_root() -> Path:
    """The folder for what can be made again, such as tokenized corpora; shared by all peers of a user."""
    value = os.environ.get(CACHE_KEY)
    return _folder(Path(value).expanduser().absolute() if value else platformdirs.user_cache_path("shoal"))


def run_folder(parent: Path, run_id: bytes) -> Path:
    """The folder of one run inside a peer's or the owner's folder."""
    return _folder(parent / run_id.hex()[:16])


def checkpoint_store(root: Path) -> Path:
    """The folder of checkpoints that belong to no peer; it may not exist yet."""
    return root / "checkpoints"


def checkpoint_folders(root: Path) -> list[Path]:
    """All folders of checkpoints under `root`: the store, and those of its peers' runs."""
    return [checkpoint_store(root), *sorted(root.glob("peer-*/*/checkpoints"))]


@dataclass
class PeerFolder:
    """A claimed `peer-N` folder. A context manager: leaving it gives the claim back."""

    path: Path
    _lock: IO[bytes]

    @classmethod
    def claim(cls, root: Path) -> Self:
        """The first peer folder of `root` that no living daemon uses. Raises StorageError."""
        for number in range(PEERS_PER_MACHINE):
            folder = _folder(root / f"peer-{number}")
            lock = _locked(folder / "lock")
            if lock is not None:
                return cls(folder, lock)
        raise StorageError(f"{PEERS_PER_MACHINE} peers already run from {root}\nstop one with `shoal leave`")

    @property
    def identity_path(self) -> Path:
        return self.path / "identity.key"

    @property
    def root(self) -> Path:
        """The data folder that it lies in."""
        return self.path.parent

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()


def _locked(path: Path) -> IO[bytes] | None:
    """The open lock file, or None when another process holds it."""
    try:
        file = path.open("ab")
    except OSError as error:
        raise StorageError(
            f"cannot use {path}: {error.strerror}\nname another folder with --data-dir"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _folder(path: Path) -> Path:
    private_directory(path)
    return path


def control_sockets(root: Path) -> list[Path]:
    """The control sockets of all peers that run, or ran, from `root`."""
    return sorted(root.glob("peer-*/*/control.sock"))
