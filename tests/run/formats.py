"""Quantized checkpoints for runs, each made by its own library in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).parents[1] / "quant"
GPTQ = {
    "bits": 4, "group_size": 32, "sym": False, "lm_head": False, "dynamic": {}, "scales": "float16", "dtype": "float16",
    "told_in": "config.json", "file": "model.safetensors",
}  # fmt: skip


def make(program: str, *jobs: dict[str, Any], env: dict[str, str] | None = None) -> None:
    command = [sys.executable, str(PROGRAMS / program)]
    done = subprocess.run(
        command, input=json.dumps(jobs), capture_output=True, text=True, check=False, env=env,
        cwd=Path(jobs[0]["target"]).parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
