"""GPTQ checkpoints as their configuration tells of them and their tensors' headers show them. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.errors import ConfigError
from pipeline.quant.bitblas_spec import layout_obstacle
from pipeline.quant.spec import QuantSettings, QuantSpec, StoredModule, TensorHeader, group_phrase, module_override

BITS = (2, 3, 4, 8)
WORD_BITS = 32
REQUIRED = {"qweight": "I32", "qzeros": "I32", "scales": None}
OPTIONAL = ("g_idx",)
TABLE = (
    "supported are bits 2, 3, 4 and 8, group_size -1 or a divisor of the inputs, sym true or false, desc_act true or "
    "false, checkpoint_format gptq or gptq_v2, pack_dtype int32"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqSpec(QuantSpec):
    """A checkpoint in GPTQ's format; `group_size` -1 is one group over all inputs.

    `zeros_offset` is what has to be added to the stored zero points: 1 in format v1, 0 in v2. `overrides` are
    the modules' own bits and group sizes by pattern (`dynamic`). `repack` asks for BitBLAS' layout at load.
    """

    group_size: int
    symmetric: bool
    act_order: bool
    zeros_offset: int
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    repack: bool = False

    @property
    def bytes_per_weight(self) -> float:
        """Codes, and a zero point and a float16 scale for each group."""
        return self.bits / 8 + (0 if self.group_size == -1 else 3 / self.group_size)

    def describe(self) -> str:
        """For the log."""
        group = "" if self.group_size == -1 else f" in groups of {self.group_size}"
        kind = "symmetric" if self.symmetric else "asymmetric"
        order = ", act-order" if self.act_order else ""
        layout = ", repacked for BitBLAS" if self.repack else ""
        return f"GPTQ {self.bits} bits{group} ({kind}{order}), from the checkpoint{layout}"

    def describe_module(self, module: StoredModule) -> str:
        """For a table."""
        return f"GPTQ {module.bits} bits, {group_phrase(module)}"

    def stored_modules(self, tensors: Mapping[str, TensorHeader]) -> list[StoredModule]:
        """Every module that has a qweight, checked against the configuration."""
        paths = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
        return [self._module(path, tensors) for path in paths]

    def bits_of(self, path: str) -> int:
        """The bits that the configuration gives a module."""
        return int(module_override(self.overrides, path).get("bits", self.bits))

    def _module(self, path: str, tensors: Mapping[str, TensorHeader]) -> StoredModule:
        found = {leaf: tensors.get(f"{path}.{leaf}") for leaf in (*REQUIRED, *OPTIONAL)}
        for leaf, dtype in REQUIRED.items():
            header = found[leaf]
            if header is None:
                raise ConfigError(
                    f"{tensors[f'{path}.qweight'].file}: {path}.{leaf} is missing beside {path}.qweight; "
                    "fetch the checkpoint again"
                )
            if len(header.shape) != 2 or (dtype and header.dtype != dtype):
                raise ConfigError(
                    f"{header.file}: {path}.{leaf} is {header.dtype} {list(header.shape)}, not a matrix of "
                    f"{dtype or 'floats'}; {TABLE}"
                )
        return self._checked(path, {leaf: header for leaf, header in found.items() if header is not None})

    def _checked(self, path: str, found: Mapping[str, TensorHeader]) -> StoredModule:
        """Bits, inputs and groups follow from the shapes; they and the configuration must agree."""
        words, outputs = found["qweight"].shape
        groups = found["scales"].shape[0]
        bits = self.bits_of(path)
        inputs = found["g_idx"].shape[0] if "g_idx" in found else words * WORD_BITS // bits
        expected: dict[str, set[tuple[int, ...]]] = {
            "qweight": {(n, outputs) for n in words_for(inputs, bits)},
            "qzeros": {(groups, n) for n in words_for(outputs, bits)},
            "scales": {(groups, outputs)},
            "g_idx": {(inputs,)},
        }
        for leaf, header in found.items():
            if header.shape not in expected[leaf]:
                raise ConfigError(
                    f"{header.file}: {path}.{leaf} has shape {list(header.shape)}, but for {bits} bits, "
                    f"{inputs} inputs, {outputs} outputs and {groups} groups it has to be {list(min(expected[leaf]))}; "
                    "the configuration names other bits than the tensors have, or the file is damaged"
                )
        module = StoredModule(
            path=path,
            leaves=tuple(found),
            bits=bits,
            group_size=self._group_size(path, inputs, groups),
            shape=(outputs, inputs),
            num_bytes=words * outputs * 4 + groups * outputs + found["scales"].num_bytes + inputs * 4,
            scale_dtype=found["scales"].dtype,
        )
        return self._repacked(module, found) if self.repack else module

    def _group_size(self, path: str, inputs: int, groups: int) -> int:
        """Of the configuration, where the number of groups is its; the last group may be a part of one."""
        told = int(module_override(self.overrides, path).get("group_size", self.group_size))
        return told if told > 0 and -(-inputs // told) == groups else -(-inputs // max(1, groups))

    def _repacked(self, module: StoredModule, found: Mapping[str, TensorHeader]) -> StoredModule:
        """What a module becomes in BitBLAS' layout, with float16 zeros; ConfigError where that cannot hold it."""
        reason = layout_obstacle(module.bits, module.shape, module.group_size)
        if reason is not None:
            raise ConfigError(
                f"{found['qweight'].file}: {module.path} {reason}; use quant=gptq, which runs it as it is"
            )
        outputs, inputs = module.shape
        order, zeros = (inputs * 8 if self.act_order else 0), outputs * (inputs // module.group_size) * 2
        codes = outputs * inputs * module.bits // 8
        return replace(module, num_bytes=codes + found["scales"].num_bytes + zeros + order)


def words_for(fields: int, bits: int) -> set[int]:
    """How many 32-bit words hold so many fields: packed to the last, or padded to whole blocks of 32 fields."""
    return {-(-fields * bits // WORD_BITS), -(-fields // WORD_BITS) * bits}


def gptq_stored(settings: QuantSettings, stored: Mapping[str, Any], path: str) -> GptqSpec:
    """What a GPTQ checkpoint says of itself; ConfigError on what is not supported or contradicts the settings."""
    layout = str(stored.get("checkpoint_format") or stored.get("format") or "gptq")
    bits, group_size = stored.get("bits"), stored.get("group_size", -1)
    packed = str(stored.get("pack_dtype") or "int32").removeprefix("torch.")
    if bits not in BITS or not _is_group(group_size) or layout not in ("gptq", "gptq_v2") or packed != "int32":
        raise ConfigError(
            f"model.path={path} is GPTQ with bits {bits}, group_size {group_size}, checkpoint_format {layout}, "
            f"pack_dtype {packed}; {TABLE}"
        )
    spec = GptqSpec(
        bits=bits,
        group_size=group_size,
        symmetric=bool(stored.get("sym", True)),
        act_order=bool(stored.get("desc_act", False)),
        zeros_offset=1 if layout == "gptq" else 0,
        overrides=stored.get("dynamic") or {},
        repack=settings.method == "bitblas",
        stored=True,
    )
    if settings.method not in ("auto", "gptq", "bitblas"):
        raise ConfigError(
            f"quant={settings.method} contradicts the checkpoint: model.path={path} is already {spec.describe()}; "
            "use quant=auto, quant=gptq or quant=bitblas"
        )
    _refuse_other_values(settings, spec, path)
    return spec


def _refuse_other_values(settings: QuantSettings, spec: GptqSpec, path: str) -> None:
    for key in ("bits", "group_size", "symmetric", "act_order"):
        asked, found = getattr(settings, key), getattr(spec, key)
        if asked is not None and asked != found:
            raise ConfigError(
                f"quant.{key}={_text(asked)} contradicts the checkpoint: model.path={path} has {_text(found)}; leave "
                f"quant.{key} out"
            )


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_group(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (value == -1 or value > 0)
