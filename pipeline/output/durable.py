"""File operations that commits rest on: a name appears whole and at most once, and survives a crash."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import uuid
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, RunFailed
from pipeline.output.store import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_EXCLUSIVE_RENAME = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


def make_folder(folder: Path) -> None:
    """Make a folder of the output and its parents; ConfigError where that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output.dir cannot have the folder {folder} ({reason(error)}); choose an output.dir that can be written to"
        ) from error


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and wait until its content is on the disk; FileExistsError if it exists."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system offers that."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> bool:
    """Give a finished file its final name unless somebody has it already; atomic, never replaces.

    True when this call published; the caller then removes the temporary name (which is already gone
    where the file system has no hard links). Raises OSError, and RunFailed like `take_name`.
    """
    # NFS may send a link twice and answer with the second result; the link count tells (open(2)).
    return take_name(temporary, final) or temporary.stat().st_nlink > 1


def take_name(path: Path, name: Path) -> bool:
    """Link a file under a name, or rename it where there are no hard links; False when the name is taken.

    Raises OSError, and RunFailed on a file system that can do neither without replacing.
    """
    try:
        os.link(path, name)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return _rename_exclusively(path, name)
    return True


def _rename_exclusively(temporary: Path, final: Path) -> bool:
    """renameat2(2) with RENAME_NOREPLACE; False when the final name is taken."""
    code = _renameat2(temporary, final)
    if code in _NO_EXCLUSIVE_RENAME:
        raise RunFailed(
            f"output.dir cannot hold {final}: its file system can neither hard-link nor rename without replacing "
            f"({os.strerror(code)}); choose an output.dir on a local disk, NFS or Lustre"
        )
    if code not in (0, errno.EEXIST):
        raise OSError(code, os.strerror(code), str(temporary), None, str(final))
    return code == 0


def _renameat2(temporary: Path, final: Path) -> int:
    """0 or the errno; ENOSYS where the C library does not have the call."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return errno.ENOSYS
    failed = rename(_AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(final), _RENAME_NOREPLACE)
    return ctypes.get_errno() if failed else 0


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to fill, which takes its final name when the block ends well and is removed when it does not.

    Raises ConfigError if there is something under that name already, and RunFailed if it cannot be written.
    """
    _refuse_taken(final)
    make_folder(final.parent)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}")
    make_folder(temporary)
    try:
        with failing_run(final):
            yield temporary
            for path in (*temporary.iterdir(), temporary):
                _sync(path)
            temporary.rename(final)
            sync_folder(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_taken(final: Path) -> None:
    if final.is_dir() and not any(final.iterdir()):
        return
    if final.exists() or final.is_symlink():
        raise ConfigError(f"output.dir={final} is there already and not empty; choose another one, or remove it")


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def failing_run(shown: str | Path) -> Iterator[None]:
    """Turn an OSError on the way to writing a file into RunFailed; `shown` is its path or URL."""
    try:
        yield
    except StoreError as error:
        raise RunFailed(
            f"{shown} could not be written or read ({error}); make sure that the store of output.dir can be reached, "
            "then run the same command again"
        ) from error
    except OSError as error:
        raise RunFailed(
            f"{shown} could not be written ({reason(error)}); make output.dir writable with free space, then run the "
            "same command again"
        ) from error


def discard(path: Path) -> None:
    """Remove a temporary file if that is possible; it must not hide the error that led here."""
    with contextlib.suppress(OSError):
        path.unlink()


def reason(error: OSError) -> str:
    """The system's words for an error, in one line."""
    return os.strerror(error.errno) if error.errno else str(error).partition("\n")[0]
