"""The source that the `data` group names."""

from __future__ import annotations

from pipeline.data.source import Source
from pipeline.settings import DataSettings


def open_source(settings: DataSettings) -> Source:
    """A source by its kind; raises ConfigError on settings it cannot use. Nothing is read yet."""
    from pipeline.data.hub import HubAsked, HubSource
    from pipeline.data.jsonl import JsonlSource
    from pipeline.data.parquet import ParquetSource

    path = settings.path[0] if len(settings.path) == 1 else settings.path
    if settings.kind == "hub":
        asked = HubAsked(name=settings.name, split=settings.split, revision=settings.revision)
        return HubSource(path, settings.columns, settings.storage_options, asked)
    if settings.kind == "jsonl":
        return JsonlSource(path, settings.columns, settings.storage_options)
    return ParquetSource(path, settings.columns, settings.storage_options)
