"""What packed BitBLAS weights mean: products as the package's own definition, built for the CPU, computes them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.kernels.packed_bitblas import BitblasWeight, dequantize_bitblas_reference, pack_codes

PROGRAM = Path(__file__).parents[1] / "quant" / "make_bitblas.py"


@dataclass(frozen=True)
class Case:
    """Zeros of mode none, original, rescale, or quantized (integers, which checkpoints store packed)."""

    bits: int
    zeros: str
    group_size: int

    def __str__(self) -> str:
        return f"{self.bits}-{self.zeros}-{self.group_size}"


CASES = [
    *(Case(bits, zeros, 32) for bits in (2, 4) for zeros in ("none", "original", "rescale", "quantized")),
    Case(4, "original", 128),
    Case(2, "none", 64),
    Case(8, "none", 64),
]


@pytest.fixture(scope="module")
def products(
    tmp_path_factory: pytest.TempPathFactory, bitblas_environment: dict[str, str]
) -> dict[Case, dict[str, torch.Tensor]]:
    """Random operands of each case, and the package's product of them."""
    folder = tmp_path_factory.mktemp("products")
    files = {case: folder / f"{case}.safetensors" for case in CASES}
    generator = torch.Generator().manual_seed(0)
    for case, file in files.items():
        low, high = (-128, 128) if case.bits == 8 else (0, 1 << case.bits)
        shape_NG = (48, 128 // case.group_size)
        scales_NG = (torch.rand(shape_NG, generator=generator) / 16).half()
        operands = {
            "codes": torch.randint(low, high, (48, 128), generator=generator).to(torch.int8),
            "scales": scales_NG,
            "x": torch.randn(5, 128, generator=generator).half(),
        }
        zeros_NG = torch.randint(0, high, shape_NG, generator=generator)
        if case.zeros == "quantized":
            operands["zeros"] = zeros_NG.to(torch.int8)
        elif case.zeros != "none":
            operands["zeros"] = (zeros_NG * scales_NG if case.zeros == "rescale" else zeros_NG).half()
        save_file(operands, file)
    jobs = [{"operands": str(files[case]), "bits": case.bits, "zeros": case.zeros} for case in CASES]
    done = subprocess.run(
        [sys.executable, str(PROGRAM)], input=json.dumps(jobs), capture_output=True, text=True,
        check=False, env=bitblas_environment, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {case: load_file(file) for case, file in files.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_are_those_of_the_packages_definition(
    case: Case, products: dict[Case, dict[str, torch.Tensor]]
) -> None:
    operands = products[case]
    zeros_NG = operands.get("zeros")
    weight = BitblasWeight(
        codes_NB=pack_codes(operands["codes"], case.bits),
        scales_NG=operands["scales"],
        zeros_NG=None if zeros_NG is None else zeros_NG.half(),
        zeros_mode="original" if case.zeros == "quantized" else case.zeros,  # type: ignore[arg-type]
        order_K=None,
        bits=case.bits,
        group_size=case.group_size,
    )
    ours = operands["x"].float() @ dequantize_bitblas_reference(weight, torch.float16).float().T
    error = float((ours - operands["product"]).abs().max() / operands["product"].abs().max())
    assert error < (2e-3 if case.zeros == "rescale" else 1e-6)  # which rounds each weight twice
