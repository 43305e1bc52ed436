"""Calibrates GPTQ checkpoints with GPTQModel, and says what GPTQModel itself computes with checkpoints.

A program of its own, since importing GPTQModel changes transformers in its process. Reads a JSON list of jobs from
standard input. With a `source` (an unquantized checkpoint with a tokenizer) it is quantized with `config` on random
rows and saved to `folder`. With `prompts` the checkpoint in `folder` is loaded by GPTQModel's plain torch kernel, and
the weights that it dequantizes (float32), the logits in float32 and those in its own float16 go to `target`.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import save_file
from torch import Tensor


def calibrate(job: dict[str, Any]) -> None:
    rng = random.Random(0)
    rows = [{"input_ids": [rng.randrange(3, 500) for _ in range(64)], "attention_mask": [1] * 64} for _ in range(32)]
    model = GPTQModel.load(job["source"], QuantizeConfig(**job["config"]), device="cpu", dtype=torch.bfloat16)
    model.quantize(rows, batch_size=4)
    model.save(job["folder"])


@torch.no_grad()
def compute(job: dict[str, Any]) -> None:
    """float16 is what the scales are stored in: bfloat16 would round them."""
    loaded = GPTQModel.load(job["folder"], backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
    model = loaded.model.eval()
    found = {f"half.{n}": logits(model, prompt) for n, prompt in enumerate(job["prompts"])}
    for name, module in model.named_modules():
        if hasattr(module, "dequantize_weight"):
            module.scales = module.scales.float()
            found[f"weight.{name}"] = module.dequantize_weight().T.float().contiguous()
    model.float()
    found |= {f"logits.{n}": logits(model, prompt) for n, prompt in enumerate(job["prompts"])}
    save_file(found, Path(job["target"]))


def logits(model: Any, prompt: list[int]) -> Tensor:
    out: Tensor = model(torch.tensor([prompt])).logits[0].float().contiguous()
    return out


if __name__ == "__main__":
    for each in json.load(sys.stdin):
        if "source" in each:
            calibrate(each)
        if "prompts" in each:
            compute(each)
