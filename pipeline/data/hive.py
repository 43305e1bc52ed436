"""Columns that are folder names: key=value, as Hive and pyarrow.dataset read them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from urllib.parse import unquote

import pyarrow as pa

from pipeline.errors import ConfigError

NULL = "__HIVE_DEFAULT_PARTITION__"
_INTEGER = re.compile(r"-?[0-9]+")

Keys = Mapping[str, str | None]
"""A file's partition keys and their values as text; None is null."""


def partition_keys(inner: str) -> Keys:
    """The keys in the folders of a path below the dataset's root."""
    folders = [folder.partition("=") for folder in inner.split("/")[:-1]]
    return {unquote(key): None if value == NULL else unquote(value) for key, equals, value in folders if equals and key}


def partition_schema(files: Sequence[Keys]) -> pa.Schema:
    """The type of every key: int32 (int64 where that is too small) if all values are integers, else string."""
    values: dict[str, list[str]] = {}
    for keys in files:
        for key, value in keys.items():
            values.setdefault(key, []).extend([] if value is None else [value])
    return pa.schema([(key, _type_of(texts)) for key, texts in values.items()])


def partition_value(path: str, key: str, value: str | None, kind: pa.DataType) -> pa.Scalar:
    """A folder's value as the column's type; ConfigError where it is none of that."""
    if value is None or not pa.types.is_integer(kind):
        return pa.scalar(value, kind)
    if not _INTEGER.fullmatch(value) or int(value).bit_length() >= kind.bit_width:
        raise ConfigError(
            f"data.path {path} lies in a folder {key}={value}, but the column {key} is {kind}; rename the folder, or "
            "leave the column out with data.columns"
        )
    return pa.scalar(int(value), kind)


def _type_of(texts: Sequence[str]) -> pa.DataType:
    if not texts or not all(_INTEGER.fullmatch(text) for text in texts):
        return pa.string()
    longest = max(int(text).bit_length() for text in texts)
    return pa.int32() if longest < 32 else pa.int64() if longest < 64 else pa.string()
