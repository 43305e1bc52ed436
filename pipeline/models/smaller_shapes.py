"""Which smaller passes give a row the bits of the listed ones on this machine: tried out on the model's own products.

Libraries choose how to sum up by the size of a product. Another order shows in one of the thousands of sums of a
product of random numbers, so that a few products of each kind tell. Everything else in a pass is done row by row,
in blocks of one size, or value by value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.plan import EnginePlan, Kind, Proven, Shape
from pipeline.kernels.prepack import MOST_TRIED_ROWS
from pipeline.models.head import Float32Head, Float32QuantHead
from pipeline.models.lora import LoraEmbedding, LoraLinear
from pipeline.models.packed_linear import PackedLinear
from pipeline.quant.linear import QuantLinear

PRODUCTS = (nn.Linear, PackedLinear, QuantLinear, LoraLinear, LoraEmbedding, Float32Head, Float32QuantHead)
"""Modules in which rows are multiplied with weights."""


@torch.inference_mode()
def prove(model: nn.Module, plan: EnginePlan, dtype: torch.dtype) -> Proven:
    """For each kind and number of rows of the plan's shapes, the smaller numbers that change no bit of a row.

    `dtype` is that of the model's hidden states.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]  # a method of transformers' models
    found: dict[tuple[Kind, int], tuple[int, ...]] = {}
    for shape in plan.shapes:
        candidates = plan.candidates(shape)
        if candidates and (shape.kind, shape.rows) not in found:
            left: Sequence[int] = candidates if shape.rows <= MOST_TRIED_ROWS else ()
            for module in _modules_of(shape, model, head):
                left = _equal(module, shape.rows, left, dtype) if left else left
            found[shape.kind, shape.rows] = tuple(left)
    return found


def _modules_of(shape: Shape, model: nn.Module, head: nn.Module) -> Iterator[nn.Module]:
    """One module of each kind of product that runs with a shape's rows: a prefill's head has the rows of its slices."""
    seen: set[Any] = set()
    taken: set[str] = set()
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{path}.") for path in taken)
        if is_inside or not isinstance(module, PRODUCTS):
            continue
        taken.add(name)
        runs = {"prefill": module is not head, "logits": module is head, "decode": True}[shape.kind]
        kind = _kind(module)
        if runs and kind not in seen:
            seen.add(kind)
            yield module


def _kind(module: nn.Module) -> Any:
    """What decides on how a product is computed: its sizes and what computes it."""
    inner = [(type(m), getattr(m, "in_features", 0), getattr(m, "out_features", 0)) for m in module.modules()]
    tensors = [(name, tuple(t.shape), t.dtype) for name, t in (*module.named_parameters(), *module.named_buffers())]
    how = [m.computed_by for m in module.modules() if isinstance(m, QuantLinear)]
    return tuple(inner), tuple(tensors), tuple(how)


def _equal(module: nn.Module, rows: int, candidates: Sequence[int], dtype: torch.dtype) -> list[int]:
    """The numbers of rows in which the first and the last rows of a product of `rows` have the same bits."""
    x = _random_input(module, rows, dtype)
    whole = module(x)
    return [
        fewer
        for fewer in candidates
        if torch.equal(module(x[:fewer]), whole[:fewer]) and torch.equal(module(x[-fewer:]), whole[-fewer:])
    ]


def _random_input(module: nn.Module, rows: int, dtype: torch.dtype) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    if isinstance(module, LoraEmbedding):
        return torch.randint(0, module.a_VR.shape[0], (rows,), generator=draws)
    return torch.randn(rows, inputs_of(module), generator=draws).to(dtype)


def inputs_of(module: nn.Module) -> int:
    """The number of inputs of a Linear of any kind."""
    sizes = (getattr(inner, "in_features", None) for inner in module.modules())
    return next(size for size in sizes if isinstance(size, int))
