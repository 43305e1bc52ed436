"""The fingerprint of everything that can change a row's output; it guards resume. No torch here."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict
from typing import Any

from pipeline import __version__
from pipeline.models.adapter import Adapter
from pipeline.models.checkpoint import Checkpoint
from pipeline.redaction import redacted
from pipeline.settings import RunConfig, TaskSettings

LIBRARIES = ("torch", "transformers", "tokenizers", "bitsandbytes", "pyarrow", "jinja2")
UNGUARDED = ("quant.dequant_cache_gib", "quant.tuning_cache", "engine.dedup", "task.truth")
"""Keys that change how fast a row is answered, or what is said of it afterwards, never the row."""


def requested(
    config: RunConfig, checkpoint: Checkpoint, tokenizer: Checkpoint, adapter: Adapter | None = None
) -> dict[str, Any]:
    """What was asked for, under flat dotted keys: enough to refuse a resume before torch is imported."""
    parts = {
        "model": {
            "files": checkpoint.identity(config.model.hash_weights),
            **({} if adapter is None else {"adapter": adapter.identity()}),
            "dtype": config.model.dtype,
            "max_len": config.model.max_len,
            "trust_remote_code": config.model.trust_remote_code,
        },
        "tokenizer": {} if tokenizer is checkpoint else {"files": tokenizer.file_hashes()},
        "quant": asdict(config.quant),
        "data": {"limit": config.data.limit, "chunk_rows": config.data.chunk_rows, "columns": config.data.columns},
        "task": _task(config.task),
        "sampling": asdict(config.sampling),
        "engine": asdict(config.engine),
        "output": {"columns": config.output.columns},
    }
    return {key: value for key, value in _flat(redacted(parts)).items() if key not in UNGUARDED}


def _task(task: TaskSettings) -> dict[str, Any]:
    """The labels as pairs: their order decides ties and the order of the columns' maps."""
    labels = task.labels if isinstance(task.labels, str | None) else [list(pair) for pair in task.labels.items()]
    return {**asdict(task), "labels": labels}


def versions() -> dict[str, str]:
    """Library versions, for the record: a change is worth a warning, not a refusal."""
    found = {f"versions.{name}": importlib.metadata.version(name) for name in LIBRARIES}
    return {**found, "versions.pipeline": __version__, "versions.python": platform.python_version()}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; tuples as lists, as JSON has them."""
    if isinstance(value, dict) and (value or not prefix):
        flat: dict[str, Any] = {}
        for key, inner in value.items():
            flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: list(value) if isinstance(value, tuple) else value}
