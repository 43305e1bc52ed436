"""The `sampling` group and the checkpoint's generation_config.json to the engine's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.core import SamplingParams
from pipeline.errors import ConfigError
from pipeline.models.checkpoint import Checkpoint
from pipeline.settings import SamplingSettings

NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def sampling_params(settings: SamplingSettings, checkpoint: Checkpoint, also_end: Sequence[int] = ()) -> SamplingParams:
    """What null stands for is taken from the checkpoint; its end tokens, and `also_end`, always stop an answer.

    A checkpoint that says do_sample: false is greedy. Raises ConfigError on values out of range.
    """
    stored = dict(checkpoint.generation_config)
    if stored.get("do_sample") is False:
        stored["temperature"] = 0.0
    chosen: dict[str, Any] = {key: getattr(settings, key) for key in NEUTRAL}
    for key, neutral in NEUTRAL.items():
        if chosen[key] is None:
            value = stored.get(key)
            chosen[key] = neutral if value is None else value
    stop = dict.fromkeys((*checkpoint.stop_token_ids, *also_end, *settings.stop_token_ids))
    try:
        return SamplingParams(
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            stop_token_ids=tuple(stop),
            stop=settings.stop,
            n=settings.n,
            logprobs=settings.logprobs,
            **chosen,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{error} (from {checkpoint.folder / 'generation_config.json'})") from error


INTEGERS = ("max_new_tokens", "top_k", "seed", "n", "logprobs")


def row_params(base: SamplingParams, columns: Mapping[str, str], row: Mapping[str, Any]) -> SamplingParams:
    """The run's parameters with a row's own values in place; a null keeps the run's.

    Raises ValueError with the column and the reason if a value cannot be used.
    """
    own = {name: _value(name, column, row[column]) for name, column in columns.items() if row[column] is not None}
    if "stop_token_ids" in own:
        own["stop_token_ids"] = tuple(dict.fromkeys((*base.stop_token_ids, *own["stop_token_ids"])))
    return replace(base, **own)


def _value(name: str, column: str, value: Any) -> Any:
    """A cell as the parameter's type."""
    try:
        if name == "stop":
            return tuple(_text(x) for x in ([value] if isinstance(value, str) else value))
        if name == "stop_token_ids":
            return tuple(_integer(x) for x in (value if isinstance(value, list) else [value]))
        if name == "logprobs" and isinstance(value, bool):
            return 0 if value else None
        if isinstance(value, bool):
            raise ValueError
        return _integer(value) if name in INTEGERS else float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"column {column} holds {value!r}, which is no {name}") from error


def _integer(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError
    return int(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value
