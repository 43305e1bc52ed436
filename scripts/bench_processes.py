"""Rows per second of the demo in one process and in two, on one machine, each with its compute threads.

Every variant is run `--repeats` times in turn with the others; the medians count, as the command's own line says them
(`speed`). The last line is one JSON document.

    python scripts/bench_processes.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline import fingerprint

VARIANTS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}


def rows_per_s(processes: int, threads: int, out: Path) -> float:
    """One run of the demo."""
    command = [sys.executable, "-m", "pipeline", "experiment=demo", f"output.dir={out}"]
    command += ["data.chunk_rows=100", f"launcher.processes={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    said = re.search(r"speed +([\d,.]+) rows/s", done.stdout)
    assert said, done.stdout
    return float(said[1].replace(",", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            for number, (name, variant) in enumerate(VARIANTS.items()):
                rates[name].append(rows_per_s(*variant, Path(folder, f"{repeat}-{number}")))
                print(f"{name}: {rates[name][-1]:,.1f} rows/s", flush=True)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    one, _, two = medians.values()
    document = {
        "command": "python scripts/bench_processes.py",
        "date": time.strftime("%Y-%m-%d"),
        "rows_per_s": rates,
        "medians": medians,
        "two_processes_over_one": round(two / one, 2),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": fingerprint.versions(),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
