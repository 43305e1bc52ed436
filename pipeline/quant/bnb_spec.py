"""bitsandbytes' formats as a configuration asks for them, and as a checkpoint's config.json tells of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError
from pipeline.quant.bnb_state import NESTED_VALUES, check_4bit, check_8bit
from pipeline.quant.spec import QuantSettings, QuantSpec, StoredModule, TensorHeader

BNB_BLOCKSIZE = 64
BNB_4BIT = {"bnb": "nf4", "bnb-fp4": "fp4"}
"""The 4-bit code of each method."""
STATISTICS = ("weight.absmax", "weight.nested_absmax", "weight.nested_quant_map")
"""What stays on the device beside a 4-bit weight's codes."""
OFFSET_BYTES = 4
NESTED_BLOCKSIZE = 256


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

    def describe_module(self, module: StoredModule) -> str:
        """For a table."""
        return _phrase(module.bits, module.code, module.group_size, "weight.nested_absmax" in module.leaves)

    def describe_in_flight(self) -> str:
        """For a table."""
        return f"{_phrase(self.bits, self.quant_type, self.blocksize, self.double_quant)}, in flight"

    def in_flight_bytes(self, shape: tuple[int, ...]) -> int:
        """Codes, and a scale for each row (8 bits) or the block maxima (4 bits), maybe quantized themselves."""
        values = math.prod(shape)
        if self.bits == 8:
            return values + 4 * shape[0]
        blocks = -(-values // self.blocksize)
        nested = blocks + 4 * -(-blocks // NESTED_BLOCKSIZE) + 4 * NESTED_VALUES + OFFSET_BYTES
        return -(-values // 2) + (nested if self.double_quant else 4 * blocks)

    def stored_modules(self, tensors: Mapping[str, TensorHeader]) -> list[StoredModule]:
        """The Linears whose statistics are there, whatever `skip_modules` says: the tensors decide."""
        if not self.stored:
            return []
        suffix = re.compile(r"\.(SCB|weight_format)$" if self.bits == 8 else r"\.(weight\..+)$")
        leaves: dict[str, dict[str, TensorHeader]] = {}
        for name, header in tensors.items():
            if match := suffix.search(name):
                leaves.setdefault(name[: match.start()], {})[match[1]] = header
        for path, found in leaves.items():
            if f"{path}.weight" in tensors:
                found["weight"] = tensors[f"{path}.weight"]
        return [self._module(path, found) for path, found in leaves.items()]

    def _module(self, path: str, found: Mapping[str, TensorHeader]) -> StoredModule:
        try:
            if self.bits == 8:
                shape = check_8bit(found)
                group_size, kept = shape[1], sum(found[leaf].num_bytes for leaf in ("weight", "SCB"))
                return StoredModule(
                    path=path, leaves=tuple(found), bits=8, group_size=group_size, shape=shape, num_bytes=kept
                )
            state = check_4bit(found)
        except ConfigError as error:
            file = found.get("weight", next(iter(found.values()))).file
            raise ConfigError(f"{file}: {path}: {error}; fetch the checkpoint again") from error
        kept = sum(found[leaf].num_bytes for leaf in ("weight", *STATISTICS) if leaf in found)
        return StoredModule(
            path=path,
            leaves=tuple(found),
            bits=4,
            group_size=state.blocksize,
            shape=state.shape,
            num_bytes=kept + (OFFSET_BYTES if state.nested_blocksize else 0),
            code=state.quant_type,
        )


def _phrase(bits: int, code: str, blocksize: int, double: bool) -> str:
    if bits == 8:
        return "bitsandbytes INT8, a scale for each row"
    return f"bitsandbytes {code.upper()}{' double-quantized' if double else ''}, blocks of {blocksize}"


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
    if is_flagged(stored, 8):
        told = stored.get("llm_int8_threshold")
        threshold = settings.int8_threshold if settings.method == "bnb-int8" or told is None else float(told)
        return BnbSpec(bits=8, int8_threshold=threshold, skip_modules=skip, stored=True)
    return BnbSpec(
        bits=4,
        quant_type=str(stored.get("bnb_4bit_quant_type") or "fp4"),
        blocksize=BNB_BLOCKSIZE,
        double_quant=bool(stored.get("bnb_4bit_use_double_quant")),
        skip_modules=skip,
        stored=True,
    )


def is_flagged(stored: Mapping[str, Any], bits: int) -> bool:
    """Whether a configuration says so many bits: transformers has written the flag with and without underscore."""
    return bool(stored.get(f"load_in_{bits}bit") or stored.get(f"_load_in_{bits}bit"))
