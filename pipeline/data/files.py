"""Where a dataset's files are: local files, folders and globs, and the same behind fsspec URLs."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipeline.errors import ConfigError, RunFailed
from pipeline.redaction import redacted_url

EDGE_BYTES = 64 * 2**10
"""What is read of each end of a file to identify it."""
REMOTE_BLOCK_BYTES = 8 * 2**20
"""What one request asks of a remote file that is read through."""
_LOCAL_SCHEMES = ("file://", "local://")
_SAME_STORE = {"s3a": "s3", "gcs": "gs", "abfss": "abfs", "az": "abfs"}


class UnreadableFile(Exception):
    """A file ends too early or cannot be decompressed."""


@dataclass(frozen=True, slots=True)
class FileKind:
    """What a source looks for in folders: files with one of the suffixes."""

    noun: str
    suffixes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A file and how to reach it; `fs` is None for a local one.

    `name` is its name in the dataset, `path` where it is (an absolute path, or a URL without
    credentials), `inner` its path below the folder or glob root, `key` what `fs` calls it. `mtime_ns` is
    when a local one was last written to.
    """

    name: str
    path: str
    inner: str
    key: str
    size: int
    mtime_ns: int | None = None
    fs: Any = None

    def open(self, *, in_order: bool) -> BinaryIO:
        """The file's bytes, local ones as a plain file; read ahead from afar only if read `in_order`."""
        if self.fs is None:
            return Path(self.key).open("rb")
        cache = "readahead" if in_order else "none"
        return cast(BinaryIO, self.fs.open(self.key, "rb", block_size=REMOTE_BLOCK_BYTES, cache_type=cache))

    def read_range(self, start: int, end: int) -> bytes:
        """The bytes from `start` to before `end`."""
        if self.fs is not None:
            return cast(bytes, self.fs.cat_file(self.key, start=start, end=end))
        with Path(self.key).open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def renewed(self) -> Located:
        """The same file with the size it has now."""
        if self.fs is not None:
            self.fs.invalidate_cache()
            return replace(self, size=int(self.fs.info(self.key)["size"]))
        stat = Path(self.key).stat()
        return replace(self, size=stat.st_size, mtime_ns=stat.st_mtime_ns)

    def require_unchanged(self) -> None:
        """RunFailed if a local file has been written to since it was located; one that is gone can still be read."""
        if self.fs is not None or not Path(self.key).exists():
            return
        now = self.renewed()
        if (now.size, now.mtime_ns) != (self.size, self.mtime_ns):
            raise RunFailed(
                f"data.path {self.path} has been written to while it was read ({self.size} bytes before, {now.size} "
                "now); restore it and run the same command again, or start another output.dir"
            )


def locate(paths: str | Sequence[str], kind: FileKind, storage_options: Mapping[str, Any]) -> list[Located]:
    """Every file of `data.path`, sorted by name, each once.

    A folder is searched recursively for the kind's suffixes; what begins with "." or "_" is left out.
    A file is named by its path relative to the folder or to the part of the glob before the first
    wildcard; a single file by its base name; an entry of a list by its absolute path or URL. Raises
    ConfigError for a path that is missing, cannot be listed, or has no file.
    """
    if isinstance(paths, str):
        found = _expand(paths, kind, storage_options)
    else:
        found = [_named(file, file.path) for path in paths for file in _expand(path, kind, storage_options)]
    if not found:
        raise ConfigError("data.path is an empty list; name at least one file, folder or glob")
    unique: dict[str, Located] = {}
    real = cache(os.path.realpath)
    for file in sorted(found, key=lambda file: (file.name, file.path)):
        unique.setdefault(_identity(file, real), file)
    return list(unique.values())


def read_ranges(files: Sequence[Located], ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """One range of bytes of each file; those of a remote file system are asked for all at once."""
    results: dict[int, bytes] = {}
    systems = {id(file.fs): file.fs for file in files if file.fs is not None}
    for fs in systems.values():
        mine = [index for index, file in enumerate(files) if file.fs is fs]
        with reaching(files[mine[0]].path):
            answers = fs.cat_ranges(
                [files[index].key for index in mine],
                [ranges[index][0] for index in mine],
                [ranges[index][1] for index in mine],
                on_error="raise",
            )
        results |= dict(zip(mine, answers, strict=True))
    for index, file in enumerate(files):
        if file.fs is None:
            with reaching(file.path):
                results[index] = file.read_range(*ranges[index])
    return [results[index] for index in range(len(files))]


def edge_digests(files: Sequence[Located]) -> list[str]:
    """For each file a hash of its size, its first and its last 64 KiB: cheap, and blind to a change in between."""
    heads = read_ranges(files, [(0, min(EDGE_BYTES, file.size)) for file in files])
    longer = [file for file in files if file.size > EDGE_BYTES]
    tails = iter(read_ranges(longer, [(file.size - EDGE_BYTES, file.size) for file in longer]))
    return [
        hashlib.sha256(
            file.size.to_bytes(8, "little") + head + (next(tails) if file.size > EDGE_BYTES else head)
        ).hexdigest()
        for file, head in zip(files, heads, strict=True)
    ]


@contextmanager
def reaching(path: str, failing: type[ConfigError | RunFailed] = ConfigError) -> Iterator[None]:
    """Whatever a file system raises, which may be anything, becomes one sentence about `data.path`."""
    shown = redacted_url(path)
    try:
        yield
    except (ConfigError, RunFailed):
        raise
    except ImportError as error:
        raise ConfigError(f"data.path {shown} needs a package that is missing ({first_line(error)})") from error
    except Exception as error:
        if not is_url(path) and not isinstance(error, (OSError, UnreadableFile, pa.ArrowException)):
            raise
        remedy = "check the URL and data.storage_options" if is_url(path) else "restore it or make it readable"
        raise failing(f"data.path {shown} cannot be read ({first_line(error)}); {remedy}") from error


def is_url(path: str) -> bool:
    """Whether fsspec is needed to reach it."""
    return "://" in path and not path.startswith(_LOCAL_SCHEMES)


def local_path(path: str) -> Path:
    """A path that is no URL, or file://, as a path."""
    return Path(path.partition("://")[2] if path.startswith(_LOCAL_SCHEMES) else path).expanduser()


def would_read(path: str, file: str) -> bool:
    """Whether reading an entry of `data.path` would come upon a file, existing or not; both may be URLs.

    URLs are compared as they are written, with all names of a store taken for the same.
    """
    if is_url(path) != is_url(file):
        return False
    if is_url(path):
        return _leads_to(_url_parts(path), _url_parts(file))
    root, place = local_path(path), local_path(file)
    if root.is_dir():
        return place.resolve().is_relative_to(root.resolve())
    return _is_wild(path) and _leads_to(root.absolute().parts, place.absolute().parts)


def first_line(error: Exception) -> str:
    """An exception in a few words, its own credentials blanked."""
    return redacted_url(str(error).strip().partition("\n")[0]) or type(error).__name__


def no_file(text: str) -> ConfigError:
    """For a path that leads nowhere."""
    return ConfigError(
        f"data.path {redacted_url(text)} is no file or folder {'there' if is_url(text) else 'on this machine'}; "
        "correct the path"
    )


def _expand(text: str, kind: FileKind, storage_options: Mapping[str, Any]) -> list[Located]:
    """The files that one entry of `data.path` stands for, in no order."""
    if is_url(text):
        with reaching(text):
            found = _expand_url(text, kind, storage_options)
    else:
        found = _expand_local(text, kind)
    if not found:
        raise ConfigError(
            f"data.path {redacted_url(text)} matches no {kind.noun} file; point it at "
            f"{', '.join(f'*{suffix}' for suffix in kind.suffixes)} files "
            '(names that begin with "." or "_" are left out)'
        )
    return found


def _expand_local(text: str, kind: FileKind) -> list[Located]:
    path = local_path(text)
    try:
        if path.is_file():
            return [_local(path, path.name)]
        if path.is_dir():
            root, found = path, list(_walk(path, kind, above=()))
        elif _is_wild(text):
            root, found = _glob(path, kind)
        else:
            raise no_file(text)
        return [_local(file, file.relative_to(root).as_posix()) for file in found]
    except OSError as error:
        raise ConfigError(
            f"data.path {text} cannot be listed ({error.strerror}: {error.filename}); make it readable"
        ) from error


def _local(path: Path, name: str) -> Located:
    absolute = str(path.absolute())
    if not _is_utf8(absolute):
        shown = os.fsencode(absolute).decode("utf-8", "backslashreplace")
        raise ConfigError(f"data.path has a file whose name is no UTF-8: {shown}; rename it or its folder")
    stat = path.stat()
    if not S_ISREG(stat.st_mode):
        raise ConfigError(f"data.path {absolute} is no regular file; leave it out, or copy what it gives to a file")
    return Located(name=name, path=absolute, inner=name, key=absolute, size=stat.st_size, mtime_ns=stat.st_mtime_ns)


def _is_utf8(text: str) -> bool:
    """Whether a name is what its bytes say: others come with half surrogate pairs in the place of bytes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _walk(folder: Path, kind: FileKind, above: tuple[Path, ...]) -> Iterator[Path]:
    """The files of the kind below a folder; follows links, but never into a folder it is inside of."""
    real = folder.resolve()
    if real in above:
        return
    for entry in folder.iterdir():
        if _is_hidden(entry.name):
            continue
        if entry.is_dir():
            yield from _walk(entry, kind, (*above, real))
        elif entry.name.endswith(kind.suffixes):
            yield entry


def _glob(pattern: Path, kind: FileKind) -> tuple[Path, list[Path]]:
    """The folder before the first wildcard, and the files that match; matching folders are searched."""
    fixed = next(index for index, part in enumerate(pattern.parts) if _is_wild(part))
    root = Path(*pattern.parts[:fixed])
    wild = str(Path(*pattern.parts[fixed:]))
    found: list[Path] = []
    for name in glob.iglob(wild, root_dir=root, recursive=True):  # noqa: PTH207 (Path.glob skips linked folders)
        match = root / name
        if any(_is_hidden(part) for part in Path(name).parts):
            continue
        found.extend(_walk(match, kind, above=()) if match.is_dir() else [match])
    return root, found


def _expand_url(text: str, kind: FileKind, storage_options: Mapping[str, Any]) -> list[Located]:
    """The same for a URL, with the file system's own listing and globs."""
    import fsspec

    fs, root = fsspec.core.url_to_fs(text, **storage_options)
    fs.invalidate_cache()
    if fs.isfile(root):
        return [_remote(fs, root, posixpath.basename(root.partition("?")[0]), fs.info(root))]
    if fs.isdir(root):
        return _below(fs, root.rstrip("/"), fs.find(root, detail=True), kind)
    if not _is_wild(text):
        raise no_file(text)
    base = root[: next(i for i, character in enumerate(root) if character in "*?[")].rpartition("/")[0]
    found: list[Located] = []
    for match, info in fs.glob(root, detail=True).items():
        if info["type"] == "directory":
            found += _below(fs, base, fs.find(match, detail=True), kind)
        elif not _any_hidden(_inside(match, base)):
            found.append(_remote(fs, match, _inside(match, base), info))
    return found


def _below(fs: Any, root: str, listing: Mapping[str, Mapping[str, Any]], kind: FileKind) -> list[Located]:
    return [
        _remote(fs, key, _inside(key, root), info)
        for key, info in listing.items()
        if key.endswith(kind.suffixes) and not _any_hidden(_inside(key, root))
    ]


def _remote(fs: Any, key: str, name: str, info: Mapping[str, Any]) -> Located:
    path = redacted_url(fs.unstrip_protocol(key))
    size = info.get("size")
    if size is None:
        raise ConfigError(f"data.path {path} does not say how long it is; copy it to a disk or an object store")
    return Located(name=name, path=path, inner=name, key=key, size=int(size), fs=fs)


def _url_parts(url: str) -> list[str]:
    """Store, bucket or container, and names; without an account behind the container."""
    scheme, _, rest = url.partition("://")
    bucket, _, names = rest.lstrip("/").partition("/")
    return [_SAME_STORE.get(scheme, scheme), bucket.partition("@")[0], *(part for part in names.split("/") if part)]


def _leads_to(pattern: Sequence[str], place: Sequence[str]) -> bool:
    """Whether a glob matches a place, or a folder it is in, component by component."""
    if not pattern:
        return True
    if pattern[0] == "**" and any(_leads_to(pattern[1:], place[skipped:]) for skipped in range(len(place) + 1)):
        return True
    return bool(place) and fnmatch.fnmatchcase(place[0], pattern[0]) and _leads_to(pattern[1:], place[1:])


def _inside(key: str, root: str) -> str:
    return key[len(root) :].lstrip("/") if key.startswith(root) else key


def _named(file: Located, name: str) -> Located:
    return replace(file, name=name)


def _identity(file: Located, real: Callable[[str], str]) -> str:
    """Equal for a file that is reached twice.

    The last component stays unresolved: two links to one blob (as hubs cache equal shards) are two files.
    """
    if file.fs is not None:
        return file.path
    folder, _, name = file.key.rpartition("/")
    return f"{real(folder or '/')}/{name}"


def _is_wild(text: str) -> bool:
    return any(character in text for character in "*?[")


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _any_hidden(name: str) -> bool:
    return any(_is_hidden(part) for part in _parts(name))


def _parts(name: str) -> Iterable[str]:
    return name.split("/")
