"""Packs weights as the bitblas package packs them, and multiplies with them as its own operators define it, on a CPU.

A program of its own, since the package needs CUDA's libraries (see `fake_cuda`) and changes its process. Reads a JSON
list of jobs from standard input:

- with `source`, a GPTQ checkpoint (format v2, no act-order): writes to `target` the same weights as a BitBLAS
  checkpoint. `zeros` says how zero points are stored (none, empty, quantized, original, rescale), `leaf` under which
  name, `code_dtype` whether 8-bit codes are signed, `ladder` asks for that layout, `told` and `told_in` are the
  configuration and the file that has it.
- with `operands`, a safetensors file with codes, scales, zeros and x: writes `product` there, x W^T in float32.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

warnings.simplefilter("ignore")

from bitblas import tvm  # noqa: E402
from bitblas.base.operator_common import TransformKind  # noqa: E402
from bitblas.ops.general_matmul.tirscript.matmul_dequantize_impl import select_implementation  # noqa: E402
from bitblas.ops.ladder_permutate import LadderPermutate, LadderPermutateConfig  # noqa: E402
from bitblas.ops.lop3_permutate import LOP3Permutate, LOP3PermutateConfig  # noqa: E402
from bitblas.ops.quant_compress import QuantCompress, QuantCompressConfig  # noqa: E402
from bitblas.quantization.utils import general_compress  # noqa: E402

CPU = tvm.target.Target("llvm")


@cache
def packing(outputs: int, inputs: int, bits: int, ladder: bool) -> list[Any]:
    """The operators that the package prepares weights [N, K] with, in their order."""
    shape = {"M": outputs, "N": inputs, "storage_dtype": "int8"}
    steps: list[Any] = []
    if ladder:
        config = LadderPermutateConfig(
            **shape, datatype="float16", dequantize_bits=-1, propagate_kind="B", transpose_matrix=True,
            transform_kind=TransformKind.LDMatrixTransform,
        )  # fmt: skip
        steps.append(LadderPermutate(config, target=CPU))
    if bits < 8:
        steps.append(QuantCompress(QuantCompressConfig(**shape, input_dtype="int8", dequantize_bits=bits), target=CPU))
        interleaved = LOP3PermutateConfig(**shape, datatype="float16", dequantize_bits=bits)
        steps.append(LOP3Permutate(interleaved, target=CPU))
    return steps


def pack(codes_NK: Tensor, bits: int, ladder: bool) -> Tensor:
    """Codes int8 [N, K] as the package stores them."""
    outputs, inputs = codes_NK.shape
    packed = codes_NK.contiguous()
    for step in packing(outputs, inputs, bits, ladder):
        packed = step.forward(packed)
    return packed.reshape(outputs // 16, inputs // 16, 16, 2 * bits).clone() if ladder else packed.clone()


def write(job: dict[str, Any]) -> None:
    source, target, bits = Path(job["source"]), Path(job["target"]), job["bits"]
    stored = {}
    tensors = load_file(next(source.glob("*.safetensors")))
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            module = {other: tensors[f"{path}.{other}"] for other in ("qweight", "qzeros", "scales", "g_idx")}
            stored |= {f"{path}.{leaf}": tensor for leaf, tensor in convert(module, bits, job).items()}
        elif leaf not in ("qzeros", "scales", "g_idx"):
            stored[name] = tensor
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    config.pop("quantization_config")
    if job["told_in"] == "config.json":
        config["quantization_config"] = job["told"]
    else:
        (target / job["told_in"]).write_text(json.dumps(job["told"]))
    (target / "config.json").write_text(json.dumps(config))


def convert(module: dict[str, Tensor], bits: int, job: dict[str, Any]) -> dict[str, Tensor]:
    """BitBLAS' tensors of a GPTQ module's."""
    codes_NK = fields(module["qweight"].T, bits)
    zeros_GN = fields(module["qzeros"], bits)
    assert (np.diff(module["g_idx"].numpy()) >= 0).all(), "act-order has no place in this format"
    shift = 128 if job["code_dtype"] == "int8" and bits == 8 else 0
    scales_NG = module["scales"].T.half()
    converted = {
        "qweight": pack(torch.from_numpy(codes_NK - shift).to(torch.int8), bits, job["ladder"]),
        "scales": scales_NG,
    }
    zeros_NG = torch.from_numpy(zeros_GN.T - shift)
    if job["zeros"] == "quantized":
        packed = general_compress((zeros_GN - shift).astype(np.int8), bits) if bits < 8 else zeros_GN - shift
        converted[job["leaf"]] = torch.from_numpy(packed).to(torch.int8)
    elif job["zeros"] == "original":
        converted[job["leaf"]] = zeros_NG.half()
    elif job["zeros"] == "rescale":
        converted[job["leaf"]] = (zeros_NG * scales_NG.float()).half()
    elif job["zeros"] == "empty":
        converted[job["leaf"]] = torch.empty(0, dtype=torch.int8)
    return converted


def fields(words_RW: Tensor, bits: int) -> Any:
    """The fields of 32-bit words along the last dimension, as int64."""
    unsigned_RW = words_RW.numpy().astype(np.int64) & 0xFFFFFFFF
    shifts = np.arange(0, 32, bits)
    return ((unsigned_RW[:, :, None] >> shifts) & ((1 << bits) - 1)).reshape(len(unsigned_RW), -1)


def multiply(job: dict[str, Any]) -> None:
    """The package's own definition of the product, built for the CPU. It reads codes that are not interleaved."""
    file, bits, mode = Path(job["operands"]), job["bits"], job["zeros"]
    operands = load_file(file)
    codes_NK, scales_NG, x_MK = (operands[name] for name in ("codes", "scales", "x"))
    (outputs, inputs), rows = codes_NK.shape, len(x_MK)
    definition = select_implementation(
        M=rows, N=outputs, K=inputs, in_dtype="float16", out_dtype="float32", accum_dtype="float32", bit=bits,
        storage_dtype="int8", source_format="int" if mode == "none" else "uint", with_scaling=True,
        with_zeros=mode != "none", group_size=inputs // scales_NG.shape[1], fast_decoding=False, with_bias=False,
        layout="nt", zeros_mode="original" if mode == "none" else mode, propagate_a=TransformKind.NonTransform,
        propagate_b=TransformKind.NonTransform,
    )  # fmt: skip
    codes = codes_NK.numpy()
    packed = general_compress(codes, bits) if bits < 8 else codes
    zeros = [] if mode == "none" else [operands["zeros"].numpy()]
    if mode == "quantized":
        zeros = [general_compress(zeros[0].T.copy(), bits)]
    out = tvm.nd.empty((rows, outputs), "float32")
    arguments = [x_MK.numpy(), packed.astype(np.int8), scales_NG.numpy(), *zeros]
    tvm.build(definition, target="llvm")(*map(tvm.nd.array, arguments), out)
    save_file(operands | {"product": torch.from_numpy(out.numpy())}, file)


if __name__ == "__main__":
    for each in json.load(sys.stdin):
        write(each) if "source" in each else multiply(each)
