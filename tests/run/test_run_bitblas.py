"""GPTQ and BitBLAS checkpoints of the shipped model as a user runs them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from formats import GPTQ, make
from harness import TICKETS, TINY, give_tokenizer, label_args, prompt, results, run_cli, run_here, stats

pytestmark = pytest.mark.skipif(find_spec("gptqmodel") is None, reason="GPTQModel is not installed (make setup)")

ROWS = [f"data.path={TICKETS}", "data.limit=12", prompt("Topic?\n\n{{ ticket }}"), *label_args(), "model.dtype=float32"]
TOLD = {"quant_method": "gptq", "checkpoint_format": "bitblas", "bits": 4, "group_size": 32, "sym": False}
PACKED = {"bits": 4, "zeros": "quantized", "leaf": "qzeros", "code_dtype": "", "ladder": False, "told": TOLD}


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped model in GPTQ's format, with and without act-order, and dense as GPTQModel dequantizes the first."""
    root = tmp_path_factory.mktemp("gptq")
    v1 = GPTQ | {"source": str(TINY), "format": "gptq", "desc_act": True}
    v2 = GPTQ | {"source": str(TINY), "format": "gptq_v2", "desc_act": False}
    make(
        "make_gptq.py",
        v1 | {"target": str(root / "act"), "dense": str(root / "dense")},
        v2 | {"target": str(root / "plain"), "dense": str(root / "plain-dense")},
    )
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(scope="module")
def bitblas(gptq: dict[str, Path], bitblas_environment: dict[str, str]) -> Path:
    """The model without act-order in BitBLAS' format, told of in quantize_config.json."""
    folder = gptq["plain"].with_name("bitblas")
    job = PACKED | {"source": str(gptq["plain"]), "target": str(folder), "told_in": "quantize_config.json"}
    make("make_bitblas.py", job, env=bitblas_environment)
    return give_tokenizer(folder, adds_bos=False)


def args(out: Path, folder: Path, *more: str) -> list[str]:
    return [*ROWS, "model=path", f"model.path={folder}", f"output.dir={out}", *more]


def agree(first: Path, second: Path) -> None:
    ours, theirs = results(first), results(second)
    assert ours["label"].to_pylist() == theirs["label"].to_pylist()
    for a, b in zip(ours["label_logprob"].to_pylist(), theirs["label_logprob"].to_pylist(), strict=True):
        assert dict(a) == pytest.approx(dict(b), abs=1e-3)


def test_a_gptq_checkpoint_is_repacked_and_answers_as_its_dequantized_self(
    gptq: dict[str, Path], tmp_path: Path
) -> None:
    ended = run_cli(*args(tmp_path / "repacked", gptq["act"], "quant=bitblas")).done()
    assert "GPTQ 4 bits in groups of 32 (asymmetric, act-order), from the checkpoint, repacked for BitBLAS" in ended.err
    assert "kernel reference (fastest that runs on cpu; bitblas: " in ended.err
    run_here(*args(tmp_path / "dense", gptq["dense"], "quant=none")).done()
    agree(tmp_path / "repacked", tmp_path / "dense")
    (run,) = stats(tmp_path / "repacked")
    assert run["kernel"] == "reference"
    assert run["quantization"].endswith("repacked for BitBLAS")


def test_a_bitblas_checkpoint_is_read_as_it_is(bitblas: Path, gptq: dict[str, Path], tmp_path: Path) -> None:
    ended = run_here(*args(tmp_path / "bitblas", bitblas)).done()
    assert "BitBLAS 4 bits in groups of 32 (asymmetric), from the checkpoint weights" in ended.err
    run_here(*args(tmp_path / "dense", gptq["plain-dense"], "quant=none")).done()
    agree(tmp_path / "bitblas", tmp_path / "dense")


@pytest.mark.parametrize("method", ["gptq", "bnb", "none"])
def test_a_method_that_contradicts_the_checkpoint_is_refused(method: str, bitblas: Path, tmp_path: Path) -> None:
    message = run_here(*args(tmp_path / "out", bitblas, f"quant={method}")).refusal()
    assert f"quant={method} contradicts the checkpoint: model.path={bitblas} is already BitBLAS 4 bits" in message
    assert "use quant=auto or quant=bitblas" in message


def test_the_package_is_refused_without_a_gpu(gptq: dict[str, Path], tmp_path: Path) -> None:
    more = ["quant=bitblas", "quant.kernel=bitblas", "model.device=cpu"]
    message = run_here(*args(tmp_path / "out", gptq["act"], *more)).refusal()
    assert message == (
        "quant.kernel=bitblas cannot run here: the bitblas package runs on NVIDIA GPUs (cuda), not on cpu; "
        "choose quant.kernel=auto"
    )


def test_where_operators_are_kept_is_no_setting_of_the_rows(gptq: dict[str, Path], tmp_path: Path) -> None:
    run_here(*args(tmp_path / "out", gptq["act"], "quant=bitblas")).done()
    again = run_here(*args(tmp_path / "out", gptq["act"], "quant=bitblas", f"quant.tuning_cache={tmp_path}")).done()
    assert "12 rows" in again.out + again.err


def test_a_dry_run_reads_no_weights_and_names_the_kernel(gptq: dict[str, Path], tmp_path: Path) -> None:
    ended = run_here(*args(tmp_path / "out", gptq["act"], "quant=bitblas", "dry_run=true")).done()
    assert "repacked for BitBLAS" in ended.out + ended.err
