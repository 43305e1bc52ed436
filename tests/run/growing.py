"""A dataset that grows, and what happens to it while a run is at work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import TINY, rows, run_json

from pipeline.config import load_config
from pipeline.job import Job
from pipeline.shift import Shift


def args(data: Path, out: Path, *more: str) -> list[str]:
    return [
        "model=path", f"model.path={TINY}", "data=jsonl", f"data.path={data}", f"output.dir={out}", "quant=none",
        "data.chunk_rows=4", "task.chat=false", *more,
    ]  # fmt: skip


def line(value: Any) -> bytes:
    return json.dumps({"prompt": value}).encode() + b"\n"


def append(path: Path, *content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as file:
        file.write(b"".join(content))


def words(first: int, end: int, of: str = "a") -> list[str]:
    return [f"{of} {n}" for n in range(first, end)]


def prompts(out: Path, ordinal: int) -> list[str]:
    return [row["prompt"] for row in rows(out) if row["row_id"].startswith(f"{ordinal:06d}-")]


def echoed(inbox: Path, out: Path, *more: str) -> list[str]:
    """The command line that `run_echo` makes of these."""
    return [*args(inbox, out), "sampling.logprobs=true", *more]


def register(inbox: Path, out: Path) -> None:
    """Do what another process does that has just started."""
    job = Job(load_config(echoed(inbox, out)))
    resolved = {k: v for k, v in run_json(out)["fingerprint"].items() if k.startswith("resolved.")}
    with job.output.claims() as claims:
        job.start(claims, resolved, {}, {})


def at_work(patch: pytest.MonkeyPatch, *events: Callable[[], object]) -> None:
    """Let things happen while a run is at work, one at each look for its first answers."""
    poll, waiting = Shift._poll, list(events)

    def polled(self: Shift, outlet: Any) -> int:
        if waiting:
            waiting.pop(0)()
        return poll(self, outlet)

    patch.setattr(Shift, "_poll", polled)
