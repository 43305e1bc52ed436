"""Whether the compute nodes of a cluster see a path as this machine does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.files import is_url
from pipeline.errors import ConfigError
from pipeline.settings import RunConfig

SHARED_TYPES = (
    "9p", "acfs", "afs", "beegfs", "ceph", "cifs", "dvs", "gfs2", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "ocfs2",
    "orangefs", "panfs", "pvfs2", "smb3", "virtiofs", "wekafs",
)  # fmt: skip
"""File systems that several machines mount at once."""
MOUNTS = Path("/proc/self/mountinfo")
SHOWN_NODES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A mounted file system: where, and of which type."""

    point: Path
    kind: str

    @property
    def shared(self) -> bool:
        """Whether other machines can mount it too; what runs in user space (fuse.*) is given the benefit of doubt."""
        return self.kind in SHARED_TYPES or self.kind.startswith("fuse.")


def refuse_unshared(config: RunConfig, model_folder: Path | None, elsewhere: Sequence[str], whose: str) -> None:
    """Raise ConfigError for a path that the nodes `elsewhere` do not see; `model_folder` None: they fetch the model.

    `whose` says in the message what runs there.
    """
    paths = [("output.dir", config.output.dir), ("the current folder", str(Path.cwd()))]
    paths += [] if model_folder is None else [("model.path", str(model_folder))]
    paths += [("data.path", p) for p in config.data.path if config.data.kind != "hub" or Path(p).expanduser().exists()]
    nodes = ", ".join(elsewhere[:SHOWN_NODES]) + (", ..." if len(elsewhere) > SHOWN_NODES else "")
    for key, path in paths:
        mount = mount_of(Path(path), MOUNTS.read_text(encoding="utf-8"))
        if not is_url(path) and not mount.shared:
            raise ConfigError(
                f"{key}={path} is on a file system of this machine alone ({mount.kind} at {mount.point}), and {whose} "
                f"{nodes}; put it on a shared one, or set launcher.shared=true if the nodes see it all the same"
            )


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
