"""Low-rank updates beside a model's Linears and embeddings: y = base(x) + scaling * (x A^T) B^T, never merged.

Updates are kept and computed in float32 and the sum is rounded once to the base's dtype, as PEFT does it.
Shapes: T tokens, K inputs, N outputs, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.adapter import RANK_MULTIPLE, Adapter, LowRank, Whole
from pipeline.models.checkpoint import TensorInfo
from pipeline.models.head import Float32QuantHead
from pipeline.quant.linear import QuantLinear

PIECE = 512
"""Inputs that are summed by one product on a CPU.

BLAS libraries share a product with few outputs out over its inputs, in as many shares as suit the number of rows;
the sums then round differently. Pieces this short are not shared out, if there are at least two outputs.
"""

Read = Callable[[TensorInfo], Tensor]


class LoraLinear(nn.Module):
    """A Linear of any kind with a low-rank update; x is [..., K]."""

    def __init__(self, base: nn.Module, a_RK: Tensor, b_NR: Tensor, bias_N: Tensor | None, scaling: float) -> None:
        super().__init__()
        self.base = base
        self.scaling = scaling
        a_RK, b_NR = pad_rank(a_RK, b_NR)
        self.a_RK: Tensor
        self.b_NR: Tensor
        self.bias_N: Tensor | None
        self.register_buffer("a_RK", a_RK)
        self.register_buffer("b_NR", b_NR)
        self.register_buffer("bias_N", bias_N)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        out: Tensor = self.base(x)
        return (out + self.update(x)).to(out.dtype)

    def update(self, x: Tensor) -> Tensor:
        """What is added, in float32."""
        low = narrow_product(x.float(), self.a_RK)
        wide = narrow_product(low, self.b_NR)
        return (wide if self.bias_N is None else wide + self.bias_N) * self.scaling


class DoraLinear(LoraLinear):
    """Scales the base's weights with the update so that each output's have the length that was learned (DoRA)."""

    def __init__(self, base: nn.Module, a_RK: Tensor, b_NR: Tensor, scaling: float, magnitude_N: Tensor) -> None:
        super().__init__(base, a_RK, b_NR, None, scaling)
        weight_NK, self._base_bias_N = dense_weight(base).float(), bias_of(base)
        length_N = torch.linalg.norm(weight_NK + scaling * (b_NR @ a_RK), dim=1)
        self.ratio_N: Tensor
        self.register_buffer("ratio_N", magnitude_N / length_N)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]; a bias is not scaled."""
        out: Tensor = self.base(x)
        plain = out if self._base_bias_N is None else out - self._base_bias_N
        return (out + (self.ratio_N - 1) * plain + self.ratio_N * self.update(x)).to(out.dtype)


class LoraEmbedding(nn.Module):
    """An embedding with a low-rank update."""

    def __init__(self, base: nn.Module, a_RV: Tensor, b_NR: Tensor, scaling: float) -> None:
        super().__init__()
        self.base = base
        self.scaling = scaling
        a_RV, b_NR = pad_rank(a_RV, b_NR)
        self.a_VR: Tensor
        self.b_NR: Tensor
        self.register_buffer("a_VR", a_RV.T.contiguous())
        self.register_buffer("b_NR", b_NR)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] to [..., N]; a base that scales what it gives scales the update too."""
        out: Tensor = self.base(ids)
        update = narrow_product(F.embedding(ids, self.a_VR), self.b_NR) * self.scaling
        scale = getattr(self.base, "embed_scale", None)
        return (out + (update if scale is None else update * scale)).to(out.dtype)


def narrow_product(x: Tensor, weight_NK: Tensor) -> Tensor:
    """x W^T for x [..., K] and a W with few rows or columns; a row's bits do not depend on the other rows."""
    if x.is_cuda or x.shape[-1] <= PIECE:
        return F.linear(x, weight_NK)
    pieces = zip(torch.split(x, PIECE, -1), torch.split(weight_NK, PIECE, -1), strict=True)
    total, *others = (F.linear(part, weight) for part, weight in pieces)
    for product in others:
        total = total + product
    return total


def pad_rank(a_RK: Tensor, b_NR: Tensor) -> tuple[Tensor, Tensor]:
    """Both matrices with a rank that BLAS treats alike for any number of rows: zeros are added."""
    missing = -a_RK.shape[0] % RANK_MULTIPLE
    return F.pad(a_RK, (0, 0, 0, missing)), F.pad(b_NR, (0, missing))


def check_fits(adapter: Adapter, model: nn.Module) -> None:
    """Raise ConfigError naming file and tensor unless every tensor has a module in the model, of a shape that fits.

    `model` is as transformers makes it, with or without memory.
    """
    modules = dict(model.named_modules())
    for tensor in adapter.whole:
        _check_whole(tensor, modules)
    _check_vocabulary(adapter, model, modules)
    for update in adapter.updates:
        kind = nn.Embedding if update.is_embedding else nn.Linear
        module = modules.get(update.path)
        if not isinstance(module, kind):
            _refuse(update.down, f"belongs to {update.path}, which is no {kind.__name__} of the model")
        _check_update(update, module, adapter.vocab)


def replace_tensors(adapter: Adapter, model: nn.Module, read: Read) -> None:
    """Put the adapter's whole tensors in place of the model's, as `read` gives them; a quantized weight ends dense."""
    for tensor in adapter.whole:
        value = read(tensor.info)
        module = model.get_submodule(tensor.path)
        if isinstance(module, QuantLinear) and tensor.leaf == "weight":
            module = _dense_linear(module)
            model.set_submodule(tensor.path, module)
        old = getattr(module, tensor.leaf)
        tied = [other for other in model.modules() if getattr(other, tensor.leaf, None) is old]
        for owner in tied if tensor.shared else [module]:
            _set_tensor(owner, tensor.leaf, value)


def add_updates(adapter: Adapter, model: nn.Module, read: Read) -> None:
    """Wrap the modules that the adapter updates; `read` gives its tensors in float32 on the device."""
    for update in adapter.updates:
        base = model.get_submodule(update.path)
        a, b = read(update.down), read(update.up)
        bias = None if update.bias is None else read(update.bias)
        if update.is_embedding:
            wrapped: nn.Module = LoraEmbedding(base, a, b, update.scaling)
        elif update.magnitude is not None:
            wrapped = DoraLinear(base, a, b, update.scaling, read(update.magnitude))
        else:
            wrapped = LoraLinear(base, a, b, bias, update.scaling)
        model.set_submodule(update.path, wrapped)


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight [N, K] of a Linear of any kind, dequantized if need be."""
    inner = linear.linear if isinstance(linear, Float32QuantHead) else linear
    return inner.dense_weight() if isinstance(inner, QuantLinear) else cast(Tensor, inner.weight)


def bias_of(linear: nn.Module) -> Tensor | None:
    """The bias [N] of a Linear of any kind."""
    inner = linear.linear if isinstance(linear, Float32QuantHead) else linear
    return cast("Tensor | None", inner.bias)


def _check_whole(tensor: Whole, modules: Mapping[str, nn.Module]) -> None:
    expected = getattr(modules.get(tensor.path), tensor.leaf, None)
    if not isinstance(expected, Tensor):
        _refuse(tensor.info, f"has no place in the model, which has no {tensor.path}.{tensor.leaf}")
    fixed = slice(1, None) if tensor.is_vocabulary else slice(None)
    if tensor.info.shape[fixed] != tuple(expected.shape[fixed]):
        _refuse(tensor.info, f"has shape {list(tensor.info.shape)}, but the model's is {list(expected.shape)}")


def _check_vocabulary(adapter: Adapter, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """A vocabulary of another size must come for the embedding and for the output head, unless they are tied."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]  # transformers'
    resized = [t for t in adapter.whole if t.is_vocabulary and adapter.vocab != ends[0].weight.shape[0]]
    tied = model.config.tie_word_embeddings and any(tensor.shared for tensor in resized)  # type: ignore[union-attr]
    brought = {tensor.path for tensor in resized}
    lacking = [path for path, module in modules.items() if module in ends and path not in brought]
    if resized and lacking and not tied:
        _refuse(
            resized[0].info, f"has {adapter.vocab} rows, but {lacking[0]}, which the adapter does not bring, has "
            f"{ends[0].weight.shape[0]}"
        )  # fmt: skip


def _check_update(update: LowRank, module: nn.Module, vocab: int | None) -> None:
    """The update's inputs and outputs are the module's; a vocabulary's rows are those that the adapter brings."""
    if isinstance(module, nn.Embedding):
        inputs, outputs = vocab or module.num_embeddings, module.embedding_dim
    else:
        assert isinstance(module, nn.Linear)
        inputs, outputs = module.in_features, module.out_features
        outputs = vocab if vocab is not None and update.path.endswith("head") else outputs
    expected: dict[str, tuple[int, ...]] = {"down": (update.rank, inputs), "up": (outputs, update.rank)}
    expected |= {"bias": (outputs,), "magnitude": (outputs,)}
    for name, shape in expected.items():
        info = getattr(update, name)
        if info is not None and info.shape != shape:
            _refuse(info, f"has shape {list(info.shape)}, but {update.path} asks for {list(shape)}")


def _refuse(info: TensorInfo, reason: str) -> NoReturn:
    raise ConfigError(f"{info.file}: tensor {info.name} {reason}; use the base model that the adapter was trained on")


def _dense_linear(quantized: QuantLinear) -> nn.Linear:
    """A Linear in place of a quantized one, its weight still to come."""
    linear = nn.Linear(quantized.in_features, quantized.out_features, bias=False, device="meta")
    bias = quantized.bias
    if bias is not None:
        linear.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
    return linear


def _set_tensor(module: nn.Module, leaf: str, value: Tensor) -> None:
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    if leaf == "weight" and isinstance(module, nn.Embedding):
        module.num_embeddings = value.shape[0]
    elif leaf == "weight" and isinstance(module, nn.Linear):
        module.out_features = value.shape[0]
