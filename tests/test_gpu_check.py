"""The trip to a GPU, as far as it can be seen without one: what is in it, and that no part can spoil the others."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.py"


def loaded(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses, and other scripts, look for the module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    return loaded("gpu_check", SCRIPT)


@pytest.fixture(scope="module")
def random_model() -> ModuleType:
    return loaded("random_model", ROOT / "scripts" / "gpu" / "random_model.py")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_the_parts_are_listed(gpu_check: ModuleType) -> None:
    listed = run("--list")
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [part.name for part in gpu_check.PARTS]
    assert len(run("--list", "decode-llama2").stdout.splitlines()) == 3
    nothing = run("nonsense")
    assert nothing.returncode == 2
    assert "nonsense; see --list" in nothing.stderr


def test_every_part_is_there(gpu_check: ModuleType) -> None:
    names = [part.name for part in gpu_check.PARTS]
    assert len(set(names)) == len(names)
    for part in gpu_check.PARTS:
        files = [ROOT / argument for argument in part.command if argument.endswith(".py")]
        assert files
        assert all(file.is_file() for file in files), part.name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("no GPU here: ")
    assert not (tmp_path / "out").exists()


def test_a_part_that_fails_or_hangs_leaves_the_others_their_results(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeping = "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    hanging = f"import subprocess, sys; print('begun', flush=True); {sleeping}"
    parts = [
        gpu_check.Part("good", 60, ("-c", "print('noise'); print('{\"step_ms\": 1.5}')")),
        gpu_check.Part("bad", 60, ("-c", "raise SystemExit('it broke')")),
        gpu_check.Part("hangs", 2, ("-c", hanging)),
        gpu_check.Part("lacking", 60, ("-c", ""), "a_package_that_is_not_there"),
        gpu_check.Part("last", 60, ("-c", "print('3 passed')")),
        gpu_check.Part("too much", 10_000, ("-c", "")),
    ]
    monkeypatch.setattr(gpu_check, "machine", dict)
    gpu_check.run_all(parts, tmp_path / "out", 1000.0)
    found: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]
    assert [found[part.name]["status"] for part in parts] == [
        "passed", "failed", "too long", "left out", "passed", "left out",
    ]  # fmt: skip
    assert found["good"]["result"] == {"step_ms": 1.5}
    assert found["bad"]["result"] == "it broke"
    assert found["hangs"]["result"] == "begun"
    assert "a_package_that_is_not_there" in found["lacking"]["reason"]
    assert found["hangs"]["seconds"] < 30
    log = (tmp_path / "out" / "log.txt").read_text()
    assert all(f"=== {name}" in log for name in ("good", "bad", "hangs", "last"))


def test_the_roofline_is_products_and_then_attention(random_model: ModuleType) -> None:
    """Tokens per second of Llama-3-8B and Llama-2-7B at 512 tokens, on 4.3 TB/s and 790 TFLOP/s, worked out apart."""
    bench = loaded("bench_decode", ROOT / "scripts" / "gpu" / "bench_decode.py")
    limits = random_model.Limits(4.3e12, 790e12)
    for size, rows, token_bytes, expected in (
        ("llama2-7b", 64, 512 << 10, 9_054),
        ("llama2-7b", 256, 512 << 10, 12_634),
        ("llama3-8b", 64, 128 << 10, 14_256),
        ("llama3-8b", 512, 128 << 10, 28_897),
    ):
        ideal_s = bench.ideal_step_s(size, rows, token_bytes * 512 * rows, limits)
        assert rows / ideal_s == pytest.approx(expected, rel=0.02)
    assert random_model.linear_weights("llama3-8b") == pytest.approx(7.50e9, rel=0.01)
    assert random_model.linear_weights("llama3-8b", head=False) == pytest.approx(6.98e9, rel=0.01)


def test_rows_are_as_many_as_memory_has_room_for(random_model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert random_model.rows_that_fit(256, 1 << 60) == 256, "on a CPU scripts are tried out with what is asked for"
    gib = 1 << 30
    monkeypatch.setattr(random_model, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (64 * gib, 80 * gib))
    assert random_model.rows_that_fit(256, gib // 4) == 240
    assert random_model.rows_that_fit(256, gib // 16) == 256
    assert random_model.rows_that_fit(256, 40 * gib) == 16


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("bench_decode.py", "--slots=16", "--prompt=100", "--new=20", "--quant=bnb", "--cache"),
        ("bench_decode.py", "--slots=16", "--prompt=200", "--new=70", "--kv-dtype=float8_e4m3", "--top-p=0.9"),
        ("bench_label.py", "--rows=40", "--prompt=60", "--shared=40", "--labels=token"),
        ("bench_label.py", "--rows=40", "--prompt=60", "--shared=40", "--quant=bnb"),
        ("bench_peer.py", "--batch=4", "--prompt=20", "--new=8"),
        ("bench_peer.py", "--batch=4", "--prompt=20", "--new=8", "--quant=bnb"),
    ],
    ids=str,
)
def test_the_benchmarks_run(command: tuple[str, ...]) -> None:
    script, *arguments = command
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "gpu" / script, "--size=small", *arguments],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.strip().splitlines()[-1])
    assert printed["rows_per_s" if script == "bench_label.py" else "step_ms"] > 0
