"""The one schema of all Parts: the input columns that are kept, then what the task adds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_COMMON = (
    ("row_id", pa.string()),
    ("completion", pa.string()),
    ("finish_reason", pa.string()),
    ("error", pa.string()),
    ("prompt_tokens", pa.int32()),
    ("completion_tokens", pa.int32()),
    ("cumulative_logprob", pa.float64()),
)
_BY_LABEL = pa.map_(pa.string(), pa.float64())
"""Label to number where each row has labels of its own. The run's own labels make a struct instead: it reads
the same in SQL (`label_probs['x']`) and as a dict in Python, and `datasets`, which has no maps, opens it too."""
_BY_TASK = {
    "generate": (),
    "label": (
        ("label", pa.string()),
        ("label_probs", _BY_LABEL),
        ("label_logprob", _BY_LABEL),
        ("margin", pa.float64()),
        ("entropy", pa.float64()),
    ),
    "score": (("target_logprob", pa.float64()), ("target_tokens", pa.int32())),
}

_LOGPROB = pa.struct([("token_id", pa.int32()), ("logprob", pa.float64())])
_LOGPROBS = pa.list_(pa.struct([*_LOGPROB, pa.field("top", pa.list_(_LOGPROB))]))
_ON_REQUEST = {
    "token_ids": pa.list_(pa.int32()),
    "logprobs": _LOGPROBS,
    "prompt_logprob": pa.float64(),
    "choices": pa.list_(
        pa.struct(
            [
                ("completion", pa.string()),
                ("finish_reason", pa.string()),
                ("completion_tokens", pa.int32()),
                ("cumulative_logprob", pa.float64()),
                ("token_ids", pa.list_(pa.int32())),
                ("logprobs", _LOGPROBS),
            ]
        )
    ),
}


def output_fields(task: str, on_request: Sequence[str] = (), labels: Sequence[str] | None = None) -> list[pa.Field]:
    """The columns that a task adds to its rows, all nullable; ConfigError for an unknown task.

    `on_request` names those that are there only if asked for: token_ids, logprobs, prompt_logprob, choices. `labels`
    are those of the run; None if each row has its own.
    """
    if task not in _BY_TASK:
        raise ConfigError(f"task must be one of {', '.join(_BY_TASK)}, got {task}")
    extra = [(name, _ON_REQUEST[name]) for name in on_request]
    by_label = _BY_LABEL if labels is None else pa.struct([(label, pa.float64()) for label in labels])
    columns = (*_COMMON, *_BY_TASK[task], *extra)
    return [pa.field(name, by_label if kind is _BY_LABEL else kind) for name, kind in columns]


def results_schema(
    input_schema: pa.Schema,
    input_columns: Sequence[str] | None,
    task: str,
    metadata: Mapping[str, str],
    on_request: Sequence[str] = (),
    labels: Sequence[str] | None = None,
) -> pa.Schema:
    """The schema of `results/`: `input_columns` (None is all of them) in their order, then the task's.

    `metadata` becomes the schema's metadata; the input's own is dropped, since it describes other
    columns. Raises ConfigError for unknown or repeated `input_columns` and for an input column with
    the name of an output column.
    """
    kept = input_schema.names if input_columns is None else list(input_columns)
    added = output_fields(task, on_request, labels)
    _require_known(kept, input_schema.names)
    _require_free(kept, [field.name for field in added])
    fields = [input_schema.field(name) for name in kept] + added
    return pa.schema(fields, metadata=dict(metadata))


def _require_known(kept: Sequence[str], names: Sequence[str]) -> None:
    unknown = [name for name in kept if name not in names]
    if unknown:
        raise ConfigError(
            f"output.columns names {', '.join(unknown)}, which the input does not have; its columns are "
            f"{', '.join(names)}"
        )
    if len(set(kept)) < len(kept):
        raise ConfigError(f"output.columns must name each column once, got {', '.join(kept)}")


def _require_free(kept: Sequence[str], added: Sequence[str]) -> None:
    # In any case: `select completion` gives DuckDB, Spark and others the first of `Completion` and `completion`.
    names = {name.casefold() for name in added}
    taken = [name for name in kept if name.casefold() in names]
    if taken:
        others = [name for name in kept if name not in taken]
        raise ConfigError(
            f"input columns {', '.join(taken)} have the names of output columns; set output.columns to the input "
            f"columns to keep without them: [{', '.join(others)}]"
        )
