"""What the checkpoint is and what was asked for, settled before any weight is read. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError

METHODS = ("auto", "none", "bnb", "bnb-fp4", "bnb-int8")
KERNELS = ("auto", "reference", "bitsandbytes")
BNB_BLOCKSIZE = 64
BNB_4BIT = {"bnb": "nf4", "bnb-fp4": "fp4"}
"""The 4-bit code of each method."""
DEFAULT_THRESHOLD = 6.0
"""The outlier threshold of LLM.int8() in its paper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSettings:
    """What was asked for under `quant`; `dequant_cache_gib` None is auto, 0 is off."""

    method: str = "auto"
    kernel: str = "auto"
    double_quant: bool = True
    int8_threshold: float = DEFAULT_THRESHOLD
    skip_modules: tuple[str, ...] = ()
    dequant_cache_gib: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """How the Linears of a model are stored; bits 16 stands for unquantized weights in the model's dtype.

    `stored` says that the checkpoint itself is quantized; otherwise weights are quantized in flight.
    """

    method: str
    bits: int
    quant_type: str = ""
    blocksize: int = 0
    double_quant: bool = False
    int8_threshold: float = 0.0
    skip_modules: tuple[str, ...] = ()
    stored: bool = False

    @property
    def quantized(self) -> bool:
        """Whether any Linear is replaced."""
        return self.method != "none"

    @property
    def batch_invariant(self) -> bool:
        """Whether a row's result is independent of its neighbours: not with outliers found over the batch."""
        return self.bits != 8 or self.int8_threshold == 0

    @property
    def bytes_per_weight(self) -> float:
        """Bytes that one weight of a Linear quantized in flight takes, block statistics included."""
        if self.bits != 4:
            return self.bits / 8
        absmax_bytes = 1 + 4 / 256 if self.double_quant else 4
        return self.bits / 8 + absmax_bytes / self.blocksize

    def skips(self, module_name: str) -> bool:
        """Whether a module stays unquantized: its path, or one of its parts, is listed."""
        parts = module_name.split(".")
        return any(
            skip == module_name or skip in parts or module_name.startswith(f"{skip}.") for skip in self.skip_modules
        )

    def describe(self) -> str:
        """One phrase for the log, the plan and the fingerprint."""
        if not self.quantized:
            return "unquantized"
        origin = "from the checkpoint" if self.stored else "in flight"
        if self.bits == 8:
            return f"bitsandbytes INT8 (threshold {self.int8_threshold:g}), {origin}"
        return f"bitsandbytes {self.quant_type.upper()}{' double-quantized' if self.double_quant else ''}, {origin}"


def resolve_spec(settings: QuantSettings, checkpoint_config: Mapping[str, Any], path: str) -> QuantSpec:
    """Settle what runs; `checkpoint_config` is config.json's content. Raises ConfigError on a contradiction."""
    stored = checkpoint_config.get("quantization_config")
    if stored:
        return _stored_spec(settings, stored, path)
    if settings.method in ("auto", "none"):
        if settings.kernel != "auto":
            raise ConfigError(
                f"quant.kernel={settings.kernel} has nothing to run: the weights are not quantized; "
                "leave quant.kernel=auto or choose quant=bnb"
            )
        return QuantSpec(method="none", bits=16)
    if settings.method == "bnb-int8":
        return QuantSpec(
            method="bnb", bits=8, int8_threshold=settings.int8_threshold, skip_modules=settings.skip_modules
        )
    return QuantSpec(
        method="bnb",
        bits=4,
        quant_type=BNB_4BIT[settings.method],
        blocksize=BNB_BLOCKSIZE,
        double_quant=settings.double_quant,
        skip_modules=settings.skip_modules,
    )


def _stored_spec(settings: QuantSettings, stored: Mapping[str, Any], path: str) -> QuantSpec:
    """What a quantized checkpoint says of itself (transformers' BitsAndBytesConfig)."""
    method = str(stored.get("quant_method", ""))
    if not (method == "bitsandbytes" or stored.get("load_in_4bit") or stored.get("load_in_8bit")):
        raise ConfigError(
            f"model.path={path} is quantized with {method or 'an unnamed method'}, which is not supported; "
            "supported are unquantized checkpoints and those of bitsandbytes"
        )
    skip = tuple(stored.get("llm_int8_skip_modules") or ())
    if stored.get("load_in_8bit"):
        is_set = settings.method == "bnb-int8"
        threshold = settings.int8_threshold if is_set else float(stored.get("llm_int8_threshold", DEFAULT_THRESHOLD))
        spec = QuantSpec(method="bnb", bits=8, int8_threshold=threshold, skip_modules=skip, stored=True)
    else:
        spec = QuantSpec(
            method="bnb",
            bits=4,
            quant_type=str(stored.get("bnb_4bit_quant_type", "fp4")),
            blocksize=BNB_BLOCKSIZE,
            double_quant=bool(stored.get("bnb_4bit_use_double_quant", False)),
            skip_modules=skip,
            stored=True,
        )
    fitting = "bnb-int8" if spec.bits == 8 else {v: k for k, v in BNB_4BIT.items()}.get(spec.quant_type)
    if settings.method not in ("auto", fitting):
        raise ConfigError(
            f"quant={settings.method} contradicts the checkpoint: model.path={path} is already {spec.describe()}; "
            f"use quant=auto{f' or quant={fitting}' if fitting else ''}"
        )
    return spec
