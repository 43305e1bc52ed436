"""The source that the `data` group names."""

from __future__ import annotations

from pipeline.data.source import Source
from pipeline.settings import DataSettings


def open_source(settings: DataSettings) -> Source:
    """A source by its kind; raises ConfigError on settings it cannot use. Nothing is read yet."""
    from pipeline.data.parquet import ParquetSource

    sources = {"parquet": ParquetSource}
    path = settings.path[0] if len(settings.path) == 1 else settings.path
    return sources[settings.kind](path, settings.columns)
