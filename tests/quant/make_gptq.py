"""Writes GPTQ checkpoints with GPTQModel's own packing, and what GPTQModel makes of them again.

A program of its own, since importing GPTQModel changes transformers in its process. Reads a JSON list of jobs
from standard input; each has `source` (an unquantized checkpoint), `target` (the GPTQ checkpoint to write),
`dense` (an unquantized checkpoint to write, with the weights as GPTQModel dequantizes them, in float32) and the
settings below. Scales and zero points are those of rounding to nearest; what counts here is the storage.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def write(job: dict[str, Any]) -> None:
    source, target, dense = Path(job["source"]), Path(job["target"]), Path(job["dense"])
    tensors = load_file(source / "model.safetensors")
    stored: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path = name.removesuffix(".weight")
        bits = bits_of(path, job)
        if name.endswith(".weight") and tensor.dim() == 2 and bits:
            packed = pack(tensor.float(), bits, job)
            exact[name] = dequantized(packed)
            if job["format"] == "gptq":
                convert_gptq_v2_to_v1_format_module(packed, QuantizeConfig(bits=bits, group_size=job["group_size"]))
            leaves = ("qweight", "qzeros", "scales", "g_idx")
            stored |= {f"{path}.{leaf}": getattr(packed, leaf).contiguous() for leaf in leaves}
            stored[f"{path}.scales"] = stored[f"{path}.scales"].to(getattr(torch, job["scales"]))
        else:
            stored[name] = tensor
            exact[name] = tensor.float()
    save(dense, source, exact, "model.safetensors", None)
    save(target, source, stored, job["file"], job)


def bits_of(path: str, job: dict[str, Any]) -> int:
    """As GPTQModel reads `dynamic`: the first pattern that matches counts, "-:" leaves a module alone."""
    head = path in ("lm_head", "embed_out")
    if "embed" in path or "norm" in path or (head and not job["lm_head"]):
        return 0
    for pattern, values in job["dynamic"].items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), path):
            return 0 if pattern.startswith("-:") else values.get("bits", job["bits"])
    return job["bits"]


def pack(weight_NK: Tensor, bits: int, job: dict[str, Any]) -> TorchLinear:
    outputs, inputs = weight_NK.shape
    group_size = inputs if job["group_size"] == -1 else job["group_size"]
    groups = inputs // group_size
    generator = torch.Generator().manual_seed(inputs * outputs)
    g_idx = torch.arange(inputs, dtype=torch.int32) // group_size
    if job["desc_act"]:
        g_idx = g_idx[torch.randperm(inputs, generator=generator)]
    scales_NG, zeros_NG = grid(weight_NK, g_idx, groups, bits, job["sym"])
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.weight.data = weight_NK
    packed = TorchLinear(
        bits=bits, group_size=job["group_size"], sym=job["sym"], desc_act=job["desc_act"], in_features=inputs,
        out_features=outputs, bias=False,
    )  # fmt: skip
    packed.pack(linear, scales_NG, zeros_NG, g_idx)
    return packed


def grid(weight_NK: Tensor, g_idx: Tensor, groups: int, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales (rounded to float16) and zero points [N, G] of each group's range; some zero points are 0."""
    top = 2**bits - 1
    scales, zeros = [], []
    for group in range(groups):
        part = weight_NK[:, g_idx == group]
        low, high = part.min(dim=1).values.clamp(max=0), part.max(dim=1).values.clamp(min=0)
        if not symmetric:
            low = low * (torch.arange(len(low)) % 3 != 0)  # every third output gets a zero point of 0
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high - low) / top).half().float()
        scales.append(scale)
        zeros.append(torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round().clamp(0, top))
    return torch.stack(scales, dim=1), torch.stack(zeros, dim=1).to(torch.int32)


def dequantized(packed: TorchLinear) -> Tensor:
    """The weight [N, K] as GPTQModel's module gives it, computed in float32."""
    packed.scales = packed.scales.float()
    packed.eval()
    weight_NK = packed.dequantize_weight().T.contiguous().float()
    packed.scales = packed.scales.half()
    return weight_NK


def save(folder: Path, source: Path, tensors: dict[str, Tensor], file: str, job: dict[str, Any] | None) -> None:
    folder.mkdir(parents=True)
    for other in source.iterdir():
        if other.suffix != ".safetensors":
            shutil.copy(other, folder / other.name)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32" if job is None else job["dtype"]
    if job is not None:
        keys = ("bits", "group_size", "sym", "desc_act", "lm_head")
        told = {key: job[key] for key in keys} | ({"dynamic": job["dynamic"]} if job["dynamic"] else {})
        if job["told_in"] == "config.json":
            config["quantization_config"] = told | {"quant_method": "gptq", "checkpoint_format": job["format"]}
        else:  # as AutoGPTQ wrote it: no method, no format
            (folder / job["told_in"]).write_text(json.dumps(told))
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    for each in json.load(sys.stdin):
        write(each)
