"""Composed values to frozen settings: every check of a value's range, with the sentence that refuses it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config_schema import COMPRESSIONS, RETRIES
from pipeline.core import SamplingParams
from pipeline.engine.plan import ATTENTION, COMPILE, KV_DTYPES, LEAST_SHARED, EngineSettings
from pipeline.errors import ConfigError
from pipeline.launch.place import Place
from pipeline.quant.gptq_spec import BITS
from pipeline.quant.spec import KERNELS, QuantSettings
from pipeline.redaction import redacted
from pipeline.settings import (
    DataSettings,
    LocalSettings,
    ModelConfig,
    ModelSettings,
    OutputSettings,
    RaySettings,
    RunConfig,
    SamplingSettings,
    ShardSettings,
    SlurmSettings,
    TaskSettings,
)

T = TypeVar("T")
DEFAULT_PROMPT = "{{ prompt }}"
TOO_LONG = ("error", "truncate_left", "truncate_right")
ON_CHANGE = ("refuse", "new")
DTYPES = ("auto", "bfloat16", "float16", "float32")


def settings_from(values: Mapping[str, Any], place: Place) -> RunConfig:
    """The whole run's settings; raises ConfigError with key, value and remedy on the first that is out of range."""
    shard = _shard(values["shard"], place)
    return RunConfig(
        model=_model(values["model"]),
        quant=_quant(values["quant"]),
        data=_data(values["data"]),
        task=_task(values["task"]),
        sampling=_sampling(values["sampling"]),
        engine=_engine(values["engine"]),
        output=_output(values["output"]),
        shard=shard,
        dry_run=values["dry_run"],
        retry=_one_of("retry", values["retry"], RETRIES),
        max_error_rate=_between("max_error_rate", values["max_error_rate"], 0, 1),
        resolved=redacted({**values, "shard": asdict(shard)}),
        launcher=_launcher(values["launcher"]),
        place=place,
    )


def model_config_from(values: Mapping[str, Any]) -> ModelConfig:
    """The settings of a command beside the run; groups that `values` lacks are None."""
    return ModelConfig(
        model=_model(values["model"]),
        quant=_quant(values["quant"]),
        output=_output(values["output"]) if "output" in values else None,
        data=_data(values["data"]) if "data" in values else None,
        task=_task(values["task"]) if "task" in values else None,
    )


def _model(values: Mapping[str, Any]) -> ModelSettings:
    _one_of("model.dtype", values["dtype"], DTYPES)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", values["device"]):
        raise ConfigError(f"model.device must be auto, cpu, cuda or cuda:N, got {values['device']}")
    if values["adapter_revision"] is not None and values["adapter"] is None:
        raise ConfigError(f"model.adapter_revision={values['adapter_revision']} is set without model.adapter; set both")
    return ModelSettings(
        path=values["path"],
        revision=values["revision"],
        dtype=values["dtype"],
        tokenizer=values["tokenizer"],
        trust_remote_code=values["trust_remote_code"],
        hash_weights=values["hash_weights"],
        max_len=_positive("model.max_len", values["max_len"]),
        device=values["device"],
        adapter=values["adapter"],
        adapter_revision=values["adapter_revision"],
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
    if values.get("tuning_cache") is not None:
        known["tuning_cache"] = Path(values["tuning_cache"]).expanduser()
    if "skip_modules" in values:
        known["skip_modules"] = tuple(values["skip_modules"])
    if "int8_threshold" in values:
        known["int8_threshold"] = _between("quant.int8_threshold", values["int8_threshold"], 0, 1e4)
    if "bits" in values:
        _one_of("quant.bits", values["bits"], (None, *BITS))
        if values["group_size"] is not None and values["group_size"] != -1:
            _positive("quant.group_size", values["group_size"])
    plain = ("double_quant", "bits", "group_size", "symmetric", "act_order")
    return QuantSettings(**known, **{key: values[key] for key in plain if key in values})


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
    label, score = (values["kind"] == kind for kind in ("label", "score"))
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
        target=values["target"] if score else None,
        prompt_logprob=values["prompt_logprob"] if score else False,
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
    alike = sorted(name for name in named if sum(other.casefold() == name.casefold() for other in named) > 1)
    if alike:  # they become fields of a struct, and label_probs['no'] gives DuckDB the first of No and no
        raise ConfigError(
            f"task.labels has {', '.join(alike)}, which differ by case alone, so that DuckDB takes one for the other "
            "in label_probs; give them other names: {no: 'no', upper_no: 'No'}"
        )
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
        share_prefix=_share_prefix(values["share_prefix"]),
        dedup=values["dedup"],
        compile=_one_of("engine.compile", "off" if values["compile"] is False else values["compile"], COMPILE),
        kv_dtype=_one_of("engine.kv_dtype", values["kv_dtype"], KV_DTYPES),
        attention=_one_of("engine.attention", values["attention"], ATTENTION),
    )


def _share_prefix(value: Any) -> int | None:
    """None: nothing is shared; 0: the template's beginning; else also every so many tokens."""
    if isinstance(value, bool):
        return 0 if value else None
    if not isinstance(value, int) or value < LEAST_SHARED:
        raise ConfigError(
            f"engine.share_prefix must be true, false or a number of tokens from {LEAST_SHARED} on, got {value}"
        )
    return value


def _output(values: Mapping[str, Any]) -> OutputSettings:
    if not values["dir"].strip():
        raise ConfigError("output.dir is empty; name the folder of the results")
    return OutputSettings(
        dir=values["dir"],
        columns=_names("output.columns", values),
        on_change=_one_of("output.on_change", values["on_change"], ON_CHANGE),
        compression=_one_of("output.compression", values["compression"], COMPRESSIONS),
        row_group_rows=_positive("output.row_group_rows", values["row_group_rows"]),
        journal_s=_not_negative("output.journal_s", values),
        storage_options=_map("output.storage_options", values["storage_options"]),
    )


def _shard(values: Mapping[str, Any], place: Place) -> ShardSettings:
    """The shard asked for, else the place that Slurm gave this process."""
    index, count = values["index"], values["count"]
    if index is None:
        index = place.shard_index if count is None else place.shard_index % max(1, count)
    shard = ShardSettings(
        index=index, count=place.shard_count if count is None else count, wait_s=_not_negative("shard.wait_s", values)
    )
    if not 0 <= shard.index < shard.count:
        raise ConfigError(
            f"shard.index must be from 0 to shard.count - 1, got shard.index={shard.index} shard.count={shard.count}"
        )
    return shard


def _launcher(values: Mapping[str, Any]) -> LocalSettings | SlurmSettings | RaySettings:
    if values["kind"] == "local":
        return _local(values)
    if values["kind"] == "ray":
        return _ray(values)
    for key in ("tasks", "at_once", "cpus"):
        _positive(f"launcher.{key}", values[key])
    _not_negative("launcher.requeues", values)
    gpus = values["gpus"]
    if gpus is not None and (type(gpus) is not int or gpus < 0):
        raise ConfigError(f"launcher.gpus must be a number of GPUs for each task, or null, got {gpus}")
    known = {key: value for key, value in values.items() if key not in ("kind", "options")}
    return SlurmSettings(**known, options=tuple(values["options"]))


def _local(values: Mapping[str, Any]) -> LocalSettings:
    processes, gpus = values["processes"], values["gpus"]
    _positive("launcher.processes", processes)
    if gpus is not None and gpus != "all" and (type(gpus) is not int or gpus < 1):
        raise ConfigError(f"launcher.gpus must be all, a number above 0 or null, got {gpus}")
    if gpus is not None and processes is not None:
        raise ConfigError(
            f"launcher.gpus={gpus} starts a process for each GPU, and launcher.processes={processes} is set too; set "
            "one of them to null"
        )
    return LocalSettings(
        processes=processes, gpus=gpus, margin_s=_not_negative("launcher.margin_s", values), lock=values["lock"]
    )


def _ray(values: Mapping[str, Any]) -> RaySettings:
    for key in ("processes", "cpus"):
        _positive(f"launcher.{key}", values[key])
    if values["gpus"] is not None and (type(values["gpus"]) is not int or values["gpus"] not in (0, 1)):
        raise ConfigError(
            f"launcher.gpus must be 0, 1 or null, got {values['gpus']}; a process uses one GPU, and launcher.processes "
            "says how many there are"
        )
    address = values["address"]
    if address is not None and address not in ("auto", "local") and not re.fullmatch(r"[^/\s]+:\d+", address):
        raise ConfigError(
            f"launcher.address must be host:port, auto, local or null, got {address}; start this on a machine of the "
            "cluster, since ray:// addresses are for clients outside it"
        )
    _not_negative("launcher.margin_s", values)
    known = {key: value for key, value in values.items() if key not in ("kind", "env")}
    return RaySettings(**known, env=tuple(values["env"]))


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


def _not_negative(key: str, values: Mapping[str, Any]) -> Any:
    """The value of a dotted key in its group; None stays None."""
    value = values[key.rpartition(".")[2]]
    if value is not None and not 0 <= value < math.inf:
        raise ConfigError(f"{key} must be 0 or more, got {value}")
    return value


def _between(key: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise ConfigError(f"{key} must be between {low} and {high}, got {value}")
    return value


def _one_of(key: str, value: T, allowed: Sequence[T]) -> T:
    if value not in allowed:
        raise ConfigError(f"{key} must be one of {', '.join(str(a) for a in allowed if a is not None)}, got {value}")
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
