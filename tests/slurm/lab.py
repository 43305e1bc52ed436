"""A real Slurm of two nodes on this machine, for as long as a test session needs it.

Debian's and Ubuntu's packages slurmctld, slurmd, slurm-client and munge suffice; no systemd, control groups,
accounting database or root are needed. Partition `low` is the default one; a job in `high` preempts it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

NODES = ("n1", "n2")
CHUNK_ROWS = 40
PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "sinfo")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
START_S = 30.0
CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
# A requeued job waits until its credential has expired, by default for two minutes.
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
KillWait=5
SlurmdTimeout=10
ReturnToService=2
MinJobAge=3600
JobRequeue=1
ScronParameters=enable
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_port}-{last_port}] CPUs=2 State=UNKNOWN
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE MaxTime=60 State=UP
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF MaxTime=60 State=UP
"""


def missing_programs() -> list[str]:
    """What would have to be installed for a lab to start."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class SlurmLab:
    """The daemons, and the commands that speak to them."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: it holds a Unix socket
        self.root.chmod(0o755)
        self.conf = self.root / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """The environment in which Slurm's commands find this lab, without what another Slurm's job would see."""
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        return {**outer, "SLURM_CONF": str(self.conf), "PATH": PATH}

    def start(self) -> None:
        """Start the daemons and wait until both nodes take jobs."""
        port = _free_ports(1 + len(NODES))
        self.conf.write_text(_conf(self.root, port))
        for folder in ("state", *(f"spool-{node}" for node in NODES)):
            (self.root / folder).mkdir()
        key = self.root / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        self._munged(key)
        self.run("slurmctld")
        self.until(lambda: self.tries("scontrol", "ping"), "slurmctld does not answer")
        for node in NODES:
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, and wait until it takes jobs."""
        self.run("slurmd", "-N", node)
        self.until(lambda: self.node_state(node) in ("idle", "mixed", "allocated"), f"{node} does not come up")

    def kill_node(self, node: str) -> None:
        """End a node's slurmd at once: the controller loses contact, the node's jobs go on."""
        os.kill(self._pid(f"slurmd-{node}"), signal.SIGKILL)

    def stop(self) -> None:
        """End all jobs and daemons, and remove their files."""
        self.tries("scancel", "--full", "--me")
        time.sleep(0.5)
        for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld", "munged"):
            pid = self._pid(name)
            if _lives(pid):
                os.kill(pid, signal.SIGTERM)
                if not _within(10, lambda pid=pid: not _lives(pid)):
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.root, ignore_errors=True)

    def run(self, *command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """What a command prints; fails with its messages and the daemons' logs."""
        done = subprocess.run(
            command, env=self.env if env is None else env, cwd=cwd, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout.strip()

    def tries(self, *command: str) -> bool:
        """Whether a command succeeds."""
        return subprocess.run(command, env=self.env, capture_output=True, timeout=60).returncode == 0

    def until(self, condition: Callable[[], object], otherwise: str, seconds: float = START_S) -> None:
        """Wait for a condition; fails with the queue and the daemons' logs."""
        if not _within(seconds, condition):
            queue = subprocess.run(
                ["squeue", "-a", "-t", "all"], env=self.env, capture_output=True, text=True, timeout=60
            )
            raise AssertionError(f"{otherwise}\n{queue.stdout}{self.logs()}")

    def node_state(self, node: str) -> str:
        """`idle`, `allocated`, `down*` and so on."""
        return self.run("sinfo", "-h", "-n", node, "-p", "low", "-o", "%T")

    def states(self, job: str) -> dict[str, str]:
        """Job id (with the array task's) to the state of every task of a job, finished ones included."""
        lines = self.run("squeue", "-h", "-a", "-r", "-t", "all", "-j", job, "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def show(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job` for one job or array task."""
        fields = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(field.partition("=")[::2] for field in fields if "=" in field)

    def wait(self, *jobs: str, seconds: float = 180) -> dict[str, str]:
        """Wait until jobs have ended and stay ended; the last states."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
        states: dict[str, str] = {}

        def over() -> bool:
            states.clear()
            for job in jobs:
                states.update(self.states(job))
            return all(state in ended for state in states.values())

        self.until(over, f"jobs {jobs} did not end", seconds)
        return states

    def logs(self) -> str:
        """The errors in the daemons' logs."""
        lines = [line for path in sorted(self.root.glob("*.log")) for line in path.read_text().splitlines()]
        return "\n".join(line for line in lines[-400:] if "error" in line or "fatal" in line)

    def _munged(self, key: Path) -> None:
        names = {"key-file": key, "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{option}={self.root / name}" for option, name in names.items()]
        self.run("munged", "--force", *options, f"--seed-file={self.root / 'munge.seed'}")
        self.until(lambda: self.tries("munge", "-n", "-S", str(self.root / "munge.socket")), "munged does not answer")

    def _pid(self, daemon: str) -> int:
        file = self.root / f"{daemon}.pid"
        return int(file.read_text()) if file.is_file() else -1


def _conf(root: Path, port: int) -> str:
    host = socket.gethostname().split(".")[0]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    text = CONF.format(root=root, host=host, user=user, port=port, node_port=port + 1, last_port=port + len(NODES))
    try:
        on_loopback = socket.gethostbyname(host) == "127.0.0.1"
    except OSError:
        on_loopback = False
    return text + ("CommunicationParameters=NoInAddrAny,NoCtldInAddrAny\n" if on_loopback else "")


def _free_ports(count: int) -> int:
    """The first of several free ports in a row."""
    for port in range(21000 + os.getpid() % 8000, 30000, count):
        try:
            for number in range(port, port + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
        except OSError:
            continue
        return port
    raise AssertionError("no free ports")


def _within(seconds: float, condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _lives(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return pid > 0 and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def run_args(out: Path) -> list[str]:
    """The demo, in 50 chunks, on the CPU."""
    return ["experiment=demo", f"output.dir={out}", f"data.chunk_rows={CHUNK_ROWS}", "model.device=cpu"]
