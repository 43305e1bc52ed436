"""The `sampling` group and the checkpoint's generation_config.json to the engine's parameters."""

from __future__ import annotations

from typing import Any

from pipeline.core import SamplingParams
from pipeline.errors import ConfigError
from pipeline.models.checkpoint import Checkpoint
from pipeline.settings import SamplingSettings

NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def sampling_params(settings: SamplingSettings, checkpoint: Checkpoint) -> SamplingParams:
    """What null stands for is taken from the checkpoint; its end tokens always stop an answer."""
    stored = checkpoint.generation_config
    chosen: dict[str, Any] = {key: getattr(settings, key) for key in NEUTRAL}
    for key, neutral in NEUTRAL.items():
        if chosen[key] is None:
            value = stored.get(key)
            chosen[key] = neutral if value is None else value
    stop = dict.fromkeys((*checkpoint.stop_token_ids, *settings.stop_token_ids))
    try:
        return SamplingParams(
            max_new_tokens=settings.max_new_tokens, seed=settings.seed, stop_token_ids=tuple(stop), **chosen
        )
    except ValueError as error:
        raise ConfigError(f"{error} (from {checkpoint.folder / 'generation_config.json'})") from error
