"""A device that has too little memory, or fails, ends a run with what to do; what is committed stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from echo import EchoEngine, answer_of, run_echo
from harness import parts, run_here

from pipeline.engine.engine import Output
from pipeline.models.runtime import giving_way


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    pq.write_table(pa.table({"prompt": [f"row {n}" for n in range(40)]}), tmp_path / "rows.parquet")
    where = [f"data.path={tmp_path}/rows.parquet", f"output.dir={tmp_path}/out", "data.chunk_rows=4"]
    return ["model=tiny", "task=generate", "engine.slots=8", "engine.max_len=256", *where]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "this machine is out of memory: "),
        (MemoryError(), "run the same command again (what is committed stays)"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
            "begin another output.dir with a smaller engine.slots or engine.max_len",
        ),
        (
            torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might"),
            "cpu failed (CUDA error: an illegal memory access was encountered); what is committed stays",
        ),
    ],
    ids=["device memory", "host memory", "cpu allocator", "device"],
)
def test_a_failing_device_is_one_sentence_and_the_run_goes_on_later(
    error: Exception, sentence: str, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls = 0

    def poll(self: EchoEngine) -> list[Output]:
        nonlocal polls
        polls += 1
        if polls > 5:
            raise error
        return [answer_of(self._queue.popleft()) for _ in range(min(4, len(self._queue)))]

    with monkeypatch.context() as failing:
        failing.setattr(EchoEngine, "poll", poll)
        failed = run_echo(failing, *overrides)
    assert failed.code == 1
    assert sentence in failed.err
    assert "Traceback" not in failed.err
    before = parts(tmp_path / "out")
    assert 0 < len(before) < 10
    run_echo(monkeypatch, *overrides).done()
    assert len(parts(tmp_path / "out")) == 10


def test_weights_that_find_no_memory_are_one_sentence_too(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_engine(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("pipeline.run.load_engine", load_engine)
    failed = run_here(*overrides)
    assert failed.code == 1
    assert "this machine is out of memory: " in failed.err
    assert "Traceback" not in failed.err


def test_another_error_is_no_failure_of_the_device(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def poll(self: EchoEngine) -> list[Any]:
        raise RuntimeError("a mistake in the code")

    monkeypatch.setattr(EchoEngine, "poll", poll)
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        run_echo(monkeypatch, *overrides)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_dequantized_weights_give_way_to_keys_and_values_on_a_gpu(
    device: str, checkpoint_folder: Callable[[str], Path], load_decoder: Callable[..., Any]
) -> None:
    decoder = load_decoder.__wrapped__(checkpoint_folder("llama"), torch.bfloat16, "nf4")  # type: ignore[attr-defined]
    kept = decoder.cache_dequantized(1 << 30)
    assert kept > 0
    asked = []

    def make() -> Any:
        asked.append(sum(linear.cached_bytes for _, linear in decoder.quant_linears()))
        if len(asked) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "a cache"

    if device == "cpu":
        with pytest.raises(torch.OutOfMemoryError):
            giving_way(decoder, torch.device(device), make, first=True)
        assert asked == [kept]
        return
    with pytest.raises(torch.OutOfMemoryError):
        giving_way(decoder, torch.device(device), _fail, first=False)
    assert giving_way(decoder, torch.device(device), make, first=True) == "a cache"
    assert asked == [kept, 0]
    with pytest.raises(torch.OutOfMemoryError):
        giving_way(decoder, torch.device(device), _fail, first=True)


def _fail() -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")
