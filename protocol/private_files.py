"""Files that only this user may read: keys, tokens, and small state that must be whole or absent.

Written to a temporary name with mode 0600, flushed to disk and renamed, so that a crash leaves the
old file or the new one. Blocking; callers on the event loop go through their executor.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from shoal.protocol.errors import StorageError

_POSIX = os.name == "posix"  # elsewhere the mode bits say nothing


def write_private(path: Path, data: bytes) -> None:
    """Replace `path` by `data` atomically. Raises StorageError."""
    temporary = _write_beside(path, data)
    try:
        os.replace(temporary, path)
        _flush_directory(path.parent)
    except OSError as error:
        _remove(temporary)
        raise _refused("write", path, error) from error


def create_private(path: Path, data: bytes) -> bool:
    """Create `path` with `data`, whole at once; False, and nothing changed, if it exists already."""
    temporary = _write_beside(path, data)
    try:
        os.link(temporary, path)  # unlike a rename, never overwrites
        _flush_directory(path.parent)
    except FileExistsError:
        return False
    except OSError as error:
        raise _refused("create", path, error) from error
    finally:
        _remove(temporary)
    return True


def append_private(path: Path, line: str) -> None:
    """Append one line, on disk when this returns. A line torn by a crash never spoils the next one."""
    private_directory(path.parent)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with open(descriptor, "wb") as file:
            file.write(f"\n{line}\n".encode())
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        raise _refused("write", path, error) from error


def read_private(path: Path, most_bytes: int) -> bytes | None:
    """The bytes of `path`, None if there is no such file.

    Raises StorageError if others may read or write it, or if it holds more than `most_bytes`.
    """
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(most_bytes + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _refused("read", path, error) from error
    if _POSIX and mode & 0o077:
        raise StorageError(
            f"{path} is open to other users of this machine (mode {mode:04o}), and it holds a secret; "
            f"if you trust them so far, run: chmod 600 {path}"
        )
    if len(data) > most_bytes:
        raise StorageError(f"{path} holds more than {most_bytes} bytes: it is not a file of ours")
    return data


def private_directory(path: Path) -> None:
    """Make `path` with mode 0700. Raises StorageError if others could replace files in it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = path.stat().st_mode
    except OSError as error:
        raise _refused("use", path, error) from error
    if _POSIX and mode & 0o022 and not mode & stat.S_ISVTX:
        raise StorageError(
            f"others may replace files in {path} (mode {stat.S_IMODE(mode):04o}); run: chmod go-w {path}"
        )


def _write_beside(path: Path, data: bytes) -> Path:
    """`data` under a fresh name in the directory of `path`, flushed to disk."""
    private_directory(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        _remove(temporary)
        raise _refused("write", path, error) from error
    return temporary


def _remove(path: Path) -> None:
    """If it is there. A read-only disk refuses that, too, even of names that are not there."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _flush_directory(path: Path) -> None:
    if not _POSIX:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refused(verb: str, path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot {verb} {path}: {error.strerror or error}; check the disk and its permissions"
    )
