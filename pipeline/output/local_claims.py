"""Claims in a local folder: files made by exclusive links and renewed by their modification time."""

from __future__ import annotations

import os
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.output.claims import NO_CHUNKS, SUFFIX, TICKET_SUFFIX, Claims
from pipeline.output.durable import discard, failing_run, make_folder, publish, take_name
from pipeline.output.owner import Owner

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """A claim file as it was read; `owner` is None when its content is not an owner's."""

    owner: Owner | None
    mtime_ns: int

    def is_stale(self, now_ns: int, lease_ns: int) -> bool:
        """Whether the owner is dead, or has not renewed for a lease; `now_ns` by the same file system's clock."""
        return (self.owner is not None and self.owner.is_dead()) or now_ns - self.mtime_ns > lease_ns

    def ticket(self, path: Path) -> Path:
        """The name that stands for the right to evict exactly this claim."""
        attempt = self.owner.attempt if self.owner else "unknown"
        return path.with_name(f".{path.stem}.{attempt}.{self.mtime_ns}{TICKET_SUFFIX}")


class LocalClaims(Claims):
    """A claim is `<folder>/<id>.json`, made whole by a hard link and renewed by its modification time.

    Its age goes by the clock of the folder's file system.
    """

    def __init__(self, folder: Path, lease_s: float = 60.0) -> None:
        """Nothing is touched before the context is entered."""
        super().__init__(lease_s)
        self._folder = folder

    def others(self) -> int:
        """How many chunks other processes hold at this moment."""
        with failing_run(self._folder), self._note("count") as (_, now_ns):
            records = [_read(path) for path in self._folder.glob(f"[!.]*{SUFFIX}") if path.stem not in NO_CHUNKS]
            return sum(self._is_others(record, now_ns) for record in records if record)

    def _is_others(self, record: _Record, now_ns: int) -> bool:
        mine = record.owner is not None and record.owner.attempt == self.attempt
        return not mine and not record.is_stale(now_ns, self._lease_ns)

    @property
    def _lease_ns(self) -> int:
        return int(self.lease_s * 1e9)

    def _shown(self, claim_id: str | None = None) -> str:
        return str(self._folder if claim_id is None else self._path(claim_id))

    def _path(self, claim_id: str) -> Path:
        return self._folder / f"{claim_id}{SUFFIX}"

    def _open(self) -> None:
        make_folder(self._folder)

    def _take(self, claim_id: str) -> bool:
        path = self._path(claim_id)
        with self._note(claim_id) as (note, now_ns):
            return publish(note, path) or (self._evict_stale(path, now_ns) and publish(note, path))

    def _is_mine(self, claim_id: str) -> bool:
        record = _read(self._path(claim_id))
        return record is not None and record.owner is not None and record.owner.attempt == self.attempt

    def _prolong(self, claim_id: str) -> None:
        os.utime(self._path(claim_id))

    def _remove(self, claim_id: str) -> None:
        self._path(claim_id).unlink(missing_ok=True)

    @contextmanager
    def _note(self, claim_id: str) -> Iterator[tuple[Path, int]]:
        """A finished claim under a temporary name, and the file system's time in ns when it was written."""
        note = self._folder / f".{claim_id}.{uuid.uuid4().hex}.tmp"
        try:
            note.write_bytes(Owner.current(self.attempt).to_json())
            yield note, note.stat().st_mtime_ns
        finally:
            discard(note)

    def _evict_stale(self, path: Path, now_ns: int) -> bool:
        """Remove a stale claim; True when the name is free as far as this process can tell."""
        judged = _read(path)
        if judged is None:
            return True
        if not judged.is_stale(now_ns, self._lease_ns):
            return False
        ticket = judged.ticket(path)
        self._drop_abandoned(ticket, now_ns)
        return _evict(path, ticket, judged)

    def _drop_abandoned(self, ticket: Path, now_ns: int) -> None:
        """Remove the ticket of a process that was killed between two steps of an eviction, a lease ago."""
        with suppress(FileNotFoundError):
            if now_ns - ticket.stat().st_ctime_ns > self._lease_ns:
                ticket.unlink()

    def _sweep(self) -> None:
        """Remove stale claims and the temporary files of processes that were killed."""
        with self._note("sweep") as (note, now_ns):
            for path in self._folder.iterdir():
                if path.suffix == TICKET_SUFFIX:
                    self._drop_abandoned(path, now_ns)
                elif path != note:
                    self._evict_stale(path, now_ns)


def _read(path: Path) -> _Record | None:
    """A claim's content and age, or None if there is no such file."""
    try:
        # Opening makes NFS fetch the attributes anew; a plain stat may be a minute old.
        with path.open("rb") as file:
            return _Record(owner=Owner.parse(file.read()), mtime_ns=os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


def _evict(path: Path, ticket: Path, judged: _Record) -> bool:
    """Remove a claim if it still is the one that was judged stale; of several callers one wins.

    Only one caller can give the claim the ticket's name, too. Who comes late, after the winner's new
    claim, finds another claim under the ticket than it judged; that claim was not touched, or, where
    there are no hard links, is put back.
    """
    try:
        if not take_name(path, ticket):
            return False
    except FileNotFoundError:
        return True  # released or evicted meanwhile
    same = _read(ticket) == judged
    if same and _is_same_file(path, ticket):
        path.unlink(missing_ok=True)
    elif not same:
        with suppress(FileNotFoundError):
            take_name(ticket, path)
    discard(ticket)
    return same


def _is_same_file(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except FileNotFoundError:
        return False
