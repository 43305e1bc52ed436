"""Loads checkpoints in a process of its own and reports seconds and the anonymous memory that it takes, as JSON lines.

Reads a JSON list of jobs from standard input: `folder`, `method` (of quant) and `dtype`; with a `target` the
checkpoint is quantized to that folder instead, and with `peer` transformers loads it. Mapped files do not count as
anonymous memory. The first job only warms up.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.kernels.bnb import bitsandbytes
from pipeline.models.architecture import load_config
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.export import write_quantized
from pipeline.models.loader import load_model
from pipeline.models.memory import give_back_freed_memory
from pipeline.quant.detect import resolve_spec
from pipeline.quant.format import format_of, needs_of
from pipeline.quant.spec import QuantSettings


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("this kernel does not tell")


class Watch:
    """The most anonymous memory while it is open, looked at every millisecond."""

    def __enter__(self) -> Watch:
        self.peak = anonymous_bytes()
        self._started = time.perf_counter()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())


def load(job: dict[str, Any]) -> dict[str, float]:
    folder, dtype = job["folder"], getattr(torch, job["dtype"])
    if job.get("peer"):
        return load_with_transformers(folder, job["method"], dtype)
    checkpoint = open_checkpoint(folder)
    spec = resolve_spec(QuantSettings(method=job["method"]), checkpoint.quantization, folder)
    needs = needs_of(spec, spec.stored_modules(checkpoint.tensors), "cpu", None, dtype)
    quant = format_of(spec, "auto", needs)[0]
    config = load_config(folder, folder, False)
    give_back_freed_memory()
    before = anonymous_bytes()
    if "target" in job:
        with Watch() as watch:
            export(checkpoint, config, quant, dtype, Path(job["target"]))
        return measured(before, watch, 0, 0)
    with Watch() as watch:
        model = load_model(checkpoint, config, quant, dtype, torch.device("cpu"))
    tensors = {t.data_ptr(): t for t in (*model.model.parameters(), *model.model.buffers())}
    cast = [t for t in tensors.values() if t.dtype != torch.bfloat16]  # the file's own dtype stays mapped
    stored = sum(linear.stored_bytes for _, linear in model.quant_linears())
    return measured(before, watch, stored, sum(t.nbytes for t in cast))


def measured(before: int, watch: Watch, quantized: int, other: int) -> dict[str, float]:
    """Bytes before, at most and after; of them those of quantized weights and of others that had to be cast."""
    sizes = {"before": before, "peak": watch.peak, "after": anonymous_bytes(), "quantized": quantized, "other": other}
    return {**sizes, "seconds": watch.seconds}


def load_with_transformers(folder: str, method: str, dtype: torch.dtype) -> dict[str, float]:
    """The same checkpoint by `from_pretrained`, for comparison."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    asked = {"quantization_config": four_bits} if method == "bnb" else {}
    before = anonymous_bytes()
    with Watch() as watch:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **asked)
    stored = sum(p.nbytes for p in model.parameters() if p.dtype == torch.uint8)
    return measured(before, watch, stored, 0)


def export(checkpoint: Any, config: Any, quant: Any, dtype: torch.dtype, folder: Path) -> None:
    folder.mkdir()
    write_quantized(checkpoint, config, quant, dtype, torch.device("cpu"), folder, shard_bytes=4 << 30)


def warm_up(folder: str) -> None:
    """What libraries keep from their first use is not the loader's."""
    bitsandbytes()
    load({"folder": folder, "method": "bnb", "dtype": "bfloat16"})
    gc.collect()


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if sys.argv[1:] else 1)
    jobs = json.load(sys.stdin)
    warm_up(jobs.pop(0)["folder"])
    for each in jobs:
        print(json.dumps(load(each)), flush=True)
        gc.collect()
