"""What a checkpoint is and how it would run here, from its headers and small files; no weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.engine.plan import ModelGeometry
from pipeline.errors import ConfigError
from pipeline.models.adapter import Adapter, open_adapter
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.models.inventory import Item, Kind, group_by_kind, list_items
from pipeline.models.memory import ITEMSIZES, capability_of, dtype_name, resolve_device, resolve_dtype, weight_bytes
from pipeline.models.small_files import has_chat_template, tokenizer_file, tokenizer_folder
from pipeline.quant.detect import family_of, resolve_spec
from pipeline.quant.spec import KERNELS, QuantSettings, QuantSpec, Unquantized
from pipeline.settings import ModelConfig, ModelSettings

if TYPE_CHECKING:
    from pipeline.kernels.need import Need
    from pipeline.kernels.registry import Kernel

ARCHITECTURE_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "sliding_window", "tie_word_embeddings",
)  # fmt: skip

OTHER_FORMAT = {"bitblas": "runs BitBLAS' layout alone, to which quant=bitblas repacks GPTQ checkpoints"}
"""Why a kernel has nothing to do with a format, where there is more to say."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelAnswer:
    """A kernel of the registry: whether it can run this checkpoint here; why not, or why only when asked for."""

    name: str
    can_run: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """How the checkpoint would run here. `kernel` is the one a run would take, `auto_kernel` what auto would."""

    device: str
    dtype: str
    resident_bytes: int
    dequantized_bytes: int
    kv_bytes_per_token: int
    kernel: str | None
    auto_kernel: str
    auto_reason: str
    kernels: tuple[KernelAnswer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A checkpoint and what a run would make of it; None is what could not be found out, for the `problem`.

    `format` is what the checkpoint is, `runs_as` what it would be loaded as. `problem` is the sentence with which a
    run would refuse it. `adapter` is what `model.adapter` puts on top.
    """

    model: str
    folder: str
    format: str
    runs_as: str | None
    batch_invariant: bool | None
    architecture: Mapping[str, Any]
    context_length: int | None
    parameters: int | None
    tokenizer: str | None
    chat_template: bool
    weight_files: int
    disk_bytes: int
    place: Place | None
    modules: tuple[Kind, ...]
    adapter: str | None
    problem: str | None


@dataclass(slots=True)
class Attempts:
    """Collects the sentences of what could not be found out, so that the rest still can."""

    problems: list[str] = field(default_factory=list)

    def at(self, find: Callable[[], T]) -> T | None:
        """What `find` finds, or None when it raises a ConfigError."""
        try:
            return find()
        except ConfigError as error:
            self.problems.append(str(error))
            return None


def describe_checkpoint(config: ModelConfig) -> Description:
    """Everything that can be said without reading weights; raises ConfigError where there is no checkpoint at all."""
    checkpoint = open_checkpoint(config.model.path, config.model.revision)
    attempts = Attempts()
    as_stored = attempts.at(lambda: resolve_spec(QuantSettings(), checkpoint.quantization, checkpoint.name))
    spec = as_stored and (attempts.at(lambda: _asked(config, checkpoint)) or as_stored)
    items = _items(checkpoint, config.model, spec, attempts)
    geometry = attempts.at(lambda: _geometry(checkpoint, config.model)) if spec else None
    adapter = attempts.at(lambda: _adapter(config.model))
    if adapter and geometry:
        attempts.at(lambda: _check_adapter(adapter, checkpoint, config.model))
    place = (
        attempts.at(lambda: _place(checkpoint, config, spec, geometry, adapter, attempts))
        if spec and geometry and items
        else None
    )
    tokenizer = attempts.at(lambda: _tokenizer_folder(checkpoint, config.model, adapter))
    return Description(
        model=checkpoint.name,
        folder=str(checkpoint.folder),
        format=as_stored.describe() if as_stored else f"{family_of(checkpoint.quantization)}, which is not supported",
        runs_as=spec.describe() if spec else None,
        batch_invariant=spec.batch_invariant if spec else None,
        architecture=_architecture(checkpoint.config),
        context_length=geometry.max_positions if geometry else checkpoint.config.get("max_position_embeddings"),
        parameters=sum(item.values for item in items) if spec and items else None,
        tokenizer=tokenizer_file(tokenizer) if tokenizer else None,
        chat_template=has_chat_template(tokenizer) if tokenizer else False,
        weight_files=len({info.file for info in checkpoint.tensors.values()}) if items else 0,
        disk_bytes=sum(item.disk_bytes for item in items),
        place=place,
        modules=tuple(group_by_kind(items)),
        adapter=f"{adapter.name}: {adapter.describe()}" if adapter else None,
        problem=attempts.problems[0] if attempts.problems else None,
    )


def _asked(config: ModelConfig, checkpoint: Checkpoint) -> QuantSpec:
    return resolve_spec(config.quant, checkpoint.quantization, checkpoint.name)


def _items(checkpoint: Checkpoint, settings: ModelSettings, spec: QuantSpec | None, attempts: Attempts) -> list[Item]:
    """As the spec has them; where that is not possible, the bare tensors."""
    itemsize = ITEMSIZES.get(attempts.at(lambda: dtype_name(settings, checkpoint)) or "", 0)
    found = attempts.at(lambda: list_items(checkpoint, spec, itemsize)) if spec else None
    return found or attempts.at(lambda: list_items(checkpoint, Unquantized(), itemsize)) or []


def _adapter(settings: ModelSettings) -> Adapter | None:
    """The adapter asked for, its tensors' headers read."""
    adapter = None if settings.adapter is None else open_adapter(settings.adapter, settings.adapter_revision)
    if adapter is not None:
        adapter.describe()
    return adapter


def _check_adapter(adapter: Adapter, checkpoint: Checkpoint, settings: ModelSettings) -> None:
    from pipeline.models.architecture import load_config
    from pipeline.models.loader import check_adapter

    config = load_config(checkpoint.name, str(checkpoint.folder), settings.trust_remote_code)
    check_adapter(adapter, config, resolve_dtype(settings, checkpoint), settings.trust_remote_code)


def _tokenizer_folder(checkpoint: Checkpoint, settings: ModelSettings, adapter: Adapter | None) -> Path:
    own = None if adapter is None or settings.tokenizer is not None else adapter.tokenizer
    return tokenizer_folder(checkpoint, settings) if own is None else own.folder


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {"model_type": config.get("model_type"), "class": (config.get("architectures") or [None])[0]}
    return found | {key: config[key] for key in ARCHITECTURE_KEYS if config.get(key) is not None}


def _geometry(checkpoint: Checkpoint, settings: ModelSettings) -> ModelGeometry:
    from pipeline.models.architecture import geometry_of, load_config

    return geometry_of(load_config(checkpoint.name, str(checkpoint.folder), settings.trust_remote_code))


def _place(
    checkpoint: Checkpoint,
    config: ModelConfig,
    spec: QuantSpec,
    geometry: ModelGeometry,
    adapter: Adapter | None,
    attempts: Attempts,
) -> Place:
    from pipeline.quant.format import format_of, kernels_of, needs_of

    device, dtype = resolve_device(config.model), resolve_dtype(config.model, checkpoint)
    needs = needs_of(spec, spec.stored_modules(checkpoint.tensors), device.type, capability_of(device), dtype)
    cache = config.quant.tuning_cache
    quant, reason = format_of(spec, "auto", needs, cache)
    asked = attempts.at(lambda: format_of(spec, config.quant.kernel, needs, cache)[0])
    kernels = kernels_of(spec, cache)
    auto = quant.kernel.name if quant else "torch"
    return Place(
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        resident_bytes=weight_bytes(checkpoint, spec, dtype, device.type)[0]
        + (0 if adapter is None else adapter.num_bytes(dtype.itemsize)),
        dequantized_bytes=sum(item.values for item in list_items(checkpoint, spec, 0)) * dtype.itemsize,
        kv_bytes_per_token=geometry.kv_bytes_per_token(dtype.itemsize),
        kernel=asked.kernel.name if asked else None if quant else "torch",
        auto_kernel=auto,
        auto_reason=reason,
        kernels=tuple(_answer(name, kernels.get(name), needs) for name in KERNELS if name != "auto") if quant else (),
    )


def _answer(name: str, kernel: Kernel[Any] | None, needs: Sequence[Need]) -> KernelAnswer:
    """What the registry says of a kernel, or that it has none of that name for the format."""
    from pipeline.kernels.registry import obstacle

    reason = OTHER_FORMAT.get(name, "does not run this format") if kernel is None else obstacle(kernel, needs)
    passed_over = kernel.passed_over(needs[0]) if kernel and kernel.passed_over else None
    return KernelAnswer(name=name, can_run=reason is None, reason=reason or passed_over or "")
