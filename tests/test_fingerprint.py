"""What guards resume: every setting that can change a row is in the fingerprint, and nothing else is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from adapters import WEIGHTS, low_rank, write_adapter

from pipeline import config, fingerprint
from pipeline.engine.plan import EngineSettings
from pipeline.models.adapter import open_adapter
from pipeline.models.checkpoint import open_checkpoint
from pipeline.output.manifest import diff
from pipeline.quant.spec import QuantSettings
from pipeline.settings import (
    DataSettings,
    ModelSettings,
    OutputSettings,
    RunConfig,
    SamplingSettings,
    ShardSettings,
    TaskSettings,
)

TINY = config.PACKAGE / "assets" / "tiny"
LABELS = {"a": "a", "b": "b", "c": "c"}
RUN = RunConfig(
    model=ModelSettings(path=str(TINY)),
    quant=QuantSettings(method="bnb"),
    data=DataSettings(kind="parquet", path=("rows.parquet",)),
    task=TaskSettings(kind="label", prompt="{{ text }}", labels=LABELS),
    sampling=SamplingSettings(),
    engine=EngineSettings(),
    output=OutputSettings(dir="out"),
    shard=ShardSettings(),
    dry_run=False,
    max_error_rate=1.0,
    resolved={},
)


def run(group: str = "", **changes: Any) -> RunConfig:
    """A run with other settings in one group, or at the root."""
    return replace(RUN, **({group: replace(getattr(RUN, group), **changes)} if group else changes))


def requested(asked: RunConfig = RUN, folder: Path = TINY, tokenizer: Path | None = None) -> dict[str, Any]:
    checkpoint = open_checkpoint(str(folder))
    return fingerprint.requested(asked, checkpoint, open_checkpoint(str(tokenizer)) if tokenizer else checkpoint)


def changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys that differ once both have been through run.json."""
    lines = diff(json.loads(json.dumps(then)), json.loads(json.dumps(now)))
    return [line.split(": ", 1)[0] for line in lines]


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [
        ("model", "dtype", "float32"),
        ("model", "max_len", 512),
        ("model", "trust_remote_code", True),
        ("quant", "method", "none"),
        ("quant", "double_quant", False),
        ("quant", "kernel", "reference"),
        ("quant", "skip_modules", ("q_proj",)),
        ("data", "chunk_rows", 7),
        ("data", "limit", 7),
        ("data", "columns", ("text",)),
        ("task", "kind", "generate"),
        ("task", "prompt", "{{ text }} "),
        ("task", "system", ""),
        ("task", "chat", False),
        ("task", "chat_args", {"thinking": False}),
        ("task", "labels", {"a": "a", "b": "b"}),
        ("task", "labels", {"b": "b", "a": "a", "c": "c"}),
        ("task", "labels", {"a": "b", "b": "a", "c": "c"}),
        ("task", "labels", "column"),
        ("task", "labels", None),
        ("task", "label_eos", True),
        ("task", "label_separator", " "),
        ("task", "abstain_below", 0.5),
        ("task", "messages", "chat"),
        ("task", "too_long", "truncate_left"),
        ("task", "target", "text"),
        ("task", "prompt_logprob", True),
        ("sampling", "seed", 3),
        ("sampling", "temperature", None),
        ("sampling", "temperature", 1.0),
        ("sampling", "stop_token_ids", (3,)),
        ("sampling", "max_new_tokens", 3),
        ("sampling", "min_p", 0.1),
        ("sampling", "repetition_penalty", 1.1),
        ("sampling", "stop", ("x",)),
        ("sampling", "n", 2),
        ("sampling", "logprobs", 0),
        ("sampling", "columns", {"seed": "s"}),
        ("quant", "int8_threshold", 0.0),
        ("engine", "slots", 32),
        ("engine", "max_len", 32),
        ("engine", "prefill_tokens", 32),
        ("engine", "compile", "off"),
        ("engine", "kv_dtype", "float8_e4m3"),
        ("engine", "attention", "reference"),
        ("output", "columns", ("text",)),
    ],
)
def test_what_changes_a_row_changes_the_fingerprint(group: str, key: str, value: Any) -> None:
    keys = changed(requested(), requested(run(group, **{key: value})))
    assert keys
    assert all(k == f"{group}.{key}" or k.startswith(f"{group}.{key}.") for k in keys)


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [
        ("quant", "dequant_cache_gib", 0.0),
        ("task", "truth", "text"),
        ("shard", "count", 4),
        ("data", "path", ("/moved/rows.parquet",)),
        ("output", "dir", "elsewhere"),
        ("model", "memory_gib", 1.0),
        ("", "dry_run", True),
        ("", "max_error_rate", 0.1),
    ],
)
def test_what_changes_no_row_does_not(group: str, key: str, value: Any) -> None:
    assert changed(requested(), requested(run(group, **{key: value}))) == []


def test_a_prompt_in_a_file_is_the_same_prompt(tmp_path: Path) -> None:
    file = tmp_path / "any.jinja"
    file.write_text("Say {{ text }}")
    base = ["data.path=rows.parquet", "output.dir=out"]
    inline = config.load_config([*base, 'task.prompt="Say {{ text }}"'])
    assert requested(config.load_config([*base, f"task.prompt_file={file}"])) == requested(inline)


def test_keys_are_flat_and_values_survive_json() -> None:
    found = requested(run("task", chat_args={"a": {"b": [1, 2]}}))
    assert json.loads(json.dumps(found)) == found
    assert not any(isinstance(value, dict) and value for value in found.values())
    assert found["task.chat_args.a.b"] == [1, 2]
    assert found["task.labels"] == [["a", "a"], ["b", "b"], ["c", "c"]]


def test_credentials_are_left_out_at_any_depth() -> None:
    arguments = {
        "api_key": "hunter2",
        "secrets": {"inner": ["hunter2"]},
        "url": "https://me:hunter2@host/x?sig=hunter2",
    }
    found = requested(run("task", chat_args=arguments))
    assert "hunter2" not in json.dumps(found)
    assert found["task.chat_args.api_key"] == found["task.chat_args.secrets"] == "(redacted)"
    innocent = requested(run("task", labels={"token": "token", "key": "key"}, chat_args={"word": "spoken"}))
    assert innocent["task.labels"] == [["token", "token"], ["key", "key"]]
    assert innocent["task.chat_args.word"] == "spoken"


def test_a_prompt_behind_a_url_with_a_key_still_guards() -> None:
    prompts = [f"See https://a.org/?key=x and answer {{{{ text }}}} {end}" for end in ("briefly", "at length")]
    assert changed(*(requested(run("task", prompt=prompt)) for prompt in prompts)) == ["task.prompt"]


def test_a_moved_checkpoint_is_the_same_and_a_changed_one_is_not(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(TINY, tmp_path / "copy"))
    assert requested(folder=copy) == requested()
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert changed(requested(), requested(folder=copy)) == ["model.files.chat_template.jinja"]
    with (copy / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)
        stream.seek(-1, 2)
        stream.write(bytes([last[0] ^ 1]))
    assert set(changed(requested(), requested(folder=copy))) == {
        "model.files.chat_template.jinja",
        "model.files.model.safetensors",
    }


def test_another_tokenizer_is_part_of_it(tmp_path: Path) -> None:
    other = Path(shutil.copytree(TINY, tmp_path / "other"))
    keys = changed(requested(), requested(tokenizer=other))
    assert "tokenizer.files.tokenizer.json" in keys
    assert all(key.startswith("tokenizer") for key in keys)


def test_an_adapter_is_part_of_it(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(TINY))
    folders = [write_adapter(tmp_path / str(n), low_rank("lm_head", 256, 2048, seed=n % 2)) for n in range(3)]
    first, other, moved = (
        fingerprint.requested(RUN, checkpoint, checkpoint, open_adapter(str(folder))) for folder in folders
    )
    assert changed(requested(), first) == [f"model.adapter.{name}" for name in ("adapter_config.json", WEIGHTS)]
    assert changed(first, other) == [f"model.adapter.{WEIGHTS}"]
    assert changed(first, moved) == []


def test_versions_are_for_the_record() -> None:
    found = fingerprint.versions()
    assert set(found) == {f"versions.{name}" for name in (*fingerprint.LIBRARIES, "pipeline", "python")}
    assert not set(found) & set(requested())
