"""Unquantized Linears on a CPU: their weights once and for all in the layout that oneDNN multiplies by."""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.kernels.prepack import can_multiply, lay_out, multiply
from pipeline.models.head import Float32Head
from pipeline.models.memory import give_back_freed_memory


class PackedLinear(nn.Module):
    """y = x W^T + b for x [..., K] in the weight's dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = lay_out(linear.weight.data)
        self.packed_bytes = linear.weight.nbytes
        self.bias: Tensor | None
        self.register_buffer("bias", None if linear.bias is None else linear.bias.data)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        return multiply(x, self.packed, self.bias)


def pack_linears(model: nn.Module) -> None:
    """Lay out the weight of every Linear that oneDNN multiplies, one after another, so that none is there twice.

    A weight that an embedding shares stays as it is: it would be.
    """
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and id(module.weight) not in embedded and can_multiply(module.weight):
            model.set_submodule(path, PackedLinear(module))
            give_back_freed_memory()
        elif isinstance(module, Float32Head):
            module.pack()


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the weights that are laid out."""
    return sum(m.packed_bytes for m in model.modules() if isinstance(m, PackedLinear | Float32Head))
