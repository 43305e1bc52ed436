"""jobs/nightly.sh on a folder that grows, as cron would start it, with the model that the project ships."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from harness import REPOSITORY, call, environment, label_args, parts, rows, run_here, stats

from pipeline import verify

NIGHTLY = REPOSITORY / "jobs" / "nightly.sh"


@pytest.mark.slow
def test_three_nights_label_exactly_what_is_new(tickets: list[str], tmp_path: Path) -> None:
    """A folder; lines appended to its file and a file more; nothing."""
    inbox, out, logs = tmp_path / "in", tmp_path / "out", tmp_path / "logs"
    command = [
        "data=jsonl", f"data.path={inbox}", "data.chunk_rows=8", "quant=none", "model.dtype=float32", *label_args(),
        "task.prompt='{{ ticket }}'",
    ]  # fmt: skip
    logs.mkdir()
    inbox.mkdir()
    nights = [{"b": tickets[:10]}, {"b": tickets[10:13], "a": tickets[13:18]}, {}]
    said, kept = [], dict[str, bytes]()
    for written in nights:
        for name, texts in written.items():
            with (inbox / f"{name}.jsonl").open("a") as file:
                file.writelines(json.dumps({"ticket": text}) + "\n" for text in texts)
        said.append(night(*command, f"output.dir={out}", logs=logs))
        found = {part.name: part.read_bytes() for part in parts(out)}
        assert {name: found[name] for name in kept} == kept, "nothing is done again"
        kept = found
    assert said == [(10, 10, 10), (18, 18, 8), (18, 18, 0)]
    assert sorted(kept) == [f"part-{n}.parquet" for n in (
        "000000-000000000000", "000000-000000000008", "000000-000000000010", "000001-000000000000"
    )]  # fmt: skip
    assert [one["rows"] for one in stats(out)] == [10, 8], "the third night loads no model"
    assert len(list(logs.iterdir())) == 2, "PIPELINE_KEEP_LOGS"
    assert call(verify.main, str(out)).done()
    assert [row["ticket"] for row in rows(out)] == tickets[:18]
    run_here(*command, f"output.dir={tmp_path / 'at once'}").done()
    assert [row["label_probs"] for row in sorted(rows(tmp_path / "at once"), key=lambda row: row["ticket"])] == [
        row["label_probs"] for row in sorted(rows(out), key=lambda row: row["ticket"])
    ]


def test_a_schedule_whose_errors_go_to_a_socket(tmp_path: Path) -> None:
    """As systemd's journal is one: /dev/stderr cannot be opened there."""
    journal, stderr = socket.socketpair()
    with journal, stderr:
        done = subprocess.run(
            ["bash", str(NIGHTLY), "nosuch.key=1"], env=environment(PIPELINE_PYTHON=sys.executable, PIPELINE_LOG=None),
            stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=60,
        )  # fmt: skip
        stderr.close()
        logged = journal.makefile().read()
    assert done.returncode == 2
    assert logged.startswith("error: nosuch") and logged.count("\n") == 1
    assert done.stdout.startswith("nightly (exit code 2): error: nosuch")


def night(*command: str, logs: Path) -> tuple[int, ...]:
    """Rows done, rows there and rows new, as the one line of the script says."""
    env = environment(PIPELINE_PYTHON=sys.executable, PIPELINE_LOG=str(logs), PIPELINE_KEEP_LOGS="2")
    done = subprocess.run(["bash", str(NIGHTLY), *command], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, (done.stderr, [log.read_text() for log in logs.iterdir()])
    assert len(done.stdout.splitlines()) == 1, done.stdout
    line = done.stdout.strip()
    match = re.fullmatch(r"nightly \(exit code 0\): .*: (\d+) of (\d+) rows done, 0 errors, (\d+) rows new", line)
    assert match, line
    return tuple(map(int, match.groups()))
