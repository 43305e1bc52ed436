"""What resume refuses: anything that would change a row's output. The results stay as they were."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from harness import disk_state, label_args, parts, prompt, results, run_here, run_json, write


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "in.parquet", {"prompt": ["a", "b", "c", "d"], "text": list("wxyz")})


@pytest.fixture(scope="module")
def generated(small_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run and its command."""
    out = tmp_path_factory.mktemp("generated") / "out"
    command = [
        "model=path", f"model.path={small_model}", f"data.path={data}", f"output.dir={out}", "quant=none",
        "data.chunk_rows=2", "sampling.max_new_tokens=4",
    ]  # fmt: skip
    run_here(*command).done()
    return out, command


CHANGES = {
    "prompt": ([prompt("{{ text }}")], "task.prompt", '"{{ prompt }}"', '"{{ text }}"'),
    "system": (["task.system=Hello"], "task.system", "null", '"Hello"'),
    "chat": (["task.chat=false"], "task.chat", "null", "false"),
    "temperature": (["sampling.temperature=0.5"], "sampling.temperature", "0.0", "0.5"),
    "seed": (["sampling.seed=1"], "sampling.seed", "0", "1"),
    "max_new_tokens": (["sampling.max_new_tokens=5"], "sampling.max_new_tokens", "4", "5"),
    "stop": (["sampling.stop_token_ids=[7]"], "sampling.stop_token_ids", "[]", "[7]"),
    "quant": (["quant=bnb"], "quant.method", '"none"', '"bnb"'),
    "dtype": (["model.dtype=bfloat16"], "model.dtype", '"auto"', '"bfloat16"'),
    "chunk_rows": (["data.chunk_rows=3"], "data.chunk_rows", "2", "3"),
    "limit": (["data.limit=3"], "data.limit", "null", "3"),
    "slots": (["engine.slots=16"], "engine.slots", "null", "16"),
    "columns": (["output.columns=[text]"], "output.columns", "null", '["text"]'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_is_refused_with_then_and_now(change: str, generated: tuple[Path, list[str]]) -> None:
    out, command = generated
    more, key, then, now = CHANGES[change]
    before = disk_state(out)
    message = run_here(*command, *more).refusal()
    assert f"{key}: {then} -> {now}" in message
    assert str(out) in message
    assert disk_state(out) == before


def test_another_task_is_refused(generated: tuple[Path, list[str]]) -> None:
    out, command = generated
    before = disk_state(out)
    message = run_here(*command, *label_args()).refusal()
    assert 'task.kind: "generate" -> "label"' in message
    assert disk_state(out) == before


def test_other_weights_in_the_same_shapes_are_refused(
    generated: tuple[Path, list[str]], other_small_model: Path
) -> None:
    out, command = generated
    before = disk_state(out)
    message = run_here(*command, f"model.path={other_small_model}").refusal()
    assert re.search(r"model\.files\.model\.safetensors: \S+ -> \S+", message)
    assert "config.json" not in message, "only the weights differ"
    assert disk_state(out) == before


def test_what_does_not_change_a_row_is_not_refused(generated: tuple[Path, list[str]]) -> None:
    _, command = generated
    run_here(*command, "shard.index=1", "shard.count=4", "max_error_rate=0.5", "model.memory=4").done()


@pytest.fixture(scope="module")
def labelled(small_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("labelled") / "out"
    command = ["model=path", f"model.path={small_model}", f"data.path={data}", f"output.dir={out}"]
    run_here(*command, *label_args(["yes", "no"])).done()
    return out, command


@pytest.mark.parametrize(
    "labels", [["yes", "no", "maybe"], ["yes", "never"], {"yes": "yes indeed", "no": "no"}, ["no", "yes"]], ids=str
)
def test_changed_labels_are_refused(labels: list[str] | dict[str, str], labelled: tuple[Path, list[str]]) -> None:
    """Their order too: it is the order in label_probs, and decides ties."""
    out, command = labelled
    before = disk_state(out)
    message = run_here(*command, *label_args(labels)).refusal()
    assert "task.labels" in message and "->" in message
    assert disk_state(out) == before


def test_a_changed_tokenizer_is_refused(generated: tuple[Path, list[str]], small_model: Path, tmp_path: Path) -> None:
    import shutil

    out, command = generated
    changed = tmp_path / "model"
    shutil.copytree(small_model, changed)
    config = json.loads((changed / "tokenizer_config.json").read_text())
    (changed / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "right"}))
    message = run_here(*command, f"model.path={changed}").refusal()
    assert "model.files.tokenizer_config.json" in message
    assert parts(out)


def test_results_with_a_torn_or_without_a_run_json_are_refused(small_model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["model=path", f"model.path={small_model}", f"data.path={data}", f"output.dir={out}"]
    command.append("sampling.max_new_tokens=2")
    run_here(*command).done()
    text = (out / "run.json").read_text()
    (out / "run.json").write_text(text[:100])
    assert "run.json" in run_here(*command).refusal()
    (out / "run.json").unlink()
    message = run_here(*command, "sampling.seed=1").refusal()
    assert "run.json" in message and str(out) in message, "nobody knows what these results are"
    (out / "run.json").write_text(text)
    assert results(out).num_rows == 4
    assert run_json(out)["summary"]["rows"] == 4
