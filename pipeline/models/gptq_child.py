"""GPTQ by the gptqmodel library, in a process of its own: importing it changes transformers, and a signal ends it.

`python -m pipeline.models.gptq_child` reads a line of JSON (a `Job`) from standard input, and ends when that closes.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

CONFIGS = ("config.json", "quantize_config.json")
OF_THIS_MACHINE = "offload_to_disk_path"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to quantize, how, on which rows of token ids, and where to write it."""

    source: str
    target: str
    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    dtype: str
    device: str
    trust_remote_code: bool
    rows: list[list[int]]


def run(job: Job) -> None:
    """Quantize and save with gptqmodel."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    asked = QuantizeConfig(
        bits=job.bits,
        group_size=job.group_size,
        sym=job.symmetric,
        desc_act=job.act_order,
        act_group_aware=False,
    )
    model = GPTQModel.load(
        job.source,
        asked,
        device=job.device,
        dtype=getattr(torch, job.dtype),
        trust_remote_code=job.trust_remote_code,
    )
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job.rows]
    model.quantize(rows, batch_size=1, calibration_data_min_length=1)
    model.save(job.target)
    for name in CONFIGS:
        _forget_this_machine(Path(job.target, name))


def _forget_this_machine(file: Path) -> None:
    """The folder that weights were moved to meanwhile is nobody else's matter."""
    if file.is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
        for holder in (values, values.get("quantization_config") or {}):
            (holder.get("meta") or {}).pop(OF_THIS_MACHINE, None)
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    received = Job(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run(received)
    sys.stdout.flush()
    os._exit(0)  # its threads need not be waited for
