"""A row's output depends on the row and the settings alone: not on neighbours, order, chunks, slots or threads."""

from __future__ import annotations

import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from formats import GPTQ, make
from harness import TINY, environment, label_args, parts, prompt, results, run_cli, run_here, write

SAMPLED = ["sampling.temperature=1.2", "sampling.top_k=100", "sampling.seed=3"]
SHOWN = ["sampling.logprobs=3"]
KINDS = {
    "greedy": ["sampling.max_new_tokens=12"],
    "sampled": ["sampling.max_new_tokens=12", *SAMPLED],
    "label": label_args({"a": "billing", "b": "the shop", "c": "the shopping list", "d": "crash of it"}),
    "target": ["task=score", "task.target=prompt", prompt("Key {{ key }}:"), *SHOWN, "task.prompt_logprob=true"],
    "prompt": ["task=score", "task.chat=false", "model.dtype=float32"],
}
DEPENDS_ON_PLACE = {"row_id"}


@pytest.fixture(scope="module")
def permuted(varied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in another order, some of them twice, in other row groups and two files."""
    table = pq.read_table(varied)
    order = list(range(len(table))) + list(range(0, len(table), 3))
    random.Random(1).shuffle(order)
    folder = tmp_path_factory.mktemp("permuted") / "in"
    write(folder / "b.parquet", table.take(order[:31]), row_group_size=7)
    write(folder / "a.parquet", table.take(order[31:]))
    return folder


def by_key(out: Path) -> dict[int, Any]:
    """Each key's output columns; rows with the same key must agree."""
    table = results(out)
    found: dict[int, Any] = {}
    for row in table.drop_columns([c for c in table.column_names if c in DEPENDS_ON_PLACE]).to_pylist():
        assert row["error"] is None
        assert found.setdefault(row["key"], row) == row, "equal rows, other bits"
    return found


@pytest.fixture(scope="session")
def gptq_model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as GPTQModel packs it."""
    root = tmp_path_factory.mktemp("gptq")
    job = GPTQ | {"source": str(small_model), "format": "gptq", "desc_act": True}
    make("make_gptq.py", job | {"target": str(root / "small"), "dense": str(root / "dense")})
    return root / "small"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quant", ["none", "bnb"])
def test_bits_do_not_depend_on_place(
    kind: str, quant: str, small_model: Path, varied: Path, permuted: Path, tmp_path: Path
) -> None:
    model = TINY if kind == "label" else small_model
    check_bits(
        [f"model.path={model}", f"quant={quant}", "model.dtype=bfloat16", *KINDS[kind]], varied, permuted, tmp_path
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", ["int8", "gptq"])
def test_bits_of_other_modes(
    quant: str, dtype: str, kind: str, small_model: Path, varied: Path, permuted: Path, tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if quant == "gptq" and find_spec("gptqmodel") is None:
        pytest.skip("GPTQModel is not installed (make setup)")
    mode = {
        "int8": lambda: [f"model.path={small_model}", "quant=bnb-int8", "quant.int8_threshold=0"],
        "gptq": lambda: [f"model.path={request.getfixturevalue('gptq_model')}"],
    }[quant]()
    check_bits([*mode, f"model.dtype={dtype}", *KINDS[kind]], varied, permuted, tmp_path)


def check_bits(settings: list[str], varied: Path, permuted: Path, tmp_path: Path) -> None:
    """The same rows in other company, order, chunks, slots, and after some were lost, have the same bits."""
    args = ["model=path", *settings]
    variants: dict[str, list[str]] = {
        "one chunk": [f"data.path={varied}"],
        "permuted, small chunks": [f"data.path={permuted}", "data.chunk_rows=9"],
        "sixteen slots": [f"data.path={varied}", "engine.slots=16", "data.chunk_rows=25"],
        "alone": [f"data.path={permuted}", "data.chunk_rows=1", "data.limit=3"],
        "from the middle": [f"data.path={varied}", "data.chunk_rows=9", "shard.index=1", "shard.count=2"],
    }
    answers = {}
    for name, more in variants.items():
        out = tmp_path / name.replace(" ", "-").replace(",", "")
        run_here(*args, *more, f"output.dir={out}").done()
        answers[name] = by_key(out)
    expected = answers.pop("one chunk")
    assert len(expected) == 60
    for name, found in answers.items():
        assert found == {key: expected[key] for key in found}, name
        assert len(found) == (3 if name == "alone" else 60)
    for part in parts(tmp_path / "from-the-middle")[1::3]:
        part.unlink()
    run_here(*args, *variants["from the middle"], f"output.dir={tmp_path / 'from-the-middle'}").done()
    assert by_key(tmp_path / "from-the-middle") == expected, "some chunks done again, in other company"


@pytest.mark.slow
def test_bits_do_not_depend_on_the_number_of_threads(small_model: Path, varied: Path, tmp_path: Path) -> None:
    """Two processes, one with two threads: also that a process of its own equals a run in this one."""
    args = ["model=path", f"model.path={small_model}", "quant=none", f"data.path={varied}", *KINDS["sampled"]]
    run_here(*args, f"output.dir={tmp_path / 'here'}").done()
    run_cli(*args, f"output.dir={tmp_path / 'two'}", env=environment(OMP_NUM_THREADS="2")).done()
    assert results(tmp_path / "two").equals(results(tmp_path / "here"))
