"""Disks that fill up or turn read-only under a run: one sentence, nothing half-written, and the next run goes on."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import environment, nothing_left_over, parts, results, run_cli, run_here, segments, stats, write

pytestmark = pytest.mark.slow

NUM_ROWS = 60

# argv: the folder that is the disk, the class and the method before whose third call it fails, how it fails, overrides.
FAULTY = """
import importlib, subprocess, sys
disk, module, owner, method, fault, *arguments = sys.argv[1:]
owner = getattr(importlib.import_module(module), owner)
original = getattr(owner, method)
calls = []

def failing(self, *given, **more):
    calls.append(given)
    if len(calls) == 3:
        if fault == "full":
            try:
                with open(disk + "/filler", "wb", buffering=0) as file:
                    while file.write(bytes(4096)):
                        pass
            except OSError:
                pass
        else:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    return original(self, *given, **more)

setattr(owner, method, failing)
from pipeline.__main__ import main
sys.exit(main(arguments))
"""
PLACES = {
    "journal": ("pipeline.output.journal", "ChunkJournal", "write"),
    "part": ("pipeline.output.sink", "Sink", "commit"),
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a tmpfs needs root: " + mount.stderr.decode().strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def args(model: Path, data: Path, out: Path) -> list[str]:
    return [
        "model=path", f"model.path={model}", f"data.path={data}", f"output.dir={out}", "quant=none", "task.chat=false",
        "data.chunk_rows=10", "engine.slots=8", "sampling.max_new_tokens=30", "sampling.temperature=1.0",
        "output.journal_s=0",
    ]  # fmt: skip


@pytest.mark.parametrize(("fault", "said"), [("full", "No space left on device"), ("ro", "Read-only file system")])
@pytest.mark.parametrize("where", PLACES)
def test_a_disk_that_fails_ends_the_run_and_the_next_goes_on(
    where: str, fault: str, said: str, small_model: Path, tickets: list[str], disk: Path, tmp_path: Path
) -> None:
    payload = [bytes(hashlib.sha512(str(row).encode()).digest() * 8) for row in range(NUM_ROWS)]
    data = write(tmp_path / "in.parquet", {"prompt": tickets[:NUM_ROWS], "payload": payload})
    command = args(small_model, data, disk / "out")
    stopped = subprocess.run(
        [sys.executable, "-c", FAULTY, str(disk), *PLACES[where], fault, *command],
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert stopped.returncode == 1, stopped.stderr
    assert said in stopped.stderr.splitlines()[-1], stopped.stderr
    assert stopped.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in stopped.stderr
    assert "run the same command again" in stopped.stderr.splitlines()[-1]
    assert {"journal": "/journal/rows-", "part": "/results/part-"}[where] in stopped.stderr.splitlines()[-1]
    for part in parts(disk / "out"):
        assert pq.read_table(part).num_rows == 10, "whole"
    for path in segments(disk / "out"):
        data_of = path.read_bytes()
        assert hashlib.blake2b(data_of[40:], digest_size=32).digest() == data_of[8:40], "whole"
        assert pa.ipc.open_stream(data_of[40:]).read_all().num_rows > 0
    if fault == "full":
        (disk / "filler").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    run_cli(*command).done()
    assert stats(disk / "out")[-1]["journaled_rows"] > 0
    run_here(*args(small_model, data, tmp_path / "whole")).done()
    assert results(disk / "out").equals(results(tmp_path / "whole"))
    assert nothing_left_over(disk / "out")
