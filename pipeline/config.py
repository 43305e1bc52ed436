"""The configuration: schema, composition, validation. With `__main__` the only Hydra and OmegaConf code.

Every group's keys are declared here, so that a key that does not exist is refused; the YAML files
under conf/ choose values. `load_config` turns command-line overrides into a frozen RunConfig.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.config_schema import COMPRESSIONS, GROUP_SCHEMAS, RootSchema, ShardSchema
from pipeline.core import SamplingParams
from pipeline.engine.plan import EngineSettings
from pipeline.errors import ConfigError
from pipeline.quant.spec import KERNELS, QuantSettings
from pipeline.redaction import redacted
from pipeline.settings import (
    DataSettings,
    ModelSettings,
    OutputSettings,
    RunConfig,
    SamplingSettings,
    ShardSettings,
    TaskSettings,
)

FIXED_BY_CHOICE = ("quant.method", "data.kind", "task.kind")
MAPS = ("task.labels", "task.chat_args", "sampling.columns", "data.storage_options")
"""Keys that can hold a map, which takes the place of the one before; Hydra by itself refuses or mixes them."""
OPEN_MAPS = ("task.chat_args.", "data.storage_options.", "sampling.columns.")
"""Keys below which any name is taken."""
PACKAGE = Path(__file__).parent
DEFAULT_PROMPT = "{{ prompt }}"
TOO_LONG = ("error", "truncate_left", "truncate_right")
DTYPES = ("auto", "bfloat16", "float16", "float32")


def config_folder() -> Path:
    """conf/ inside an installed package, else beside it in a checkout."""
    return next(p for p in (PACKAGE / "conf", PACKAGE.parent / "conf") if p.is_dir())


def register_schemas() -> None:
    """Store the schemas where conf/ finds them, and the resolver of files that the package ships."""
    store = ConfigStore.instance()
    store.store(name="root_schema", node=RootSchema)
    for group, schemas in GROUP_SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=f"{group}/schema", name=name, node=schema)
    OmegaConf.register_new_resolver("asset", lambda name: str(PACKAGE / "assets" / name), replace=True)


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Compose conf/ with overrides; an empty command line is the demo. Raises ConfigError."""
    register_schemas()
    GlobalHydra.instance().clear()
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides) or ["experiment=demo"])
        lines = [line for override in parsed for line in _hydra_lines(override)]
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            config = compose("config", overrides=lines)
        OmegaConf.resolve(config)
        _refuse_added_keys(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_sentence(error, overrides)) from error
    return config


def _hydra_lines(override: Override) -> list[str]:
    """What Hydra is given for an override, after refusing what it would ignore or stumble over."""
    key, line = override.key_or_group, str(override.input_line)
    group = re.split(r"[./]", key)[0]
    if not key:
        raise ConfigError(f"{line} names no key; a setting is written key=value")
    if key in FIXED_BY_CHOICE:
        raise ConfigError(f"{key} is set by the choice of its group; use {group}=... instead")
    if group == "hydra":
        raise ConfigError(_unknown_key(key))
    if override.is_delete():
        raise ConfigError(f"{line} would delete a key, which is not possible; set {key} to a value or to null")
    if override.is_sweep_override():
        raise ConfigError(
            f"{line} has several values for {key}; a list is written {key}=[a,b], and a text with commas is quoted "
            f"twice, as in '{key}=\"a,b\"'"
        )
    if key in group_names() and not isinstance(override.value(), str):
        raise ConfigError(
            f"{line} names no choice; {key} can be {', '.join(choices(key))}, and its keys are set one by one"
        )
    if key in MAPS and isinstance(override.value(), dict):
        return [f"{key}=null", line]
    return [f"++{line.lstrip('+')}"] if key.startswith(OPEN_MAPS) else [line]


def _refuse_added_keys(config: DictConfig) -> None:
    """A key added with + passes Hydra even where the schema lacks it."""
    added = [str(key) for key in config if key != "experiment" and key not in {f.name for f in fields(RootSchema)}]
    for group, schemas in GROUP_SCHEMAS.items():
        schema = next((s for s in schemas.values() if OmegaConf.get_type(config[group]) is s), None)
        if schema is not None:
            added += [f"{group}.{key}" for key in config[group] if key not in {f.name for f in fields(schema)}]
    if added:
        raise ConfigError(_unknown_key(added[0]))


def load_config(overrides: Sequence[str]) -> RunConfig:
    """From command-line overrides to a validated RunConfig; raises ConfigError with one sentence."""
    config = compose_config(overrides)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} is required and not set; add {missing[0]}=... to the command line")
    return _build(config)


def choices(group: str) -> list[str]:
    """The choices of a group: the YAML files under conf/."""
    return sorted(p.stem for p in (config_folder() / group).glob("*.yaml"))


def group_names() -> list[str]:
    """All groups: the folders under conf/."""
    return sorted(p.name for p in config_folder().iterdir() if p.is_dir())


def schema_keys() -> dict[str, str]:
    """Every key with the line that documents it."""
    keys: dict[str, str] = {}
    for group, schemas in GROUP_SCHEMAS.items():
        for schema in schemas.values():
            keys |= _keys_of(group, schema)
    keys |= _keys_of("shard", ShardSchema)
    return keys | {f.name: f.metadata["doc"] for f in fields(RootSchema) if "doc" in f.metadata}


def _keys_of(group: str, schema: type) -> dict[str, str]:
    return {f"{group}.{f.name}": f.metadata["doc"] for f in fields(schema) if "doc" in f.metadata}


def _build(config: DictConfig) -> RunConfig:
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    values.pop("experiment", None)
    return RunConfig(
        model=_model(values["model"]),
        quant=_quant(values["quant"]),
        data=_data(values["data"]),
        task=_task(values["task"]),
        sampling=_sampling(values["sampling"]),
        engine=_engine(values["engine"]),
        output=_output(values["output"]),
        shard=_shard(values["shard"]),
        dry_run=values["dry_run"],
        max_error_rate=_between("max_error_rate", values["max_error_rate"], 0, 1),
        resolved=redacted(values),
    )


def _model(values: Mapping[str, Any]) -> ModelSettings:
    _one_of("model.dtype", values["dtype"], DTYPES)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", values["device"]):
        raise ConfigError(f"model.device must be auto, cpu, cuda or cuda:N, got {values['device']}")
    return ModelSettings(
        path=values["path"],
        revision=values["revision"],
        dtype=values["dtype"],
        tokenizer=values["tokenizer"],
        trust_remote_code=values["trust_remote_code"],
        max_len=_positive("model.max_len", values["max_len"]),
        device=values["device"],
        memory_gib=_auto_number("model.memory", values["memory"], float),
    )


def _quant(values: Mapping[str, Any]) -> QuantSettings:
    """The keys that the chosen method has; what it lacks keeps the default."""
    known: dict[str, Any] = {"method": values["method"]}
    if "kernel" in values:
        _one_of("quant.kernel", values["kernel"], KERNELS)
        cache = values["dequant_cache"]
        known["kernel"] = values["kernel"]
        known["dequant_cache_gib"] = (
            0.0 if cache in ("off", False) else _auto_number("quant.dequant_cache", cache, float, "auto, off or GiB")
        )
    if "skip_modules" in values:
        known["skip_modules"] = tuple(values["skip_modules"])
    if "int8_threshold" in values:
        known["int8_threshold"] = _between("quant.int8_threshold", values["int8_threshold"], 0, 1e4)
    return QuantSettings(**known, **{k: values[k] for k in ("double_quant",) if k in values})


def _data(values: Mapping[str, Any]) -> DataSettings:
    path = values["path"]
    paths = path if isinstance(path, list) else [path]
    if not paths or not all(isinstance(p, str) and p for p in paths):
        raise ConfigError(f"data.path must be a file, folder, glob, URL, or list of these, got {path}")
    return DataSettings(
        kind=values["kind"],
        path=tuple(paths),
        columns=_names("data.columns", values),
        limit=_positive("data.limit", values["limit"]),
        chunk_rows=_positive("data.chunk_rows", values["chunk_rows"]) or 1,
        storage_options=_map("data.storage_options", values["storage_options"]),
        name=values.get("name"),
        split=values.get("split"),
        revision=values.get("revision"),
    )


def _task(values: Mapping[str, Any]) -> TaskSettings:
    label = values["kind"] == "label"
    return TaskSettings(
        kind=values["kind"],
        prompt=_template(values),
        messages=_messages(values),
        too_long=_one_of("task.too_long", values["too_long"], TOO_LONG),
        system=values["system"],
        chat=_auto_bool("task.chat", values["chat"]),
        chat_args=_map("task.chat_args", values["chat_args"]),
        labels=_labels(values["labels"]) if label else None,
        label_separator=values["label_separator"] if label else None,
        label_eos=_auto_bool("task.label_eos", values["label_eos"]) if label else None,
        abstain_below=_between("task.abstain_below", values["abstain_below"], 0, 1) if label else 0.0,
        truth=values["truth"] if label else None,
    )


def _template(values: Mapping[str, Any]) -> str:
    """The template's text; a command line has no other way to write a new line than \\n."""
    prompt = values["prompt"]
    if values["prompt_file"] is None:
        if prompt is not None and not prompt.strip():
            raise ConfigError("task.prompt is empty; give a template, or a file that holds it as task.prompt_file")
        return DEFAULT_PROMPT if prompt is None else str(prompt).replace("\\n", "\n")
    if prompt is not None:
        raise ConfigError(
            f"task.prompt and task.prompt_file={values['prompt_file']} are both set; set one of them to null"
        )
    try:
        return Path(values["prompt_file"]).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"task.prompt_file={values['prompt_file']} cannot be read as UTF-8 text ({error})") from error


def _messages(values: Mapping[str, Any]) -> str | None:
    if values["messages"] is None:
        return None
    for key in ("prompt", "prompt_file"):
        if values[key] is not None:
            raise ConfigError(f"task.messages and task.{key} are both set; set one of them to null")
    if values["too_long"] != "error":
        raise ConfigError(
            f"task.too_long={values['too_long']} cuts the text of task.prompt; with task.messages it must be error"
        )
    return str(values["messages"])


def _labels(labels: Any) -> Mapping[str, str] | str:
    if isinstance(labels, str):
        return labels
    if not isinstance(labels, (list, dict)):
        raise ConfigError(f"task.labels must be a list of labels, a map of label to text, or a column, got {labels}")
    pairs = list(labels.items()) if isinstance(labels, dict) else [(label, label) for label in labels]
    for value in (part for pair in pairs for part in pair):
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ConfigError(
                f"task.labels must hold texts, got {value}; quote words such as true, null and (in YAML) yes and no"
            )
    named = {str(name): str(text) for name, text in pairs}
    given = len(labels)
    if len(named) < 2 or len(named) != given or len(set(named.values())) != given or not all(named.values()):
        raise ConfigError(f"task.labels must be at least two different, non-empty labels, got {labels}")
    return named


def _sampling(values: Mapping[str, Any]) -> SamplingSettings:
    settings = SamplingSettings(
        **{
            **values,
            "stop_token_ids": tuple(values["stop_token_ids"]),
            "stop": tuple(values["stop"]),
            "logprobs": _logprobs(values["logprobs"]),
            "columns": _sampling_columns(values["columns"]),
        }
    )
    fixed = {f.name: getattr(settings, f.name) for f in fields(SamplingParams)}
    try:
        SamplingParams(**{key: value for key, value in fixed.items() if value is not None})
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return settings


def _logprobs(value: Any) -> int | None:
    if value is None or value is False:
        return None
    if value is True:
        return 0
    if not isinstance(value, int):
        raise ConfigError(f"sampling.logprobs must be false, true or a count, got {value}")
    return value


def _sampling_columns(columns: Any) -> Mapping[str, str]:
    known = [f.name for f in fields(SamplingParams)]
    if not isinstance(columns, dict) or not all(isinstance(column, str) for column in columns.values()):
        raise ConfigError(f"sampling.columns must be a map of parameter to column, got {columns}")
    unknown = [name for name in columns if name not in known]
    if unknown:
        raise ConfigError(f"sampling.columns names {unknown[0]}, which is no parameter; there are {', '.join(known)}")
    return columns


def _engine(values: Mapping[str, Any]) -> EngineSettings:
    return EngineSettings(
        slots=_positive("engine.slots", _auto_number("engine.slots", values["slots"], int)),
        max_len=_positive("engine.max_len", values["max_len"]),
        prefill_tokens=_positive(
            "engine.prefill_tokens", _auto_number("engine.prefill_tokens", values["prefill_tokens"], int)
        ),
    )


def _output(values: Mapping[str, Any]) -> OutputSettings:
    if not values["dir"].strip():
        raise ConfigError("output.dir is empty; name the folder of the results")
    return OutputSettings(
        dir=values["dir"],
        columns=_names("output.columns", values),
        compression=_one_of("output.compression", values["compression"], COMPRESSIONS),
        row_group_rows=_positive("output.row_group_rows", values["row_group_rows"]),
    )


def _shard(values: Mapping[str, Any]) -> ShardSettings:
    shard = ShardSettings(**values)
    if not 0 <= shard.index < shard.count:
        raise ConfigError(
            f"shard.index must be from 0 to shard.count - 1, got shard.index={shard.index} shard.count={shard.count}"
        )
    return shard


def _names(key: str, values: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = values["columns"]
    if names is None:
        return None
    if len(set(names)) != len(names):
        raise ConfigError(f"{key} names a column twice: {', '.join(names)}; name each once")
    return tuple(names)


def _positive(key: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise ConfigError(f"{key} must be at least 1, got {value}")
    return value


def _between(key: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise ConfigError(f"{key} must be between {low} and {high}, got {value}")
    return value


def _one_of(key: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ConfigError(f"{key} must be one of {', '.join(allowed)}, got {value}")
    return value


def _auto_number(key: str, value: Any, kind: Callable[[Any], Any], allowed: str = "auto or a number above 0") -> Any:
    if value in ("auto", None):
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf or kind(value) != value:
        raise ConfigError(f"{key} must be {allowed}, got {value}")
    return kind(value)


def _map(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{key} must be a map, as in '{key}={{name: value}}', got {value}")
    return value


def _auto_bool(key: str, value: Any) -> bool | None:
    if value in ("auto", None):
        return None
    if not isinstance(value, bool):
        raise ConfigError(f"{key} must be auto, true or false, got {value}")
    return value


def _sentence(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's and OmegaConf's messages as one sentence with key, value and remedy."""
    text, cause = str(error), str(error.__cause__ or "")
    if "nterpolation" in text:
        named = next((override for override in overrides if "${" in override), "the configuration")
        return f"{named} refers to what is not there ({_first_line(text)}); write \\${{ for the characters themselves"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be parsed ({_first_line(cause or text)}); quote a value with braces, commas or "
            "spaces twice, as in 'task.prompt=\"Label {{ text }}\"', or use task.prompt_file"
        )
    match = re.search(r"Could not find '([^'/]+)/([^']+)'", text)
    if match:
        return f"{match[1]}={match[2]} is no choice; {match[1]} can be {', '.join(choices(match[1]))}"
    match = re.search(r"An item is already at '([^']+)'", text)
    if match:
        return f"{match[1]} is a key already; write {match[1]}=... without the +"
    match = re.search(r"full_key: (\S+)", f"{text}\n{cause}")
    unknown = re.search(r"Key '[^']*' (?:is )?not in ", text + cause)
    if match and not unknown:
        return f"{match[1]}: {_first_line(cause or text)}"
    match = re.search(r"Could not override '?([\w.@/-]+)'?", text)
    return _unknown_key(match[1]) if match else _first_line(text)


def _unknown_key(key: str) -> str:
    """The sentence for a key that the chosen configuration does not have."""
    group = key.split(".")[0]
    owners = [n for n, schema in GROUP_SCHEMAS.get(group, {}).items() if key in _keys_of(group, schema)]
    if owners:
        return f"{key} is no key of the chosen {group}; it belongs to {' and '.join(f'{group}={n}' for n in owners)}"
    return f"{key} is no key of the configuration{_suggestion(key)}"


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].rstrip(".") if text.strip() else "the configuration cannot be composed"


def _suggestion(key: str) -> str:
    known = list(schema_keys()) if "." in key else [*group_names(), *(k for k in schema_keys() if "." not in k)]
    near = difflib.get_close_matches(key, known, n=2, cutoff=0.7)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    group = key.split(".")[0]
    inside = [k.split(".", 1)[1] for k in schema_keys() if k.startswith(f"{group}.")]
    return f"; {group} has {', '.join(inside)}" if inside else "; python -m pipeline --help lists the keys"
