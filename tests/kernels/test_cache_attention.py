"""Attention to a static cache, in plain torch and in Triton, against a float64 softmax one slot at a time."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_checks import DTYPES
from triton_process import HAS_TRITON

from pipeline.errors import ConfigError
from pipeline.kernels.attention import AttentionRule, attend_cache
from pipeline.kernels.cache_attention import AttentionNeed, CachedLayer
from pipeline.kernels.float8 import dequantize, quantize
from pipeline.kernels.registry import CACHE_ATTENTION, choose_attention

KERNELS = pytest.mark.parametrize("kernel", sorted(CACHE_ATTENTION))
FLOAT8_CACHE = pytest.mark.parametrize("float8", [False, True], ids=["plain", "float8"])
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
LENGTHS = (1, 31, 64, 97, 130)
SHAPES = [
    pytest.param((4, 4, 16, 130, 1), AttentionRule(0.25), id="ungrouped"),
    pytest.param((6, 2, 40, 130, 3), AttentionRule(0.2), id="groups-of-3-3splits"),
    pytest.param((20, 1, 96, 131, 2), AttentionRule(0.1, 33), id="one-kv-window-2splits"),
    pytest.param((4, 2, 256, 200, 4), AttentionRule(0.06, 1, 5.0), id="window-of-one-capped-4splits"),
    pytest.param((4, 2, 128, 160, 1), AttentionRule(0.3, 64, 1.5), id="window-capped"),
]
H200 = AttentionNeed(device_type="cuda", capability=(9, 0), dtype=torch.bfloat16)


@pytest.fixture
def attend(request: pytest.FixtureRequest) -> Callable[..., tuple[Tensor, Tensor]]:
    """The kernel of a name: Triton's in the interpreter, and on the GPU where there is one."""

    def run(kernel: str, *args: Any) -> tuple[Tensor, Tensor]:
        if kernel == "numba" and args[0].dtype == torch.float16:
            pytest.skip("refused: Numba knows no float16")
        if kernel != "triton":
            return CACHE_ATTENTION[kernel].attend(*args)
        result: tuple[Tensor, Tensor] = request.getfixturevalue("interpreter")(CACHE_ATTENTION[kernel].attend, *args)
        return result

    return run


def a_cache(shape: tuple[int, ...], dtype: torch.dtype, float8: bool) -> tuple[Tensor, CachedLayer, Tensor]:
    """Queries, a layer with large values behind each row's end, and the rows' lengths."""
    heads, kv_heads, dim, positions, _ = shape
    torch.manual_seed(heads + dim)
    lengths = torch.tensor(LENGTHS)
    q = torch.randn(len(LENGTHS), heads, dim).to(dtype)
    k, v = (torch.randn(len(LENGTHS), kv_heads, positions, dim).to(dtype) for _ in range(2))
    for slot, length in enumerate(LENGTHS):
        k[slot, :, length:], v[slot, :, length:] = 1e4, -1e4
    if not float8:
        return q, CachedLayer(k, v), lengths
    (keys, key_scales), (values, value_scales) = quantize(k), quantize(v)
    return q, CachedLayer(keys, values, key_scales, value_scales), lengths


def oracle(q: Tensor, layer: CachedLayer, slot: int, length: int, rule: AttentionRule) -> tuple[Tensor, Tensor]:
    """Output [H, D] and log-sum-exp [H] of one slot in float64, of the values that the cache holds."""
    keys, values = layer.keys, layer.values
    if layer.key_scales is not None and layer.value_scales is not None:
        keys, values = dequantize(keys, layer.key_scales), dequantize(values, layer.value_scales)
    begin = 0 if rule.window is None else max(0, length - rule.window)
    groups = q.shape[1] // keys.shape[1]
    k, v = (x[slot, :, begin:length].double().repeat_interleave(groups, dim=0) for x in (keys, values))
    scores = (k @ q[slot].double()[..., None])[..., 0] * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    return (torch.softmax(scores, -1)[:, None] @ v)[:, 0], torch.logsumexp(scores, -1)


@FLOAT8_CACHE
@KERNELS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "rule"), SHAPES)
def test_each_slot_up_to_its_length(
    shape: tuple[int, ...], rule: AttentionRule, dtype: torch.dtype, kernel: str, float8: bool,
    attend: Callable[..., tuple[Tensor, Tensor]],
) -> None:  # fmt: skip
    q, layer, lengths = a_cache(shape, dtype, float8)
    out, lse = attend(kernel, q, layer, lengths, rule, shape[-1])
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    for slot, length in enumerate(LENGTHS):
        expected_out, expected_lse = oracle(q, layer, slot, length, rule)
        assert float((out[slot].double() - expected_out).abs().max()) < TOLERANCE[dtype] * (2 if float8 else 1)
        assert float((lse[slot].double() - expected_lse).abs().max()) < TOLERANCE[dtype]


@FLOAT8_CACHE
@KERNELS
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slots_bits_do_not_depend_on_the_others(
    dtype: torch.dtype, kernel: str, float8: bool, attend: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    rule, splits = AttentionRule(0.2), 2
    q, layer, lengths = a_cache((4, 2, 32, 130, splits), dtype, float8)
    out, lse = attend(kernel, q, layer, lengths, rule, splits)
    order = torch.tensor([3, 0, 4, 2, 1])
    fields = [x if x is None else x[order] for x in (layer.keys, layer.values, layer.key_scales, layer.value_scales)]
    moved_out, moved_lse = attend(kernel, q[order], CachedLayer(*fields), lengths[order], rule, splits)  # type: ignore[arg-type]
    assert torch.equal(moved_out, out[order])
    assert torch.equal(moved_lse, lse[order])
    others = q.clone()
    others[0] = math.nan
    out_beside_nan, _ = attend(kernel, others, layer, lengths, rule, splits)
    assert torch.equal(out_beside_nan[1:], out[1:])
    assert bool(out_beside_nan[0].isnan().all())


@FLOAT8_CACHE
@KERNELS
@pytest.mark.parametrize("splits", [1, 2])
def test_a_free_slot_gets_finite_numbers_and_changes_no_other(
    splits: int, kernel: str, float8: bool, attend: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    q, layer, lengths = a_cache((4, 2, 32, 130, splits), torch.float32, float8)
    rule = AttentionRule(0.2)
    out, lse = attend(kernel, q, layer, lengths, rule, splits)
    free = lengths.clone()
    free[[1, 3]] = 0
    out_beside, lse_beside = attend(kernel, q, layer, free, rule, splits)
    assert bool(out_beside.isfinite().all())
    assert torch.equal(out_beside[[0, 2, 4]], out[[0, 2, 4]])
    assert torch.equal(lse_beside[[0, 2, 4]], lse[[0, 2, 4]])
    none, _ = attend(kernel, q, layer, free * 0, rule, splits)
    assert bool(none.isfinite().all())


@FLOAT8_CACHE
@KERNELS
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_for_some_of_the_slots(
    dtype: torch.dtype, kernel: str, float8: bool, attend: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    """A query's bits are those it has in a step of all slots."""
    rule = AttentionRule(0.2, 50)
    q, layer, lengths = a_cache((4, 2, 32, 130, 1), dtype, float8)
    out, lse = attend(kernel, q, layer, lengths, rule, 1)
    for slots in ([3], [4, 0, 2]):
        chosen = torch.tensor(slots)
        some_out, some_lse = attend(kernel, q[chosen], replace(layer, slots_B=chosen), lengths[chosen], rule, 1)
        assert torch.equal(some_out, out[chosen])
        assert torch.equal(some_lse, lse[chosen])


def test_numba_leaves_torch_its_threads() -> None:
    """Its first launch in a process sets OpenMP's number, for torch too, to that of the processors."""
    script = """
import torch
from pipeline.kernels.cache_attention import AttentionNeed
from pipeline.kernels.numba_attention import compile_for
torch.set_num_threads({threads})
for dtype in (torch.float32, torch.bfloat16):
    compile_for(AttentionNeed(device_type="cpu", capability=None, dtype=dtype, head_dim=16))
    assert torch.get_num_threads() == {threads}, torch.get_num_threads()
"""
    for threads in (1, 3):
        subprocess.run([sys.executable, "-c", script.format(threads=threads)], check=True)


def test_the_process_that_compiles_has_the_bits_of_those_that_read_what_it_kept(tmp_path: Path) -> None:
    """Numba links a function that it has just compiled otherwise than the one that it keeps."""
    script = """
import hashlib, torch
from pipeline.kernels.attention import AttentionRule
from pipeline.kernels.cache_attention import CachedLayer
from pipeline.kernels.numba_attention import attend_cached
torch.set_num_threads(1)
torch.manual_seed(0)
q, keys, values = torch.randn(5, 8, 40), torch.randn(5, 2, 130, 40), torch.randn(5, 2, 130, 40)
out, lse = attend_cached(q, CachedLayer(keys, values), torch.tensor([1, 31, 64, 97, 130]), AttentionRule(0.2), 1)
print(hashlib.sha256(out.numpy().tobytes() + lse.numpy().tobytes()).hexdigest())
"""
    kept = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    first, second = (
        subprocess.run([sys.executable, "-c", script], env=kept, check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    )
    assert list(tmp_path.rglob("*.nbc"))
    assert first == second


def test_without_a_place_for_its_code_numba_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str) -> None:
        raise RuntimeError("cannot cache function 'attend': no locator available")

    monkeypatch.setattr("pipeline.kernels.numba_attention.importlib.import_module", nowhere)
    need = AttentionNeed(device_type="cpu", capability=None, dtype=torch.float32, head_dim=16)
    assert choose_attention("auto", need)[0].name == "slotwise"
    with pytest.raises(ConfigError, match=r"nowhere to keep its machine code.*NUMBA_CACHE_DIR"):
        choose_attention("numba", need)


def test_a_plain_cache_has_the_bits_of_the_products_over_it() -> None:
    q, layer, lengths = a_cache((4, 2, 32, 130, 1), torch.float32, False)
    rule = AttentionRule(0.2, 40)
    ours = CACHE_ATTENTION["reference"].attend(q, layer, lengths, rule, 3)
    theirs = attend_cache(q, layer.keys, layer.values, lengths, rule)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_keeps_four_significant_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 50, 64).to(dtype) * torch.logspace(-4, 3, 50).to(dtype)[:, None]
    x[1, 7] = 0
    codes, scales = quantize(x)
    assert codes.dtype == torch.uint8
    back = dequantize(codes, scales)
    largest = x.float().abs().amax(-1, keepdim=True)
    assert bool(((back - x.float()).abs() <= x.float().abs() / 16 + largest / 448 / 512 * 1.01).all())
    assert bool((back[1, 7] == 0).all())
    kept = torch.arange(50) != 9
    x[:, 9, 3] = math.inf
    assert not bool(dequantize(*quantize(x))[:, 9].isfinite().any())
    assert torch.equal(dequantize(*quantize(x))[:, kept], back[:, kept])


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_auto_takes_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_attention("auto", H200)[0].name == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernel, reason = choose_attention("auto", H200)
    assert kernel.name == "reference"
    assert "asked for" in reason


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"device_type": "cpu", "capability": None}, "run on cuda devices, not on cpu"),
        ({"capability": (7, 5)}, "need compute capability 8.0, this device has 7.5"),
        ({"dtype": torch.float64}, "not in float64"),
        ({"head_dim": 512}, "heads of 256 in this dtype, not of 512"),
        ({"head_dim": 256, "dtype": torch.float32}, "heads of 128 in this dtype, not of 256"),
    ],
)
def test_what_triton_cannot_read_is_said(changes: dict[str, Any], told: str) -> None:
    need = replace(H200, **changes)
    kernel, reason = choose_attention("auto", need)
    assert kernel.name == ("numba" if need.device_type == "cpu" else "reference")
    assert told in reason
    with pytest.raises(ConfigError, match=r"engine\.attention=triton cannot run here: .*" + told):
        choose_attention("triton", need)


def test_on_a_cpu_auto_takes_numba_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = AttentionNeed(device_type="cpu", dtype=torch.bfloat16)
    assert choose_attention("auto", cpu)[0].name == "numba"
    kernel, reason = choose_attention("auto", replace(cpu, dtype=torch.float16))
    assert kernel.name == "slotwise"
    assert "Numba's kernel reads float32 and bfloat16, not float16" in reason
    monkeypatch.setitem(sys.modules, "numba", None)
    kernel, reason = choose_attention("auto", cpu)
    assert kernel.name == "slotwise"
    assert "numba cannot be imported" in reason
    with pytest.raises(ConfigError, match=r"engine\.attention=numba cannot run here: numba cannot be imported"):
        choose_attention("numba", cpu)


def test_without_triton_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    kernel, reason = choose_attention("auto", H200)
    assert kernel.name == "reference"
    assert "cannot be imported" in reason
