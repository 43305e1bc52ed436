"""Configuration as code: every file under conf/ composes, every key does something, every mistake is one sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from pipeline import __version__, config
from pipeline.config_schema import GROUP_SCHEMAS, MISSING, RootSchema, ShardSchema
from pipeline.errors import ConfigError
from pipeline.settings import RunConfig

CONF = config.config_folder()
CHOICES = [
    (folder.name, file.stem) for folder in sorted(CONF.iterdir()) if folder.is_dir() for file in folder.glob("*.yaml")
]
REQUIRED = {
    "data.path": "rows.parquet",
    "output.dir": "out",
    "model.path": "some/model",
    "task.labels": "[yes,no]",
}
LABEL = ("task=label", "task.labels=[a,b]")
BNB = ("quant=bnb",)


@cache
def load(*overrides: str) -> RunConfig:
    """A valid configuration with these overrides."""
    return config.load_config(["data.path=rows.parquet", "output.dir=out", *overrides])


def schema_of(group: str, choice: str) -> type:
    """The schema that a file of conf/ names in its defaults."""
    defaults = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text())["defaults"]
    name = next(re.fullmatch(r"schema/([\w-]+)@_here_", entry)[1] for entry in defaults if entry.startswith("schema/"))
    return GROUP_SCHEMAS[group][name]


def documented(schema: type) -> dict[str, Any]:
    return {field.name: field for field in dataclasses.fields(schema) if "doc" in field.metadata}


# --- what composes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_resolves_and_validates(group: str, choice: str) -> None:
    if group == "experiment":
        config.load_config([f"experiment={choice}"])
        return
    given = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text())
    required = {name for name, field in documented(schema_of(group, choice)).items() if field.default is MISSING}
    missing = {f"{group}.{name}" for name in required - set(given)}
    settings = {"data.path": "rows.parquet", "output.dir": "out"} | {key: REQUIRED[key] for key in missing}
    resolved = config.load_config([f"{group}={choice}", *(f"{k}={v}" for k, v in settings.items())]).resolved
    assert set(resolved[group]) == {field.name for field in dataclasses.fields(schema_of(group, choice))}
    assert "${" not in json.dumps(resolved), "an interpolation was left"


def test_folders_of_conf_are_the_groups_of_the_schema() -> None:
    assert set(config.group_names()) == {*GROUP_SCHEMAS, "experiment"}
    used = {(group, schema_of(group, choice)) for group, choice in CHOICES if group != "experiment"}
    unused = {
        (group, schema)
        for group, schemas in GROUP_SCHEMAS.items()
        for schema in schemas.values()
        if (group, schema) not in used
    }
    assert not unused, "a schema that no file of conf/ chooses"


@pytest.mark.parametrize(
    ("choice", "path"),
    [
        ("llama7b", "huggyllama/llama-7b"),
        ("llama2-7b", "meta-llama/Llama-2-7b-chat-hf"),
        ("llama3-8b", "meta-llama/Meta-Llama-3-8B-Instruct"),
        ("qwen3-8b", "Qwen/Qwen3-8B"),
        ("mistral7b", "mistralai/Mistral-7B-Instruct-v0.3"),
        ("tinyllama-bnb-4bit", "unsloth/tinyllama-bnb-4bit"),
        ("llama13b-gptq", "hxbgsyxh/llama-13b-4bit-g-1"),
        ("llama13b-bitblas", "hxbgsyxh/llama-13b-4bit-g-1-bitblas"),
    ],
)
def test_presets_name_the_models_of_the_contract(choice: str, path: str) -> None:
    assert load(f"model={choice}").model.path == path


def test_group_defaults_of_the_contract() -> None:
    found = load()
    assert Path(found.model.path) == config.PACKAGE / "assets" / "tiny"
    assert found.quant.method == "auto"
    assert found.data.kind == "parquet"
    assert found.task.kind == "generate"
    assert found.task.prompt == "{{ prompt }}"
    assert found.sampling.temperature == 0.0
    assert found.engine.slots is None
    assert (found.shard.index, found.shard.count) == (0, 1)
    assert not found.dry_run
    assert found.max_error_rate == 1.0
    assert not found.model.trust_remote_code


def test_an_empty_command_line_is_the_demo() -> None:
    empty, demo = config.load_config([]), config.load_config(["experiment=demo"])
    assert empty == demo
    assert empty.quant.method == "bnb"
    assert empty.task.kind == "label"
    assert Path(empty.model.path).is_dir()
    assert all(Path(path).is_file() for path in empty.data.path)


def test_the_command_line_wins_over_an_experiment() -> None:
    found = config.load_config(["task.labels=[x,y]", "experiment=demo", "data.chunk_rows=7", "quant=none"])
    assert found.data.chunk_rows == 7
    assert found.quant.method == "none"
    assert found.task.labels == {"x": "x", "y": "y"}


# --- every key ---------------------------------------------------------------------------------------------------

SAMPLES = {
    "model.dtype": "float32",
    "model.hash_weights": "true",
    "model.device": "cuda:1",
    "model.memory": "1.5",
    "quant.kernel": "reference",
    "quant.double_quant": "false",
    "quant.dequant_cache": "0.5",
    "data.path": "[a.parquet,b.parquet]",
    "data.storage_options": "{anon: true}",
    "task.prompt_file": str(config.PACKAGE / "assets" / "tickets" / "topic.jinja"),
    "task.chat": "false",
    "task.chat_args": "{enable_thinking: false}",
    "task.too_long": "truncate_left",
    "sampling.logprobs": "2",
    "sampling.columns": "{seed: seed_column}",
    "task.labels": "{a: first, b: second}",
    "task.label_eos": "true",
    "engine.slots": "3",
    "engine.share_prefix": "64",
    "engine.dedup": "false",
    "engine.prefill_tokens": "3",
    "engine.compile": "graphs",
    "engine.kv_dtype": "float8_e4m3",
    "engine.attention": "reference",
    "output.on_change": "new",
    "output.compression": "snappy",
    "output.storage_options": "{anon: true}",
    "shard.index": "1",
    "launcher.gpus": "2",
    "launcher.address": "head:6379",
    "retry": "failed",
}
"""A value other than the default, for the keys where the type alone does not give one."""
BY_TYPE = {"bool": "true", "int": "3", "float": "0.5", "str": "word", "list[int]": "[3]", "list[str]": "[a,b]"}
SCHEMAS = [(group, schema) for group, schemas in GROUP_SCHEMAS.items() for schema in schemas.values()]
SCHEMAS += [("shard", ShardSchema), ("", RootSchema)]
KEYS = {
    (f"{group}.{name}" if group else name): (group, schema, field)
    for group, schema in SCHEMAS
    for name, field in documented(schema).items()
}


@pytest.mark.parametrize("key", KEYS)
def test_every_key_can_be_set_and_does_something(key: str) -> None:
    group, schema, field = KEYS[key]
    choice = next((f"{g}={c}" for g, c in CHOICES if g == group and schema_of(g, c) is schema), None)
    kind = str(field.type).removesuffix(" | None")
    sample = SAMPLES.get(key) or BY_TYPE.get(kind)
    assert sample is not None, f"add a value of {key} to SAMPLES"
    base = [choice] if choice else []
    base += ["task.labels=[yes,no]"] if choice == "task=label" else []
    base += ["shard.count=2"] if key == "shard.index" else []
    base += ["model.adapter=some/adapter"] if key == "model.adapter_revision" else []
    before, after = load(*base), load(*base, f"{key}={sample}")
    unchanged = dataclasses.replace(after, resolved=before.resolved)
    assert unchanged != before, f"{key}={sample} is accepted and ignored"
    assert OmegaConf.select(OmegaConf.create(dict(after.resolved)), key) == yaml.safe_load(sample)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_help_shows_every_choice_and_key(group: str, choice: str, help_text: str) -> None:
    assert re.search(rf"^  {group} .*\b{re.escape(choice)}\b", help_text, re.MULTILINE)
    if group != "experiment":
        for name, field in documented(schema_of(group, choice)).items():
            assert re.search(rf"^  {group}\.{name} +{re.escape(field.metadata['doc'])}$", help_text, re.MULTILINE)


def test_help_shows_the_keys_outside_of_groups(help_text: str) -> None:
    assert set(re.findall(r"^  (?!\d)([\w.]+) +\S", help_text, re.MULTILINE)) >= set(config.schema_keys())
    assert {"shard.index", "shard.count", "dry_run", "max_error_rate"} <= set(config.schema_keys())


@pytest.fixture(scope="module")
def help_text() -> str:
    from pipeline.__main__ import help_text

    return help_text()


# --- values ------------------------------------------------------------------------------------------------------


def test_maps_replace_maps_and_grow_key_by_key() -> None:
    first, second = "{a: x, b: y}", "{c: z, d: w}"
    assert load("task=label", f"task.labels={first}", f"task.labels={second}").task.labels == {"c": "z", "d": "w"}
    assert load("task.chat_args={a: 1}", "task.chat_args={b: 2}").task.chat_args == {"b": 2}
    assert load("task.chat_args.a=1", "+task.chat_args.b=x").task.chat_args == {"a": 1, "b": "x"}
    columns = "sampling.columns={seed: s, n: c}"
    assert load(columns).sampling.columns == {"seed": "s", "n": "c"}
    assert load(columns, "sampling.columns={top_k: k}").sampling.columns == {"top_k": "k"}
    assert load("sampling.columns.seed=s", "+sampling.columns.n=c").sampling.columns == {"seed": "s", "n": "c"}


@pytest.mark.parametrize("group", ["data", "output"])
@pytest.mark.parametrize(
    "value", ["={secret: hidden", "={'secret': hidden}", "=a,hidden", ".secret=${nothing.hidden}", ".secret=[hidden"]
)
def test_a_mistake_in_storage_options_does_not_tell_credentials(group: str, value: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(f"{group}.storage_options{value}")
    assert f"{group}.storage_options" in str(error.value)
    assert str(error.value).count("hidden") == value.count("nothing.hidden"), "a name of a key is no secret"


def test_labels_keep_their_order_and_become_text() -> None:
    assert list(load("task=label", "task.labels=[10,9,2.5]").task.labels) == ["10", "9", "2.5"]
    assert list(load("task=label", "task.labels=[z,a,m]").task.labels) == ["z", "a", "m"]
    assert load("task=label", "task.labels=column").task.labels == "column"


def test_a_prompt_file_is_the_template(tmp_path: Path) -> None:
    file = tmp_path / "prompt.jinja"
    file.write_text("Grüße {{ text }} ${not_an_interpolation}\n", encoding="utf-8")
    assert load(f"task.prompt_file={file}").task.prompt == file.read_text(encoding="utf-8")
    assert load("task.prompt_file=null").task.prompt == "{{ prompt }}"


def test_auto_and_off() -> None:
    assert load("engine.slots=auto", "model.memory=auto").engine.slots is None
    assert load(*BNB, "quant.dequant_cache=auto").quant.dequant_cache_gib is None
    assert load(*BNB, "quant.dequant_cache=off").quant.dequant_cache_gib == 0.0
    assert load(*BNB, "quant.dequant_cache=0").quant.dequant_cache_gib == 0.0
    sampling = load("sampling=default").sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (None, None, None)


# --- mistakes ----------------------------------------------------------------------------------------------------

MISTAKES = [
    # unknown names
    (("modle=tiny",), r"modle is no key .* did you mean model\?"),
    (("+nope=1",), r"nope is no key"),
    (("model.nope=1",), r"model\.nope is no key"),
    (("+model.nope=1",), r"model\.nope is no key"),
    (("+task.foo.bar=1",), r"task\.foo is no key"),
    (("sampling.temprature=1",), r"did you mean sampling\.temperature\?"),
    (("model=nope",), r"model=nope is no choice; model can be .*tiny"),
    (("hydra.run.dir=x",), r"hydra\.run\.dir is no key"),
    (("hydra/job_logging=none",), r"hydra/job_logging is no key"),
    (("model@other=tiny",), r"model@other is no key"),
    # keys of another choice
    (("quant=none", "quant.kernel=reference"), r"quant\.kernel is no key of the chosen quant; .* quant=auto"),
    (("quant=none", "+quant.kernel=reference"), r"quant\.kernel is no key of the chosen quant"),
    (("quant.double_quant=false",), r"quant\.double_quant is no key of the chosen quant; it belongs to quant=bnb"),
    ((*BNB, "quant.int8_threshold=0"), r"quant\.int8_threshold is no key .*; it belongs to quant=bnb-int8"),
    (("quant=bnb-int8", "quant.double_quant=true"), r"quant\.double_quant is no key of the chosen quant"),
    (("+quant.kernel=reference",), r"quant\.kernel is a key already; .* quant\.kernel=\.\.\."),
    (("task.labels=[a,b]",), r"task\.labels is no key of the chosen task; it belongs to task=label"),
    (("task.target=text",), r"task\.target is no key of the chosen task; it belongs to task=score"),
    (("task=score", "task.prompt_logprob=maybe"), r"task\.prompt_logprob"),
    # what a choice fixes, and groups that are no choice
    (("quant.method=bnb",), r"quant\.method is set by the choice .* quant=\.\.\."),
    (("data.kind=jsonl",), r"data\.kind is set by the choice"),
    (("quant={method: bnb}",), r"quant=.* names no choice; quant can be"),
    (("model=null",), r"model=null names no choice"),
    (("quant=3",), r"quant=3 names no choice"),
    # deletions
    (("~model",), r"~model would delete"),
    (("~shard",), r"~shard would delete"),
    (("~model.path",), r"~model\.path would delete"),
    # types
    (("model.max_len=abc",), r"model\.max_len: .*'abc'.*Integer"),
    (("model.max_len=1.5",), r"model\.max_len: .*1\.5.*Integer"),
    (("sampling.temperature=hot",), r"sampling\.temperature: .*hot.*Float"),
    (("dry_run=maybe",), r"dry_run: .*maybe.*bool"),
    (("sampling.stop_token_ids=[a]",), r"sampling\.stop_token_ids"),
    (("model.path=null",), r"model\.path: "),
    (("shard=3",), r"shard: "),
    (("task.chat=maybe",), r"task\.chat must be auto, true or false, got maybe"),
    (("task.chat_args=3",), r"task\.chat_args must be a map"),
    (("data.path=3",), r"data\.path must be a file.*got 3"),
    (("data.path=",), r"data\.path must be a file"),
    (("output.dir=",), r"output\.dir is empty"),
    ((*LABEL, "task.label_eos=maybe"), r"task\.label_eos must be auto, true or false"),
    # ranges
    (("model.max_len=0",), r"model\.max_len must be at least 1, got 0"),
    (("model.memory=-1",), r"model\.memory must be auto or a number above 0, got -1"),
    (("model.memory=inf",), r"model\.memory must be .* got inf"),
    (("model.dtype=float64",), r"model\.dtype must be one of auto.*got float64"),
    (("model.device=tpu",), r"model\.device must be auto, cpu, cuda or cuda:N, got tpu"),
    (("engine.slots=0",), r"engine\.slots must be .* got 0"),
    (("engine.slots=1.5",), r"engine\.slots must be .* got 1\.5"),
    (("engine.slots=inf",), r"engine\.slots must be .* got inf"),
    (("engine.slots=nan",), r"engine\.slots must be .* got nan"),
    (("engine.compile=maybe",), r"engine\.compile must be one of auto, graphs, off, got maybe"),
    (("engine.compile=true",), r"engine\.compile must be one of auto, graphs, off, got True"),
    (("engine.kv_dtype=int8",), r"engine\.kv_dtype must be one of auto, float8_e4m3, got int8"),
    (("engine.attention=flash",), r"engine\.attention must be one of auto, numba, reference, slotwise, triton, got"),
    (("data.limit=0",), r"data\.limit must be at least 1"),
    (("data.columns=[a,a]",), r"data\.columns names a column twice: a, a"),
    (("sampling.max_new_tokens=0",), r"sampling\.max_new_tokens must be at least 1, got 0"),
    (("sampling.temperature=-1",), r"sampling\.temperature must be .* got -1"),
    (("sampling.top_p=0",), r"sampling\.top_p must be .* got 0"),
    (("sampling.seed=18446744073709551616",), r"sampling\.seed must be .* got 18446744073709551616"),
    (("shard.index=2",), r"shard\.index must be from 0 .* shard\.index=2 shard\.count=1"),
    (("max_error_rate=1.1",), r"max_error_rate must be between 0 and 1, got 1\.1"),
    (("output.journal_s=-1",), r"output\.journal_s must be 0 or more, got -1"),
    (("retry=all",), r"retry must be one of failed, got all"),
    ((*LABEL, "task.abstain_below=2"), r"task\.abstain_below must be between 0 and 1, got 2"),
    ((*BNB, "quant.kernel=nope"), r"quant\.kernel must be one of .*got nope"),
    ((*BNB, "quant.dequant_cache=-1"), r"quant\.dequant_cache must be auto, off or GiB, got -1"),
    # labels
    (("task=label",), r"task\.labels is required and not set; add task\.labels=\.\.\."),
    (("task=label", "task.labels=[a]"), r"task\.labels must be at least two .* got \['a'\]"),
    (("task=label", "task.labels={a: x, b: x}"), r"task\.labels must be at least two different"),
    (("task=label", "task.labels=['No', b, 'no']"), r"task\.labels has No, no, which differ by case alone"),
    (("task=label", "task.labels=[a,'']"), r"task\.labels must be at least two .*non-empty"),
    (("task=label", "task.labels=null"), r"task\.labels must be a list .* got None"),
    (("task=label", "task.labels=[true,false]"), r"task\.labels must hold texts, got True; quote"),
    (("task=label", "task.labels=[a,null]"), r"task\.labels must hold texts, got None"),
    (("task=label", "task.labels=[[a],b]"), r"task\.labels must hold texts"),
    # missing, both, unreadable
    (("model=path",), r"model\.path is required and not set; add model\.path="),
    (("task.prompt=a", "task.prompt_file=b"), r"task\.prompt and task\.prompt_file=b are both set"),
    (("experiment=demo", "task.prompt=a"), r"task\.prompt and task\.prompt_file="),
    (("task.prompt='  '",), r"task\.prompt is empty"),
    (("task.prompt_file=/nonexistent/x",), r"task\.prompt_file=/nonexistent/x cannot be read"),
    # messages, lengths, sampling
    (("task.messages=chat", "task.prompt=a"), r"task\.messages and task\.prompt are both set"),
    (("task.messages=chat", f"task.prompt_file={SAMPLES['task.prompt_file']}"), r"task\.prompt_file are both set"),
    (("task.messages=chat", "task.too_long=truncate_left"), r"task\.too_long=truncate_left .* task\.messages .* error"),
    (("task.too_long=cut",), r"task\.too_long must be one of error, truncate_left, truncate_right, got cut"),
    (("sampling.n=0",), r"sampling\.n must be at least 1, got 0"),
    (("sampling.logprobs=21",), r"sampling\.logprobs must be false, true or a count from 0 to 20, got 21"),
    (("sampling.logprobs=-1",), r"sampling\.logprobs must be false, true or a count from 0 to 20, got -1"),
    (("sampling.logprobs=many",), r"sampling\.logprobs must be false, true or a count, got many"),
    (("sampling.logprobs=1.5",), r"sampling\.logprobs must be false, true or a count, got 1\.5"),
    (("sampling.min_p=2",), r"sampling\.min_p must be .* got 2"),
    (("sampling.repetition_penalty=0",), r"sampling\.repetition_penalty must be .* got 0"),
    (("sampling.stop=['']",), r"sampling\.stop must be texts"),
    (("sampling.stop_token_ids=[-1]",), r"sampling\.stop_token_ids must be 0 or more"),
    (("sampling.columns={heat: t}",), r"sampling\.columns names heat, which is no parameter; there are .*temperature"),
    (("sampling.columns={seed: 3}",), r"sampling\.columns must be a map of parameter to column"),
    (("sampling.columns=seed",), r"sampling\.columns must be a map of parameter to column"),
    (("quant=bnb-int8", "quant.int8_threshold=-1"), r"quant\.int8_threshold must be between 0 and .* got -1"),
    # quoting
    (("task.prompt={{ text }}",), r"task\.prompt=.* cannot be parsed .*quote .*task\.prompt_file"),
    (("output.dir=a=b",), r"output\.dir=a=b cannot be parsed"),
    (("model.path=a,b",), r"model\.path=a,b has several values .*quoted"),
    (("sampling.seed=range(1,3)",), r"sampling\.seed=range\(1,3\) has several values"),
    (('task.prompt="${foo}"',), r"task\.prompt=.* refers to what is not there .*foo"),
    (("data.path=${oc.env:PIPELINE_TEST_UNSET}",), r"data\.path=.*PIPELINE_TEST_UNSET"),
    (("dry_run",), r"dry_run cannot be parsed"),
    (("=3",), r"=3 names no key"),
    (("--multirun",), r"--multirun cannot be parsed"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "sentence"), MISTAKES, ids=[" ".join(o) for o, _ in MISTAKES])
def test_a_mistake_is_one_sentence_that_names_the_key(overrides: tuple[str, ...], sentence: str) -> None:
    demo = overrides[0] == "experiment=demo"
    with pytest.raises(ConfigError, match=sentence) as caught:
        config.load_config(list(overrides)) if demo else load(*overrides)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    assert not text.endswith(".")


@pytest.mark.parametrize("key", ["data.path", "output.dir"])
def test_what_every_run_needs(key: str) -> None:
    given = [f"{k}=x" for k in ("data.path", "output.dir") if k != key]
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)} is required and not set; add {re.escape(key)}=\.\.\."):
        config.load_config(given)


def test_a_new_line_on_the_command_line() -> None:
    assert load("task.prompt='a\\nb {{ prompt }}'").task.prompt == "a\nb {{ prompt }}"


def test_the_home_folder_of_a_prompt_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.jinja").write_text("Say {{ text }}")
    assert load("task.prompt_file='~/p.jinja'").task.prompt == "Say {{ text }}"


def test_a_prompt_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "latin1.jinja"
    file.write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"task\.prompt_file=.*latin1\.jinja cannot be read as UTF-8"):
        load(f"task.prompt_file={file}")


# --- credentials -------------------------------------------------------------------------------------------------


SECRET_KEYS = (
    "token", "hf_token", "api_key", "apikey", "password", "passwd", "client_secret", "aws_secret_access_key", "key",
    "account_key", "sas", "connection_string", "credentials", "accessToken", "session_token", "private_key",
)  # fmt: skip


@pytest.mark.parametrize("value", ["hunter2", "4242424242", "{inner: hunter2}", "[hunter2, {inner: 4242424242}]"])
def test_credentials_are_not_recorded(value: str) -> None:
    found = load(f"task.chat_args={{{', '.join(f'{key}: {value}' for key in SECRET_KEYS)}, word: spoken}}")
    assert found.resolved["task"]["chat_args"] == {**dict.fromkeys(SECRET_KEYS, "(redacted)"), "word": "spoken"}
    assert "(redacted)" not in str(found.task.chat_args), "the run itself keeps the values"


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:hunter2@bucket/rows.parquet", "https://hunter2@host/x", "https://me:hun@hunter2@host/x?y=1",
        "hdfs://me:hunter2@host:9000/x@y",
    ],
)  # fmt: skip
def test_credentials_in_paths_are_not_recorded(url: str) -> None:
    found = load(f"data.path=['{url}',rows.parquet]", f"output.dir='{url}'", f"model.path='{url}'")
    assert "hunter2" not in json.dumps(found.resolved)
    assert "://(redacted)@" in found.resolved["data"]["path"][0]
    assert found.data.path == (url, "rows.parquet")


def test_innocent_keys_are_recorded() -> None:
    settings = ("engine.prefill_tokens=512", "sampling.stop_token_ids=[7,8]", "sampling.max_new_tokens=9",
                "model.tokenizer=other", "task.prompt='mail me@example.com at http://host/a@b'")  # fmt: skip
    record = load(*settings, "data.path=s3://bucket/a@b").resolved
    assert record["engine"]["prefill_tokens"] == 512
    assert record["sampling"]["stop_token_ids"] == [7, 8]
    assert record["sampling"]["max_new_tokens"] == 9
    assert record["model"]["tokenizer"] == "other"
    assert record["task"]["prompt"] == "mail me@example.com at http://host/a@b"
    assert record["data"]["path"] == "s3://bucket/a@b"
    assert "(redacted)" not in json.dumps(config.load_config([]).resolved)
    assert json.loads(json.dumps(record)) == record


# --- cheap answers -----------------------------------------------------------------------------------------------


def answer(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """The process's answer, and the least processor time of up to three tries: others may use the machine."""
    least = float("inf")
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-m", "pipeline", *arguments], capture_output=True, text=True)
        after = os.times()
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        least = min(least, spent)
        if least < 2:
            break
    return done, least


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        (["--help"], 0, "usage: python -m pipeline", ""),
        (["--version"], 0, __version__, ""),
        (["modle=tiny"], 2, "", "error: modle is no key"),
        (["data.path=/nonexistent/x.parquet", "output.dir=/tmp/never"], 2, "", "/nonexistent/x.parquet"),
    ],
    ids=["help", "version", "unknown-key", "no-such-file"],
)
def test_cheap_answers_are_fast(arguments: list[str], code: int, out: str, err: str) -> None:
    done, least = answer(*arguments)
    assert done.returncode == code, done.stderr
    assert out in done.stdout
    assert bool(done.stdout) == (code == 0)
    assert err in done.stderr
    assert "Traceback" not in done.stderr
    assert least < 2


def test_composition_imports_no_torch() -> None:
    script = (
        "import sys; from pipeline.config import load_config; load_config([]);"
        "print([m for m in ('torch', 'transformers', 'pyarrow', 'bitsandbytes', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
