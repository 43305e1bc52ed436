"""The columns and places that a run's settings speak of, held against the input that there is."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from pipeline.data.files import would_read
from pipeline.errors import ConfigError
from pipeline.output.sink import NO_ROWS, part_path
from pipeline.redaction import redacted_url
from pipeline.settings import RunConfig
from pipeline.template import names_in


def columns_named(config: RunConfig) -> list[str]:
    """The columns that the settings speak of, each once."""
    task, kept = config.task, config.output.columns or ()
    columns = [task.truth, task.target, task.labels if isinstance(task.labels, str) else None]
    return [name for name in dict.fromkeys([*columns, *names_in(task.prompt), *kept]) if name]


def check_output_apart(config: RunConfig) -> None:
    """ConfigError for results below the input, which the next run would read as input."""
    output = config.output.dir
    part = f"{output.rstrip('/')}/{part_path(NO_ROWS.id)}"
    for path in config.data.path:
        if would_read(path, part):
            raise ConfigError(redacted_url(f"output.dir={output} lies inside data.path={path}; choose another one"))


def check_columns(config: RunConfig, schema: pa.Schema) -> None:
    """ConfigError where a setting names a column that the input does not have, or has of another kind."""
    task = config.task
    names: dict[str, str | None] = {f"sampling.columns.{k}": v for k, v in config.sampling.columns.items()}
    names |= {
        "task.truth": task.truth,
        "task.messages": task.messages,
        "task.target": task.target,
        "task.labels": task.labels if isinstance(task.labels, str) else None,
    }
    for key, name in names.items():
        if name is not None and name not in schema.names:
            raise ConfigError(f"{key}={name} is no column; the columns are {', '.join(schema.names) or 'none'}")
    if task.truth is not None and pa.types.is_nested(schema.field(task.truth).type):
        raise ConfigError(f"task.truth={task.truth} is a column of lists or structs; name one of plain values")
    if isinstance(task.labels, str):
        kind = schema.field(task.labels).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise ConfigError(f"task.labels={task.labels} is a column of {kind}; name one of lists of labels")
    kept = config.output.columns
    if task.truth is not None and kept is not None and task.truth not in kept:
        raise ConfigError(f"task.truth={task.truth} is not kept; add it to output.columns")


def run_labels(config: RunConfig) -> list[str] | None:
    """The names of the run's labels, if it has any of its own."""
    labels = config.task.labels
    return list(labels) if isinstance(labels, Mapping) else None
