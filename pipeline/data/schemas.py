"""The one schema of a source: projection, equality of files, types that are the same in every file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pyarrow as pa

from pipeline.errors import ConfigError, SchemaDiffers

_MOST_LISTED = 50


def checked_columns(columns: Sequence[str] | None) -> Sequence[str] | None:
    """`data.columns` as they are; ConfigError where they are empty or repeat."""
    if columns is not None and (not columns or len(set(columns)) < len(columns)):
        raise ConfigError(
            f"data.columns must name at least one column, and each once, got {list(columns)}; "
            "leave it out for all columns"
        )
    return columns


def project(schema: pa.Schema, columns: Sequence[str] | None, path: str) -> pa.Schema:
    """Names and plain types of the columns asked for; ConfigError for unknown names and for names that repeat."""
    names = schema.names if columns is None else list(columns)
    unknown = [name for name in names if name not in schema.names]
    if unknown:
        raise ConfigError(
            f"data.columns names {listed(unknown)}, which {path} does not have; its columns are {listed(schema.names)}"
        )
    repeated = sorted({name for name in names if schema.names.count(name) > 1})
    if repeated:
        raise ConfigError(
            f"data.path {path} has several columns named {listed(repeated)}; "
            "rename them, or leave them out with data.columns"
        )
    return pa.schema([pa.field(name, decoded_type(schema.field(name).type)) for name in names])


def require_same(schema: pa.Schema, path: str, other: pa.Schema, other_path: str) -> None:
    """SchemaDiffers naming the first column that two files do not share; the order of columns is free."""
    for name in dict.fromkeys([*schema.names, *other.names]):
        kind, other_kind = _kind(schema, name), _kind(other, name)
        if kind != other_kind:
            raise SchemaDiffers(
                f"data.path has files with different schemas: column {name} is {kind} in {path} and {other_kind} "
                f"in {other_path}; name the columns they share in data.columns, or rewrite one of them"
            )


def decoded_type(kind: pa.DataType) -> pa.DataType:
    """A type without dictionaries: they differ between files by index width alone; their values are what counts."""
    if pa.types.is_dictionary(kind):
        return decoded_type(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, decoded_type(f.type)) for f in kind])
    if pa.types.is_map(kind):
        return pa.map_(decoded_type(kind.key_type), decoded_type(kind.item_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(decoded_type(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(decoded_type(kind.value_type), kind.list_size)
    return pa.list_(decoded_type(kind.value_type)) if pa.types.is_list(kind) else kind


def decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column as its decoded type."""
    kind = decoded_type(column.type)
    return column if column.type.equals(kind) else column.cast(kind)


def _kind(schema: pa.Schema, name: str) -> str:
    return str(schema.field(name).type) if name in schema.names else "missing"


def listed(names: Iterable[str]) -> str:
    """Names for a sentence, the first ones of very many."""
    every = list(names)
    return ", ".join(every if len(every) <= _MOST_LISTED else [*every[:_MOST_LISTED], f"... ({len(every):,} in all)"])
