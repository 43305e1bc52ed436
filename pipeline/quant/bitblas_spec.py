"""BitBLAS checkpoints as their configuration tells of them and their tensors' headers show them. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import ConfigError
from pipeline.quant.spec import QuantSettings, QuantSpec, StoredModule, TensorHeader, group_phrase, module_override

BITS = (2, 4, 8)
TILE = 16
"""Outputs and inputs come in multiples of this; a tile of the ladder layout is this wide and high."""
ZEROS = ("zeros", "qzeros")
LEAVES = ("qweight", "scales", *ZEROS)
ZEROS_MODES = ("quantized", "original", "rescale")
CODE_DTYPES = ("int8", "uint8")
SIGN_REMEDY = (
    'add "W_dtype": "int8" (stored less 128) or "uint8" (stored as they are) to its quantization_config, or take the '
    "GPTQ checkpoint it was made of"
)
TABLE = (
    "supported are bits 2, 4 and 8, group_size -1 or a divisor of the inputs, sym true or false, desc_act false, "
    "outputs and inputs in multiples of 16, zeros_mode quantized, original or rescale"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BitblasSpec(QuantSpec):
    """A checkpoint in BitBLAS' format; `group_size` -1 is one group over all inputs.

    `zeros_mode` and `code_dtype` are what the configuration says under `zeros_mode` and `W_dtype`, empty if
    nothing: how zero points are stored, and whether 8-bit codes are signed (int8) or not (uint8). `overrides` are
    the modules' own bits and group sizes by pattern (`dynamic`).
    """

    group_size: int
    symmetric: bool
    zeros_mode: str = ""
    code_dtype: str = ""
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def bytes_per_weight(self) -> float:
        """Codes, and a float16 scale and zero point for each group."""
        return self.bits / 8 + (0 if self.group_size == -1 else 4 / self.group_size)

    def describe(self) -> str:
        """For the log."""
        group = "" if self.group_size == -1 else f" in groups of {self.group_size}"
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"BitBLAS {self.bits} bits{group} ({kind}), from the checkpoint"

    def describe_module(self, module: StoredModule) -> str:
        """For a table."""
        return f"BitBLAS {module.bits} bits, {group_phrase(module)}"

    def stored_modules(self, tensors: Mapping[str, TensorHeader]) -> list[StoredModule]:
        """Every module that has a qweight, checked against the configuration."""
        paths = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
        return [self._module(path, tensors) for path in paths]

    def _module(self, path: str, tensors: Mapping[str, TensorHeader]) -> StoredModule:
        codes = tensors[f"{path}.qweight"]
        own = module_override(self.overrides, path)
        bits, group_size = int(own.get("bits", self.bits)), int(own.get("group_size", self.group_size))
        outputs, inputs = _shape(path, codes, bits)
        reason = layout_obstacle(bits, (outputs, inputs), group_size)
        if bits == 8 and self.code_dtype not in CODE_DTYPES:
            reason = f"has 8 bits, and the configuration does not say whether they are signed; {SIGN_REMEDY}"
        if reason is not None:
            raise ConfigError(f"{codes.file}: {path} {reason}; {TABLE}")
        groups = 1 if group_size == -1 else inputs // group_size
        leaves = {leaf: header for leaf in LEAVES if (header := tensors.get(f"{path}.{leaf}")) is not None}
        if "scales" not in leaves:
            raise ConfigError(
                f"{codes.file}: {path}.scales is missing beside {path}.qweight; fetch the checkpoint again"
            )
        mode = self._check_statistics(path, leaves, (outputs, groups), bits)
        if bits == 8 and (mode, self.code_dtype) == ("rescale", "uint8"):
            raise ConfigError(f"{codes.file}: {path} has unsigned codes and rescaled zeros; {TABLE}, the last for int8")
        return StoredModule(
            path=path,
            leaves=tuple(leaves),
            bits=bits,
            group_size=inputs // groups,
            shape=(outputs, inputs),
            num_bytes=outputs * (inputs * bits // 8 + groups * (2 if mode == "none" else 4)),
            zeros_mode=mode,
        )

    def _check_statistics(
        self, path: str, leaves: Mapping[str, TensorHeader], shape_NG: tuple[int, int], bits: int
    ) -> str:
        """How the zero points are to be applied: "none" where there are none or they are empty, or a mode."""
        _check(f"{path}.scales", leaves["scales"], "F16", shape_NG, bits)
        present = [leaf for leaf in ZEROS if leaf in leaves and leaves[leaf].num_bytes]
        if not present:
            return "none"
        header = leaves[present[0]]
        mode = self.zeros_mode or ("quantized" if header.dtype == "I8" else "original")
        if mode == "quantized":
            _check(f"{path}.{present[0]}", header, "I8", (shape_NG[1], shape_NG[0] * bits // 8), bits)
            return "original"
        _check(f"{path}.{present[0]}", header, "F16", shape_NG, bits)
        return mode


def _shape(path: str, codes: TensorHeader, bits: int) -> tuple[int, int]:
    """(N, K) of a qweight int8 [N, K * bits / 8], or in the ladder layout [N / 16, K / 16, 16, 2 * bits]."""
    if codes.dtype == "I8" and len(codes.shape) == 2:
        return codes.shape[0], codes.shape[1] * 8 // bits
    if codes.dtype == "I8" and len(codes.shape) == 4 and codes.shape[2:] == (TILE, 2 * bits):
        return codes.shape[0] * TILE, codes.shape[1] * TILE
    raise ConfigError(
        f"{codes.file}: {path}.qweight is {codes.dtype} {list(codes.shape)}, but BitBLAS with {bits} bits has "
        f"I8 [outputs, inputs * {bits} / 8]; its configuration names the wrong format or bits"
    )


def _check(name: str, header: TensorHeader, dtype: str, shape: tuple[int, ...], bits: int) -> None:
    if (header.dtype, header.shape) != (dtype, shape):
        raise ConfigError(
            f"{header.file}: {name} is {header.dtype} {list(header.shape)}, but with {bits} bits and the groups and "
            f"zeros_mode of the configuration it has to be {dtype} {list(shape)}; correct the configuration, or fetch "
            "the checkpoint again"
        )


def layout_obstacle(bits: int, shape: tuple[int, int], group_size: int) -> str | None:
    """Why BitBLAS' layout cannot hold a weight [N, K] of so many bits in such groups, or None if it can."""
    outputs, inputs = shape
    if bits not in BITS:
        return f"has {bits} bits, and BitBLAS' layout holds 2, 4 or 8"
    if outputs % TILE or inputs % TILE:
        return f"is {outputs} x {inputs}, and BitBLAS' layout holds multiples of {TILE}"
    if group_size != -1 and inputs % group_size:
        return f"has {inputs} inputs, which are no multiple of the group size {group_size}"
    return None


def bitblas_stored(settings: QuantSettings, stored: Mapping[str, Any], path: str) -> BitblasSpec:
    """What a BitBLAS checkpoint says of itself; ConfigError on what is not supported or contradicts the settings."""
    bits, group_size, mode = stored.get("bits"), stored.get("group_size"), stored.get("zeros_mode")
    group_size = -1 if group_size is None else group_size
    is_group = type(group_size) is int and (group_size == -1 or group_size > 0)
    if bits not in BITS or not is_group or (mode and mode not in ZEROS_MODES):
        raise ConfigError(
            f"model.path={path} is BitBLAS with bits {bits}, group_size {group_size}, zeros_mode {mode}; {TABLE}"
        )
    if stored.get("desc_act") and group_size != -1 and not stored.get("static_groups"):
        raise ConfigError(
            f"model.path={path} is BitBLAS with desc_act true, but the format has no place for the order of the "
            "inputs; take the GPTQ checkpoint it was made of, with quant=bitblas"
        )
    spec = BitblasSpec(
        bits=bits,
        group_size=group_size,
        symmetric=bool(stored.get("sym", False)),
        zeros_mode=str(mode or ""),
        code_dtype=str(stored.get("W_dtype") or ""),
        overrides=stored.get("dynamic") or {},
        stored=True,
    )
    if settings.method not in ("auto", "bitblas"):
        raise ConfigError(
            f"quant={settings.method} contradicts the checkpoint: model.path={path} is already {spec.describe()}; "
            "use quant=auto or quant=bitblas"
        )
    return spec
