"""Smaller passes are run only where a row keeps its bits, and then it does; packed weights multiply like plain ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import low_rank, write_adapter
from oracle import CHECKPOINTS, SMALL, drive, random_prompt
from torch import Tensor, nn

from pipeline.core import Request, SamplingParams
from pipeline.engine.plan import EnginePlan, LengthClass
from pipeline.kernels import prepack
from pipeline.models.head import Float32Head
from pipeline.models.packed_linear import PackedLinear, pack_linears, packed_bytes
from pipeline.models.smaller_shapes import prove

PLAN = EnginePlan(
    length_classes=(LengthClass(slots=64, max_len=128),), prefill_tokens=(128, 256), logit_rows=32, vocab=509,
    kv_bytes=0, smaller=(16, 32, 48, 64, 96),
)  # fmt: skip
MODELS = [
    pytest.param(dtype, quant, id=f"{str(dtype).removeprefix('torch.')}-{quant}")
    for dtype in (torch.float32, torch.bfloat16)
    for quant in ("none", "nf4", "int8-plain")
]


def rows_of_any_length(count: int) -> list[Request]:
    """Answers that end one after another, so that steps run with every number of rows; some rows are scored."""
    rng = random.Random(3)
    rows = []
    for n in range(count):
        prompt = random_prompt(rng, rng.choice([1, 5, 30, 90, 128, 200]))
        settings: dict[str, Any] = [{}, {"temperature": 0.9, "seed": n}, {"repetition_penalty": 1.2}][n % 3]
        if n % 10 == 9:
            rows.append(Request(id=n, prompt_ids=prompt, candidates=((5, 6), (7,))))
        else:
            sampling = SamplingParams(max_new_tokens=1 + n % 37, logprobs=1, **settings)
            rows.append(Request(id=n, prompt_ids=prompt, sampling=sampling))
    return rows


@pytest.mark.parametrize(("dtype", "quant"), MODELS)
def test_answers_are_those_of_full_shapes(
    dtype: torch.dtype, quant: str, checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    settings = {"slots": 64, "prefill_tokens": 128}
    under_test = build_engine(checkpoint_folder("llama-wide"), dtype, quant, settled=True, **settings)
    if not any(under_test.plan.proven.values()):
        pytest.skip("on this processor rows of smaller passes have other bits")
    padded = replace(under_test, plan=replace(under_test.plan, proven={}))
    rows = rows_of_any_length(64)
    ours, theirs = under_test.engine(), padded.engine()
    answers = drive(ours, rows)
    assert drive(theirs, rows) == answers
    assert ours.counters.padded_tokens < theirs.counters.padded_tokens / 2
    assert drive(under_test.engine(), rows, polls_between=1) == answers, "with few rows at a time"


def test_answers_under_an_adapter_are_those_of_full_shapes(
    tmp_path: Path, checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    hidden = {**SMALL, **CHECKPOINTS["llama-wide"][1]}["hidden_size"]
    tensors = low_rank("model.layers.0.self_attn.q_proj", hidden, hidden, 20)
    tensors |= low_rank("lm_head", hidden, SMALL["vocab_size"], 20)
    adapter = write_adapter(tmp_path, tensors, r=20)
    under_test = build_engine(
        checkpoint_folder("llama-wide"), torch.float32, "none", "auto", adapter, settled=True, slots=64
    )
    padded = replace(under_test, plan=replace(under_test.plan, proven={}))
    rows = rows_of_any_length(30)
    assert under_test.answer(rows) == padded.answer(rows)


class Moody(nn.Linear):
    """A Linear that sums up otherwise in products of other sizes, or of some rows."""

    others: frozenset[int] = frozenset()
    last_row_of: int = 0

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if x.shape[0] in self.others:
            out[:, 3] += 1e-3
        if x.shape[0] == self.last_row_of:
            out[-1, 5] += 1e-3
        return out


class Model(nn.Module):
    """Two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.lm_head = Moody(32, 48), Moody(48, 32), Moody(32, 509)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def test_what_every_product_allows_is_proven() -> None:
    model = Model()
    plain = prove(model, PLAN, torch.float32)
    if not any(plain.values()):
        pytest.skip("on this processor rows of smaller products have other bits")
    assert set(plain) == {("prefill", 128), ("decode", 64), ("logits", 32)}, "a prompt that runs alone decides itself"
    model.second.others = frozenset({32})
    changed = prove(model, PLAN, torch.float32)
    assert changed["prefill", 128] == tuple(n for n in plain["prefill", 128] if n != 32)
    assert changed["decode", 64] == tuple(n for n in plain["decode", 64] if n != 32)
    assert changed["logits", 32] == plain["logits", 32]
    model.lm_head.others = frozenset({16})
    changed = prove(model, PLAN, torch.float32)
    assert changed["decode", 64] == tuple(n for n in plain["decode", 64] if n not in (16, 32)), "steps run the head too"
    assert changed["logits", 32] == ()
    assert 16 in changed["prefill", 128]
    model.first.others = frozenset({64})
    assert prove(model, PLAN, torch.float32)["decode", 64] == (), "the listed shape itself is another one"


def test_the_last_rows_are_looked_at_too() -> None:
    model = Model()
    plain = prove(model, PLAN, torch.float32)
    model.first.last_row_of = 48
    assert prove(model, PLAN, torch.float32)["decode", 64] == tuple(n for n in plain["decode", 64] if n != 48)


def test_large_listed_shapes_are_not_tried_out() -> None:
    plan = replace(PLAN, prefill_tokens=(4096,))
    assert prove(Model(), plan, torch.float32)["prefill", 4096] == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_packed_weights_multiply_like_plain_ones(dtype: torch.dtype, biased: bool) -> None:
    linear = nn.Linear(200, 96, bias=biased).to(dtype)
    if not prepack.can_multiply(linear.weight):
        pytest.skip("oneDNN has no bfloat16 products on this processor")
    packed = PackedLinear(linear)
    x = torch.randn(2, 24, 200).to(dtype)
    exact = x.double() @ linear.weight.double().T + (linear.bias.double() if biased else 0)
    assert packed(x).dtype == dtype
    assert float((packed(x).double() - exact).detach().abs().max()) < (2e-6 if dtype == torch.float32 else 1e-2)
    assert torch.equal(packed(x[:1]), packed(x)[:1])


def test_a_head_multiplies_in_float32_when_it_is_packed() -> None:
    head = Float32Head(nn.Linear(128, 300).bfloat16())
    x = torch.randn(16, 128).bfloat16()
    exact = x.double() @ head.weight.double().T + head.bias.double()  # type: ignore[union-attr]
    head.pack()
    assert head.packed_bytes == 4 * 128 * 300
    assert head.weight.numel() == 0
    assert head(x).dtype == torch.float32
    assert float((head(x).double() - exact).abs().max()) < 2e-6


def test_a_weight_that_an_embedding_shares_is_not_packed() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer, self.lm_head = nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 64)
            self.lm_head.weight = self.embed.weight

    model = Tied()
    pack_linears(model)
    assert type(model.lm_head) is nn.Linear
    assert isinstance(model.layer, PackedLinear)
    assert packed_bytes(model) == 4 * 32 * 32


def test_without_onednn_weights_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = Model()
    pack_linears(model)
    assert isinstance(model.first, nn.Linear)
    assert packed_bytes(model) == 0
