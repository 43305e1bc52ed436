"""Leases on chunks, so that several processes can share one output without doing the same work.

Claims are advisory. After a suspended process or a lost network folder two processes may hold the
same chunk; that costs double work and nothing else, because the exclusive publish of a Part is the
commit (see `sink.py`).
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import uuid
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pipeline.output.durable import discard, failing_run, make_folder, publish, reason, take_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

RUN_CLAIM = "run"
"""The id of the claim under which run.json is changed; every other id is a chunk's."""

_BEATS_PER_LEASE = 6
_SUFFIX = ".json"
_TICKET_SUFFIX = ".ticket"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who made a claim: enough to see from the same machine whether that process still lives.

    `started` is the process's start in clock ticks since boot and `pid_namespace` an inode number;
    with `boot_id` they are None where /proc does not tell, and then only the lease's age counts.
    """

    attempt: str
    host: str
    boot_id: str | None
    pid_namespace: int | None
    pid: int
    started: int | None
    claimed_at: str

    @classmethod
    def current(cls, attempt: str) -> Self:
        """This process, now."""
        return cls(
            attempt=attempt,
            host=socket.gethostname(),
            boot_id=_boot_id(),
            pid_namespace=_pid_namespace(),
            pid=os.getpid(),
            started=_started(os.getpid()),
            claimed_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    @classmethod
    def parse(cls, text: bytes) -> Self | None:
        """An owner from a claim's content; None when it is torn or of another kind."""
        try:
            owner = cls(**json.loads(text))
        except (ValueError, TypeError):
            return None
        return owner if isinstance(owner.pid, int) else None

    def is_dead(self) -> bool:
        """Whether this process is known to have ended; False when another machine would have to tell."""
        here = (socket.gethostname(), _boot_id(), _pid_namespace())
        if None in here or here != (self.host, self.boot_id, self.pid_namespace):
            return False
        started = _started(self.pid)
        return not _is_concealed(self.pid) if started is None else started != self.started


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
        return path.with_name(f".{path.stem}.{attempt}.{self.mtime_ns}{_TICKET_SUFFIX}")


class Claims:
    """The claims of one process; a context manager, since a thread renews what is held.

    A claim is `<folder>/<id>.json`, made whole and exclusively by a hard link, and renewed by its
    modification time. It may be taken over when its owner's process has ended on this machine, or
    when it was not renewed for `lease_s` seconds by the clock of the folder's file system. A claim
    that somebody took over is `lost`; that does not stop its loser, whose commit just comes second.
    """

    def __init__(self, folder: Path, lease_s: float = 60.0) -> None:
        """Nothing is touched before the context is entered."""
        self.attempt = uuid.uuid4().hex
        self._folder = folder
        self._lease_s = lease_s
        self._held: set[str] = set()
        self._lost: set[str] = set()
        self._changing = threading.RLock()  # one claim file is looked at or changed at a time
        self._closing = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="claims-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        """Make the folder and start renewing; ConfigError where the folder cannot be made."""
        make_folder(self._folder)
        self._heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release everything held, and remove what dead processes left in the folder."""
        self._closing.set()
        self._heartbeat.join()
        for claim_id in self.held() | self.lost():
            self.release(claim_id)
        try:
            self._sweep()
        except OSError as problem:
            _log.warning("claims of ended processes stay in %s (%s)", self._folder, reason(problem))

    def try_claim(self, claim_id: str) -> bool:
        """Take the claim if it is free or stale; False while anybody, this object included, holds it.

        Raises RunFailed when the folder cannot be written.
        """
        path = self._path(claim_id)
        with self._changing, failing_run(path):
            if claim_id in self._held:
                return False
            with self._note(claim_id) as (note, now_ns):
                taken = publish(note, path) or (self._evict_stale(path, now_ns) and publish(note, path))
            if taken:
                self._held.add(claim_id)
                self._lost.discard(claim_id)
            return taken

    def release(self, claim_id: str) -> None:
        """Give a claim back, and forget it if it was lost. Never fails: what stays behind turns stale."""
        with self._changing:
            if claim_id not in self._held | self._lost:
                return
            self._held.discard(claim_id)
            self._lost.discard(claim_id)
            try:
                if self._is_mine(claim_id):
                    self._path(claim_id).unlink(missing_ok=True)
            except OSError as error:
                _log.warning("claim %s could not be released (%s)", claim_id, reason(error))

    def held(self) -> set[str]:
        """The ids that this object holds."""
        with self._changing:
            return set(self._held)

    def lost(self) -> set[str]:
        """The ids that somebody else took over, or removed, while this object held them."""
        with self._changing:
            return set(self._lost)

    def others(self) -> int:
        """How many chunks other processes hold at this moment."""
        with failing_run(self._folder), self._note("count") as (_, now_ns):
            records = [_read(path) for path in self._folder.glob(f"[!.]*{_SUFFIX}") if path.stem != RUN_CLAIM]
            return sum(self._is_others(record, now_ns) for record in records if record)

    def _is_others(self, record: _Record, now_ns: int) -> bool:
        mine = record.owner is not None and record.owner.attempt == self.attempt
        return not mine and not record.is_stale(now_ns, self._lease_ns)

    @property
    def _lease_ns(self) -> int:
        return int(self._lease_s * 1e9)

    def _path(self, claim_id: str) -> Path:
        return self._folder / f"{claim_id}{_SUFFIX}"

    @contextmanager
    def _note(self, claim_id: str) -> Iterator[tuple[Path, int]]:
        """A finished claim under a temporary name, and the file system's time in ns when it was written."""
        note = self._folder / f".{claim_id}.{uuid.uuid4().hex}.tmp"
        try:
            note.write_text(json.dumps(asdict(Owner.current(self.attempt)), sort_keys=True), encoding="utf-8")
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

    def _is_mine(self, claim_id: str) -> bool:
        record = _read(self._path(claim_id))
        return record is not None and record.owner is not None and record.owner.attempt == self.attempt

    def _beat(self) -> None:
        while not self._closing.wait(self._lease_s / _BEATS_PER_LEASE):
            for claim_id in self.held():
                self._renew(claim_id)

    def _renew(self, claim_id: str) -> None:
        """Prolong a claim if it still is this object's; what fails now is tried again at the next beat."""
        with self._changing:
            if claim_id not in self._held:
                return
            try:
                if self._is_mine(claim_id):
                    os.utime(self._path(claim_id))
                    return
            except FileNotFoundError:
                pass  # taken over between the look and the renewal
            except OSError as error:
                _log.warning("claim %s could not be renewed (%s)", claim_id, reason(error))
                return
            self._held.remove(claim_id)
            self._lost.add(claim_id)

    def _sweep(self) -> None:
        """Remove stale claims and the temporary files of processes that were killed."""
        with self._note("sweep") as (note, now_ns):
            for path in self._folder.iterdir():
                if path.suffix == _TICKET_SUFFIX:
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


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _pid_namespace() -> int | None:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (field 22 of proc(5) stat); None if none runs.

    A zombie has ended: it only waits for its parent.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()  # the command name before it may hold anything
    return None if state in "ZX" else int(fields[18])


def _is_concealed(pid: int) -> bool:
    """Whether another user's process runs that /proc, mounted with hidepid, does not show."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        return False
    return False  # ours, so /proc would have shown it: a zombie
