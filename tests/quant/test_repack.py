"""GPTQ weights in BitBLAS' layout: exactly the same weights, whatever their bits, groups, zero points and order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.kernels.packed_bitblas import dequantize_bitblas_reference, pack_codes, unpack_codes
from pipeline.quant import bitblas
from pipeline.quant.bitblas import NotRepackable, repack_gptq
from pipeline.quant.gptq import read_gptq
from pipeline.quant.spec import StoredModule


def words(fields_RC: Any, bits: int) -> Tensor:
    """Fields as GPTQ packs them: little-endian along the columns into int32 words."""
    split_RWF = fields_RC.astype(np.uint64).reshape(len(fields_RC), -1, 32 // bits)
    shifts = np.arange(0, 32, bits, dtype=np.uint64)
    return torch.from_numpy((split_RWF << shifts).sum(axis=2).astype(np.uint32).view(np.int32))


@st.composite
def gptq_weights(draw: st.DrawFn) -> tuple[StoredModule, dict[str, Tensor], int, Any]:
    """A module's tensors, how much its zero points are short of the true ones, and the weight [N, K] in float64."""
    bits = draw(st.sampled_from([2, 4, 8]))
    group_size = draw(st.sampled_from([16, 32, 64, 128]))
    inputs = group_size * draw(st.integers(1, 4))
    outputs = 16 * draw(st.integers(1, 6))
    if draw(st.booleans()):
        group_size = inputs
    groups, top = inputs // group_size, (1 << bits) - 1
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes_NK = rng.integers(0, top + 1, (outputs, inputs))
    symmetric, offset = draw(st.booleans()), draw(st.sampled_from([0, 1]))
    zeros_GN = np.full((groups, outputs), 1 << (bits - 1)) if symmetric else rng.integers(0, top + 1, (groups, outputs))
    if not symmetric:
        zeros_GN[:, :: draw(st.integers(1, 5))] = 0
    scales_GN = rng.uniform(1e-4, 0.1, (groups, outputs)).astype(draw(st.sampled_from([np.float16, np.float32])))
    g_idx = np.arange(inputs) // group_size
    if draw(st.booleans()):
        g_idx = rng.permutation(g_idx)
    ones = sum(1 << start for start in range(0, 32, bits))
    stored_zeros = words(zeros_GN, bits).to(torch.int64) - offset * ones  # whole words, as the writers of version 1 do
    tensors = {
        "qweight": words(codes_NK, bits).T.contiguous(),
        "qzeros": ((stored_zeros + (1 << 31)) % (1 << 32) - (1 << 31)).to(torch.int32),
        "scales": torch.from_numpy(scales_GN),
        "g_idx": torch.from_numpy(g_idx.astype(np.int32)),
    }
    module = StoredModule(
        path="linear", leaves=tuple(tensors), bits=bits, group_size=group_size, shape=(outputs, inputs), num_bytes=0
    )
    exact_NK = (codes_NK - zeros_GN[g_idx].T) * scales_GN[g_idx].T.astype(np.float64)
    return module, tensors, offset, exact_NK


@settings(max_examples=200, deadline=None)
@given(gptq_weights())
def test_repacked_weights_are_exactly_the_same(drawn: tuple[StoredModule, dict[str, Tensor], int, Any]) -> None:
    module, tensors, offset, exact_NK = drawn
    packed = repack_gptq(read_gptq(module, tensors, offset))
    assert packed.shape == module.shape
    assert packed.codes_NB.shape == (module.shape[0], module.shape[1] * module.bits // 8)
    expected = torch.from_numpy(exact_NK.astype(np.float32))  # rounded once, from float64
    assert torch.equal(dequantize_bitblas_reference(packed, torch.float32), expected)


@settings(max_examples=25, deadline=None)
@given(gptq_weights())
def test_repacking_in_blocks_changes_nothing(drawn: tuple[StoredModule, dict[str, Tensor], int, Any]) -> None:
    module, tensors, offset, _ = drawn
    weight = read_gptq(module, tensors, offset)
    whole = repack_gptq(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitblas, "BLOCK_WEIGHTS", 3 * module.shape[1])
        assert torch.equal(repack_gptq(weight).codes_NB, whole.codes_NB)


@settings(max_examples=50, deadline=None)
@given(gptq_weights())
def test_the_order_keeps_inputs_of_a_group_in_their_order(
    drawn: tuple[StoredModule, dict[str, Tensor], int, Any],
) -> None:
    module, tensors, offset, _ = drawn
    packed = repack_gptq(read_gptq(module, tensors, offset))
    expected = np.argsort(tensors["g_idx"].numpy(), kind="stable")
    in_order = (np.diff(tensors["g_idx"].numpy()) >= 0).all()
    assert packed.order_K is None if in_order else packed.order_K.tolist() == expected.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_is_undone_by_unpacking(bits: int) -> None:
    low, high = (-128, 128) if bits == 8 else (0, 1 << bits)
    codes_NK = torch.randint(low, high, (48, 80), dtype=torch.int32)
    assert torch.equal(unpack_codes(pack_codes(codes_NK, bits), bits), codes_NK)


@pytest.mark.parametrize("moved", [0, 37, 63])
def test_one_input_too_many_in_a_group_is_refused(moved: int) -> None:
    g_idx = torch.arange(64, dtype=torch.int32) // 32
    g_idx[moved] = 1 - g_idx[moved]
    module = StoredModule(path="linear", leaves=(), bits=4, group_size=32, shape=(16, 64), num_bytes=0)
    tensors = {
        "qweight": torch.zeros(8, 16, dtype=torch.int32),
        "qzeros": torch.zeros(2, 2, dtype=torch.int32),
        "scales": torch.ones(2, 16),
        "g_idx": g_idx,
    }
    with pytest.raises(NotRepackable, match=r"its g_idx gives group 0 3[13] inputs, .* 32 in each; use quant=gptq"):
        repack_gptq(read_gptq(module, tensors, 0))
