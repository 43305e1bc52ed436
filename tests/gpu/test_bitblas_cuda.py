"""The bitblas package's own operators on a GPU, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.kernels.bitblas_operators import OperatorStore, toolchain_obstacle
from pipeline.kernels.bitblas_package import BitblasPackage
from pipeline.kernels.need import Need
from pipeline.kernels.packed_bitblas import BitblasWeight, dequantize_bitblas_reference, pack_codes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
SHAPES = [(4096, 4096), (1024, 4096), (11008, 4096), (4096, 11008), (16, 32), (400, 1024)]
CASES = [
    *((4, shape, 128 if shape[1] >= 128 else 32, "original") for shape in SHAPES),
    *((bits, (1024, 512), group, mode) for bits in (2, 4) for group in (32, 64, 128, 512)
      for mode in ("none", "original", "rescale")),
]  # fmt: skip


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> BitblasPackage:
    reason = toolchain_obstacle()
    if reason is not None:
        pytest.skip(reason)
    return BitblasPackage(OperatorStore(tmp_path_factory.mktemp("operators")))


def need_of(bits: int, shape: tuple[int, int], group_size: int, mode: str) -> Need:
    return Need(
        device_type="cuda", capability=torch.cuda.get_device_capability(), dtype=torch.float16, bits=bits,
        group_size=group_size, shape=shape, zeros_mode=mode,
    )  # fmt: skip


def random_weight(need: Need) -> BitblasWeight:
    generator = torch.Generator(CUDA).manual_seed(1)
    outputs, inputs = need.shape
    codes_NK = torch.randint(0, 1 << need.bits, need.shape, generator=generator, device=CUDA)
    shape_NG = (outputs, inputs // need.group_size)
    scales_NG = (torch.rand(shape_NG, generator=generator, device=CUDA) / 64).half()
    zeros_NG = torch.randint(0, 1 << need.bits, shape_NG, generator=generator, device=CUDA).half()
    return BitblasWeight(
        codes_NB=pack_codes(codes_NK, need.bits),
        scales_NG=scales_NG,
        zeros_NG=None if need.zeros_mode == "none" else zeros_NG * (scales_NG if need.zeros_mode == "rescale" else 1),
        zeros_mode=need.zeros_mode,  # type: ignore[arg-type]
        order_K=torch.randperm(inputs, generator=generator, device=CUDA),
        bits=need.bits,
        group_size=need.group_size,
    )


def bound(x_MK: Tensor, weight_NK: Tensor, mode: str) -> Tensor:
    """What rounding weights to float16 and sums to float32 may change: per result, in units of its summands' sizes."""
    sizes_MN = x_MK.double().abs() @ weight_NK.double().abs().T
    if mode == "rescale":  # there code * scale is rounded, which is larger than the weight
        sizes_MN = 4 * sizes_MN + x_MK.double().abs().sum(dim=1, keepdim=True) / 4
    return 2**-10 * sizes_MN + 1e-6


@pytest.mark.parametrize(("bits", "shape", "group_size", "mode"), CASES, ids=str)
def test_products_are_within_rounding(
    bits: int, shape: tuple[int, int], group_size: int, mode: str, package: BitblasPackage
) -> None:
    need = need_of(bits, shape, group_size, mode)
    assert package.can_run(need) is None
    package.prepare([need], CUDA, iter)
    weight = random_weight(need)
    dense_NK = dequantize_bitblas_reference(weight, torch.float32)
    for rows in (1, 16, 129):
        for dtype in (torch.float16, torch.bfloat16):
            x_MK = torch.randn(rows, shape[1], device=CUDA).to(dtype)
            bias_N = torch.randn(shape[0], device=CUDA).to(dtype)
            exact = x_MK.double() @ dense_NK.double().T + bias_N.double()
            error = (package.linear(x_MK, weight, bias_N).double() - exact).abs()
            allowed = bound(x_MK, dense_NK, mode) + torch.finfo(dtype).eps * exact.abs()
            assert bool((error <= allowed).all())


def test_a_rows_bits_do_not_depend_on_the_others(package: BitblasPackage) -> None:
    need = need_of(4, (1024, 512), 128, "original")
    package.prepare([need], CUDA, iter)
    weight, x_MK = random_weight(need), torch.randn(300, 512, device=CUDA).half()
    whole = package.linear(x_MK, weight, None)
    for rows in (slice(0, 16), slice(7, 23), slice(128, 300)):
        assert torch.equal(package.linear(x_MK[rows], weight, None), whole[rows])


def test_operators_are_captured(package: BitblasPackage) -> None:
    need = need_of(4, (1024, 512), 128, "original")
    package.prepare([need], CUDA, iter)
    weight, x_MK = random_weight(need), torch.randn(16, 512, device=CUDA).half()
    expected = package.linear(x_MK, weight, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = package.linear(x_MK, weight, None)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_operators_are_stored(package: BitblasPackage, tmp_path: Path) -> None:
    store = OperatorStore(tmp_path)
    need = need_of(4, (16, 32), 32, "original")
    BitblasPackage(store).prepare([need], CUDA, iter)
    shown: list[object] = []
    BitblasPackage(OperatorStore(tmp_path)).prepare([need], CUDA, lambda items: shown.extend(items) or items)
    assert not shown
