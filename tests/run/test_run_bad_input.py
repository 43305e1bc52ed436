"""Bad input: exit 2 with one sentence where nothing can run, an error row where one row is bad."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import (
    Ended,
    environment,
    holding,
    nothing_left_over,
    parts,
    prompt,
    results,
    rows,
    run_cli,
    run_here,
    run_json,
    stats,
    write,
)

SECONDS = 8
"""A refusal takes 1 to 2 s of an idle machine."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "in.parquet", {"prompt": ["one", "two", "three"], "n": [0, 1, 2]})


@pytest.fixture
def attempt(small_model: Path, data: Path, tmp_path: Path) -> Callable[..., Ended]:
    """Run three good rows with the small model, changed by overrides."""

    def run(*more: str, here: bool = True, **env: str | None) -> Ended:
        base = ["model=path", f"model.path={small_model}", f"data.path={data}", f"output.dir={tmp_path / 'out'}"]
        base += ["quant=none", "sampling.max_new_tokens=3", *more]
        ended = run_here(*base) if here else run_cli(*base, env=environment(**env))
        assert ended.code == 0 or not parts(tmp_path / "out") or ended.code == 3
        return ended

    return run


REFUSED = {
    "unknown column": ([prompt("{{ promt }}")], ["task.prompt", "promt", "prompt, n"]),
    "syntax": ([prompt("{{ prompt }")], ["task.prompt", "line 1"]),
    "unknown filter": ([prompt("{{ prompt | nosuch }}")], ["task.prompt", "nosuch"]),
    "empty template": (["task.prompt=''"], ["task.prompt"]),
    "template file": (["task.prompt_file=/nosuch.jinja"], ["task.prompt_file", "/nosuch.jinja"]),
    "unknown key": (["sampling.temprature=1"], ["sampling.temprature", "did you mean sampling.temperature"]),
    "added key": (["+sampling.nosuch=1"], ["sampling.nosuch"]),
    "unknown group": (["modle=tiny"], ["modle", "model"]),
    "unknown choice": (["model=nosuch"], ["model=nosuch", "tiny"]),
    "key of another choice": (["quant.double_quant=false"], ["quant.double_quant", "quant=bnb"]),
    "wrong type": (["sampling.max_new_tokens=many"], ["sampling.max_new_tokens", "many"]),
    "out of range": (["sampling.top_p=0"], ["sampling.top_p", "0"]),
    "negative": (["data.chunk_rows=0"], ["data.chunk_rows", "0"]),
    "not a device": (["model.device=tpu"], ["model.device", "tpu"]),
    "no such device": (["model.device=cuda:7"], ["model.device", "cuda:7"]),
    "shard": (["shard.index=2", "shard.count=2"], ["shard.index", "2"]),
    "no equals sign": (["nonsense"], ["nonsense"]),
    "two paths in one": (["data.path=a.parquet,b.parquet"], ["data.path"]),
    "unquoted template": (["task.prompt={{ prompt }}"], ["quote"]),
    "missing file": (["data.path=/nosuch/in.parquet"], ["data.path", "/nosuch/in.parquet"]),
    "missing model": (["model.path=/nosuch/model"], ["model.path", "/nosuch/model"]),
    "columns": (["output.columns=[nosuch]"], ["output.columns", "nosuch"]),
    "column named twice": (["output.columns=[n,n]"], ["output.columns"]),
    "read columns": (["data.columns=[nosuch]"], ["data.columns", "nosuch"]),
    "labels missing": (["task=label"], ["task.labels"]),
    "one label": (["task=label", "task.labels=[a]"], ["task.labels"]),
    "labels of no column": (["task=label", "task.labels=nosuch"], ["task.labels", "nosuch"]),
    "truth of no column": (["task=label", "task.labels=[a,b]", "task.truth=nosuch"], ["task.truth", "nosuch"]),
    "chat without template": (["task.chat=maybe"], ["task.chat", "maybe"]),
    "too many positions": (["engine.max_len=1000"], ["engine.max_len=1000", "512"]),
    "no memory": (["model.memory=0.001"], ["0.00 GiB", "model.memory"]),
    "slots without memory": (["engine.slots=100000", "model.memory=4"], ["engine.slots=100000", "GiB"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_refused_in_one_sentence(case: str, attempt: Callable[..., Ended], tmp_path: Path) -> None:
    overrides, named = REFUSED[case]
    message = attempt(*overrides).refusal()
    for word in named:
        assert word in message
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_refusal_is_quick_and_one_line_in_a_real_process(attempt: Callable[..., Ended]) -> None:
    for overrides in (["data.path=/nosuch/in.parquet"], ["nosuch.key=1"]):
        ended = attempt(*overrides, here=False, PYTHONPROFILEIMPORTTIME=None)
        ended.refusal()
        assert ended.seconds < SECONDS


def test_a_hub_model_without_a_network_is_one_sentence(data: Path, tmp_path: Path) -> None:
    """Both where the user says offline and where the network is just not there."""
    nowhere = {"HF_HUB_OFFLINE": None, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    for changes in ({"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}, nowhere):
        command = ["model=llama7b", "quant=bnb", f"data.path={data}", f"output.dir={tmp_path / 'out'}"]
        ended = run_cli(*command, env=environment(**changes))
        message = ended.refusal()
        assert "huggyllama/llama-7b" in message and "model.path" in message
        assert ended.seconds < 3 * SECONDS


def test_an_unwritable_output_is_refused(attempt: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where the folder should be")
    message = attempt().refusal()
    assert "output.dir" in message and str(tmp_path / "out") in message
    below = tmp_path / "out" / "below"
    assert "output.dir" in attempt(f"output.dir={below}").refusal()


def test_a_model_larger_than_its_memory_names_both_sizes(attempt: Callable[..., Ended]) -> None:
    message = attempt("model.memory=0.001").refusal()
    assert message.count("GiB") >= 3


def test_an_empty_folder_and_a_broken_file_are_refused(attempt: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "matches no Parquet file" in attempt(f"data.path={tmp_path / 'empty'}").refusal()
    good = (write(tmp_path / "good.parquet", {"prompt": ["x"] * 100})).read_bytes()
    for name, content in {"cut": good[: len(good) // 2], "zero": b"", "text": b"prompt\nhello\n" * 9}.items():
        (tmp_path / f"{name}.parquet").write_bytes(content)
        message = attempt(f"data.path={tmp_path / name}.parquet").refusal()
        assert f"{name}.parquet" in message and "data.path" in message


def test_pages_that_cannot_be_read_are_refused(attempt: Callable[..., Ended], tmp_path: Path) -> None:
    """The footer is whole, the data is not: no row can be told from another, so nothing is made up."""
    broken = write(tmp_path / "broken.parquet", {"prompt": [f"text {i}" for i in range(2000)]}, compression="zstd")
    content = bytearray(broken.read_bytes())
    content[100:400] = b"\xff" * 300
    broken.write_bytes(content)
    ended = attempt(f"data.path={broken}")
    assert ended.code == 2, ended
    assert f"error: data.path {broken}: row group 0, column prompt, cannot be read (" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err
    assert not parts(tmp_path / "out")


def test_an_input_column_named_like_an_output_column(attempt: Callable[..., Ended], tmp_path: Path) -> None:
    named = write(tmp_path / "named.parquet", {"prompt": ["x"], "completion": ["y"], "error": [1], "extra": [2.5]})
    message = attempt(f"data.path={named}").refusal()
    assert "completion" in message and "output.columns" in message and "[prompt, extra]" in message
    attempt(f"data.path={named}", "output.columns=[prompt, extra]", prompt("{{ prompt }} {{ completion }}")).done()
    (row,) = rows(tmp_path / "out")
    assert list(row)[:3] == ["prompt", "extra", "row_id"]
    assert row["completion"] is not None and row["error"] is None


def test_pickled_or_missing_weights_are_refused(
    attempt: Callable[..., Ended], small_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    (model / "model.safetensors").unlink()
    assert "safetensors" in attempt(f"model.path={model}").refusal()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    message = attempt(f"model.path={model}").refusal()
    assert "pytorch_model.bin" in message and "never loaded" in message
    (model / "model.safetensors").write_bytes((small_model / "model.safetensors").read_bytes()[:5000])
    assert "model.safetensors" in attempt(f"model.path={model}").refusal()


def test_an_unsupported_or_broken_checkpoint_is_refused(
    attempt: Callable[..., Ended], small_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    config = json.loads((model / "config.json").read_text())
    for content, word in (
        (json.dumps({**config, "model_type": "gpt2"}), "gpt2"),
        (json.dumps({**config, "model_type": "nosuch"}), "nosuch"),
        ("{", "config.json"),
        (json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}), "gptq"),
    ):
        (model / "config.json").write_text(content)
        assert word in attempt(f"model.path={model}").refusal()
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer.json").write_text("{}")
    assert "tokenizer" in attempt(f"model.path={model}").refusal()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink()
    assert "tokenizer" in attempt(f"model.path={model}").refusal()


@pytest.mark.parametrize("interrupted", [False, True])
def test_no_rows_give_one_part_with_the_schema(
    interrupted: bool, attempt: Callable[..., Ended], tmp_path: Path
) -> None:
    schema = pa.schema([("prompt", pa.string()), ("n", pa.int64())])
    empty = write(tmp_path / "empty.parquet", schema.empty_table())
    ended = attempt(f"data.path={empty}").done()
    if interrupted:  # as if killed between run.json and the Part
        parts(tmp_path / "out")[0].unlink()
        ended = attempt(f"data.path={empty}").done()
    assert "(0 rows" in ended.out
    (part,) = parts(tmp_path / "out")
    assert pq.read_metadata(part).num_rows == 0
    assert pq.read_schema(part).names[:3] == ["prompt", "n", "row_id"]
    assert nothing_left_over(tmp_path / "out")
    assert run_json(tmp_path / "out")["summary"]["rows"] == 0
    attempt(f"data.path={empty}").done()


def invalid_utf8(values: list[bytes | None]) -> pa.Array:
    """A string column whose bytes nobody checked."""
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), binary.buffers(), binary.null_count)


def test_bad_rows_become_error_rows_and_cost_the_others_nothing(
    small_model: Path, attempt: Callable[..., Ended], tmp_path: Path
) -> None:
    texts = [b"good 0", None, b"", b"bad \xff\xfe utf8", b"word " * 600, b"divide", b"good 6", b"good 7"]
    dividers = [1, 1, 1, 1, 1, 0, 1, 1]
    data = write(tmp_path / "bad.parquet", {"prompt": invalid_utf8(texts), "n": dividers})
    template = prompt("{{ prompt }}{{ '' if 1 / n else '' }}")
    common = ["task.chat=false", template, "data.chunk_rows=5"]
    ended = attempt(f"data.path={data}", *common).done()
    assert "(8 rows, 4 of them errors" in ended.out
    table = results(tmp_path / "out")
    kinds = table["finish_reason"].to_pylist()
    errors = table["error"].to_pylist()
    assert [place for place, kind in enumerate(kinds) if kind == "error"] == [1, 3, 4, 5]
    assert [place for place, error in enumerate(errors) if error is not None] == [1, 3, 4, 5]
    for place, word in {1: "null", 3: "UTF-8", 4: "tokens", 5: "division by zero"}.items():
        assert word in errors[place]
    bad = table.filter(pa.array([kind == "error" for kind in kinds]))
    assert bad["completion"].null_count == bad["cumulative_logprob"].null_count == 4
    assert table["prompt"].cast(pa.binary()).to_pylist() == [None if b"\xff" in (t or b"") else t for t in texts]
    assert r"bad \xff\xfe utf8" in errors[3], "the raw input is kept"
    good = write(tmp_path / "good.parquet", {"prompt": ["good 0", "", "good 6", "good 7"], "n": [1] * 4})
    run_here(
        "model=path", f"model.path={small_model}", f"data.path={good}", f"output.dir={tmp_path / 'good'}",
        "quant=none", "sampling.max_new_tokens=3", *common,
    ).done()  # fmt: skip
    alone = results(tmp_path / "good")
    for name in ("completion", "cumulative_logprob", "prompt_tokens", "finish_reason"):
        assert alone[name].to_pylist() == table.take([0, 2, 6, 7])[name].to_pylist()
    again = attempt(f"data.path={data}", *common, "max_error_rate=0.1")
    assert again.code == 3
    assert "max_error_rate=0.1" in again.err and "4 of 8" in again.err
    assert attempt(f"data.path={data}", *common, "max_error_rate=0.5").code == 0


def test_too_long_is_measured_in_tokens_to_the_last_one(attempt: Callable[..., Ended], tmp_path: Path) -> None:
    """512 positions: 511 prompt tokens leave room for one, 512 for none."""
    data = write(tmp_path / "long.parquet", {"prompt": ["a" + " a" * (n - 2) for n in (510, 511, 512)]})
    attempt(f"data.path={data}", "task.chat=false").done()
    found = rows(tmp_path / "out")
    assert [row["prompt_tokens"] for row in found] == [510, 511, 512]
    assert [row["finish_reason"] == "error" for row in found] == [False, False, True]
    assert found[0]["completion_tokens"] <= 2 and found[1]["completion_tokens"] <= 1
    assert "512" in found[2]["error"]


def test_categories_with_a_text_that_is_no_utf8_cost_its_rows_alone(
    attempt: Callable[..., Ended], tmp_path: Path
) -> None:
    """As pandas writes them: a dictionary with indices of 8 bits."""
    words = invalid_utf8([b"login", b"bad \xff word", b"billing"])
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 2, 1, 0], pa.int8()), words)
    data = write(tmp_path / "categories.parquet", {"prompt": ["x"] * 6, "kind": column})
    attempt(f"data.path={data}", prompt("{{ prompt }} {{ kind if kind is not none }}"), "data.chunk_rows=4").done()
    table = results(tmp_path / "out")
    assert table["kind"].to_pylist() == ["login", None, None, "billing", None, "login"]
    errors = table["error"].to_pylist()
    assert [row for row, error in enumerate(errors) if error is not None] == [1, 4]
    assert (
        errors[1]
        == r"categories.parquet: the value of kind cannot be read (text that is not valid UTF-8); it is: bad \xff word"
    )


class Odd:
    """Columns that no template should print, and values that Python cannot hold."""

    BYTES = pa.array([b"x", b"y"], pa.binary())
    LIST = pa.array([["x"], ["y"]], pa.list_(pa.string()))
    STRUCT = pa.array([{"a": 1}, {"a": 2}])
    NULL = pa.array([None, None], pa.null())
    FAR_DATE = pa.array([0, 100_000_000], pa.int32()).cast(pa.date32())
    FAR_TIME = pa.array([0, 2**62], pa.int64()).cast(pa.timestamp("us"))
    NOWHERE = pa.array([0, 1], pa.int64()).cast(pa.timestamp("us", tz="Nowhere/Land"))


@pytest.mark.parametrize("kind", [name for name in vars(Odd) if name.isupper()])
def test_columns_that_are_no_text(kind: str, attempt: Callable[..., Ended], tmp_path: Path) -> None:
    column: Any = getattr(Odd, kind)
    data = write(tmp_path / "odd.parquet", {"prompt": ["one", "two"], "odd": column})
    attempt(f"data.path={data}", prompt("{{ odd }}")).done()
    found = results(tmp_path / "out")
    assert found["finish_reason"].to_pylist() == ["error", "error"]
    assert found["odd"].type == column.type
    assert found["odd"].combine_chunks().equals(column), "the raw input is kept"
    attempt(f"data.path={data}", f"output.dir={tmp_path / 'unused'}").done()
    assert "error" not in results(tmp_path / "unused")["finish_reason"].to_pylist()


def test_one_value_that_python_cannot_hold_costs_one_row(attempt: Callable[..., Ended], tmp_path: Path) -> None:
    data = write(tmp_path / "dates.parquet", {"prompt": ["one", "two"], "odd": Odd.FAR_DATE})
    attempt(f"data.path={data}", prompt("{{ odd.year }}")).done()
    assert [error is None for error in results(tmp_path / "out")["error"].to_pylist()] == [True, False]


def test_columns_named_like_jinjas_own_globals(attempt: Callable[..., Ended], tmp_path: Path) -> None:
    data = write(tmp_path / "names.parquet", {"range": ["one", "two"], "dict": ["three", "four"], "row": ["r", "s"]})
    attempt(f"data.path={data}", prompt("{{ range }} {{ dict }} {{ row }}")).done()
    assert results(tmp_path / "out")["error"].to_pylist() == [None, None]


def test_text_that_cannot_be_encoded_is_an_error_row(attempt: Callable[..., Ended], tmp_path: Path) -> None:
    data = write(tmp_path / "n.parquet", {"n": [0, 1, 0]})
    attempt(f"data.path={data}", prompt('{{ "\\ud800" if n else "fine" }}')).done()
    assert [error is None for error in results(tmp_path / "out")["error"].to_pylist()] == [True, False, True]


@pytest.mark.parametrize(
    "template",
    [
        "{{ prompt | trim }}",
        "{{ prompt ~ '!' }}",
        "{{ 'Say ' + prompt }}",
    ],
)
def test_a_null_that_passes_a_filter_is_still_null(
    template: str, attempt: Callable[..., Ended], tmp_path: Path
) -> None:
    data = write(tmp_path / "null.parquet", {"prompt": ["one", None]})
    attempt(f"data.path={data}", prompt(template)).done()
    errors = results(tmp_path / "out")["error"].to_pylist()
    assert [error is None for error in errors] == [True, False], "a prompt with the text None"


def test_a_template_may_ask_whether_a_value_is_null(attempt: Callable[..., Ended], tmp_path: Path) -> None:
    data = write(tmp_path / "null.parquet", {"prompt": ["one", None]})
    attempt(f"data.path={data}", prompt("{{ 'nothing' if prompt is none else prompt }}")).done()
    assert results(tmp_path / "out")["error"].to_pylist() == [None, None]


def test_rows_whose_logits_are_not_finite_are_error_rows(
    attempt: Callable[..., Ended], small_model: Path, tmp_path: Path
) -> None:
    """A checkpoint with one broken embedding: only the rows with that token fail."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    (token,) = AutoTokenizer.from_pretrained(model)("login", add_special_tokens=False).input_ids
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    data = write(tmp_path / "poison.parquet", {"prompt": ["a b", "login a", "login", "c d e"] * 5})
    common = [f"data.path={data}", "task.chat=false"]
    attempt(*common, f"output.dir={tmp_path / 'well'}").done()
    attempt(*common, f"model.path={model}").done()
    for well, found in zip(rows(tmp_path / "well"), rows(tmp_path / "out"), strict=True):
        if "login" in well["prompt"]:
            assert (found["finish_reason"], found["completion"]) == ("error", None)
            assert "not finite" in found["error"]
        else:
            assert found == well


def test_no_input_column_needs_to_be_kept(attempt: Callable[..., Ended], tmp_path: Path) -> None:
    attempt("output.columns=[]").done()
    assert results(tmp_path / "out").column_names[0] == "row_id"


URL = "https://me:hunter2@host/x?partNumber=1&X-Amz-Signature=hunter2&se=3"


@pytest.mark.parametrize(
    "overrides",
    [
        ["task.chat_args={api_key: hunter2}"],
        ["task.chat_args={secrets: {inner: [hunter2, {deeper: hunter2}]}, passwords: [hunter2]}"],
        [f"task.chat_args={{url: '{URL}', urls: ['{URL}'], nested: {{more: '{URL}'}}}}"],
        [prompt("{{ prompt }}{# " + URL + " #}")],
        [f"task.system='{URL}'"],
    ],
    ids=["key", "nested", "urls", "comment", "system"],
)
def test_secrets_stay_out_of_the_output_folder(
    overrides: list[str], attempt: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = attempt(*overrides).done()
    assert not holding(tmp_path / "out", "hunter2")
    assert "hunter2" not in ended.out + ended.err
    assert holding(tmp_path / "out", "(redacted)") == [
        "plan.json",
        "report.html",
        "run.json",
        stats_file(tmp_path / "out"),
    ]
    assert json.loads(stats(tmp_path / "out")[0]["config"])["task"]["kind"] == "generate"
    attempt(*overrides).done()
    shown = attempt(*overrides, f"output.dir={tmp_path / 'never'}", "dry_run=true").done()
    assert "hunter2" not in shown.out + shown.err
    assert json.loads(shown.out)["rows"] == 3


def stats_file(out: Path) -> str:
    (path,) = (out / "stats").glob("run-*.parquet")
    return str(path.relative_to(out))


@pytest.mark.parametrize("key", ["data.path", "model.path", "model.tokenizer"])
def test_secrets_stay_out_of_refusals(key: str, attempt: Callable[..., Ended]) -> None:
    """`file://` and unknown places: nothing is fetched, the sentence names what was asked for."""
    place = URL.replace("https", "nosuch")
    ended = attempt(f"{key}='{place}'")
    assert "hunter2" not in ended.refusal()
    assert key.split(".")[0] in ended.err
