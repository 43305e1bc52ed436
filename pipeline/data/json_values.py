"""JSON lines as values: strict parsing, the types they have, and whether they fit types fixed before."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.data.lines import MAX_LINE_BYTES, LongLine

MAX_DEPTH = 40
"""Objects and lists inside each other; deeper ones give no column its type, since pyarrow reads no more than 100
levels back from Parquet, of which a list takes two."""
MAX_KEYS = 10_000
"""Keys in all, those inside of objects included; an object with more gives no column its type."""
_BOOL, _INT64, _DOUBLE, _STRING = pa.bool_(), pa.int64(), pa.float64(), pa.string()
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

Coerce = Callable[[Any], Any]
"""A JSON value to what Arrow takes for the type; raises Unfit."""


class Unfit(ValueError):
    """Why a line is no row of the run."""


class MinusZero(int):
    """The number written -0, which is a double's negative zero and an integer's zero."""


class Repeated:
    """Stands for an object in which a key occurs twice; fits no type."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        counts = Counter(key for key, _ in pairs)
        self.key = next(key for key, count in counts.items() if count > 1)


def parse_object(line: bytes) -> dict[str, Any]:
    """The object that a line holds; raises Unfit with the reason for anything else.

    NaN and Infinity, repeated keys at the top, invalid UTF-8 and escapes of half a surrogate pair are
    refused. An object with repeated keys further down comes as Repeated.
    """
    if isinstance(line, LongLine):
        raise Unfit(f"it is longer than {MAX_LINE_BYTES // 2**20} MiB")
    try:
        value = _DECODER.decode(line.decode("utf-8"))
        if _SURROGATE.search(line):
            json.dumps(value, ensure_ascii=False, default=lambda repeated: repeated.key).encode("utf-8")
    except UnicodeDecodeError as error:
        raise Unfit(f"it is not valid UTF-8 ({error.reason} at byte {error.start})") from error
    except UnicodeEncodeError as error:
        raise Unfit("it escapes half of a surrogate pair") from error
    except json.JSONDecodeError as error:
        raise Unfit(f"it is not valid JSON ({error.msg} at character {error.pos})") from error
    except RecursionError as error:
        raise Unfit("it is nested too deep") from error
    if isinstance(value, Repeated):
        raise Unfit(f"it has the key {shown(value.key)} twice")
    if not isinstance(value, dict):
        raise Unfit(f"it is {kind_of(value)}, not an object")
    return value


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Repeated:
    values = dict(pairs)
    return values if len(values) == len(pairs) else Repeated(pairs)


def _integer(text: str) -> int:
    if len(text) > 400:  # beyond any double; int() itself gives up on a few thousand digits
        raise Unfit("a number in it is too large")
    value = int(text)
    return value if value or text[0] != "-" else MinusZero()


def _constant(text: str) -> Any:
    raise Unfit(f"it is not valid JSON ({text} is no number)")


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_int=_integer, parse_constant=_constant)


# Types


class SeenTypes:
    """The types that values have in the rows seen so far; `names` are the keys of the rows, `rows` how many there were.

    Integers and doubles together are doubles; objects are structs with the fields of all; null is any
    type, and string where nothing else is seen; otherwise the type first seen counts. A key that holds
    only empty objects is no column.
    """

    def __init__(self, columns: Sequence[str] | None = None) -> None:
        """`columns`: the only keys whose values are looked at."""
        self._columns = columns
        self._shapes: dict[str, Any] = {}
        self._num_keys = 0
        self.names: dict[str, None] = {}
        self.rows = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Look at a row; Unfit, and nothing is taken from it, if no columns could hold it."""
        looked_at = row if self._columns is None else {key: row[key] for key in self._columns if key in row}
        depth, num_keys = _depth_and_keys(looked_at)
        if depth > MAX_DEPTH:
            raise Unfit("it is nested too deep")
        if num_keys > MAX_KEYS:
            raise Unfit(f"it has more than {MAX_KEYS:,} keys, of which data.columns can name the ones to read")
        self.names |= dict.fromkeys(row)
        shape = _shape(looked_at)
        self._num_keys += _new_keys(self._shapes, shape)
        self._shapes = _merge(self._shapes, shape)
        self.rows += 1

    @property
    def fullest(self) -> str | None:
        """The key with the most keys inside, where all rows together have too many for a schema."""
        if self._num_keys <= MAX_KEYS:
            return None
        return max(self._shapes, key=lambda name: _depth_and_keys(self._shapes[name])[1])

    def schema(self) -> pa.Schema:
        """The columns, in the order in which their keys were first seen."""
        fields = [(name, _type_of(shape)) for name, shape in self._shapes.items()]
        return pa.schema([pa.field(name, kind) for name, kind in fields if kind is not None])


def infer_schema(rows: Iterable[Mapping[str, Any]]) -> pa.Schema:
    """The columns of rows."""
    seen = SeenTypes()
    for row in rows:
        seen.add(row)
    return seen.schema()


def _shape(value: Any) -> Any:
    """A value's type: an Arrow type, a dict of shapes (object), a list of at most one shape, or None (unknown)."""
    if isinstance(value, dict):
        return {key: _shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        merged = None
        for inner in value:
            merged = _merge(merged, _shape(inner))
        return [merged]
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        return _INT64 if _is_int64(value) else None
    if isinstance(value, float):
        return _DOUBLE
    return _STRING if isinstance(value, str) else None


def _merge(first: Any, second: Any) -> Any:
    """The shape of both, made of the first; the first one where they do not go together."""
    if first is None:
        return second
    if isinstance(first, dict) and isinstance(second, dict):
        for key, shape in second.items():
            first[key] = _merge(first.get(key), shape)
    elif isinstance(first, list) and isinstance(second, list):
        first[0] = _merge(first[0], second[0])
    elif first is _INT64 and second is _DOUBLE:
        return _DOUBLE
    return first


def _new_keys(seen: Any, shape: Any) -> int:
    """How many keys a shape would add to what has been seen."""
    if seen is None:
        return _depth_and_keys(shape)[1]
    if isinstance(seen, dict) and isinstance(shape, dict):
        return sum((key not in seen) + _new_keys(seen.get(key), inner) for key, inner in shape.items())
    if isinstance(seen, list) and isinstance(shape, list):
        return _new_keys(seen[0], shape[0])
    return 0


def _type_of(shape: Any) -> pa.DataType | None:
    """The Arrow type of a shape; None for an object without fields, which Parquet has no type for."""
    if isinstance(shape, dict):
        inner = [(name, _type_of(field)) for name, field in shape.items()]
        known = [pa.field(name, kind) for name, kind in inner if kind is not None]
        return pa.struct(known) if known else None
    if isinstance(shape, list):
        return pa.list_(_type_of(shape[0]) or _STRING)
    return _STRING if shape is None else shape


def _is_int64(value: int) -> bool:
    return -(2**63) <= value < 2**63


def _depth_and_keys(value: Any) -> tuple[int, int]:
    """How many objects and lists are inside each other, and how many keys all objects have together."""
    depth = num_keys = 0
    level = [value]
    while level := [x for x in level if isinstance(x, (dict, list))]:
        depth += 1
        num_keys += sum(len(x) for x in level if isinstance(x, dict))
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x)]
    return depth, num_keys


# Fitting


def coerce_row(schema: pa.Schema, *, ignore_others: bool) -> Coerce:
    """A parsed object to a row of the schema; with `ignore_others` keys that are no column are passed over."""
    fields = {field.name: _coerce(field.type, field.name) for field in schema}

    def coerce(row: dict[str, Any]) -> dict[str, Any]:
        return _fields(row, fields, "", ignore_others)

    return coerce


def _fields(values: Mapping[str, Any], fields: Mapping[str, Coerce], path: str, ignore_others: bool) -> dict[str, Any]:
    row = {}
    for key, value in values.items():
        if key in fields:
            row[key] = None if value is None else fields[key](value)
        elif not ignore_others and value is not None and value != {}:
            raise Unfit(f"the key {shown(path + key)} is not among those of the run's first rows")
    return row


def _coerce(kind: pa.DataType, path: str) -> Coerce:
    if pa.types.is_struct(kind):
        fields = {field.name: _coerce(field.type, f"{path}.{field.name}") for field in kind}
        return _checked(dict, lambda value: _fields(value, fields, f"{path}.", ignore_others=False), kind, path)
    if pa.types.is_list(kind):
        element = _coerce(kind.value_type, f"{path}[]")
        return _checked(list, lambda value: [None if x is None else element(x) for x in value], kind, path)
    if pa.types.is_boolean(kind):
        return _checked(bool, bool, kind, path)
    if pa.types.is_string(kind):
        return _checked(str, str, kind, path)
    if pa.types.is_int64(kind):
        return _checked(int, lambda value: _in_range(int(value), _is_int64(value), path), kind, path)
    assert pa.types.is_float64(kind), kind
    return _checked((int, float), lambda value: _double(value, path), kind, path)


def _checked(wanted: Any, convert: Coerce, kind: pa.DataType, path: str) -> Coerce:
    def coerce(value: Any) -> Any:
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            if isinstance(value, Repeated):
                raise Unfit(f"{shown(path)} has the key {shown(value.key)} twice")
            raise Unfit(f"{shown(path)} is {kind_of(value)}, and the column's type is {_named(kind)}")
        return convert(value)

    return coerce


def _double(value: float, path: str) -> Any:
    if isinstance(value, MinusZero):
        return -0.0
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    return _in_range(number, math.isfinite(number), path)


def _in_range(value: Any, fits: bool, path: str) -> Any:
    if not fits:
        raise Unfit(f"{shown(path)} is too large a number")
    return value


def _named(kind: pa.DataType) -> str:
    text = str(kind)
    return text if len(text) <= 100 else text[:97] + "..."


def kind_of(value: Any) -> str:
    """A JSON value's kind, for a sentence."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", float: "a fraction"}
    return "null" if value is None else kinds.get(type(value), "an integer")


def shown(key: str) -> str:
    """A key that may hold anything, on one line and encodable."""
    return key if key.isprintable() else key.encode("unicode_escape").decode("ascii")
