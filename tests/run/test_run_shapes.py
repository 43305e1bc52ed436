"""What a run says of its static shapes, of captured steps and of its compute threads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from echo import run_echo
from harness import run_here, run_json, stats

from pipeline.output.manifest import other_hardware

SETTINGS = ("task=generate", "engine.slots=16", "engine.prefill_tokens=64", "engine.max_len=256", "data.chunk_rows=4")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": [f"row {n}" for n in range(12)]}), path)
    return path


def overrides(data: Path, out: Path) -> list[str]:
    return ["model=tiny", *SETTINGS, f"data.path={data}", f"output.dir={out}"]


def test_the_shapes_are_told_before_the_run(data: Path, tmp_path: Path) -> None:
    planned = json.loads(run_here(*overrides(data, tmp_path / "out"), "dry_run=true").done().out)
    ended = run_here(*overrides(data, tmp_path / "out")).done()
    shapes = ["prefill 64", "prefill 128", "prefill 256", "decode 16 x 256", "logits 64"]
    assert planned["static_shapes"] == shapes
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["static_shapes"] == shapes
    assert f"5 static shapes: {', '.join(shapes)}" in ended.err
    (run,) = stats(tmp_path / "out")
    assert (run["graphs"], run["attention"]) == (0, "numba")
    told = dict(re.findall(r"(prefill|logits) 64: (\d+(?:, \d+)*)", ended.err))
    assert told or "every pass is padded to its shape" in ended.err
    assert run["shapes"] == 5 + sum(len(rows.split(", ")) for rows in told.values())
    assert "cuda devices, not on cpu" in run["eager"]


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("engine.compile=graphs", "engine.compile=graphs needs a CUDA device, this is cpu; use engine.compile=auto"),
        ("engine.attention=triton", "engine.attention=triton cannot run here: Triton kernels run on cuda devices"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(setting: str, reason: str, data: Path, tmp_path: Path) -> None:
    sentence = run_here(*overrides(data, tmp_path / "out"), "model.device=cpu", setting).refusal()
    assert reason in sentence
    assert not (tmp_path / "out" / "run.json").exists()


def test_another_number_of_threads_is_told(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    again = overrides(data, out)
    assert "compute threads" not in run_echo(monkeypatch, *again).done().err
    assert run_json(out)["informational"]["threads"] == torch.get_num_threads() == 1
    sorted((out / "results").glob("*.parquet"))[1].unlink()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    resumed = run_echo(monkeypatch, *again).done()
    assert "begun with 1 compute threads and goes on with 3" in resumed.err
    assert "OMP_NUM_THREADS=1" in resumed.err
    assert run_json(out)["informational"]["threads"] == 1


def test_another_processor_or_gpu_is_told() -> None:
    (note,) = other_hardware({"threads": 4, "cpu": "AVX512"}, {"threads": 4, "cpu": "AVX2"})
    assert "begun with AVX512 instructions and goes on with AVX2" in note
    then = {"gpu": "NVIDIA H100 80GB HBM3", "cuda": "13.0", "batch_invariant": True}
    assert other_hardware(then, then) == []
    assert other_hardware({}, then) == []
    (note,) = other_hardware(then, {**then, "gpu": "NVIDIA A100-SXM4-80GB"})
    assert "begun with NVIDIA H100 80GB HBM3 and goes on with NVIDIA A100-SXM4-80GB" in note
    assert "one kind of GPU" in note
