"""What the journal costs: rows per second with `output.journal_s` at 10 (the default), 1, 0, and without.

The shipped model answers short, so that many rows pass in a second. All rows are one chunk: nothing is committed before
the end, and every row goes through the journal but those of the last seconds. "off" is a time that never comes. Every
variant is run `--repeats` times in turn with the others, in a process of its own; the medians of the rates that the
command's own line says count, which are without loading. The last line is one JSON document.

    python scripts/bench_journal.py
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

from bench_pipeline import write_input

from pipeline import fingerprint

VARIANTS = {"off": 1e6, "10": 10.0, "1": 1.0, "0": 0.0}
NEW_TOKENS = 8


def rows_per_s(data: Path, rows: int, journal_s: float, out: Path) -> float:
    """One run of the shipped model in NF4 over all rows."""
    command = [
        sys.executable, "-m", "pipeline", f"data.path={data}", f"output.dir={out}", "quant=bnb",
        "task.prompt='{{ text }}'", "task.chat=false", f"sampling.max_new_tokens={NEW_TOKENS}",
        f"data.chunk_rows={rows}", f"output.journal_s={journal_s}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = re.search(r"speed +([\d,.]+) rows/s", done.stdout)
    assert said, done.stdout
    return float(said[1].replace(",", ""))


def main() -> None:
    """Measure all variants in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8000)
    asked = parser.parse_args()
    rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        write_input(Path(folder, "in"), asked.rows)
        for repeat in range(asked.repeats):
            for name, journal_s in VARIANTS.items():
                out = Path(folder, f"{repeat}-{name}")
                rates[name].append(rows_per_s(Path(folder, "in", "rows.parquet"), asked.rows, journal_s, out))
                print(f"journal_s {name}: {rates[name][-1]:,.1f} rows/s", flush=True)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    document = {
        "command": f"python scripts/bench_journal.py --repeats {asked.repeats} --rows {asked.rows}",
        "date": time.strftime("%Y-%m-%d"),
        "rows": asked.rows,
        "new_tokens": NEW_TOKENS,
        "rows_per_s": rates,
        "medians": medians,
        "over_off": {name: round(rate / medians["off"], 3) for name, rate in medians.items()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} before",
        "versions": fingerprint.versions(),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
