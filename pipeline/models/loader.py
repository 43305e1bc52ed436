"""Weights from safetensors to the device, one tensor at a time, quantized on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.kernels.need import Progress
from pipeline.models import lora
from pipeline.models.adapter import Adapter
from pipeline.models.architecture import ATTENTION, register_attention
from pipeline.models.checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo
from pipeline.models.decoder import TransformersDecoder
from pipeline.models.head import Float32Head, Float32QuantHead
from pipeline.models.memory import give_back_freed_memory
from pipeline.models.rope import install_row_rope, settle_dynamic_rope
from pipeline.models.seamless import make_seamless
from pipeline.quant.bitblas import NotRepackable
from pipeline.quant.format import StorageFormat
from pipeline.quant.linear import QuantLinear
from pipeline.quant.spec import QuantSpec, StoredModule

if TYPE_CHECKING:
    from transformers import PretrainedConfig

RECOMPUTED = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")
"""Buffers that old checkpoints carry and models compute themselves."""
RENAMED = {"embed_out.": "lm_head."}
"""Names that checkpoints use and transformers' models do not any more (GPT-NeoX)."""


@dataclass(frozen=True, slots=True)
class Load:
    """The next thing to load: what fills one parameter, or all stored tensors of a quantized Linear, by leaf."""

    path: str
    tensors: Mapping[str, TensorInfo]
    stored: StoredModule | None = None


def load_model(
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    quant: StorageFormat | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    adapter: Adapter | None = None,
    trust_remote_code: bool = False,
    progress: Progress = iter,
) -> TransformersDecoder:
    """Build the model without memory, then fill it tensor by tensor; raises ConfigError on a bad checkpoint.

    `quant` is the format of the quantized Linears, None if there are none. `progress` wraps the loads,
    for a progress bar.
    """
    model = build_skeleton(config, dtype, trust_remote_code)
    if adapter is not None:
        lora.check_fits(adapter, model)
    loads = plan_loads(checkpoint, model, quant)
    for load in progress(loads):
        _run(load, model, quant, dtype, device)
        give_back_freed_memory()
    model.tie_weights()  # type: ignore[operator]  # a method of transformers' models
    install_row_rope(model, config)
    settle_dynamic_rope(model)
    _finish(model, checkpoint, device)
    if adapter is not None:
        lora.replace_tensors(adapter, model, lambda info: _read(info).to(device=device, dtype=dtype))
    widen_head(model)
    if adapter is not None:
        lora.add_updates(adapter, model, lambda info: _read(info).to(device=device, dtype=torch.float32))
    if device.type == "cpu":
        make_seamless(model)
    return TransformersDecoder(model.eval().requires_grad_(False), dtype, device, unused_tensors(checkpoint, loads))


def check_adapter(adapter: Adapter, config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> None:
    """Raise ConfigError naming file and tensor unless the adapter fits the model; reads no weights."""
    lora.check_fits(adapter, build_skeleton(config, dtype, trust_remote_code))


def plan_loads(checkpoint: Checkpoint, model: nn.Module, quant: StorageFormat | None) -> list[Load]:
    """What to load in which order: biases before weights, since a quantized Linear is built from both."""
    wanted = set(model.state_dict()) | {name for name, _ in model.named_parameters(remove_duplicate=False)}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    modules = [] if quant is None else quant.spec.stored_modules(checkpoint.tensors)
    module_of = {f"{module.path}.{leaf}": module for module in modules for leaf in module.leaves}
    stored: dict[str, dict[str, TensorInfo]] = {}
    loads: list[Load] = []
    for info in checkpoint.tensors.values():
        name = _model_name(info.name, wanted, linears, model)
        path, leaf = _split(name, linears)
        if info.name in module_of and path in linears:
            stored.setdefault(path, {})[leaf] = info
        elif name in wanted:
            loads.append(Load(path, {leaf: info}))
    loads += [Load(path, leaves, module_of[next(iter(leaves.values())).name]) for path, leaves in stored.items()]
    return sorted(loads, key=lambda load: ("bias" not in load.tensors, load.path))


def unused_tensors(checkpoint: Checkpoint, loads: Iterable[Load]) -> tuple[str, ...]:
    """The names of the checkpoint's tensors that no load reads and no model computes itself."""
    used = {info.name for load in loads for info in load.tensors.values()}
    return tuple(sorted(name for name in checkpoint.tensors if name not in used and not name.endswith(RECOMPUTED)))


def _split(name: str, linears: set[str]) -> tuple[str, str]:
    """A tensor's module path and leaf; a leaf may have dots where it belongs to a Linear (weight.absmax)."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:end])
        if path in linears:
            return path, ".".join(parts[end:])
    return ".".join(parts[:-1]), parts[-1]


def _model_name(name: str, wanted: set[str], linears: set[str], model: nn.Module) -> str:
    """A checkpoint's name in the model's terms: old names renamed, the base model's prefix added where it lacks."""
    for old, new in RENAMED.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
    prefixed = f"{getattr(model, 'base_model_prefix', 'model')}.{name}"
    known = prefixed in wanted or _split(prefixed, linears)[0] in linears
    return prefixed if known and name not in wanted else name


def _run(load: Load, model: nn.Module, quant: StorageFormat | None, dtype: torch.dtype, device: torch.device) -> None:
    """Read a load's tensors and put them where they belong."""
    if load.stored is None:
        leaf, weight = read_weight(load, model, dtype, device)
        place_weight(model, load.path, leaf, weight, quant)
        return
    assert quant is not None
    tensors = {leaf: _read(info).to(device) for leaf, info in load.tensors.items()}
    bias = getattr(model.get_submodule(load.path), "bias", None)
    info = load.tensors["weight"] if "weight" in load.tensors else next(iter(load.tensors.values()))
    try:
        linear = quant.restore(load.stored, tensors, None if bias is None else bias.data, dtype)
    except ConfigError as error:
        remedy = "" if isinstance(error, NotRepackable) else "; fetch the checkpoint again"
        raise ConfigError(f"{info.file}: {load.path}: {error}{remedy}") from error
    expected = model.get_submodule(load.path)
    assert isinstance(expected, nn.Linear)
    if (linear.in_features, linear.out_features) != (expected.in_features, expected.out_features):
        raise ConfigError(
            f"{info.file}: {load.path} is {linear.out_features} x {linear.in_features}, but config.json asks for "
            f"{expected.out_features} x {expected.in_features}; fetch the checkpoint again"
        )
    model.set_submodule(load.path, linear)


def read_weight(load: Load, model: nn.Module, dtype: torch.dtype, device: torch.device) -> tuple[str, Tensor]:
    """The leaf that a load of one unquantized tensor fills, and the tensor on the device; raises ConfigError.

    Integers are no weights: they would be the codes of a quantized one whose statistics are missing.
    """
    leaf, info = next(iter(load.tensors.items()))
    expected = getattr(model.get_submodule(load.path), leaf)
    if expected.is_floating_point() and info.dtype not in FLOAT_DTYPES:
        raise ConfigError(
            f"{info.file}: tensor {info.name} has dtype {info.dtype} and no statistics to dequantize it with; "
            "fetch the checkpoint again"
        )
    if info.shape != expected.shape:
        raise ConfigError(
            f"{info.file}: tensor {info.name} has shape {list(info.shape)}, but config.json asks for "
            f"{list(expected.shape)}; fetch the checkpoint again"
        )
    return leaf, _read(info).to(device=device, dtype=dtype)


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    """The model with parameters on the meta device and its computed buffers (RoPE frequencies) real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    register_attention()
    with init_empty_weights(include_buffers=False):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=trust_remote_code
        )
    return model


def _read(info: TensorInfo) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(info.file), framework="pt") as file:
            tensor: Tensor = file.get_tensor(info.name)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{info.file}: tensor {info.name} cannot be read ({error}); fetch it again") from error
    return tensor


def place_weight(model: nn.Module, path: str, leaf: str, weight: Tensor, quant: StorageFormat | None) -> None:
    """Put an unquantized tensor where it belongs, as it is or as a Linear quantized in flight."""
    module = model.get_submodule(path)
    if quant is not None and leaf == "weight" and is_quantized_in_flight(model, path, quant.spec):
        bias = getattr(module, "bias", None)
        model.set_submodule(path, quant.quantize(weight, None if bias is None else bias.data))
    elif leaf in module._buffers:
        module._buffers[leaf] = weight
    else:
        module.register_parameter(leaf, nn.Parameter(weight, requires_grad=False))


def is_quantized_in_flight(model: nn.Module, path: str, spec: QuantSpec) -> bool:
    """Every Linear is but the output head (as bitsandbytes' users expect) and those to skip."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    module = model.get_submodule(path)
    return not spec.stored and type(module) is nn.Linear and module is not head and not spec.skips(path)


def _finish(model: nn.Module, checkpoint: Checkpoint, device: torch.device) -> None:
    """Refuse a model with holes, and move the computed buffers to the device."""
    tensors = (*model.named_parameters(), *model.named_buffers())  # the bias of a quantized Linear is a buffer
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"model.path={checkpoint.name} lacks tensor {missing[0]}{more}; fetch the checkpoint again")
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def widen_head(model: nn.Module) -> None:
    """Logits in float32 whatever the model's dtype."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    path = next(name for name, module in model.named_modules() if module is head)
    if isinstance(head, QuantLinear):
        model.set_submodule(path, Float32QuantHead(head))
    elif type(head) is nn.Linear and head.weight.dtype != torch.float32:
        model.set_submodule(path, Float32Head(head))
