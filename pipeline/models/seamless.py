"""The activation functions of a model on a CPU, with bits that do not depend on a token's place in a pass."""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.kernels.elementwise import seamless

OF_TORCH = (nn.SiLU, nn.GELU, nn.Sigmoid, nn.Mish, nn.Softplus, nn.ELU, nn.Tanh, nn.Hardswish)
"""torch's activation modules that models use and that are not exact whatever computes them."""


class Seamless(nn.Module):
    """An activation function of single values."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape, and as large as `x`."""
        return seamless(self.function, x)


def make_seamless(model: nn.Module) -> None:
    """Put every activation module of the model into a `Seamless`."""
    wrapped: dict[int, Seamless] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if path and is_activation(module):
            model.set_submodule(path, wrapped.setdefault(id(module), Seamless(module)))


def is_activation(module: nn.Module) -> bool:
    """Whether it is a function of single values, by torch or transformers."""
    kind = type(module)
    return isinstance(module, OF_TORCH) or kind.__module__ == "transformers.activations" or kind.__name__ == "BloomGelu"
