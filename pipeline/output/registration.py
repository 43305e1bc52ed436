"""The files of a run.json as they are found now: what stays, what was appended to, what is new."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.data.source import Chunk, Counted, FoundFile, SourceFile, chunks_of, registered, unfinished_chunk
from pipeline.errors import OutputDiffers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from pipeline.output.manifest import RunManifest


def register(
    manifest: RunManifest,
    found: Sequence[FoundFile],
    committed: AbstractSet[str],
    count: Callable[[FoundFile], Counted],
    grown: Callable[[SourceFile, FoundFile], Counted | str],
) -> tuple[SourceFile, ...]:
    """The manifest's files with their present paths and what was appended to them, then the new ones, by name.

    An ordinal, once given, stays; a file without rows that has changed is a new one. `committed` are the ids of the
    chunks that have a Part; `count` says how many rows a new file has, `grown` how many one has that has changed.
    Raises ConfigError for a registered file that has changed otherwise, or that is gone before all of it was done.
    """
    by_name = {file.name: file for file in found}
    limit = manifest.fingerprint.get("data.limit")
    room = None if limit is None else max(0, limit - sum(file.rows for file in manifest.files))
    known: list[SourceFile] = []
    for file in manifest.files:
        now = by_name.get(file.name)
        if now is None:
            known.append(_gone(file, manifest, committed))
        elif (now.size, now.digest) == (file.size, file.digest):
            known.append(replace(file, path=now.path))
        elif room == 0 and now.size > file.size:
            known.append(replace(file, path=now.path))  # what was appended to it is beyond data.limit
        elif file.rows:
            known.append(_grown(file, now, grown(replace(file, path=now.path), now), room))
            room = None if room is None else room - (known[-1].rows - file.rows)
    known_names = {file.name for file in known}
    new = sorted((file for file in found if file.name not in known_names), key=lambda file: file.name)
    first = 1 + max((file.ordinal for file in manifest.files), default=-1)
    return (*known, *(registered(first + index, file, count) for index, file in enumerate(new)))


def as_registered(
    manifest: RunManifest, found: Sequence[FoundFile], committed: AbstractSet[str]
) -> tuple[SourceFile, ...]:
    """The manifest's files as they are there, with their present paths; what came since is left aside.

    Raises ConfigError for one that is gone before all of it was done.
    """
    by_name = {file.name: file.path for file in found}
    return tuple(
        replace(file, path=by_name[file.name]) if file.name in by_name else _gone(file, manifest, committed)
        for file in manifest.files
    )


def continued(before: Sequence[SourceFile], now: Sequence[SourceFile]) -> dict[str, SourceFile]:
    """The chunks, by id, whose one row was unfinished and has been continued since, with the files as they were."""
    sizes = {file.ordinal: file.size for file in now}
    chunks = ((unfinished_chunk(file), file) for file in before)
    return {c.id: file for c, file in chunks if c is not None and sizes.get(file.ordinal, file.size) != file.size}


def redo_of(files: Sequence[SourceFile]) -> dict[str, str]:
    """The chunks whose Part may still be of half a row, by id, with the attempt that wrote such a Part."""
    return {
        Chunk(file_ordinal=file.ordinal, first_row=row, num_rows=1).id: attempt
        for file in files
        for row, attempt in file.redo
    }


def with_redo(
    files: Sequence[SourceFile], halves: Sequence[str], attempts: Callable[[Iterable[str]], dict[str, str]]
) -> tuple[SourceFile, ...]:
    """The files with the Parts that are of half a row now, without those that have been done again since.

    `halves` are chunks, by id; `attempts` says who wrote the Part of those that have one.
    """
    before = redo_of(files)
    now = attempts([*before, *halves])
    stale = {id_: attempt for id_, attempt in now.items() if id_ in halves or before.get(id_) == attempt}
    return tuple(replace(file, redo=_redo_in(file, stale)) for file in files)


def _redo_in(file: SourceFile, stale: Mapping[str, str]) -> tuple[tuple[int, str], ...]:
    rows = {Chunk(file_ordinal=file.ordinal, first_row=end, num_rows=1).id: end for end in (0, *file.ends)}
    return tuple((rows[id_], attempt) for id_, attempt in sorted(stale.items()) if id_ in rows)


def more_in(now: Sequence[SourceFile], before: Sequence[SourceFile]) -> str | None:
    """What there is beside the files that were registered, for a sentence; None if there is nothing."""
    known = {file.ordinal: file for file in before}
    new = [file for file in now if file.ordinal not in known]
    grown = [file for file in now if file.ordinal in known and file.size != known[file.ordinal].size]
    rows = sum(file.rows for file in new) + sum(file.rows - known[file.ordinal].rows for file in grown)
    if not new and not grown:
        return None
    kinds = [f"{_count(len(new), 'new file')}"] * bool(new) + [f"{_count(len(grown), 'file')} that grew"] * bool(grown)
    return f"{_count(rows, 'row')} in {' and '.join(kinds)} came since; the next run takes them"


def refused_since(sentence: str) -> str:
    """What a run would say of a new file, for those who go on without it."""
    return f"a file that came since cannot be taken, and ends the next run: {sentence}"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _gone(file: SourceFile, manifest: RunManifest, committed: AbstractSet[str]) -> SourceFile:
    """A registered file that is not there any more and need not be."""
    if all(chunk.id in committed for chunk in chunks_of(file, manifest.chunk_rows)):
        return file
    raise OutputDiffers(
        f"data.path has no {file.name} any more (it was {file.path}), and not all its rows are done; restore the "
        "file, or use another output.dir, or output.on_change=new",
        f"{file.name} is gone",
    )


def _grown(file: SourceFile, found: FoundFile, counted: Counted | str, room: int | None) -> SourceFile:
    """A registered file with the rows that were appended to it, as far as `data.limit` leaves room (None: for all).

    The rows up to the limit stay those that were first registered, whatever grows later.
    """
    if isinstance(counted, str):
        raise OutputDiffers(
            f"data.path {found.path} has changed since it was registered ({file.size} bytes then, {found.size} now): "
            f"{counted}; restore the file, give the new content a new name, or use another output.dir, or "
            "output.on_change=new for a version beside it",
            f"{file.name} has changed: {counted}",
        )
    more = counted.rows - file.rows
    added = more if room is None else min(more, room)
    rows, unfinished = file.rows + added, counted.unfinished and added == more
    ends = {*file.ends, *([file.rows] if added else []), *([rows - 1] if unfinished and rows > 1 else [])}
    return replace(
        file,
        path=found.path,
        size=found.size,
        rows=rows,
        digest=found.digest,
        content=counted.content,
        ends=tuple(sorted(ends)),
        unfinished=unfinished,
    )
