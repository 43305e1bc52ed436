"""Attention over segments against a float64 softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipeline.engine.attention import PackedPrefill, RowSpan, TrieMask
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.plan import LengthClass, ModelGeometry, round_up
from pipeline.engine.trie import build_trie
from pipeline.kernels.attention import (
    AttentionRule,
    attend_cache,
    attend_causal,
    attend_reference,
    attend_segment,
    merge_segments,
    segment_kernel,
)

HEADS = [pytest.param(4, 4, id="ungrouped"), pytest.param(6, 2, id="groups-of-3"), pytest.param(8, 1, id="one-kv")]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in TOLERANCE]


def oracle(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Output [H, T, D] and log-sum-exp [H, T] in float64, one head at a time."""
    groups = q.shape[0] // k.shape[0]
    outs, lses = [], []
    for head in range(q.shape[0]):
        keys, values = k[head // groups].double(), v[head // groups].double()
        scores = q[head].double() @ keys.T * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        outs.append(torch.softmax(scores, dim=-1) @ values)
        lses.append(torch.logsumexp(scores, dim=-1))
    return torch.stack(outs), torch.stack(lses)


def sees(query: int, key: int, window: int | None) -> bool:
    """Whether the token at a position sees the one at another: itself, and window - 1 before it."""
    return key <= query and (window is None or query - key < window)


def window_mask(tokens: int, window: int | None) -> Tensor:
    return torch.tensor([[sees(query, key, window) for key in range(tokens)] for query in range(tokens)])


def qkv(heads: int, kv_heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(heads * 1000 + queries * 100 + keys)
    shapes = ((heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, dim))
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def assert_close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    assert actual[0].dtype == dtype
    assert actual[1].dtype == torch.float32
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert float((ours.double() - theirs).abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(("tokens", "dim"), [(1, 16), (2, 64), (33, 16), (129, 32), (300, 128)])
def test_a_segment(tokens: int, dim: int, heads: int, kv_heads: int, causal: bool, dtype: torch.dtype) -> None:
    q, k, v = qkv(heads, kv_heads, tokens, tokens, dim, dtype)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() if causal else None
    attend = attend_causal if causal else attend_segment
    assert_close(attend(q, k, v, AttentionRule(dim**-0.5)), oracle(q, k, v, dim**-0.5, mask), dtype)


WINDOWS = [
    pytest.param(tokens, window, id=f"{tokens}tokens-{window}window")
    for tokens in (1, 2, 16, 17, 33, 100)
    for window in sorted({1, 2, 7, 16, tokens - 1, tokens, tokens + 1, 10_000} - {0})
]


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["", "capped"])
@pytest.mark.parametrize(("tokens", "window"), WINDOWS)
def test_a_row_looks_at_itself_within_the_window(tokens: int, window: int, softcap: float | None) -> None:
    """In blocks where the row is longer than the window."""
    for dtype in TOLERANCE:
        q, k, v = qkv(6, 2, tokens, tokens, 16, dtype)
        expected = oracle(q, k, v, 0.5, window_mask(tokens, window), softcap)
        assert_close(attend_causal(q, k, v, AttentionRule(0.5, window, softcap)), expected, dtype)


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_capped_scores(heads: int, kv_heads: int, softcap: float) -> None:
    rule = AttentionRule(2.0, softcap=softcap)
    for dtype in TOLERANCE:
        q, k, v = qkv(heads, kv_heads, 21, 21, 16, dtype)
        assert_close(attend_segment(q, k, v, rule), oracle(q, k, v, 2.0, softcap=softcap), dtype)
        expected = oracle(q, k, v, 2.0, window_mask(21, None), softcap)
        assert_close(attend_causal(q, k, v, rule), expected, dtype)


def test_a_row_longer_than_its_window_has_equal_bits_as_its_longer_self() -> None:
    """Blocks begin at the row's first token: what a row's tokens get does not depend on what comes behind them."""
    q, k, v = qkv(4, 2, 100, 100, 16, torch.float32)
    rule = AttentionRule(0.5, 16)
    whole, _ = attend_causal(q, k, v, rule)
    part, _ = attend_causal(q[:, :48], k[:, :48], v[:, :48], rule)
    assert torch.equal(part, whole[:, :48])


def trie_oracle(prompt: int, parents: Sequence[int], window: int | None) -> Tensor:
    """[S + N, S + N]: what prompt tokens and trie nodes see, node by node along its path."""
    depth: list[int] = []
    paths: list[set[int]] = []
    for node, parent in enumerate(parents):
        depth.append(1 if parent < 0 else depth[parent] + 1)
        paths.append({node} | (set() if parent < 0 else paths[parent]))
    places = [*range(prompt), *(prompt - 1 + d for d in depth)]
    mask = torch.zeros(len(places), len(places), dtype=torch.bool)
    for query, key in product(range(len(places)), repeat=2):
        on_path = key < prompt or (query >= prompt and key - prompt in paths[query - prompt])
        mask[query, key] = on_path and sees(places[query], places[key], window)
    return mask


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["", "capped"])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 9, 10, 11, 12, 40])
@pytest.mark.parametrize("prompt", [1, 9, 10])
def test_candidates_look_along_their_path_within_the_window(
    prompt: int, window: int | None, softcap: float | None
) -> None:
    """Two rows in one pass with padding behind them, in every layer of which the rule may be another."""
    tries = [build_trie(((5, 6, 7, 8), (5, 6, 9, 9, 9), (5, 1), (4, 4, 4), (3,))), build_trie(((1, 2), (3, 4)))]
    spans, masks, start = [], [], 0
    for trie in tries:
        tree = TrieMask(torch.tensor(trie.ancestors()), torch.tensor(trie.depths))
        spans.append(RowSpan(start, prompt, tree))
        masks.append(trie_oracle(prompt, trie.parents, window))
        start += prompt + len(trie.tokens)
    padded = round_up(start)
    q, k, v = qkv(4, 2, padded, padded, 16, torch.float32)
    attention = PackedPrefill(tuple(spans), None, *(torch.zeros(padded, dtype=torch.int64) for _ in range(2)))
    out_THD = attention.attend(0, q, k, v, AttentionRule(0.5, window, softcap))
    for span, mask in zip(spans, masks, strict=True):
        row = slice(span.start, span.start + mask.shape[0])
        expected, _ = oracle(q[:, row], k[:, row], v[:, row], 0.5, mask, softcap)
        assert float((out_THD[row].transpose(0, 1).double() - expected).abs().max()) < 1e-5
    assert not out_THD[start:].any()


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["", "capped"])
@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 63, 64, 65])
def test_a_cache_is_read_within_the_window(window: int, softcap: float | None) -> None:
    """Windows of one token, of a row's length and one off it, and longer than every row."""
    lengths = torch.tensor([1, 2, 31, 32, 33, 34, 63, 64])
    torch.manual_seed(0)
    for dtype in TOLERANCE:
        q = torch.randn(8, 6, 16).to(dtype)
        k, v = (torch.randn(8, 2, 64, 16).to(dtype) for _ in range(2))
        out, lse = attend_cache(q, k, v, lengths, AttentionRule(0.5, window, softcap))
        for slot, length in enumerate(lengths.tolist()):
            seen = [key for key in range(length) if sees(length - 1, key, window)]
            expected = oracle(q[slot][:, None], k[slot][:, seen], v[slot][:, seen], 0.5, softcap=softcap)
            assert float((out[slot].double() - expected[0][:, 0]).abs().max()) < TOLERANCE[dtype]
            assert float((lse[slot].double() - expected[1][:, 0]).abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("window", [None, 1, 5, 16])
def test_decoding_token_by_token_equals_the_row_at_once(window: int | None) -> None:
    """A cache that is written and read as a row grows, against attention over the whole row."""
    cache, rule = small_cache(), AttentionRule(0.4, window)
    q, k, v = qkv(4, 2, 32, 32, 8, torch.float32)
    expected, _ = oracle(q, k, v, 0.4, window_mask(32, window))
    for position in range(32):
        here = torch.tensor([position])
        cache.write(1, torch.tensor([3]), here, k[:, here], v[:, here])
        read = cache.read(1)
        keys, values = read.keys, read.values
        query = q[:, position].expand(16, -1, -1)
        out, _ = attend_cache(query, keys, values, torch.full((16,), position + 1), rule)
        assert float((out[3].double() - expected[:, position]).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 100), (5, 33), (40, 3)])
def test_a_segment_of_others_tokens(queries: int, keys: int, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(heads, kv_heads, queries, keys, 32, dtype)
    assert_close(attend_segment(q, k, v, AttentionRule(0.3)), oracle(q, k, v, 0.3), dtype)


@pytest.mark.parametrize(
    ("dtype", "dim", "capability", "is_flash"),
    [
        (torch.bfloat16, 128, (9, 0), True),
        (torch.float16, 256, (8, 0), True),
        (torch.float16, 128, (7, 5), False),
        (torch.bfloat16, 264, (9, 0), False),
        (torch.bfloat16, 100, (9, 0), False),
        (torch.float32, 128, (9, 0), False),
    ],
    ids=str,
)
def test_on_a_gpu_flash_attention_takes_what_it_can_run(
    dtype: torch.dtype, dim: int, capability: tuple[int, int], is_flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's operator raises on GPUs before Ampere (a T4 has 7.5), and for longer or odd heads."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    queries = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(4, 9, dim))
    chosen = segment_kernel(queries, AttentionRule(0.1))  # type: ignore[arg-type]
    assert chosen.__name__ == ("by_flash" if is_flash else "by_reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_the_reference_with_a_mask(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(heads, kv_heads, 20, 20, 16, dtype)
    mask = (torch.rand(20, 20) < 0.3) | torch.eye(20, dtype=torch.bool)
    assert_close(attend_reference(q, k, v, AttentionRule(0.25), mask), oracle(q, k, v, 0.25, mask), dtype)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("cuts", [(1,), (17,), (63,), (1, 2), (20, 40), (5, 6, 7, 60)])
def test_segments_merged_equal_the_whole(cuts: tuple[int, ...], heads: int, kv_heads: int) -> None:
    q, k, v = qkv(heads, kv_heads, 5, 64, 16, torch.float32)
    ends = (0, *cuts, 64)
    parts = [attend_segment(q, k[:, a:b], v[:, a:b], AttentionRule(0.5)) for a, b in pairwise(ends)]
    assert_close(merge_segments(parts), oracle(q, k, v, 0.5), torch.float32)


@pytest.mark.parametrize("shift", [0.0, 300.0, -300.0])
def test_merging_scores_far_from_zero(shift: float) -> None:
    """The largest score is taken out before the exponential, in every part and in the merge."""
    q, k, v = qkv(4, 2, 3, 32, 16, torch.float32)
    q[..., 0], k[..., 0] = 1.0, shift
    parts = [attend_segment(q, k[:, a:b], v[:, a:b], AttentionRule(1.0)) for a, b in ((0, 10), (10, 32))]
    out, lse = merge_segments(parts)
    expected_out, expected_lse = oracle(q, k, v, 1.0)
    assert float((out.double() - expected_out).abs().max()) < 2e-4
    assert float((lse.double() - expected_lse).abs().max()) < 2e-4


@pytest.mark.parametrize("split", [1, 10, 39])
def test_a_prefix_and_a_causal_rest_equal_causal_attention(split: int) -> None:
    q, k, v = qkv(6, 2, 40, 40, 16, torch.float32)
    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    expected = [x[:, split:] for x in oracle(q, k, v, 0.25, causal)]
    rest = q[:, split:]
    merged = merge_segments(
        [
            attend_segment(rest, k[:, :split], v[:, :split], AttentionRule(0.25)),
            attend_causal(rest, k[:, split:], v[:, split:], AttentionRule(0.25)),
        ]
    )
    assert_close(merged, (expected[0], expected[1]), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("garbage", [0.0, 1e4, -1e4])
def test_a_cache_is_read_up_to_each_slots_length(garbage: float, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    lengths = torch.tensor([1, 2, 31, 64, 63])
    torch.manual_seed(0)
    q = torch.randn(5, heads, 16).to(dtype)
    k, v = (torch.randn(5, kv_heads, 64, 16).to(dtype) for _ in range(2))
    for slot, length in enumerate(lengths.tolist()):
        k[slot, :, length:], v[slot, :, length:] = garbage, garbage
    out, lse = attend_cache(q, k, v, lengths, AttentionRule(0.25))
    assert out.shape == (5, heads, 16)
    for slot, length in enumerate(lengths.tolist()):
        expected = oracle(q[slot][:, None], k[slot, :, :length], v[slot, :, :length], 0.25)
        assert float((out[slot].double() - expected[0][:, 0]).abs().max()) < TOLERANCE[dtype]
        assert float((lse[slot].double() - expected[1][:, 0]).abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slots_bits_do_not_depend_on_the_others(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    lengths = torch.randint(1, 200, (64,))
    q = torch.randn(64, 8, 32).to(dtype)
    k, v = (torch.randn(64, 2, 256, 32).to(dtype) for _ in range(2))
    out, lse = attend_cache(q, k, v, lengths, AttentionRule(0.2))
    order = torch.randperm(64)
    moved = attend_cache(q[order], k[order], v[order], lengths[order], AttentionRule(0.2))
    assert torch.equal(moved[0], out[order])
    assert torch.equal(moved[1], lse[order])
    fewer = attend_cache(q[:16], k[:16], v[:16], lengths[:16], AttentionRule(0.2))
    assert torch.equal(fewer[0], out[:16])
    assert torch.equal(fewer[1], lse[:16])


def small_cache(dtype: torch.dtype = torch.float32) -> KVCache:
    geometry = ModelGeometry(layers=2, kv_heads=2, head_dim=8, hidden=16, intermediate=32, vocab=50, max_positions=32)
    return KVCache(geometry, LengthClass(slots=16, max_len=32), dtype, torch.device("cpu"))


def test_a_cleared_slot_shows_nothing_of_its_nans() -> None:
    cache = small_cache()
    torch.manual_seed(2)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
        tensor[3] = float("nan")
    untouched = [t[4].clone() for t in (*cache.keys, *cache.values)]
    cache.clear(3)
    assert all(torch.equal(t[4], u) for t, u in zip((*cache.keys, *cache.values), untouched, strict=True))
    for layer in range(2):
        k, v = torch.randn(2, 2, 2, 8)
        cache.write(layer, torch.tensor([3, 3]), torch.tensor([0, 1]), k, v)
        q = torch.randn(16, 4, 8)
        read = cache.read(layer)
        keys, values = read.keys, read.values
        out, _ = attend_cache(q, keys, values, torch.full((16,), 2), AttentionRule(0.3))
        expected, _ = oracle(q[3][:, None], k, v, 0.3)
        assert float((out[3].double() - expected[:, 0]).abs().max()) < 1e-5


def test_the_cache_keeps_each_token_where_it_was_put() -> None:
    cache = small_cache()
    k, v = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    slots, positions = torch.tensor([0, 7, 7, 15, cache.scratch_slot]), torch.tensor([31, 0, 5, 2, 2])
    cache.write(1, slots, positions, k, v)
    read = cache.read(1)
    keys, values = read.keys, read.values
    assert keys.shape == values.shape == (16, 2, 32, 8), "the scratch slot is never read"
    for token in range(4):
        assert torch.equal(keys[slots[token], :, positions[token]], k[:, token])
        assert torch.equal(values[slots[token], :, positions[token]], v[:, token])
    assert int((keys != 0).any(dim=-1).sum()) == 4 * 2
    assert not cache.keys[0].any(), "other layers are left alone"
