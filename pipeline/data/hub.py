"""Hugging Face datasets as a Source: what save_to_disk left in a folder, or a hub id, shard by shard."""

from __future__ import annotations

import hashlib
import json
import logging
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.data.arrow_stream import ArrowRows, MappedRows, read_schema
from pipeline.data.broken_values import checked_rows
from pipeline.data.files import FileKind, Located, edge_digests, first_line, is_url, locate, no_file, reaching
from pipeline.data.schemas import checked_columns, decoded, project, require_same
from pipeline.data.source import Chunk, Counted, FoundFile, Rows, SourceFile
from pipeline.errors import ConfigError, RunFailed

SHARDS = FileKind("Arrow", (".arrow",))
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_STATE, _DICT, _INFO = "state.json", "dataset_dict.json", "dataset_info.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubAsked:
    """The keys of `data` that only this source has."""

    name: str | None = None
    split: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class _Saved:
    """A saved split: its shards in order, and the shards of its index into them where it has one."""

    shards: tuple[Located, ...]
    indices: tuple[Located, ...] = ()


class HubSource:
    """The rows of one split of a dataset, or of several saved datasets.

    The files are the Arrow shards. A dataset that was filtered or shuffled and saved with its index
    (`_indices_files`) is one file named like its folder, in the order of the index.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        columns: Sequence[str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        asked: HubAsked | None = None,
    ) -> None:
        """Keep the settings; nothing is read."""
        self._path = path
        self._columns = checked_columns(columns)
        self._storage_options = storage_options or {}
        self._asked = asked or HubAsked()
        self._schema: pa.Schema | None = None
        self.left: Sequence[str] = ()
        self.refused: Mapping[str, ConfigError] = {}
        self._saved: dict[str, _Saved] = {}

    def find(self) -> list[FoundFile]:
        """The shards of the split; a hub id is downloaded to the local cache first.

        Raises ConfigError for a folder that holds no saved dataset, a split that is not there or not
        named, a hub id that cannot be had, unknown `columns` and schemas that differ.
        """
        single = isinstance(self._path, str)
        paths = [self._path] if isinstance(self._path, str) else list(self._path)
        found: list[FoundFile] = []
        self._saved = {}
        for path in paths:
            saved = self._open(path)
            self._check(saved)
            found += self._found_indexed(saved, single) if saved.indices else self._found_shards(saved, single)
        if self._schema is None:
            raise ConfigError(f"data.path {', '.join(paths)} has no rows and no columns; name another split or dataset")
        return found

    def count(self, found: FoundFile) -> Counted:
        """Rows in the shard's batches; the data itself is not looked at."""
        with reaching(found.path):
            saved = self._saved[found.path]
            parts = saved.indices or saved.shards
            return Counted(rows=sum(ArrowRows(part).count() for part in parts))

    def grown(self, file: SourceFile, found: FoundFile) -> str:
        """Never: datasets are saved anew."""
        return "nothing can be appended to a saved dataset; save new rows as a new one"

    def fix_schema(self, schema: pa.Schema) -> None:
        """Hold the shards to the schema of the run's first start."""
        self._schema = schema

    def schema(self) -> pa.Schema:
        """Names and types of the columns asked for; class labels are their numbers."""
        if self._schema is None:
            self.find()
        assert self._schema is not None
        return self._schema

    def read(self, file: SourceFile, chunks: Iterable[Chunk]) -> Iterator[Rows]:
        """Each chunk's rows, in the order of `chunks`; ConfigError when the file is not the registered one."""
        schema = self.schema()
        saved = self._registered(file)
        with reaching(file.path, RunFailed):
            rows = MappedRows(saved.shards, saved.indices) if saved.indices else ArrowRows(saved.shards[0])
        for chunk in chunks:
            assert chunk.file_ordinal == file.ordinal
            with reaching(file.path, RunFailed):
                table = rows.take(chunk.first_row, chunk.num_rows, schema.names)
            columns = [decoded(table[name]) for name in schema.names]
            yield checked_rows(pa.Table.from_arrays(columns, names=schema.names).cast(schema), file.name)

    def _open(self, path: str) -> _Saved:
        if is_url(path) or Path(path).expanduser().is_dir():
            return self._open_folder(path)
        if Path(path).expanduser().exists() or not _HUB_ID.fullmatch(path):
            raise no_file(path)
        return _Saved(tuple(self._downloaded(path)))

    def _open_folder(self, folder: str) -> _Saved:
        """A folder of save_to_disk: a dataset, or a dictionary of splits."""
        splits = self._json(folder, _DICT)
        if splits is not None:
            folder = posixpath.join(folder, _split(folder, splits["splits"], self._asked.split))
        elif self._asked.split is not None:
            raise ConfigError(f"data.split={self._asked.split}, but {folder} is saved without splits; leave it out")
        state = self._json(folder, _STATE)
        if state is None:
            raise ConfigError(
                f"data.path {folder} holds no dataset of save_to_disk ({_STATE} is missing); for files use "
                "data=parquet or data=jsonl"
            )
        if not state["_data_files"]:
            self._schema = self._schema or project(_features(self._json(folder, _INFO)), self._columns, folder)
        indices = state.get("_indices_files") or state.get("_indices_data_files") or []
        return _Saved(self._files(folder, state["_data_files"]), self._files(folder, indices))

    def _files(self, folder: str, entries: Sequence[Mapping[str, str]]) -> tuple[Located, ...]:
        return tuple(
            located
            for entry in entries
            for located in locate(posixpath.join(folder, entry["filename"]), SHARDS, self._storage_options)
        )

    def _json(self, folder: str, name: str) -> Any:
        """What a file of the folder holds; None where there is no such file."""
        path = posixpath.join(folder, name)
        try:
            (file,) = locate(path, SHARDS, self._storage_options)
        except ConfigError as error:
            if "is no file or folder" in str(error):
                return None
            raise
        with reaching(path):
            return json.loads(file.read_range(0, file.size))

    def _downloaded(self, hub_id: str) -> list[Located]:
        files = prepared_files(hub_id, self._asked)
        return [file for name in files for file in locate(name, SHARDS, {})]

    def _check(self, saved: _Saved) -> None:
        for shard in saved.shards:
            with reaching(shard.path):
                schema = project(read_schema(shard), self._columns, shard.path)
            self._schema = self._schema or schema
            require_same(self._schema, "the run's first rows", schema, shard.path)

    def _found_shards(self, saved: _Saved, single: bool) -> list[FoundFile]:
        """The shards under names that sort in their order."""
        names = [shard.name if single else shard.path for shard in saved.shards]
        if names != sorted(names) or len(set(names)) < len(names):
            names = [f"{index:06d}-{name}" for index, name in enumerate(names)]
        self._saved |= {shard.path: _Saved((shard,)) for shard in saved.shards}
        digests = edge_digests(saved.shards)
        return [
            FoundFile(name=name, path=shard.path, size=shard.size, rows=None, digest=digest)
            for name, shard, digest in zip(names, saved.shards, digests, strict=True)
        ]

    def _found_indexed(self, saved: _Saved, single: bool) -> list[FoundFile]:
        folder = posixpath.dirname(saved.shards[0].path)
        self._saved[folder] = saved
        name = posixpath.basename(folder) if single else folder
        return [FoundFile(name=name, path=folder, size=_size(saved), rows=None, digest=_digest(saved))]

    def _registered(self, file: SourceFile) -> _Saved:
        if not self._saved:
            self.find()
        saved = self._saved[file.path]
        with reaching(file.path):
            now = replace(
                saved,
                shards=tuple(shard.renewed() for shard in saved.shards),
                indices=tuple(part.renewed() for part in saved.indices),
            )
        if (_size(now), _digest(now)) != (file.size, file.digest):
            raise ConfigError(
                f"data.path {file.path} is not the registered file any more ({_size(now)} bytes, registered with "
                f"{file.size}); restore it, or start another output.dir"
            )
        return now


def prepared_files(path: str, asked: HubAsked) -> list[str]:
    """The Arrow files that `datasets` makes in its cache of a hub id (or a folder of data files), in order.

    No script of the dataset is run. Raises ConfigError where the dataset or the split cannot be had.
    """
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry; the sentence below is enough
    try:
        builder = datasets.load_dataset_builder(path, asked.name, revision=asked.revision)
        builder.download_and_prepare()
        split = _split(path, list(builder.info.splits or {}), asked.split)
        return [file["filename"] for file in builder.as_dataset(split=split).cache_files]
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"data.path {path} is no folder on this machine, and cannot be had from the hub as a dataset "
            f"({first_line(error)}); check data.path, data.name, data.revision and the connection"
        ) from error


def _features(info: Mapping[str, Any]) -> pa.Schema:
    """The columns of a dataset that was saved without rows, and so without shards."""
    import datasets

    return datasets.Features.from_dict(info["features"]).arrow_schema


def _split(path: str, splits: Sequence[str], asked: str | None) -> str:
    if asked is None and len(splits) == 1:
        return splits[0]
    if asked is None or asked not in splits:
        got = "is not set" if asked is None else f"is {asked}"
        raise ConfigError(f"data.split {got}, and the splits of {path} are {', '.join(splits) or 'none'}; name one")
    return asked


def _size(saved: _Saved) -> int:
    return sum(file.size for file in (*saved.shards, *saved.indices))


def _digest(saved: _Saved) -> str:
    digests = edge_digests([*saved.shards, *saved.indices])
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
