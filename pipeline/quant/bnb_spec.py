"""bitsandbytes' formats as a configuration asks for them, and as a checkpoint's config.json tells of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError
from pipeline.quant.spec import DEFAULT_THRESHOLD, QuantSettings, QuantSpec, StoredModule, TensorHeader

BNB_BLOCKSIZE = 64
BNB_4BIT = {"bnb": "nf4", "bnb-fp4": "fp4"}
"""The 4-bit code of each method."""
STATE = "weight.quant_state.bitsandbytes__"
"""Begins the name of the tensor that holds a 4-bit weight's other values as JSON bytes; the code's name follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BnbSpec(QuantSpec):
    """NF4 or FP4 (`bits` 4, `quant_type`) in blocks of `blocksize` weights, or LLM.int8() (`bits` 8)."""

    quant_type: str = ""
    blocksize: int = 0
    double_quant: bool = False
    int8_threshold: float = 0.0

    @property
    def batch_invariant(self) -> bool:
        """Not with outliers found over the batch."""
        return self.bits != 8 or self.int8_threshold == 0

    @property
    def bytes_per_weight(self) -> float:
        """Block statistics included."""
        if self.bits == 8:
            return 1.0
        absmax_bytes = 1 + 4 / 256 if self.double_quant else 4
        return self.bits / 8 + absmax_bytes / self.blocksize

    def describe(self) -> str:
        """For the log."""
        origin = "from the checkpoint" if self.stored else "in flight"
        if self.bits == 8:
            return f"bitsandbytes INT8 (threshold {self.int8_threshold:g}), {origin}"
        return f"bitsandbytes {self.quant_type.upper()}{' double-quantized' if self.double_quant else ''}, {origin}"

    def stored_modules(self, tensors: Mapping[str, TensorHeader]) -> list[StoredModule]:
        """The Linears whose statistics are there; their shapes are only known to 8-bit headers."""
        if not self.stored:
            return []
        return self._stored_8bit(tensors) if self.bits == 8 else self._stored_4bit(tensors)

    def _stored_8bit(self, tensors: Mapping[str, TensorHeader]) -> list[StoredModule]:
        paths = [name.removesuffix(".SCB") for name in tensors if name.endswith(".SCB")]
        modules = []
        for path in paths:
            leaves = tuple(leaf for leaf in ("SCB", "weight", "weight_format") if f"{path}.{leaf}" in tensors)
            shape = tensors[f"{path}.weight"].shape if "weight" in leaves else (0, 0)
            modules.append(self._module(path, leaves, (shape[0], math.prod(shape[1:])), tensors))
        return modules

    def _stored_4bit(self, tensors: Mapping[str, TensorHeader]) -> list[StoredModule]:
        leaves: dict[str, list[str]] = {}
        for name in sorted(tensors):
            path, found, rest = name.partition(".weight.")
            if found:
                leaves.setdefault(path, []).append(f"weight.{rest}")
        modules = []
        for path, names in leaves.items():
            packed = tensors.get(f"{path}.weight")
            codes = 0 if packed is None else packed.num_bytes * 2
            modules.append(self._module(path, (*names, *(("weight",) if packed else ())), (1, codes), tensors))
        return modules

    def _module(
        self, path: str, leaves: tuple[str, ...], shape: tuple[int, int], tensors: Mapping[str, TensorHeader]
    ) -> StoredModule:
        return StoredModule(
            path=path,
            leaves=leaves,
            bits=self.bits,
            group_size=self.blocksize or shape[1],
            shape=shape,
            num_bytes=sum(tensors[f"{path}.{leaf}"].num_bytes for leaf in leaves),
        )


def bnb_in_flight(settings: QuantSettings) -> BnbSpec:
    """What quant=bnb, bnb-fp4 or bnb-int8 makes of unquantized weights."""
    if settings.method == "bnb-int8":
        return BnbSpec(bits=8, int8_threshold=settings.int8_threshold, skip_modules=settings.skip_modules)
    return BnbSpec(
        bits=4,
        quant_type=BNB_4BIT[settings.method],
        blocksize=BNB_BLOCKSIZE,
        double_quant=settings.double_quant,
        skip_modules=settings.skip_modules,
    )


def bnb_stored(settings: QuantSettings, stored: Mapping[str, Any], path: str) -> BnbSpec:
    """What a checkpoint says of itself (transformers' BitsAndBytesConfig); ConfigError on a contradiction."""
    spec = _read(settings, stored)
    fitting = "bnb-int8" if spec.bits == 8 else {v: k for k, v in BNB_4BIT.items()}.get(spec.quant_type)
    if settings.method not in ("auto", fitting):
        raise ConfigError(
            f"quant={settings.method} contradicts the checkpoint: model.path={path} is already {spec.describe()}; "
            f"use quant=auto{f' or quant={fitting}' if fitting else ''}"
        )
    return spec


def _read(settings: QuantSettings, stored: Mapping[str, Any]) -> BnbSpec:
    skip = tuple(stored.get("llm_int8_skip_modules") or ())
    if stored.get("load_in_8bit"):
        is_set = settings.method == "bnb-int8"
        threshold = settings.int8_threshold if is_set else float(stored.get("llm_int8_threshold", DEFAULT_THRESHOLD))
        return BnbSpec(bits=8, int8_threshold=threshold, skip_modules=skip, stored=True)
    return BnbSpec(
        bits=4,
        quant_type=str(stored.get("bnb_4bit_quant_type", "fp4")),
        blocksize=BNB_BLOCKSIZE,
        double_quant=bool(stored.get("bnb_4bit_use_double_quant", False)),
        skip_modules=skip,
        stored=True,
    )
