"""What the checkpoint is and what was asked for, settled before any weight is read. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError

METHODS = ("auto", "none", "bnb")
KERNELS = ("auto", "reference", "bitsandbytes")
BNB_BLOCKSIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSettings:
    """What was asked for under `quant`; `dequant_cache_gib` None is auto, 0 is off."""

    method: str = "auto"
    kernel: str = "auto"
    double_quant: bool = True
    skip_modules: tuple[str, ...] = ()
    dequant_cache_gib: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """How the Linears of a model are stored; bits 16 stands for unquantized weights in the model's dtype."""

    method: str
    bits: int
    quant_type: str = ""
    blocksize: int = 0
    double_quant: bool = False
    skip_modules: tuple[str, ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether any Linear is replaced."""
        return self.method != "none"

    @property
    def bytes_per_weight(self) -> float:
        """Bytes that one weight of a quantized Linear takes, statistics included (for the plan)."""
        if not self.quantized:
            return 2.0
        absmax_bytes = 1 + 4 / 256 if self.double_quant else 4
        return self.bits / 8 + absmax_bytes / self.blocksize

    def skips(self, module_name: str) -> bool:
        """Whether a module stays unquantized: its path, or one of its parts, is listed."""
        parts = module_name.split(".")
        return any(
            skip == module_name or skip in parts or module_name.startswith(f"{skip}.") for skip in self.skip_modules
        )

    def describe(self) -> str:
        """One phrase for the log and the plan."""
        if not self.quantized:
            return "unquantized"
        return f"bitsandbytes {self.quant_type.upper()}{' with double quantization' if self.double_quant else ''}"


def resolve_spec(settings: QuantSettings, checkpoint_config: Mapping[str, Any], path: str) -> QuantSpec:
    """Settle what runs; `checkpoint_config` is config.json's content. Raises ConfigError on a contradiction."""
    stored = checkpoint_config.get("quantization_config")
    if stored:
        method = stored.get("quant_method", "an unnamed method")
        raise ConfigError(
            f"model.path={path} is already quantized ({method}), which is not supported yet; "
            "use the unquantized checkpoint with quant=bnb"
        )
    if settings.method in ("auto", "none"):
        if settings.kernel != "auto":
            raise ConfigError(
                f"quant.kernel={settings.kernel} has nothing to run: the weights are not quantized; "
                "leave quant.kernel=auto or choose quant=bnb"
            )
        return QuantSpec(method="none", bits=16)
    return QuantSpec(
        method="bnb",
        bits=4,
        quant_type="nf4",
        blocksize=BNB_BLOCKSIZE,
        double_quant=settings.double_quant,
        skip_modules=settings.skip_modules,
    )
