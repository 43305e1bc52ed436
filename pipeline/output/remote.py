"""An output in an object store, through fsspec: whole objects, made by one request on condition that there is none.

What the exactly-once commit rests on is that condition, so a store is taken only if it is known to make
it part of the upload (see STORES), and only after it has been seen to refuse a second one (`prepare`).
fsspec's own default for other file systems is to look first and then write, which two processes can both do.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from contextlib import contextmanager, nullcontext, suppress
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from pipeline.data.files import first_line
from pipeline.errors import ConfigError
from pipeline.output.remote_claims import RemoteClaims
from pipeline.output.remote_reads import RangeFile, dataset_of
from pipeline.output.store import CLAIMS, RUN_JSON, STORES, StoreError
from pipeline.redaction import redacted_url, without

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from datetime import datetime

    import pyarrow.dataset as ds

CONTACT_S = 30.0
"""How long a store may take for each of its first answers, before the run."""
CALL_S = 120.0
"""The same for every other one, all retries of the libraries below included; without it a connection that has
gone silent can be waited for without end."""
SLOWEST_BYTES_PER_S = 2**20
S3_PUT_BYTES = 5 * 2**30
"""The most that S3 takes in one request. Larger objects would be made of parts, which not every S3-like store
completes under a condition, and which stay behind, unseen and paid for, when a process is killed."""

_IMPATIENT: Mapping[str, Mapping[str, Any]] = {"s3fs": {"config_kwargs": {"retries": {"max_attempts": 1}}}}
"""Options of the first contact, where a wrong address should not be tried for minutes."""
_PAUSES_S = (0.1, 0.3, 1.0, 3.0, 3.0)
"""Between the tries of an exclusive upload that met another request."""
_TRY_AGAIN = ("412", "PreconditionFailed", "409", "ConditionalRequestConflict", "OperationAborted")
_MODIFIED = {"s3fs": "LastModified", "gcsfs": "mtime", "adlfs": "last_modified"}
_LOGGERS = ("adlfs", "aiobotocore", "azure", "botocore", "fsspec", "gcsfs", "s3fs")
_ONE_BY_ONE = threading.Lock()  # memory:// looks and then writes; all who use it are threads of this process


class RemoteDraft:
    """A file in memory, of at most one chunk, that is uploaded when it is published."""

    def __init__(self, create: Callable[[bytes], bool], replace: Callable[[bytes], None]) -> None:
        self._buffer = BytesIO()
        self.file: BinaryIO = self._buffer
        self._create = create
        self._replace = replace

    def finish(self) -> None:
        """Nothing: it is safe once it is published."""

    def publish(self) -> bool:
        """Upload it on condition that there is no object of its name."""
        return self._create(self._buffer.getvalue())

    def replace(self) -> None:
        """Upload it, whatever is there."""
        self._replace(self._buffer.getvalue())


class RemoteStore:
    """The Store of a URL. There are no folders: a name with a slash is part of an object's key."""

    reads_at_once = 16

    def __init__(self, url: str, storage_options: Mapping[str, Any]) -> None:
        """Connect and read, so that a wrong address, package or credential is said at once (ConfigError)."""
        self._url = redacted_url(url).rstrip("/")
        self._options = storage_options
        self._protocol = url.partition("://")[0]
        self._require_exclusive()
        self._package = STORES[self._protocol]
        self._patience_s = CONTACT_S
        _quiet()
        with self._start():
            self._fs, root = _connect(url, {**_IMPATIENT.get(self._package, {}), **storage_options})
        self._root = root.rstrip("/")
        if not self._root.strip("/") and self._protocol != "memory":
            raise ConfigError(f"output.dir {self._url} names no bucket; write {self._protocol}://bucket/folder")
        with self._start():
            self._contact()
            self._fs, _ = _connect(url, storage_options)
        self._patience_s = CALL_S

    def shown(self, name: str = "") -> str:
        """The URL, without credentials."""
        return f"{self._url}/{name}" if name else self._url

    def prepare(self) -> None:
        """Make an object and try to make it again; ConfigError if the first is refused or the second is not."""
        probe = f"{CLAIMS}/.probe.{uuid.uuid4().hex}.tmp"
        with self._start():
            exclusive = self._refuses_second(probe)
        if not exclusive:
            raise ConfigError(
                f"output.dir {self._url} is in a store that lets an upload replace what is there although it was asked "
                f"not to, so results could be lost; update the store or {self._package}, or write to a local "
                "folder"
            )

    def make_folder(self, name: str) -> None:
        """Nothing: there are no folders."""

    def exists(self, name: str) -> bool:
        """Whether there is an object of that name now."""
        with suppress(FileNotFoundError), self._reaching():
            return bool(self._ask("info", self._key(name))["type"] == "file")
        return False

    def names(self, folder: str) -> list[str]:
        """The names of the objects below a folder; none if there are none."""
        prefix = self._key(folder) + "/"
        keys: list[str] = []
        with suppress(FileNotFoundError), self._reaching():
            keys = self._ask("find", self._key(folder))
        return [key.removeprefix(prefix) for key in keys if key.startswith(prefix) and "/" not in key[len(prefix) :]]

    def read(self, name: str) -> bytes:
        """An object's content."""
        with self._reaching():
            return bytes(self._ask("cat_file", self._key(name)))

    def open(self, name: str) -> BinaryIO:
        """An object to read here and there, by requests for ranges."""
        return cast(BinaryIO, self._opened(self._key(name)))

    def dataset(self, folder: str) -> ds.Dataset:
        """The Parquet objects of a folder as one dataset."""
        names = sorted(name for name in self.names(folder) if name.endswith(".parquet"))
        return dataset_of(self._fs, [self._key(f"{folder}/{name}") for name in names], self._opened)

    def create(self, name: str, data: bytes) -> bool:
        """Make an object unless there is one; True when this call did, even if the store's answer was lost.

        A request that was carried out and whose answer got lost is repeated by the libraries below, and then
        refused because of itself. So whatever goes wrong, what the object holds decides: it is ours if it is
        what we sent. It is tried again if somebody has just removed the object that was in the way, if there was
        no answer at all, and if S3 asks for it, as it does when two requests meet.
        """
        for pause_s in _PAUSES_S:
            try:
                self._upload(name, data, exclusively=True)
            except Exception as error:
                present = self._present(name, error)
                if present is not None:
                    return present == data
                if not _is_worth_another_try(error):
                    raise self._told(error) from error
                time.sleep(pause_s)
            else:
                return True
        raise StoreError(f"it could not be made in {len(_PAUSES_S)} tries")

    @contextmanager
    def draft(self, name: str, attempt: str) -> Iterator[RemoteDraft]:
        """A file that is written in memory; nothing of it is in the store before it is published."""
        yield RemoteDraft(lambda data: self.create(name, data), lambda data: self.replace(name, data))

    def replace(self, name: str, data: bytes) -> None:
        """Write an object with one request."""
        with self._reaching():
            self._upload(name, data, exclusively=False)

    def remove(self, name: str) -> None:
        """Remove an object if it is there."""
        with suppress(FileNotFoundError), self._reaching():
            self._ask("rm_file", self._key(name))

    def claims(self, lease_s: float = 60.0) -> RemoteClaims:
        """A process's claims in this output."""
        return RemoteClaims(self, lease_s)

    def sweep(self) -> None:
        """Nothing: a killed process leaves no half-written object."""

    def modified(self, name: str) -> datetime:
        """When an object was last written, by the store's clock; FileNotFoundError if there is none."""
        key = self._key(name)
        with self._reaching():
            field = _MODIFIED.get(self._package)
            moment: datetime = self._ask("info", key)[field] if field else self._fs.modified(key)
        return moment

    def _ask(self, method: str, *arguments: Any, size: int = 0, **options: Any) -> Any:
        """The result of a file system's method, in time; `size` is of the bytes that are moved."""
        if not self._fs.async_impl:
            return getattr(self._fs, method)(*arguments, **options)
        from fsspec.asyn import sync

        seconds = self._patience_s + size / SLOWEST_BYTES_PER_S
        try:
            return sync(self._fs.loop, getattr(self._fs, f"_{method}"), *arguments, timeout=seconds, **options)
        except TimeoutError as error:
            raise TimeoutError(f"no answer within {seconds:.0f} s") from error

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _opened(self, key: str) -> RangeFile:
        with self._reaching():
            size = int(self._ask("info", key)["size"])
        return RangeFile(size, lambda start, end: self._read_range(key, start, end))

    def _read_range(self, key: str, start: int, end: int) -> bytes:
        with self._reaching():
            return bytes(self._ask("cat_file", key, size=end - start, start=start, end=end))

    def _upload(self, name: str, data: bytes, *, exclusively: bool) -> None:
        """One request, or where fsspec's backend cuts large data, one that makes it appear."""
        more: dict[str, Any] = {"mode": "create" if exclusively else "overwrite"}
        if self._package == "s3fs":
            if len(data) >= S3_PUT_BYTES:
                raise StoreError(
                    f"{len(data)} bytes are more than S3 takes in one request; use another output.dir with a smaller "
                    "data.chunk_rows"
                )
            more["chunksize"] = S3_PUT_BYTES
        with _ONE_BY_ONE if self._protocol == "memory" else nullcontext():
            self._ask("pipe_file", self._key(name), data, size=len(data), **more)

    def _present(self, name: str, error: Exception) -> bytes | None:
        """What is there after an upload failed; the upload's own error where that cannot be told."""
        try:
            return self.read(name)
        except FileNotFoundError:
            return None
        except OSError as unknown:
            raise self._told(error) from unknown

    def _refuses_second(self, probe: str) -> bool:
        first = self.create(probe, b"first")
        second = self.create(probe, b"second")
        kept = self.read(probe)
        self.remove(probe)
        return first and not second and kept == b"first"

    def _contact(self) -> None:
        """Read and list; that nothing is there yet is fine, but that there is no such bucket is not."""
        for look, name in (("cat_file", RUN_JSON), ("find", CLAIMS)):
            try:
                self._ask(look, self._key(name))
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise

    def _require_exclusive(self) -> None:
        if self._protocol not in STORES:
            raise ConfigError(
                f"output.dir {self._url} is in a store where an upload cannot be refused because the name is taken, so "
                f"results could be lost or doubled; use {', '.join(f'{name}://' for name in STORES)} or a local folder"
            )

    @contextmanager
    def _start(self) -> Iterator[None]:
        """Whatever a file system raises before the run becomes one sentence about `output.dir`."""
        try:
            yield
        except ImportError as error:
            package = self._package
            raise ConfigError(
                f"output.dir {self._url} needs the package {package}, which cannot be imported ({first_line(error)}); "
                f"pip install {package}"
            ) from error
        except Exception as error:
            raise ConfigError(
                f"output.dir {self._url} cannot be used ({self._told(error)}); check the URL and output.storage_options"
            ) from error

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Whatever a file system raises, which may be anything, becomes an OSError."""
        try:
            yield
        except (FileNotFoundError, StoreError):
            raise
        except Exception as error:
            raise self._told(error) from error

    def _told(self, error: Exception) -> StoreError:
        """An error in one line, which does not tell credentials."""
        if isinstance(error, StoreError):
            return error
        what = "not found: " if isinstance(error, FileNotFoundError) else ""
        return StoreError(what + without(first_line(error), self._options))


def _connect(url: str, storage_options: Mapping[str, Any]) -> tuple[Any, str]:
    """A file system that remembers no listing, and the root's key in it."""
    import fsspec

    own = {"use_listings_cache": False, "skip_instance_cache": True}
    fs, root = fsspec.core.url_to_fs(url, **{**storage_options, **own})
    return fs, str(root)


def _code(error: BaseException | None) -> str:
    """The store's own code of an error, where s3fs keeps it."""
    response = getattr(error, "response", None) or getattr(getattr(error, "__cause__", None), "response", None)
    return str(response["Error"].get("Code", "")) if isinstance(response, dict) and "Error" in response else ""


def _is_worth_another_try(error: Exception) -> bool:
    return isinstance(error, FileExistsError | TimeoutError) or _code(error) in _TRY_AGAIN


def _quiet() -> None:
    """What the libraries below log about errors that are told anyway stays off a terminal without logging set up."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
