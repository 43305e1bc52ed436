"""The bitblas package as a kernel: products of float16 activations with packed weights on NVIDIA GPUs.

Weights are dequantized to float16 inside its operators, products are summed in float32. Activations in
bfloat16 are cast to float16 on the way in (the package cannot compile bfloat16), so that beyond 65504 they
would overflow; results leave in the activations' own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.kernels.bitblas_operators import (
    Operator,
    OperatorKey,
    OperatorStore,
    toolchain_obstacle,
)
from pipeline.kernels.need import Need, Progress
from pipeline.kernels.packed_bitblas import BitblasWeight, dequantize_bitblas_reference

OLDEST = (8, 0)
"""Compute capability that its schedules are made for."""
GROUP_SIZES = (32, 64, 128)
OUTPUTS = {2: 128, 4: 16}
INPUTS = 32
"""Of what their numbers have to be multiples, for outputs by bits; the code generated for others does not compile."""
CHECKED_ROWS = 33
CHECKED_OUTPUTS = 64
ALLOWED_ERROR = 1e-2
"""Of the largest result: far above rounding, far below what a wrong kernel gives."""


class BitblasPackage:
    """Runs operators out of a store, and has those that are missing built."""

    def __init__(self, store: OperatorStore) -> None:
        self._store = store

    def can_run(self, need: Need) -> str | None:
        """Why the package cannot run this, or None; the package itself is tried last, and only if it has to build."""
        reason = device_obstacle(need) or weight_obstacle(need)
        if reason is not None or self._store.holds(key_of(need)):
            return reason
        return toolchain_obstacle()

    def prepare(self, needs: Sequence[Need], device: torch.device, progress: Progress) -> None:
        """Build the operators that are missing, then try all on the device; raises ConfigError with the reason."""
        keys = list(dict.fromkeys(key_of(need) for need in needs))
        self._store.build(keys, progress)
        for key in keys:
            check_operator(self._store.load(key), key, device)

    def linear(self, x_MK: Tensor, weight: BitblasWeight, bias_N: Tensor | None) -> Tensor:
        """x W^T + b, [M, N] in x's dtype."""
        half_MK = x_MK.to(torch.float16)
        if weight.order_K is not None:
            half_MK = half_MK[:, weight.order_K]
        out_MN = self._store.load(key_for(weight, x_MK.device))(half_MK, weight)
        if bias_N is not None:
            out_MN += bias_N
        return out_MN.to(x_MK.dtype)


def device_obstacle(need: Need) -> str | None:
    """Why the package cannot run on this device in this dtype, or None."""
    if need.device_type != "cuda" or need.capability is None:
        return f"the bitblas package runs on NVIDIA GPUs (cuda), not on {need.device_type}"
    if need.capability < OLDEST:
        return "the bitblas package needs compute capability {}.{}, this device has {}.{}".format(
            *OLDEST, *need.capability
        )
    if need.dtype not in (torch.float16, torch.bfloat16):
        dtype = str(need.dtype).removeprefix("torch.")
        return f"the bitblas package multiplies in float16, not in {dtype}; set model.dtype=float16"
    return None


def passed_over(need: Need) -> str:
    """Why `auto` does not take the package: its speed, and that of its untuned schedules, is not measured."""
    asked = "only when asked for (quant.kernel=bitblas), since its speed is not measured"
    return device_obstacle(need) or weight_obstacle(need) or asked


def weight_obstacle(need: Need) -> str | None:
    """Why the package cannot multiply with such a weight, or None."""
    outputs, inputs = need.shape
    if need.bits not in OUTPUTS:
        return f"the bitblas package runs 2 and 4 bits, not {need.bits}"
    if need.scale_dtype != "F16":
        return f"the bitblas package takes scales in float16, and the checkpoint's are {need.scale_dtype}"
    if need.group_size not in (*GROUP_SIZES, inputs):
        return f"the bitblas package runs groups of 32, 64, 128 or all inputs, not of {need.group_size}"
    if outputs % OUTPUTS[need.bits] or inputs % INPUTS:
        multiples = f"outputs in multiples of {OUTPUTS[need.bits]} and inputs in those of {INPUTS}"
        return f"the bitblas package runs {need.bits} bits with {multiples}, not {outputs} x {inputs}"
    return None


def key_of(need: Need) -> OperatorKey:
    """The operator that a need needs."""
    assert need.capability is not None
    return OperatorKey(
        outputs=need.shape[0],
        inputs=need.shape[1],
        bits=need.bits,
        group_size=need.group_size,
        zeros_mode=need.zeros_mode,
        capability=need.capability,
    )


def key_for(weight: BitblasWeight, device: torch.device) -> OperatorKey:
    """The operator that multiplies with a weight."""
    outputs, inputs = weight.shape
    return OperatorKey(
        outputs=outputs,
        inputs=inputs,
        bits=weight.bits,
        group_size=weight.group_size,
        zeros_mode=weight.zeros_mode,
        capability=torch.cuda.get_device_capability(device),
    )


def check_operator(operator: Operator, key: OperatorKey, device: torch.device) -> None:
    """Compare an operator with the reference on random weights; raises ConfigError if it computes something else.

    An operator tells of no error of its own, and was compiled elsewhere perhaps.
    """
    random = torch.Generator(device).manual_seed(0)
    weight = _random_weight(key, random)
    x_MK = torch.randn(CHECKED_ROWS, key.inputs, device=device, generator=random).half()
    out_MN = operator(x_MK, weight)
    for edge in (slice(0, CHECKED_OUTPUTS), slice(-CHECKED_OUTPUTS, None)):
        expected_Mn = x_MK.float() @ dequantize_bitblas_reference(_some(weight, edge), torch.float32).T
        error = float((out_MN[:, edge] - expected_Mn).abs().max() / expected_Mn.abs().max())
        if not error <= ALLOWED_ERROR:
            raise ConfigError(
                f"quant.kernel=bitblas: the operator {key.file} differs from the reference by {error:.0%} of the "
                "largest result on this device; choose quant.kernel=auto, or delete it from quant.tuning_cache"
            )


def _random_weight(key: OperatorKey, random: torch.Generator) -> BitblasWeight:
    groups, device = key.inputs // key.group_size, random.device
    shape_NB = (key.outputs, key.inputs * key.bits // 8)
    codes_NB = torch.randint(-128, 128, shape_NB, dtype=torch.int8, device=device, generator=random)
    scales_NG = (torch.rand(key.outputs, groups, device=device, generator=random) / 64).half()
    zeros_NG = torch.randint(0, 1 << key.bits, (key.outputs, groups), device=device, generator=random).half()
    if key.zeros_mode == "rescale":
        zeros_NG *= scales_NG
    return BitblasWeight(
        codes_NB=codes_NB,
        scales_NG=scales_NG,
        zeros_NG=None if key.zeros_mode == "none" else zeros_NG,
        zeros_mode=key.zeros_mode,  # type: ignore[arg-type]  # a mode of the weight that asked for it
        order_K=None,
        bits=key.bits,
        group_size=key.group_size,
    )


def _some(weight: BitblasWeight, outputs: slice) -> BitblasWeight:
    zeros_NG = weight.zeros_NG
    return replace(
        weight,
        codes_NB=weight.codes_NB[outputs],
        scales_NG=weight.scales_NG[outputs],
        zeros_NG=None if zeros_NG is None else zeros_NG[outputs],
    )
