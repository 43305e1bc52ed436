"""Quantized checkpoints and methods as a user names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import TICKETS, TINY, give_tokenizer, label_args, prompt, results, run_cli, run_here, run_json, stats

LIMIT = 12
ROWS = [f"data.path={TICKETS}", f"data.limit={LIMIT}", prompt("Topic?\n\n{{ ticket }}"), *label_args()]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The shipped model as transformers and bitsandbytes save it quantized, by bits."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from pipeline.kernels.bnb import bitsandbytes

    bitsandbytes()
    configs = {
        4: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        8: BitsAndBytesConfig(load_in_8bit=True),
    }  # fmt: skip

    def save(bits: int) -> Path:
        folder = tmp_path_factory.mktemp("quantized") / f"{bits}bit"
        model = AutoModelForCausalLM.from_pretrained(
            TINY, dtype=torch.bfloat16, quantization_config=configs[bits], device_map="cpu"
        )
        model.save_pretrained(folder)
        return give_tokenizer(folder, adds_bos=False)

    return {bits: save(bits) for bits in configs}


def args(out: Path, *more: str) -> list[str]:
    return [*ROWS, f"output.dir={out}", *more]


def test_a_checkpoint_quantized_before_gives_what_quantizing_in_flight_gives(quantized: Any, tmp_path: Path) -> None:
    run_here(*args(tmp_path / "flight", "quant=bnb")).done()
    more = ["model=path", f"model.path={quantized[4]}", "quant=auto"]
    ended = run_cli(*args(tmp_path / "stored", *more)).done()
    assert "NF4 double-quantized, from the checkpoint" in ended.err
    stored, flight = results(tmp_path / "stored"), results(tmp_path / "flight")
    assert stored.schema.equals(flight.schema)
    assert stored["label"].to_pylist() == flight["label"].to_pylist()
    for a, b in zip(stored["label_logprob"].to_pylist(), flight["label_logprob"].to_pylist(), strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    (run,) = stats(tmp_path / "stored")
    assert "from the checkpoint" in run["quantization"]
    assert run["quantized_bytes"] == stats(tmp_path / "flight")[0]["quantized_bytes"] > 0
    assert run_here(*args(tmp_path / "stored", *more[:2], "quant=bnb")).code == 2, "another setting, another run"
    run_here(*args(tmp_path / "named", *more[:2], "quant=bnb")).done()


@pytest.mark.parametrize(("bits", "method"), [(4, "bnb-int8"), (4, "bnb-fp4"), (4, "none"), (8, "bnb"), (8, "none")])
def test_a_method_that_contradicts_the_checkpoint_is_refused(
    bits: int, method: str, quantized: Any, tmp_path: Path
) -> None:
    more = ["model=path", f"model.path={quantized[bits]}", f"quant={method}"]
    message = run_here(*args(tmp_path / "out", *more)).refusal()
    assert f"quant={method} contradicts the checkpoint" in message
    assert str(quantized[bits]) in message and "quant=auto" in message
    assert not (tmp_path / "out" / "run.json").exists()


WARNING = "a row's result can depend on the rows computed with it"


@pytest.mark.parametrize(
    ("overrides", "invariant"),
    [
        (["quant=bnb-int8"], False),
        (["quant=bnb-int8", "quant.int8_threshold=0"], True),
        (["quant=bnb"], True),
        (["quant=none"], True),
    ],
    ids=["int8", "int8 without outliers", "nf4", "none"],
)
def test_the_run_says_whether_rows_are_independent(overrides: list[str], invariant: bool, tmp_path: Path) -> None:
    ended = run_here(*args(tmp_path / "out", *overrides, "data.chunk_rows=4")).done()
    assert run_json(tmp_path / "out")["informational"]["batch_invariant"] is invariant
    assert ended.err.count(WARNING) == (0 if invariant else 1)
    assert not any("batch_invariant" in key for key in run_json(tmp_path / "out")["fingerprint"])
    assert WARNING not in run_here(*args(tmp_path / "out", *overrides, "data.chunk_rows=4")).done().err, "all done"


def test_an_8_bit_checkpoint_says_so_too(quantized: Any, tmp_path: Path) -> None:
    ended = run_here(*args(tmp_path / "out", "model=path", f"model.path={quantized[8]}")).done()
    assert run_json(tmp_path / "out")["informational"]["batch_invariant"] is False
    assert ended.err.count(WARNING) == 1
    run_here(*args(tmp_path / "flight", "quant=bnb-int8")).done()
    stored, flight = results(tmp_path / "out"), results(tmp_path / "flight")
    assert stored["label"].to_pylist() == flight["label"].to_pylist()
