"""What adapter_config.json says, as PEFT writes it: checked, so that what runs is plain LoRA or DoRA. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.models.checkpoint import read_json

CONFIG = "adapter_config.json"
REFUSED = (
    "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_qalora",
    "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
"""Settings under which the update is not the plain product, or the base model not the plain one."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` under which training began by taking the first update out of the base's weights."""
DEFAULT_RANK = DEFAULT_ALPHA = 8


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of a LoRA adapter; which modules it updates is told by its tensors, not here."""

    file: Path
    values: Mapping[str, Any]

    @property
    def base(self) -> str:
        """The model it was trained on, by the name its training knew; empty if it does not say."""
        return str(self.values.get("base_model_name_or_path") or "")

    @property
    def is_dora(self) -> bool:
        """Whether updates have magnitudes."""
        return bool(self.values.get("use_dora"))

    def rank_and_scaling(self, path: str) -> tuple[int, float]:
        """A module's own by the first pattern that its path ends with, else the adapter's."""
        rank = _by_pattern(self.values.get("rank_pattern"), path, self.values.get("r", DEFAULT_RANK))
        alpha = _by_pattern(self.values.get("alpha_pattern"), path, self.values.get("lora_alpha", DEFAULT_ALPHA))
        return rank, alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def copies(self, path: str) -> bool:
        """Whether the module is one of modules_to_save: what was tied to it keeps the base's weight."""
        return any(f".{name}." in f".{path}." for name in self.values.get("modules_to_save") or ())


def read_config(name: str, folder: Path) -> AdapterConfig:
    """The settings in a folder that is asked for by `name`; raises ConfigError on what is not computed here."""
    file = folder / CONFIG
    if not file.is_file():
        raise ConfigError(
            f"model.adapter={name} has no {CONFIG}; name a folder that PEFT's save_pretrained has written"
        )
    values = read_json(file)
    _check_kind(f"model.adapter={name}", values)
    _check_numbers(file, values, "r", "rank_pattern")
    _check_numbers(file, values, "lora_alpha", "alpha_pattern", fractions=True)
    return AdapterConfig(file, values)


def _check_kind(key: str, values: Mapping[str, Any]) -> None:
    kind = str(values.get("peft_type") or "an unnamed kind")
    if kind != "LORA":
        raise ConfigError(f"{key} is a PEFT adapter of type {kind}, which is not supported; supported is LORA")
    for name in REFUSED:
        if values.get(name):
            raise ConfigError(f"{key} was made with {name}, which is not supported; supported are LoRA and DoRA")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise ConfigError(
            f"{key} has init_lora_weights={start}, which changes the base model's weights; convert it to plain LoRA "
            "with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _check_numbers(
    file: Path, values: Mapping[str, Any], key: str, patterns_key: str, *, fractions: bool = False
) -> None:
    """Raise ConfigError unless values are numbers above 0 and patterns regular expressions."""
    patterns = values.get(patterns_key) or {}
    if not isinstance(patterns, dict):
        raise ConfigError(f"{file}: {patterns_key} is {patterns!r}, which is no map; save the adapter again")
    for value in (values.get(key, DEFAULT_RANK), *patterns.values()):
        if isinstance(value, bool) or not isinstance(value, (int, float) if fractions else int) or value <= 0:
            raise ConfigError(f"{file}: {key} is {value!r}, which is no number above 0; save the adapter again")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{file}: {pattern!r} is no regular expression ({error}); change it") from error


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, otherwise: Any) -> Any:
    found = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", path))
    return next(found, otherwise)
