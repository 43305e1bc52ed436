"""Checks of single values of the configuration: each gives the value back, or a ConfigError with its dotted key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pipeline.errors import ConfigError

T = TypeVar("T")


def names_of(key: str, values: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Columns of a group, each named once; None where they are not set."""
    names = values["columns"]
    if names is None:
        return None
    if len(set(names)) != len(names):
        raise ConfigError(f"{key} names a column twice: {', '.join(names)}; name each once")
    return tuple(names)


def positive(key: str, value: int | None) -> int | None:
    """A count from 1 on, or None."""
    if value is not None and value < 1:
        raise ConfigError(f"{key} must be at least 1, got {value}")
    return value


def not_negative(key: str, values: Mapping[str, Any]) -> Any:
    """The value of a dotted key in its group; None stays None."""
    value = values[key.rpartition(".")[2]]
    if value is not None and not 0 <= value < math.inf:
        raise ConfigError(f"{key} must be 0 or more, got {value}")
    return value


def between(key: str, value: float, low: float, high: float) -> float:
    """A number within its bounds."""
    if not low <= value <= high:
        raise ConfigError(f"{key} must be between {low} and {high}, got {value}")
    return value


def one_of(key: str, value: T, allowed: Sequence[T]) -> T:
    """A value that is allowed; None among them is not listed."""
    if value not in allowed:
        raise ConfigError(f"{key} must be one of {', '.join(str(a) for a in allowed if a is not None)}, got {value}")
    return value


def auto_number(key: str, value: Any, kind: Callable[[Any], Any], allowed: str = "auto or a number above 0") -> Any:
    """A number above 0; None for auto."""
    if value in ("auto", None):
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf or kind(value) != value:
        raise ConfigError(f"{key} must be {allowed}, got {value}")
    return kind(value)


def map_of(key: str, value: Any) -> dict[str, Any]:
    """A map as it is."""
    if not isinstance(value, dict):
        raise ConfigError(f"{key} must be a map, as in '{key}={{name: value}}', got {value}")
    return value


def auto_bool(key: str, value: Any) -> bool | None:
    """True or false; None for auto."""
    if value in ("auto", None):
        return None
    if not isinstance(value, bool):
        raise ConfigError(f"{key} must be auto, true or false, got {value}")
    return value
