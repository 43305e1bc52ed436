"""Weights from safetensors to the device, one tensor at a time, quantized on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.kernels.registry import Kernel
from pipeline.models.architecture import ATTENTION, register_attention
from pipeline.models.checkpoint import Checkpoint, TensorInfo
from pipeline.models.decoder import TransformersDecoder
from pipeline.models.head import Float32Head
from pipeline.models.rope import install_row_rope
from pipeline.quant.bnb4bit import Bnb4bitLinear
from pipeline.quant.spec import QuantSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

RECOMPUTED = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")
"""Buffers that old checkpoints carry and models compute themselves."""
RENAMED = {"embed_out.": "lm_head."}
"""Names that checkpoints use and transformers' models do not any more (GPT-NeoX)."""
Progress = Callable[[Iterable[TensorInfo]], Iterable[TensorInfo]]


def load_model(
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    spec: QuantSpec,
    kernel: Kernel | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
    progress: Progress = iter,
) -> TransformersDecoder:
    """Build the model without memory, then fill it tensor by tensor; raises ConfigError on a bad checkpoint.

    `kernel` serves the quantized Linears and is None exactly when `spec` is unquantized. `progress`
    wraps the tensors, for a progress bar.
    """
    model = _skeleton(config, dtype, trust_remote_code)
    unknown = set(checkpoint.tensors)
    for info, name in _in_order(checkpoint, model, progress):
        unknown.discard(info.name)
        weight = _read(info).to(device=device, dtype=dtype)
        _place(model, name, weight, info, spec, kernel)
    model.tie_weights()  # type: ignore[operator]  # a method of transformers' models
    install_row_rope(model, config)
    _finish(model, checkpoint, device)
    _widen_head(model)
    unused = tuple(sorted(name for name in unknown if not name.endswith(RECOMPUTED)))
    return TransformersDecoder(model.eval().requires_grad_(False), dtype, device, unused)


def _skeleton(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    """The model with parameters on the meta device and its computed buffers (RoPE frequencies) real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    register_attention()
    with init_empty_weights(include_buffers=False):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=trust_remote_code
        )
    return model


def _in_order(checkpoint: Checkpoint, model: nn.Module, progress: Progress) -> Iterable[tuple[TensorInfo, str]]:
    """Biases before weights (a quantized Linear is built from both), with the parameter or buffer each fills."""
    wanted = set(model.state_dict()) | {name for name, _ in model.named_parameters(remove_duplicate=False)}
    infos = sorted(checkpoint.tensors.values(), key=lambda i: (i.name.endswith(".weight"), str(i.file), i.name))
    for info in progress(infos):
        name = _place_name(info.name, wanted, model)
        if name is not None:
            yield info, name


def _place_name(name: str, wanted: set[str], model: nn.Module) -> str | None:
    """What a tensor fills, or None for one the model has no place for (old RoPE buffers, say)."""
    for old, new in RENAMED.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
    prefixed = f"{getattr(model, 'base_model_prefix', 'model')}.{name}"
    return next((candidate for candidate in (name, prefixed) if candidate in wanted), None)


def _read(info: TensorInfo) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(info.file), framework="pt") as file:
            tensor: Tensor = file.get_tensor(info.name)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{info.file}: tensor {info.name} cannot be read ({error}); fetch it again") from error
    return tensor


def _place(
    model: nn.Module, name: str, weight: Tensor, info: TensorInfo, spec: QuantSpec, kernel: Kernel | None
) -> None:
    """Put a tensor where it belongs, as it is or as a quantized Linear."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    expected = getattr(module, leaf).shape
    if weight.shape != expected:
        raise ConfigError(
            f"{info.file}: tensor {info.name} has shape {list(weight.shape)}, but config.json asks for "
            f"{list(expected)}; fetch the checkpoint again"
        )
    if kernel is not None and leaf == "weight" and _is_quantized(model, path, module, spec):
        bias = getattr(module, "bias", None)
        linear = Bnb4bitLinear.quantize(weight, None if bias is None else bias.data, spec, kernel)
        model.set_submodule(path, linear)
    elif leaf in module._buffers:
        module._buffers[leaf] = weight
    else:
        module.register_parameter(leaf, nn.Parameter(weight, requires_grad=False))


def _is_quantized(model: nn.Module, path: str, module: nn.Module, spec: QuantSpec) -> bool:
    """Every Linear but the output head (as bitsandbytes' users expect) and the modules to skip."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return type(module) is nn.Linear and module is not head and not spec.skips(path)


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


def _widen_head(model: nn.Module) -> None:
    """Logits in float32 whatever the model's dtype."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    path = next(name for name, module in model.named_modules() if module is head)
    if type(head) is nn.Linear and head.weight.dtype != torch.float32:
        model.set_submodule(path, Float32Head(head))
