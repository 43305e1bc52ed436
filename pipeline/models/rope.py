"""Long RoPE (Phi-3; Ding et al., "LongRoPE", 2024) with the factors chosen per row.

transformers chooses the short or the long factors by the longest sequence of the batch, so that a row's
result depends on its neighbours, and again at every step of a growing row. Here a row's own longest
possible length (prompt and answer) decides, once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class RowLongRope(nn.Module):
    """Takes the place of a model's rotary embedding; `reach_T` is set before each pass."""

    def __init__(self, rotary: nn.Module, config: PretrainedConfig) -> None:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        super().__init__()
        self.original_positions = int(config.rope_parameters["original_max_position_embeddings"])
        init = ROPE_INIT_FUNCTIONS["longrope"]
        short, self.attention_scaling = init(config, torch.device("cpu"), seq_len=self.original_positions)
        long, _ = init(config, torch.device("cpu"), seq_len=self.original_positions + 1)
        self.short: Tensor
        self.long: Tensor
        self.register_buffer("short", short.float(), persistent=False)
        self.register_buffer("long", long.float(), persistent=False)
        self.reach_T: Tensor | None = None

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [1, T, D] in x's dtype for the positions [1, T] of a flat pass."""
        assert self.reach_T is not None
        is_long_T1 = (self.reach_T > self.original_positions)[:, None]
        frequencies_TF = torch.where(is_long_T1, self.long, self.short)
        angles_1TF = position_ids[..., None].float() * frequencies_TF
        angles_1TD = torch.cat((angles_1TF, angles_1TF), dim=-1)
        cos, sin = angles_1TD.cos() * self.attention_scaling, angles_1TD.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def settle_dynamic_rope(model: nn.Module) -> None:
    """Keep the angles of dynamic NTK RoPE as they are up to the model's own number of positions.

    No row goes beyond it. transformers looks at the longest position of every pass, on the host, to find out.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str):
            module.rope_type = _settled(kind)  # type: ignore[assignment]  # a plain attribute of transformers' modules
        elif isinstance(kind, dict):
            module.rope_type = {layers: _settled(name) for layers, name in kind.items()}  # type: ignore[assignment]


def _settled(rope_type: str) -> str:
    return "default" if rope_type == "dynamic" else rope_type


def install_row_rope(model: nn.Module, config: PretrainedConfig) -> list[RowLongRope]:
    """Replace the model's rotary embeddings if they are long RoPE; returns the new ones."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != "longrope":
        return []
    installed = []
    for name, module in list(model.named_modules()):
        if name.endswith("rotary_emb"):
            installed.append(RowLongRope(module, config))
            model.set_submodule(name, installed[-1])
    return installed
