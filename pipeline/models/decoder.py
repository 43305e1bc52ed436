"""A transformers causal language model behind the engine's `DecoderModel` interface."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipeline.engine.attention import AttentionPass
from pipeline.models.rope import RowLongRope
from pipeline.quant.linear import QuantLinear


class TransformersDecoder:
    """Runs flat passes of T tokens, all rows of a pass in one sequence; attention knows the rows."""

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, device: torch.device, unused_tensors: tuple[str, ...] = ()
    ) -> None:
        """`unused_tensors` are those of the checkpoint that the model has no place for."""
        self.model = model
        self.unused_tensors = unused_tensors
        self.dtype = dtype
        self.device = device
        self._row_ropes = [module for module in model.modules() if isinstance(module, RowLongRope)]

    def logits(
        self, tokens_T: Tensor, positions_T: Tensor, attention: AttentionPass, wanted_L: Tensor | None
    ) -> Tensor:
        """Float32 logits [L, V] at the pass's indices `wanted_L` (all T if None)."""
        for rope in self._row_ropes:
            rope.reach_T = attention.reach_T
        out = self.model(
            input_ids=tokens_T[None],
            position_ids=positions_T[None],
            use_cache=False,
            logits_to_keep=0 if wanted_L is None else wanted_L,
            attention_pass=attention,
        )
        logits_LV: Tensor = out.logits[0].float()
        return logits_LV

    def quant_linears(self) -> Iterator[tuple[str, QuantLinear]]:
        """Every quantized Linear with its module path."""
        for name, module in self.model.named_modules():
            if isinstance(module, QuantLinear):
                yield name, module

    def cache_dequantized(self, budget_bytes: int) -> int:
        """Keep dequantized weights, layer after layer, while they fit the budget; returns the bytes taken."""
        taken = 0
        for linear in (linear for _, linear in self.quant_linears() if linear.cacheable):
            if taken + linear.dense_bytes > budget_bytes:
                break
            linear.cache_weight()
            taken += linear.dense_bytes
        return taken

    def weight_bytes(self) -> int:
        """Bytes of parameters and quantized weights on the device, cached dequantized weights not counted."""
        dense = {t.data_ptr(): t.numel() * t.element_size() for t in (*self.model.parameters(), *self.model.buffers())}
        return sum(dense.values()) + sum(linear.stored_bytes for _, linear in self.quant_linears())
