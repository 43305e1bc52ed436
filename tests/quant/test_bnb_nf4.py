"""NF4 in flight against transformers with BitsAndBytesConfig on the same folder."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import EngineUnderTest, oracle_logits, oracle_logprob, pass_logits, random_prompt
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pipeline.core import Request
from pipeline.errors import ConfigError
from pipeline.kernels.bnb import bitsandbytes
from pipeline.quant.bnb_spec import BnbSpec
from pipeline.quant.detect import resolve_spec
from pipeline.quant.linear import QuantLinear
from pipeline.quant.spec import QuantSettings

QUANTS = {"nf4": True, "nf4-single": False}
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (torch.float32, torch.bfloat16)]
each_quant = pytest.mark.parametrize("quant", QUANTS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_model = pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-biases", "qwen2", "qwen3", "mistral"])


def load_bnb(folder: Path, dtype: torch.dtype, double_quant: bool) -> nn.Module:
    """The checkpoint as transformers and bitsandbytes quantize it."""
    bitsandbytes()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=config, device_map="cpu", attn_implementation="eager"
    )
    return model.eval()


def linears_4bit(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, bitsandbytes().nn.Linear4bit)}


def dequantized(linear: Any) -> Tensor:
    weight: Tensor = bitsandbytes().functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return weight


def make_dense(model: nn.Module) -> nn.Module:
    """Put ordinary Linears with the dequantized weights in place of bitsandbytes' own."""
    for name, linear in linears_4bit(model).items():
        dense = nn.Linear(linear.in_features, linear.out_features, bias=False)
        dense.weight = nn.Parameter(dequantized(linear), requires_grad=False)
        dense.bias = linear.bias
        model.set_submodule(name, dense)
    return model


@each_dtype
@each_quant
@each_model
def test_every_linear_has_the_weights_of_transformers_with_bitsandbytes(
    name: str,
    quant: str,
    dtype: torch.dtype,
    checkpoint_folder: Callable[[str], Path],
    load_decoder: Callable[..., Any],
) -> None:
    folder = checkpoint_folder(name)
    theirs = linears_4bit(load_bnb(folder, dtype, QUANTS[quant]))
    ours = dict(load_decoder(folder, dtype, quant).quant_linears())
    assert set(ours) == set(theirs)
    assert len(ours) == 7 * 3, "all projections of three layers, and not the output head"
    for path, linear in ours.items():
        assert linear.dequantize().dtype == dtype
        assert torch.equal(linear.dequantize(), dequantized(theirs[path])), path
        assert (linear.bias is None) == (theirs[path].bias is None)
        if linear.bias is not None:
            assert torch.equal(linear.bias, theirs[path].bias)


@each_quant
@each_model
def test_logits_equal_those_of_the_dequantized_model(
    name: str, quant: str, checkpoint_folder: Callable[[str], Path], load_decoder: Callable[..., Any]
) -> None:
    """In float32, over whole prompts."""
    folder = checkpoint_folder(name)
    model = make_dense(load_bnb(folder, torch.float32, QUANTS[quant]))
    decoder = load_decoder(folder, torch.float32, quant)
    for length in (1, 17, 200):
        prompt = random_prompt(random.Random(length), length)
        assert float((pass_logits(decoder, prompt).double() - oracle_logits(model, prompt)).abs().max()) < 1e-4


@each_quant
@each_model
def test_scored_texts_equal_those_of_the_dequantized_model(
    name: str, quant: str, checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    """Targets and prompts, of the length of a token and longer than a pass, in float32."""
    folder = checkpoint_folder(name)
    model = make_dense(load_bnb(folder, torch.float32, QUANTS[quant]))
    rng = random.Random(0)
    rows = [
        Request(
            id=n, prompt_ids=random_prompt(rng, before), target_ids=random_prompt(rng, behind), score_prompt=n % 2 > 0
        )
        for n, (before, behind) in enumerate([(1, 1), (20, 1), (20, 30), (3, 150), (150, 3)])
    ]
    answers = build_engine(folder, torch.float32, quant, prefill_tokens=64).answer(rows)
    for row in rows:
        target = oracle_logprob(model, row.prompt_ids, row.target_ids)
        assert answers[row.id].cumulative_logprob == pytest.approx(target, abs=2e-5 * len(row.target_ids) + 1e-5)
        if row.score_prompt:
            prompt = oracle_logprob(model, row.prompt_ids[:1], row.prompt_ids[1:])
            assert answers[row.id].prompt_logprob == pytest.approx(prompt, abs=2e-5 * len(row.prompt_ids))


@each_quant
def test_bfloat16_logits_err_no_more_than_bitsandbytes_own(
    quant: str, checkpoint_folder: Callable[[str], Path], load_decoder: Callable[..., Any]
) -> None:
    """Both against the same weights in float64: ours may not be further off than bitsandbytes' CPU forward."""
    folder = checkpoint_folder("llama")
    exact = make_dense(load_bnb(folder, torch.bfloat16, QUANTS[quant])).double()
    theirs = load_bnb(folder, torch.bfloat16, QUANTS[quant])
    decoder = load_decoder(folder, torch.bfloat16, quant)
    our_error, their_error, size = [], [], []
    for length in (5, 64, 150):
        prompt = random_prompt(random.Random(length), length)
        expected = oracle_logits(exact, prompt)
        our_error.append(pass_logits(decoder, prompt).double() - expected)
        their_error.append(oracle_logits(theirs, prompt) - expected)
        size.append(expected)
    ours, bnb, whole = (float(torch.cat(e).square().mean().sqrt()) for e in (our_error, their_error, size))
    assert ours < 1.2 * bnb
    assert ours < 0.05 * whole


@each_dtype
@each_quant
def test_cached_weights_give_the_same_bits(
    quant: str,
    dtype: torch.dtype,
    checkpoint_folder: Callable[[str], Path],
    load_decoder: Callable[..., Any],
    build_engine: Callable[..., Any],
) -> None:
    folder = checkpoint_folder("llama-biases")
    under_test: EngineUnderTest = build_engine(folder, dtype, quant)
    rng = random.Random(0)
    asked = [Request(id=n, prompt_ids=random_prompt(rng, 20)) for n in range(12)]
    asked += [Request(id=n, prompt_ids=random_prompt(rng, 9), candidates=((5, 6), (7,))) for n in range(12, 20)]
    uncached = under_test.answer(asked)
    decoder = load_decoder.__wrapped__(folder, dtype, quant)  # type: ignore[attr-defined]  # one of its own
    dense = [linear.dense_bytes for _, linear in decoder.quant_linears()]
    assert decoder.cache_dequantized(0) == 0
    rows = [shape.rows for shape in under_test.plan.shapes]
    part = decoder.cache_dequantized(sum(dense[:5]) + dense[5] - 1, rows)
    assert part == sum(dense[:5]) == sum(linear.cached_bytes for _, linear in decoder.quant_linears())
    half = EngineUnderTest(decoder, under_test.plan, under_test.geometry, dtype)
    assert half.answer(asked) == uncached
    assert decoder.cache_dequantized(1 << 40, rows) == sum(dense)
    assert all(linear.cached_bytes == linear.dense_bytes for _, linear in decoder.quant_linears())
    assert half.answer(asked) == uncached


@each_dtype
def test_both_kernels_give_the_same_answers(
    dtype: torch.dtype, checkpoint_folder: Callable[[str], Path], load_decoder: Callable[..., Any]
) -> None:
    folder = checkpoint_folder("llama")
    prompt = random_prompt(random.Random(1), 50)
    by_kernel = [pass_logits(load_decoder(folder, dtype, "nf4", k), prompt) for k in ("reference", "bitsandbytes")]
    assert torch.equal(*by_kernel)


@each_quant
def test_quantized_weights_are_small_and_counted_right(
    quant: str, checkpoint_folder: Callable[[str], Path], load_decoder: Callable[..., Any]
) -> None:
    decoder = load_decoder(checkpoint_folder("llama-wide"), torch.bfloat16, quant)
    linears = dict(decoder.quant_linears()).values()
    stored, dense = sum(m.stored_bytes for m in linears), sum(m.dense_bytes for m in linears)
    assert dense == 2 * sum(m.in_features * m.out_features for m in linears)
    assert stored <= 0.35 * dense
    double = QUANTS[quant]
    spec = BnbSpec(bits=4, quant_type="nf4", blocksize=64, double_quant=double)
    assert stored == pytest.approx(dense / 2 * spec.bytes_per_weight, rel=0.03)
    total = decoder.weight_bytes()
    assert stored < total
    assert not any(isinstance(p, nn.Parameter) and p.numel() > 509 * 256 for p in decoder.model.parameters())


@each_quant
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_the_output_head_and_the_embedding_stay_as_they_are(
    name: str, quant: str, checkpoint_folder: Callable[[str], Path], load_decoder: Callable[..., Any], reference: Any
) -> None:
    folder = checkpoint_folder(name)
    model = load_decoder(folder, torch.bfloat16, quant).model
    whole = reference(folder, torch.bfloat16)
    assert not isinstance(model.lm_head, QuantLinear)
    assert torch.equal(model.lm_head.weight.float(), whole.lm_head.weight.float())
    assert torch.equal(model.model.embed_tokens.weight, whole.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        ("o_proj", {f"model.layers.{n}.self_attn.o_proj" for n in range(3)}),
        ("model.layers.1.mlp.up_proj", {"model.layers.1.mlp.up_proj"}),
        ("model.layers.2", None),
    ],
)
def test_modules_to_skip_stay_unquantized(
    skip: str, kept: set[str] | None, checkpoint_folder: Callable[[str], Path], load_decoder: Callable[..., Any]
) -> None:
    folder = checkpoint_folder("llama")
    everything = set(dict(load_decoder(folder, torch.float32, "nf4").quant_linears()))
    quantized = set(dict(load_decoder(folder, torch.float32, "nf4", skip_modules=(skip,)).quant_linears()))
    expected = kept if kept is not None else {n for n in everything if n.startswith("model.layers.2.")}
    assert expected
    assert everything - quantized == expected


@pytest.mark.parametrize(
    ("skip", "path", "skipped"),
    [
        ("lm_head", "lm_head", True),
        ("o_proj", "model.layers.7.self_attn.o_proj", True),
        ("mlp", "model.layers.7.mlp.up_proj", True),
        ("model.layers.7.mlp.up_proj", "model.layers.7.mlp.up_proj", True),
        ("model.layers.7", "model.layers.7.mlp.up_proj", True),
        ("model", "model.layers.7.mlp.up_proj", True),
        ("7", "model.layers.7.mlp.up_proj", True),
        ("model.layers.1", "model.layers.10.mlp.up_proj", False),
        ("model.layers.7.mlp.up", "model.layers.7.mlp.up_proj", False),
        ("proj", "model.layers.7.mlp.up_proj", False),
        ("layers.7", "model.layers.7.mlp.up_proj", False),
        ("mlp.up_proj", "model.layers.7.mlp.up_proj", False),
        ("model.layers.*.mlp", "model.layers.7.mlp.up_proj", False),
        ("", "model.layers.7.mlp.up_proj", False),
    ],
)
def test_names_match_as_in_vllm(skip: str, path: str, skipped: bool) -> None:
    """Read from its is_layer_skipped_bnb: an entry equals a part of the path, or the path up to the end of a part."""
    assert BnbSpec(bits=4, skip_modules=(skip,)).skips(path) is skipped
    assert BnbSpec(bits=4, skip_modules=("other", skip)).skips(path) is skipped
    assert BnbSpec(bits=4).skips(path) is False


def test_a_quantized_linear_is_its_dequantized_product(
    checkpoint_folder: Callable[[str], Path], load_decoder: Callable[..., Any]
) -> None:
    decoder = load_decoder(checkpoint_folder("qwen2"), torch.float32, "nf4")
    linear = dict(decoder.quant_linears())["model.layers.0.self_attn.q_proj"]
    x = torch.randn(2, 9, linear.in_features)
    expected = F.linear(x.double(), linear.dequantize().double(), linear.bias.double())
    assert float((linear(x).double() - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("method", ["auto", "none", "bnb"])
def test_a_checkpoint_of_an_unknown_method_is_refused(method: str) -> None:
    stored = {"quant_method": "hqq"}
    with pytest.raises(ConfigError, match=r"model.path=there is quantized with hqq, which is not supported"):
        resolve_spec(QuantSettings(method=method), stored, "there")


def test_a_kernel_without_quantized_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"quant\.kernel=reference has nothing to run"):
        resolve_spec(QuantSettings(kernel="reference"), {}, "there")
    assert resolve_spec(QuantSettings(), {}, "there").quantized is False
