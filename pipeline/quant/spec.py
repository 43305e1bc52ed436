"""What a quantization is, in terms that hold for every storage format. No torch here."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

METHODS = ("auto", "none", "bnb", "bnb-fp4", "bnb-int8", "gptq", "bitblas")
KERNELS = ("auto", "reference", "bitsandbytes", "bitblas", "triton", "triton-fused")
DEFAULT_THRESHOLD = 6.0
"""The outlier threshold of LLM.int8() in its paper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSettings:
    """What was asked for under `quant`.

    `dequant_cache_gib` None is auto, 0 is off; `tuning_cache` None is a folder of the user's.
    `bits` to `act_order` are GPTQ's; None is what the checkpoint has.
    """

    method: str = "auto"
    kernel: str = "auto"
    double_quant: bool = True
    int8_threshold: float = DEFAULT_THRESHOLD
    skip_modules: tuple[str, ...] = ()
    dequant_cache_gib: float | None = None
    tuning_cache: Path | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    act_order: bool | None = None


class TensorHeader(Protocol):
    """What a weight file says of a tensor: safetensors' dtype ("I32", "F16"), shape and size."""

    @property
    def file(self) -> Path: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def num_bytes(self) -> int: ...

    def read(self) -> bytes:
        """The tensor's bytes, for those that are small."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModule:
    """A Linear that a checkpoint holds quantized: weight [N, K] in `leaves` (names below `path`).

    `num_bytes` is what it takes once loaded. `group_size` is the number of weights that share a scale. `code` names
    the values of the codes where a format has several ("nf4"). Kernels that take not every kind also ask for
    `zeros_mode` (none, original, rescale) and safetensors' `scale_dtype`.
    """

    path: str
    leaves: tuple[str, ...]
    bits: int
    group_size: int
    shape: tuple[int, int]
    num_bytes: int
    zeros_mode: str = "original"
    scale_dtype: str = "F16"
    code: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec(ABC):
    """How the Linears of a model are stored; one subclass per family of formats.

    `stored` says that the checkpoint itself is quantized; otherwise weights are quantized in flight.
    """

    bits: int
    stored: bool = False
    skip_modules: tuple[str, ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether any Linear is replaced."""
        return True

    @property
    def batch_invariant(self) -> bool:
        """Whether a row's result is independent of its neighbours."""
        return True

    @property
    @abstractmethod
    def bytes_per_weight(self) -> float:
        """Bytes that one weight of a Linear takes, statistics included."""

    @abstractmethod
    def describe(self) -> str:
        """One phrase for the log, the plan and the fingerprint."""

    def describe_module(self, module: StoredModule) -> str:
        """A stored module's format in a few words, for a table."""
        return f"{module.bits} bits, {group_phrase(module)}"

    def describe_in_flight(self) -> str:
        """The format of what is quantized in flight, for a table."""
        return f"{self.bits} bits"

    def in_flight_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a weight quantized in flight takes, statistics included."""
        return int(math.prod(shape) * self.bytes_per_weight)

    @abstractmethod
    def stored_modules(self, tensors: Mapping[str, TensorHeader]) -> list[StoredModule]:
        """The Linears that a checkpoint with these tensors holds quantized.

        Raises ConfigError naming the tensor that is missing, or has a shape or dtype that does not fit.
        """

    def skips(self, module_name: str) -> bool:
        """Whether a module stays unquantized: one of its path's parts is listed, or its path up to some part.

        As vLLM matches `llm_int8_skip_modules` (`is_layer_skipped_bnb` in its quantization/bitsandbytes.py): whole
        parts alone, so that "model.layers.1" does not mean layer 10, nor "proj" every projection.
        """
        parts = module_name.split(".")
        listed = set(self.skip_modules)
        return any(part in listed or ".".join(parts[: end + 1]) in listed for end, part in enumerate(parts))


def module_override(overrides: Mapping[str, Mapping[str, Any]], path: str) -> Mapping[str, Any]:
    """A module's own settings among those of `dynamic`, by pattern: the first that matches counts.

    "-:" before a pattern marks modules that stay unquantized; they have none. (GPTQModel's rules.)
    """
    for pattern, values in overrides.items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), path):
            return values
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Unquantized(QuantSpec):
    """Weights in the model's dtype."""

    bits: int = 16

    @property
    def quantized(self) -> bool:
        """No Linear is replaced."""
        return False

    @property
    def bytes_per_weight(self) -> float:
        """Of a dtype of 16 bits."""
        return 2.0

    def describe(self) -> str:
        """For the log."""
        return "unquantized"

    def stored_modules(self, tensors: Mapping[str, TensorHeader]) -> list[StoredModule]:
        """None."""
        return []


def group_phrase(module: StoredModule) -> str:
    """How the inputs of a module share scales."""
    return "one group" if module.group_size >= module.shape[1] else f"groups of {module.group_size}"
