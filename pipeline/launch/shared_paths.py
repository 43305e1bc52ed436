"""Whether the compute nodes of a cluster see a path as this machine does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

SHARED_TYPES = (
    "9p", "acfs", "afs", "beegfs", "ceph", "cifs", "dvs", "gfs2", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "ocfs2",
    "orangefs", "panfs", "pvfs2", "smb3", "virtiofs", "wekafs",
)  # fmt: skip
"""File systems that several machines mount at once."""
MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A mounted file system: where, and of which type."""

    point: Path
    kind: str

    @property
    def shared(self) -> bool:
        """Whether other machines can mount it too; what runs in user space (fuse.*) is given the benefit of doubt."""
        return self.kind in SHARED_TYPES or self.kind.startswith("fuse.")


def mount_of(path: Path, mounts: str) -> Mount:
    """The mount that holds a path, from the text of /proc/self/mountinfo (proc_pid_mountinfo(5))."""
    path = _existing(path)
    best = Mount(point=Path("/"), kind="unknown")
    for line in mounts.splitlines():
        fields, _, source = line.partition(" - ")
        point = Path(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), fields.split()[4]))
        if path.is_relative_to(point) and len(point.parts) >= len(best.point.parts):  # of two at one point, the later
            best = Mount(point=point, kind=source.split()[0])
    return best


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that there is, without symbolic links."""
    path = path.expanduser().absolute()
    return next(p for p in (path, *path.parents) if p.exists()).resolve()
