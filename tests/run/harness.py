"""Runs of the pipeline as a user starts them, and what they leave behind.

`run_cli` is a real process; `run_here` is the same entry point in this process, where a process of its
own would add nothing but seconds of imports.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

REPOSITORY = Path(__file__).resolve().parents[2]
ASSETS = REPOSITORY / "pipeline" / "assets"
TICKETS = ASSETS / "tickets" / "tickets.parquet"
TINY = ASSETS / "tiny"
TOPICS = ("billing", "login", "shipping", "crash", "feature", "cancellation")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WAIT_S = 120.0


@dataclass(frozen=True)
class Ended:
    """A run that has ended."""

    code: int
    out: str
    err: str
    seconds: float

    def done(self) -> Ended:
        assert self.code == 0, f"exit {self.code}\n{self.out}\n{self.err}"
        return self

    def refusal(self) -> str:
        """The one sentence of exit code 2."""
        assert self.code == 2, f"exit {self.code}\n{self.out}\n{self.err}"
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        assert "Traceback" not in self.err
        assert not self.out
        return lines[0].removeprefix("error: ")


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment for a child: one thread, as these models are tiny; None removes a name."""
    values = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **changes}
    return {name: value for name, value in values.items() if value is not None}


def start(*overrides: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """A process that runs the pipeline; the caller waits for it (`ended`)."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=cwd,
        env=environment() if env is None else dict(env),
    )


def ended(process: subprocess.Popen[str], timeout: float = WAIT_S) -> Ended:
    started = time.monotonic()
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout} s\n{out}\n{err}") from None
    return Ended(process.returncode, out, err, time.monotonic() - started)


def run_cli(*overrides: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Ended:
    """The pipeline in a process of its own, to its end."""
    return ended(start(*overrides, cwd=cwd, env=env))


def run_here(*overrides: str) -> Ended:
    """The pipeline's entry point in this process."""
    from pipeline.__main__ import main

    return call(main, *overrides)


def call(entry: Callable[[Sequence[str]], int], *arguments: str) -> Ended:
    """A command's entry point in this process, whose signal handlers are put back."""
    from pipeline.command import SIGNALS

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    out, err = io.StringIO(), io.StringIO()
    started = time.monotonic()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = entry(list(arguments))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Ended(int(code), out.getvalue(), err.getvalue(), time.monotonic() - started)


def quoted(text: str) -> str:
    """A value with braces, commas or spaces as Hydra wants it in an override."""
    return "'" + text.replace("'", "\\'") + "'"


def prompt(template: str) -> str:
    return f"task.prompt={quoted(template)}"


def label_args(labels: Iterable[str] | Mapping[str, str] = TOPICS) -> list[str]:
    """task=label with these labels."""
    if isinstance(labels, Mapping):
        escaped = {name.replace(",", "\\,"): quoted(text) for name, text in labels.items()}
        inside = ", ".join(f"{name}: {text}" for name, text in escaped.items())
        return ["task=label", f"task.labels={{{inside}}}"]
    return ["task=label", f"task.labels=[{', '.join(quoted(label) for label in labels)}]"]


def parts(out: Path) -> list[Path]:
    return sorted((out / "results").glob("*.parquet"))


def results(out: Path) -> pa.Table:
    """The concatenated Parts, sorted by name."""
    return pa.concat_tables([pq.read_table(part) for part in parts(out)])


def rows(out: Path) -> list[dict[str, Any]]:
    return results(out).to_pylist()


def run_json(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "run.json").read_text())
    return values


def put_run_json(out: Path, values: Mapping[str, Any]) -> None:
    """A run.json as an older version may have written it, without its hash."""
    (out / "run.json").write_text(json.dumps({key: value for key, value in values.items() if key != "sha256"}))


def stats(out: Path) -> list[dict[str, Any]]:
    return [pq.read_table(path).to_pylist()[0] for path in sorted((out / "stats").glob("run-*.parquet"))]


def greedy_tokens(model: Any, ids: Sequence[int], max_new_tokens: int, **settings: Any) -> list[int]:
    """What transformers' generate puts behind the prompt, the end token (1) cut off."""
    import torch

    out = model.generate(
        torch.tensor([list(ids)]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        **settings,
    )
    tokens: list[int] = out[0, len(ids) :].tolist()
    return tokens[:-1] if tokens[-1] == 1 else tokens


def holding(folder: Path, secret: str) -> list[str]:
    """The files of a folder that have a text in them, in a Parquet file's values too."""
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and (
            secret.encode() in path.read_bytes()
            or (path.suffix == ".parquet" and secret in repr(pq.ParquetFile(path).read().to_pylist()))
        )
    ]


def disk_state(out: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file's inode, modification time and content."""
    return {
        str(path.relative_to(out)): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def nothing_left_over(out: Path) -> bool:
    """Whether no work in progress is in the output folder."""
    return not list((out / "claims").iterdir()) and not list((out / "journal").iterdir())


def segments(out: Path) -> list[Path]:
    """The journal of what is not committed yet."""
    return sorted((out / "journal").glob("rows-*.segment"))


def only_journal_left_over(out: Path) -> bool:
    """Whether nothing of an interrupted run is there but what the next one goes on from."""
    return not list((out / "claims").iterdir()) and sorted((out / "journal").iterdir()) == segments(out)


def write(path: Path, columns: Mapping[str, Any] | pa.Table, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(dict(columns)), path, **options)
    return path


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None, timeout: float = 90) -> None:
    """Poll until the condition holds; fails when the process has ended before, or the time is up."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        if process is not None and process.poll() is not None:
            assert condition(), f"ended before: {process.communicate()}"
            return
        time.sleep(0.01)


def give_tokenizer(folder: Path, *, adds_bos: bool, names: Sequence[str] = TOKENIZER_FILES) -> Path:
    """The shipped tokenizer beside another checkpoint; with `adds_bos` plain texts begin with <|bos|> as in Llama."""
    for name in names:
        shutil.copy(TINY / name, folder / name)
    if adds_bos:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
        content["post_processor"]["single"].insert(0, bos)
        content["post_processor"]["pair"].insert(0, bos)
        content["post_processor"]["special_tokens"] = {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}}
        path.write_text(json.dumps(content))
    return folder
