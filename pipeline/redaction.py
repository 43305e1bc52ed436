"""Credentials kept out of everything that is written: run.json, plan, stats, logs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

BLANK = "(redacted)"
_SECRET = re.compile(
    r"secret|passw|credential|connection_?string|(api|access|account|private|auth)_?(key|token)|(^|_)(token|key|sas)$",
    re.IGNORECASE,
)
_USER = re.compile(r"(?<!abfs)(?<!abfss)://[^/\s]+@")  # in Azure's URLs a container stands there
_SIGNED = re.compile(r"([?&][^=&\s]*(?:sig|token|key|secret|credential|passw)[^=&\s]*=)[^&\s\"']+", re.IGNORECASE)
_OPTIONS = "storage_options"
_SHORTEST_SECRET = 4
_HARMLESS = ("endpoint_url", "endpoint", "region", "region_name", "profile", "project", "account_name", "protocol")


def redacted(values: Any, key: str = "") -> Any:
    """The same values with anything that looks like a credential blanked, by key name and inside URLs.

    Under `storage_options` the names are those of other people's file systems, so any text there is
    blanked unless its key is known to be harmless.
    """
    if _SECRET.search(key) and values is not None:
        return BLANK
    if isinstance(values, dict):
        clean = _redacted_options if key == _OPTIONS else redacted
        return {k: clean(v, str(k)) for k, v in values.items()}
    if isinstance(values, list | tuple):
        return [redacted(v) for v in values]
    return redacted_url(values) if isinstance(values, str) else values


def redacted_url(text: str) -> str:
    """A text whose URLs show neither user and password nor signed parameters."""
    return _SIGNED.sub(rf"\1{BLANK}", _USER.sub(f"://{BLANK}@", text))


def without(text: str, options: Mapping[str, Any]) -> str:
    """A text, such as an error of a file system, in which no blanked value of its storage options stands."""
    for secret in sorted(_blanked(options, redacted(options, _OPTIONS)), key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, BLANK)
    return redacted_url(text)


def _blanked(values: Any, clean: Any) -> Iterator[str]:
    """The texts in values that are not in their redacted form."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _blanked(value, BLANK if clean == BLANK else clean[key])
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            yield from _blanked(value, BLANK if clean == BLANK else clean[index])
    elif clean == BLANK:
        yield str(values)


def _redacted_options(values: Any, key: str) -> Any:
    if isinstance(values, dict):
        return {k: _redacted_options(v, str(k)) for k, v in values.items()}
    if isinstance(values, list):
        return [_redacted_options(v, key) for v in values]
    if values is None or isinstance(values, bool):
        return values
    if isinstance(values, str):
        return redacted_url(values) if key in _HARMLESS else BLANK
    return BLANK if _SECRET.search(key) else values
