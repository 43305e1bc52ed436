"""The output head in float32: logits are not rounded to the model's dtype.

In bfloat16 a logit of 8 is a multiple of 1/32, so the likeliest labels tie again and again and their
probabilities come in coarse steps. The inputs and weights keep their dtype; only the product does not
round.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to float32 [..., N]."""
        if self.weight.dtype == torch.float32:
            return F.linear(x.float(), self.weight, self.bias)
        flat = torch.mm(x.reshape(-1, x.shape[-1]), self.weight.t(), out_dtype=torch.float32)
        if self.bias is not None:
            flat = flat + self.bias
        return flat.reshape(*x.shape[:-1], -1)
