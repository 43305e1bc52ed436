"""Who holds a claim, and whether that process still runs on this machine."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self


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

    def to_json(self) -> bytes:
        """A claim's content."""
        return json.dumps(asdict(self), sort_keys=True).encode()


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
