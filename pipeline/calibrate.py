"""GPTQ checkpoints calibrated on rows of the data source, by the gptqmodel library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import IO, Any

from pipeline.console import Console
from pipeline.data.open import open_source
from pipeline.data.source import SourceFile, chunks_of, registered
from pipeline.errors import ConfigError, Interrupted, RunFailed
from pipeline.intake import read_rows
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.gptq_child import Job
from pipeline.models.memory import dtype_name, resolve_device
from pipeline.models.tokenizer import Tokenizer
from pipeline.process import Stopping
from pipeline.prompts import Prompt, PromptBuilder
from pipeline.settings import DataSettings, ModelConfig

DEFAULT_ROWS = 128
LONGEST_ROW = 2048
"""Tokens of a row that are used: so long are the rows that GPTQ's authors calibrate on."""
SHORTEST_ROW = 11
"""gptqmodel leaves out what is shorter."""
DEFAULTS = {"bits": 4, "group_size": 128, "symmetric": True, "act_order": False}
LOOK_EVERY_S = 0.2


def calibrate(
    asked: ModelConfig, checkpoint: Checkpoint, tokenizer: Path, folder: Path, console: Console, stopping: Stopping
) -> str:
    """Write a GPTQ checkpoint to an empty folder; returns what it is. Raises ConfigError, RunFailed or Interrupted."""
    if find_spec("gptqmodel") is None:
        raise ConfigError(
            "quant=gptq needs the gptqmodel library, which is not installed; install the extra gptq "
            "(pip install 'quantized-batch-pipeline[gptq]') or choose quant=bnb"
        )
    dtype = dtype_name(asked.model, checkpoint)
    if dtype == "float32":
        raise ConfigError(
            f"model.dtype={asked.model.dtype} is float32, but GPTQ checkpoints are read in 16 bits by their own tools; "
            "set model.dtype=bfloat16 or float16"
        )
    rows = calibration_rows(asked, Tokenizer(str(tokenizer), asked.model.trust_remote_code), console)
    chosen = {key: getattr(asked.quant, key) for key in DEFAULTS}
    chosen = {key: DEFAULTS[key] if value is None else value for key, value in chosen.items()}
    job = Job(
        source=str(checkpoint.folder.resolve()),
        target=str(folder.resolve()),
        dtype=dtype,
        device=str(resolve_device(asked.model)),
        trust_remote_code=asked.model.trust_remote_code,
        rows=rows,
        **chosen,
    )
    console.note(
        f"calibrating on {len(rows):,} rows of {sum(map(len, rows)):,} tokens with gptqmodel {version('gptqmodel')} "
        f"on {job.device}"
    )
    _run_child(job, console, stopping)
    group = "one group" if job.group_size == -1 else f"groups of {job.group_size}"
    return f"GPTQ {job.bits} bits in {group}{', act-order' if job.act_order else ''}"


def calibration_rows(asked: ModelConfig, tokenizer: Tokenizer, console: Console) -> list[list[int]]:
    """Token ids of the first `data.limit` rows that have a prompt; raises ConfigError if there are none."""
    if asked.data is None or asked.task is None:
        key = "data.path" if asked.data is None else "task.labels"
        raise ConfigError(f"quant=gptq is calibrated on rows, and {key} is not set; add {key}=... to the command line")
    source = open_source(asked.data)
    found = source.find()
    prompts = PromptBuilder(tokenizer, asked.task, source.schema().names)
    files = [registered(ordinal, file, source.count) for ordinal, file in enumerate(found)]
    made: list[list[int]] = []
    failed: list[str] = []
    for row in islice(_rows(source, files, asked.data), asked.data.limit or DEFAULT_ROWS):
        prompt = prompts.build([row])[0] if isinstance(row, dict) else Prompt(error=row)
        if len(prompt.token_ids) < SHORTEST_ROW:
            failed.append(prompt.error or f"it has {len(prompt.token_ids)} tokens, fewer than {SHORTEST_ROW}")
        else:
            made.append(list(prompt.token_ids[:LONGEST_ROW]))
    if failed:
        console.note(f"{len(failed)} rows cannot be used, the first because: {failed[0]}")
    if not made:
        raise ConfigError(f"data.path={asked.data.path[0]} has no row to calibrate on; name rows with longer prompts")
    return made


def _rows(source: Any, files: list[SourceFile], settings: DataSettings) -> Iterator[dict[str, Any] | str]:
    """Rows as the run would read them; for one that cannot be read, the reason."""
    for file in files:
        for rows in source.read(file, chunks_of(file, min(settings.chunk_rows, settings.limit or DEFAULT_ROWS))):
            for index, row in enumerate(read_rows(rows.table)):
                yield rows.errors.get(index, row)


def _run_child(job: Job, console: Console, stopping: Stopping) -> None:
    """The library in a process of its own, whose words are only shown to a terminal, or when it fails.

    It writes files to where it runs, which is a folder that goes.
    """
    package = str(Path(__file__).parents[1])
    paths = os.pathsep.join(path for path in (package, os.environ.get("PYTHONPATH")) if path)
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as there:
        child = subprocess.Popen(  # noqa: S603  # this interpreter, on a module of ours
            [sys.executable, "-m", Job.__module__],
            stdin=subprocess.PIPE,
            stdout=None if console.is_terminal else log,
            stderr=None if console.is_terminal else subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths},
            cwd=there,
            start_new_session=True,
        )
        try:
            _tell(child, job)
            while child.poll() is None:
                if stopping():
                    raise Interrupted("stopped while calibrating")
                _wait(child)
        finally:
            child.kill()
            child.wait()
        if child.returncode:
            raise RunFailed(f"gptqmodel could not quantize {job.source} (exit {child.returncode}): {_last_words(log)}")


def _tell(child: subprocess.Popen[bytes], job: Job) -> None:
    """The job in a line; standard input stays open, since its end is the child's."""
    assert child.stdin is not None
    child.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
    child.stdin.flush()


def _wait(child: subprocess.Popen[bytes]) -> None:
    try:
        child.wait(LOOK_EVERY_S)
    except subprocess.TimeoutExpired:
        return


def _last_words(log: IO[bytes]) -> str:
    """What a traceback ends with."""
    log.seek(0)
    lines = log.read().decode("utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "its own output says why")
