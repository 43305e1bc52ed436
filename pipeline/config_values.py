"""Composed values to frozen settings, checked: the whole of them, and the groups of model, data, engine and output."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pipeline.config_checks import auto_number, between, map_of, names_of, not_negative, one_of, positive
from pipeline.config_launch import launcher_from, shard_from
from pipeline.config_schema import COMPRESSIONS, RETRIES
from pipeline.config_task import task_from
from pipeline.core import SamplingParams
from pipeline.engine.plan import ATTENTION, COMPILE, KV_DTYPES, LEAST_SHARED, EngineSettings
from pipeline.errors import ConfigError
from pipeline.launch.place import Place
from pipeline.quant.gptq_spec import BITS
from pipeline.quant.spec import KERNELS, QuantSettings
from pipeline.redaction import redacted
from pipeline.settings import (
    DataSettings,
    ModelConfig,
    ModelSettings,
    OutputSettings,
    RunConfig,
    SamplingSettings,
)

ON_CHANGE = ("refuse", "new")
DTYPES = ("auto", "bfloat16", "float16", "float32")


def settings_from(values: Mapping[str, Any], place: Place) -> RunConfig:
    """The whole run's settings; raises ConfigError with key, value and remedy on the first that is out of range."""
    shard = shard_from(values["shard"], place)
    return RunConfig(
        model=_model(values["model"]),
        quant=_quant(values["quant"]),
        data=_data(values["data"]),
        task=task_from(values["task"]),
        sampling=_sampling(values["sampling"]),
        engine=_engine(values["engine"]),
        output=_output(values["output"]),
        shard=shard,
        dry_run=values["dry_run"],
        retry=one_of("retry", values["retry"], RETRIES),
        max_error_rate=between("max_error_rate", values["max_error_rate"], 0, 1),
        resolved=redacted({**values, "shard": asdict(shard)}),
        launcher=launcher_from(values["launcher"]),
        place=place,
    )


def model_config_from(values: Mapping[str, Any]) -> ModelConfig:
    """The settings of a command beside the run; groups that `values` lacks are None."""
    return ModelConfig(
        model=_model(values["model"]),
        quant=_quant(values["quant"]),
        output=_output(values["output"]) if "output" in values else None,
        data=_data(values["data"]) if "data" in values else None,
        task=task_from(values["task"]) if "task" in values else None,
    )


def _model(values: Mapping[str, Any]) -> ModelSettings:
    one_of("model.dtype", values["dtype"], DTYPES)
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
        max_len=positive("model.max_len", values["max_len"]),
        device=values["device"],
        adapter=values["adapter"],
        adapter_revision=values["adapter_revision"],
        memory_gib=auto_number("model.memory", values["memory"], float),
    )


def _quant(values: Mapping[str, Any]) -> QuantSettings:
    """The keys that the chosen method has; what it lacks keeps the default."""
    known: dict[str, Any] = {"method": values["method"]}
    if "kernel" in values:
        one_of("quant.kernel", values["kernel"], KERNELS)
        cache = values["dequant_cache"]
        known["kernel"] = values["kernel"]
        known["dequant_cache_gib"] = (
            0.0 if cache in ("off", False) else auto_number("quant.dequant_cache", cache, float, "auto, off or GiB")
        )
    if values.get("tuning_cache") is not None:
        known["tuning_cache"] = Path(values["tuning_cache"]).expanduser()
    if "skip_modules" in values:
        known["skip_modules"] = tuple(values["skip_modules"])
    if "int8_threshold" in values:
        known["int8_threshold"] = between("quant.int8_threshold", values["int8_threshold"], 0, 1e4)
    if "bits" in values:
        one_of("quant.bits", values["bits"], (None, *BITS))
        if values["group_size"] is not None and values["group_size"] != -1:
            positive("quant.group_size", values["group_size"])
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
        columns=names_of("data.columns", values),
        limit=positive("data.limit", values["limit"]),
        chunk_rows=positive("data.chunk_rows", values["chunk_rows"]) or 1,
        storage_options=map_of("data.storage_options", values["storage_options"]),
        name=values.get("name"),
        split=values.get("split"),
        revision=values.get("revision"),
    )


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
        slots=positive("engine.slots", auto_number("engine.slots", values["slots"], int)),
        max_len=positive("engine.max_len", values["max_len"]),
        prefill_tokens=positive(
            "engine.prefill_tokens", auto_number("engine.prefill_tokens", values["prefill_tokens"], int)
        ),
        share_prefix=_share_prefix(values["share_prefix"]),
        dedup=values["dedup"],
        compile=one_of("engine.compile", "off" if values["compile"] is False else values["compile"], COMPILE),
        kv_dtype=one_of("engine.kv_dtype", values["kv_dtype"], KV_DTYPES),
        attention=one_of("engine.attention", values["attention"], ATTENTION),
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
        columns=names_of("output.columns", values),
        on_change=one_of("output.on_change", values["on_change"], ON_CHANGE),
        compression=one_of("output.compression", values["compression"], COMPRESSIONS),
        row_group_rows=positive("output.row_group_rows", values["row_group_rows"]),
        journal_s=not_negative("output.journal_s", values),
        storage_options=map_of("output.storage_options", values["storage_options"]),
    )
