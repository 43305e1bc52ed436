"""What the checkpoint is and what was asked for, settled before any weight is read. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import ConfigError
from pipeline.quant.bitblas_spec import bitblas_stored
from pipeline.quant.bnb_spec import bnb_in_flight, bnb_stored, is_flagged
from pipeline.quant.gptq_spec import gptq_stored
from pipeline.quant.spec import QuantSettings, QuantSpec, Unquantized

SUPPORTED = "unquantized checkpoints, and those of bitsandbytes (4 and 8 bits), GPTQ and BitBLAS"


def resolve_spec(settings: QuantSettings, quantization: Mapping[str, Any], path: str) -> QuantSpec:
    """Settle what runs; `quantization` is what the checkpoint says of itself, empty if nothing.

    Raises ConfigError where settings and checkpoint contradict each other or the format is not supported.
    """
    family = family_of(quantization)
    if family == "bitsandbytes":
        return bnb_stored(settings, quantization, path)
    if family == "gptq":
        return gptq_stored(settings, quantization, path)
    if family == "bitblas":
        return bitblas_stored(settings, quantization, path)
    if family != "none":
        raise ConfigError(
            f"model.path={path} is quantized with {family}, which is not supported; supported are {SUPPORTED}"
        )
    return _of_unquantized(settings, path)


def family_of(quantization: Mapping[str, Any]) -> str:
    """The family of formats that a checkpoint's quantization_config or quantize_config.json speaks of.

    Old GPTQ files name no method, but bits and a group size; BitBLAS ones may say so in three ways.
    """
    if not quantization:
        return "none"
    method = str(quantization.get("quant_method") or "").lower()
    if not method and (is_flagged(quantization, 4) or is_flagged(quantization, 8)):
        return "bitsandbytes"
    marks = (method, quantization.get("checkpoint_format"), quantization.get("format"))
    if "bitblas" in marks or quantization.get("is_bitblas_format"):
        return "bitblas"
    if method == "gptq" or (not method and "bits" in quantization and "group_size" in quantization):
        return "gptq"
    return method or "an unnamed method"


def _of_unquantized(settings: QuantSettings, path: str) -> QuantSpec:
    if settings.method in ("gptq", "bitblas"):
        formats = "GPTQ or BitBLAS" if settings.method == "bitblas" else "GPTQ"
        raise ConfigError(
            f"quant={settings.method} needs a checkpoint quantized with {formats}, but model.path={path} is "
            "unquantized; use quant=bnb to quantize it in flight, or quant=none"
        )
    if settings.method in ("auto", "none"):
        if settings.kernel != "auto":
            raise ConfigError(
                f"quant.kernel={settings.kernel} has nothing to run: the weights are not quantized; "
                "leave quant.kernel=auto or choose quant=bnb"
            )
        return Unquantized()
    return bnb_in_flight(settings)
