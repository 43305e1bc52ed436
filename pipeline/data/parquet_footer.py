"""What the ends of Parquet files say, and whether their columns can be read at all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.files import Located, first_line, reaching, read_ranges
from pipeline.errors import ConfigError

WRITING_S = 600.0
"""So many seconds after it was last written to, a file without footer is taken for one that is being written."""
_MAGIC = b"PAR1"
_ENCRYPTED_MAGIC = b"PARE"
_LENGTH_BYTES = 8  # footer length (4 bytes, little endian) and magic
_TAIL_BYTES = 64 * 2**10  # read at once; longer footers take a second look
_SIGNATURE_BYTES = 28  # nonce and tag behind a footer in plain text, where columns are encrypted


@dataclass(frozen=True, slots=True, kw_only=True)
class Footer:
    """What the end of a file says; `digest` of the footer and the size.

    `dictionaries` are the paths of text in dictionary columns. It has to be asked for as such (`read_dictionary`), with
    indices of 32 bits: for the narrower ones of the schema (pandas' are of 8) pyarrow casts the values too, and refuses
    a whole row group for one that is no UTF-8.
    """

    rows: int
    digest: str
    schema: pa.Schema
    dictionaries: tuple[str, ...] = ()


def read_tails(files: Sequence[Located]) -> list[bytes]:
    """The last bytes of files, in which their footers mostly are."""
    return read_ranges(files, [(max(0, file.size - _TAIL_BYTES), file.size) for file in files])


def parse_footer(file: Located, tail: bytes, columns: Sequence[str] | None) -> Footer:
    """Check and describe a file by its last bytes.

    ConfigError for one that is not a whole Parquet file, or is encrypted; if only some of its columns are,
    naming `columns` is taken to avoid them.
    """
    footer = _footer_bytes(file, tail)
    if footer is None:
        raise _not_parquet(file)
    if footer.endswith(_ENCRYPTED_MAGIC):
        raise ConfigError(f"data.path {file.path} is an encrypted Parquet file; decrypt it first")
    try:
        # The metadata has offsets into the file, but nothing looks at them before rows are read. A column chunk's
        # own metadata is never looked at: where it is encrypted or damaged, that ends the process.
        reader = pq.ParquetFile(pa.BufferReader(_MAGIC + footer))
        schema, metadata = reader.schema_arrow, reader.metadata
        str(schema)  # decodes the names, at any depth
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(file, first_line(error)) from error
    if len(footer) - _LENGTH_BYTES == metadata.serialized_size + _SIGNATURE_BYTES and columns is None:
        raise ConfigError(
            f"data.path {file.path} has encrypted columns; decrypt it first, or name the others in data.columns"
        )
    groups = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    if sum(groups) != metadata.num_rows or min(groups, default=0) < 0:
        raise _damaged(file, f"it says {metadata.num_rows} rows, and {sum(groups)} in its row groups")
    digest = hashlib.sha256(footer + file.size.to_bytes(8, "little")).hexdigest()
    return Footer(rows=metadata.num_rows, digest=digest, schema=schema, dictionaries=_dictionaries(reader))


def _dictionaries(reader: pq.ParquetFile) -> tuple[str, ...]:
    """The paths of the leaves of text below columns that hold dictionaries."""
    roots = [field.name for field in reader.schema_arrow if _holds_dictionary(field.type)]
    if not roots:
        return ()
    leaves = [reader.schema.column(index) for index in range(len(reader.schema))]
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    return tuple(path for path in texts if any(path == root or path.startswith(f"{root}.") for root in roots))


def _holds_dictionary(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return True
    return any(_holds_dictionary(kind.field(index).type) for index in range(kind.num_fields))


def is_being_written(file: Located, now: float) -> bool:
    """Whether a local file begins as Parquet, has no footer yet and was written to not long before `now`.

    In an object store a file appears whole, so one without a footer has been cut.
    """
    if file.mtime_ns is None or now - file.mtime_ns / 1e9 > WRITING_S:
        return False
    with reaching(file.path):
        head = file.read_range(0, min(file.size, len(_MAGIC)))
        tail = file.read_range(max(0, file.size - _TAIL_BYTES), file.size)
    return _MAGIC.startswith(head) and _footer_bytes(file, tail) is None


def _damaged(file: Located, reason: str) -> ConfigError:
    return ConfigError(f"data.path {file.path} cannot be opened as Parquet ({reason}); replace the file")


def _footer_bytes(file: Located, tail: bytes) -> bytes | None:
    """The footer with its length and magic, or None where the file does not end in a whole one."""
    if file.size < len(_MAGIC) + _LENGTH_BYTES or len(tail) < min(file.size, _TAIL_BYTES):
        return None
    length = int.from_bytes(tail[-_LENGTH_BYTES : -len(_MAGIC)], "little") + _LENGTH_BYTES
    if tail[-len(_MAGIC) :] not in (_MAGIC, _ENCRYPTED_MAGIC) or length + len(_MAGIC) > file.size:
        return None
    if length > len(tail):
        tail = read_ranges([file], [(file.size - length, file.size)])[0]
    return tail[-length:]


def _not_parquet(file: Located) -> ConfigError:
    if read_ranges([file], [(0, len(_MAGIC))])[0] == _MAGIC:
        return ConfigError(
            f"data.path {file.path} is a truncated Parquet file ({file.size} bytes, no footer); replace the file, or "
            "wait if it is still being written"
        )
    return ConfigError(
        f"data.path {file.path} is not a Parquet file ({file.size} bytes); convert it, leave it out of the path, or "
        "name its kind (data=jsonl, data=hub)"
    )
