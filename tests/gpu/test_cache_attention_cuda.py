"""The Triton kernel that reads the cache, on a GPU and at the sizes of real models, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.engine.attention import PackedPrefill, RowSpan, Tiling
from pipeline.engine.kv_cache import Segment
from pipeline.kernels.attention import AttentionRule
from pipeline.kernels.cache_attention import CachedLayer
from pipeline.kernels.float8 import dequantize, quantize
from pipeline.kernels.registry import CACHE_ATTENTION

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TRITON, REFERENCE = CACHE_ATTENTION["triton"].attend, CACHE_ATTENTION["reference"].attend
PLAIN = AttentionRule(128**-0.5)
CASES = [
    pytest.param((512, 32, 8, 128, 512, 1), PLAIN, id="llama3"),
    pytest.param((256, 32, 32, 128, 512, 1), PLAIN, id="llama2"),
    pytest.param((16, 32, 8, 128, 8000, 4), PLAIN, id="llama3-long"),
    pytest.param((64, 8, 4, 256, 1000, 2), AttentionRule(0.0625, 300, 50.0), id="gemma2"),
    pytest.param((33, 14, 2, 64, 77, 1), AttentionRule(0.125), id="qwen-small"),
    pytest.param((17, 71, 1, 80, 130, 1), AttentionRule(0.1), id="one-kv-head"),
]
DTYPES = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}
FLOAT8 = pytest.mark.parametrize("float8", [False, True], ids=["plain", "float8"])


def a_cache(shape: tuple[int, ...], dtype: torch.dtype, float8: bool) -> tuple[Tensor, CachedLayer, Tensor]:
    slots, heads, kv_heads, dim, positions, _ = shape
    generator = torch.Generator("cuda").manual_seed(heads + dim)
    q = torch.randn(slots, heads, dim, device="cuda", generator=generator).to(dtype)
    k, v = (
        torch.randn(slots, kv_heads, positions, dim, device="cuda", generator=generator).to(dtype) for _ in range(2)
    )
    lengths = torch.randint(1, positions + 1, (slots,), device="cuda", generator=generator)
    lengths[0], lengths[-1] = 1, positions
    if not float8:
        return q, CachedLayer(k, v), lengths
    (keys, key_scales), (values, value_scales) = quantize(k), quantize(v)
    return q, CachedLayer(keys, values, key_scales, value_scales), lengths


def oracle(q: Tensor, layer: CachedLayer, slot: int, length: int, rule: AttentionRule) -> tuple[Tensor, Tensor]:
    keys, values = layer.keys[slot], layer.values[slot]
    if layer.key_scales is not None and layer.value_scales is not None:
        keys, values = dequantize(keys, layer.key_scales[slot]), dequantize(values, layer.value_scales[slot])
    begin = 0 if rule.window is None else max(0, length - rule.window)
    groups = q.shape[1] // keys.shape[0]
    k, v = (x[:, begin:length].double().repeat_interleave(groups, dim=0) for x in (keys, values))
    scores = (k @ q[slot].double()[..., None])[..., 0] * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    return (torch.softmax(scores, -1)[:, None] @ v)[:, 0], torch.logsumexp(scores, -1)


@FLOAT8
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize(("shape", "rule"), CASES)
def test_against_float64(shape: tuple[int, ...], rule: AttentionRule, dtype: torch.dtype, float8: bool) -> None:
    if dtype == torch.float32 and shape[3] > 128:
        pytest.skip("refused: the registers do not hold it")
    q, layer, lengths = a_cache(shape, dtype, float8)
    for attend in (TRITON, REFERENCE):
        out, lse = attend(q, layer, lengths, rule, shape[-1])
        for slot in {0, 1, shape[0] // 2, shape[0] - 1}:
            expected_out, expected_lse = oracle(q, layer, slot, int(lengths[slot]), rule)
            assert float((out[slot].double() - expected_out).abs().max()) < DTYPES[dtype] * (2 if float8 else 1)
            assert float((lse[slot].double() - expected_lse).abs().max()) < max(DTYPES[dtype], 1e-4)


@FLOAT8
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_a_slots_bits_do_not_depend_on_the_others(dtype: torch.dtype, float8: bool) -> None:
    q, layer, lengths = a_cache((64, 32, 8, 128, 1000, 3), dtype, float8)
    out, lse = TRITON(q, layer, lengths, PLAIN, 3)
    order = torch.randperm(64, device="cuda")
    fields = [x if x is None else x[order] for x in (layer.keys, layer.values, layer.key_scales, layer.value_scales)]
    q_moved = q[order]
    q_moved[0] = math.nan
    moved_out, moved_lse = TRITON(q_moved, CachedLayer(*fields), lengths[order], PLAIN, 3)  # type: ignore[arg-type]
    assert torch.equal(moved_out[1:], out[order][1:])
    assert torch.equal(moved_lse[1:], lse[order][1:])
    assert bool(moved_out[0].isnan().all())


def test_it_is_captured() -> None:
    q, layer, lengths = a_cache((64, 32, 8, 128, 1000, 3), torch.bfloat16, False)
    expected, _ = TRITON(q, layer, lengths, PLAIN, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = TRITON(q, layer, lengths, PLAIN, 3)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
    lengths.fill_(5)
    graph.replay()
    assert torch.equal(out, TRITON(q, layer, lengths, PLAIN, 3)[0])


ROWS = CACHE_ATTENTION["triton"].rows
PASSES = [
    pytest.param((32, 8, 128), PLAIN, 0, id="llama3"),
    pytest.param((32, 8, 128), PLAIN, 217, id="llama3-behind-217"),
    pytest.param((32, 32, 128), PLAIN, 0, id="llama2"),
    pytest.param((8, 4, 256), AttentionRule(0.0625, 100, 50.0), 217, id="gemma2-behind-217"),
]


def a_pass(heads: tuple[int, int, int], earlier: int, dtype: torch.dtype) -> tuple[list[Tensor], list[RowSpan]]:
    """Queries, keys and values [heads, T, D] as a model hands them over (not contiguous), and the rows of the pass."""
    query_heads, kv_heads, dim = heads
    generator = torch.Generator("cuda").manual_seed(earlier)

    def random(count: int, tokens: int) -> Tensor:
        return torch.randn(tokens, count, dim, device="cuda", generator=generator).to(dtype).transpose(0, 1)

    begun = Segment(0, earlier)
    begun.put(0, random(kv_heads, earlier), random(kv_heads, earlier))
    spans, at = [], 0
    for length in (1, 64, 65, 500, 3, 1000, 127):
        spans.append(RowSpan(at, length, None, (begun,) if earlier else ()))
        at += length
    return [random(count, at + 48) for count in (query_heads, kv_heads, kv_heads)], spans


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "rule", "earlier"), PASSES)
def test_all_rows_of_a_pass_at_once(
    heads: tuple[int, int, int], rule: AttentionRule, earlier: int, dtype: torch.dtype
) -> None:
    """Against the same pass row by row in float32, and against itself with the rows in another order."""
    assert ROWS is not None
    qkv, spans = a_pass(heads, earlier, dtype)
    positions = torch.cat([torch.arange(earlier, earlier + s.causal, device="cuda") for s in spans])
    positions = torch.nn.functional.pad(positions, (0, qkv[0].shape[1] - positions.shape[0]))
    tiling = Tiling.of(spans, ROWS, torch.device("cuda"))
    ours = PackedPrefill(tuple(spans), None, positions, positions, tiling).attend(0, *qkv, rule)
    wide = [x.float() for x in qkv]
    for segment in {id(s): s for span in spans for s in span.earlier}.values():
        segment.keys, segment.values = [x.float() for x in segment.keys], [x.float() for x in segment.values]
    theirs = PackedPrefill(tuple(spans), None, positions, positions).attend(0, *wide, rule)
    assert float((ours.float() - theirs).abs().max()) < DTYPES[dtype]
    qkv, spans = a_pass(heads, earlier, dtype)
    tiling = Tiling.of(spans[::-1], ROWS, torch.device("cuda"))
    again = PackedPrefill(tuple(spans[::-1]), None, positions, positions, tiling).attend(0, *qkv, rule)
    assert torch.equal(again, ours)
