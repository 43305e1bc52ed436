"""The output head in float32: logits are not rounded to the model's dtype.

In bfloat16 a logit of 8 is a multiple of 1/32, so the likeliest labels tie again and again and their
probabilities come in coarse steps. The inputs and weights keep their dtype; only the product does not
round.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.kernels.prepack import can_multiply, lay_out, multiply
from pipeline.quant.linear import QuantLinear


class Float32Head(nn.Module):
    """y = x W^T + b with y in float32; x [..., K] and W [N, K] in the model's dtype."""

    def __init__(self, head: nn.Linear) -> None:
        """Take over a head's weight; on CPU, which has no such product, as a float32 copy."""
        super().__init__()
        weight = head.weight.data
        self.register_buffer("weight", weight if weight.is_cuda else weight.float())
        self.bias: Tensor | None
        self.register_buffer("bias", None if head.bias is None else head.bias.data.float())
        self.weight: Tensor
        self.out_features, self.in_features = weight.shape
        self._packed: Tensor | None = None

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weight once it is laid out."""
        return 0 if self._packed is None else 4 * self.in_features * self.out_features

    def pack(self) -> None:
        """Lay out the weight for oneDNN, where it multiplies it; from then on there is no other."""
        if can_multiply(self.weight):
            self._packed = lay_out(self.weight)
            self.weight = self.weight.new_empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to float32 [..., N]."""
        if self._packed is not None:
            return multiply(x.float(), self._packed, self.bias)
        return product_in_float32(x, self.weight, self.bias)


class Float32QuantHead(nn.Module):
    """The same for a quantized head: its weight in the model's dtype, unless the kernel never makes one."""

    def __init__(self, linear: QuantLinear) -> None:
        super().__init__()
        self.linear = linear
        linear.multiplies_only = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to float32 [..., N]."""
        if not self.linear.kernel.dequantizes:
            out: Tensor = self.linear(x)
            return out.float()
        bias = self.linear.bias
        return product_in_float32(x, self.linear.dense_weight(), None if bias is None else bias.float())


def product_in_float32(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """x W^T + b, not rounded to the dtype of x [..., K]; W may be float32 already."""
    if weight_NK.dtype == torch.float32 or not weight_NK.is_cuda:
        return F.linear(x.float(), weight_NK.float(), bias_N)
    flat = torch.mm(x.reshape(-1, x.shape[-1]), weight_NK.t(), out_dtype=torch.float32)
    if bias_N is not None:
        flat = flat + bias_N
    return flat.reshape(*x.shape[:-1], -1)
