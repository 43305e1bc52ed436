"""LoRA adapters that PEFT has written, against PEFT running them: logits of whole prompts and greedy answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import Case, Made, furthest, lora, make_adapters, some_prompts
from oracle import greedy, oracle_logits, pass_logits
from test_architectures import BASE, MODELS, save_random
from torch import nn

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
RESIZED = 520
NEW_TOKENS = 64
CLOSE = 1e-5
"""Of the largest logit: what float32 leaves of sums in another order."""
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "every linear": ("llama", lora("all-linear")),
    "rank 1": ("llama", lora(["q_proj", "v_proj"], 1, 2)),
    "rank 20": ("llama", lora(LINEARS, 20)),
    "rank-stabilized": ("llama", lora(LINEARS, 20, use_rslora=True)),
    "regular expression": ("llama", lora(r".*layers\.[02]\..*(down|k)_proj", 4, 7)),
    "some layers": ("llama", lora(["q_proj", "up_proj"], layers_to_transform=[1])),
    "rank patterns": ("llama", lora(LINEARS, 8, 16, rank_pattern={"q_proj": 3, r"model.layers.1.mlp.*_proj": 24})),
    "alpha patterns": (
        "llama",
        lora(LINEARS, 8, 16, alpha_pattern={"^model.layers.0.self_attn.k_proj": 3, "v_proj": 40}),
    ),
    "both patterns": (
        "llama",
        lora(LINEARS, 8, 4, use_rslora=True, rank_pattern={"(up|down)_proj": 5}, alpha_pattern={"down_proj": 9}),
    ),
    "a dense layer's option": ("llama", lora(["q_proj"], fan_in_fan_out=True, lora_dropout=0.3)),
    "biases": ("qwen2", lora(LINEARS)),
    "bias of LoRA's modules": ("qwen2", lora(["q_proj", "v_proj"], bias="lora_only")),
    "every bias": ("llama-biases", lora(["q_proj"], bias="all")),
    "a bias of its own": ("qwen2", lora(["k_proj", "o_proj"], lora_bias=True)),
    "fused": ("phi3", lora(["qkv_proj", "gate_up_proj", "o_proj"])),
    "head": ("llama", lora(["q_proj", "lm_head"])),
    "tied head": ("llama-tied", lora(["q_proj", "lm_head"])),
    "embedding": ("llama", lora(["q_proj", "embed_tokens"])),
    "tied embedding": ("llama-tied", lora(["v_proj", "embed_tokens"])),
    "embedding and head tied": ("llama-tied", lora(["v_proj", "embed_tokens"], ensure_weight_tying=True)),
    "whole embedding and head": ("llama", lora(["q_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "whole head, tied": ("llama-tied", lora(["q_proj"], modules_to_save=["lm_head"])),
    "whole embedding, tied": ("llama-tied", lora(["q_proj"], modules_to_save=["embed_tokens"])),
    "whole both, tied": (
        "llama-tied",
        lora(["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "whole norms and a linear": ("llama", lora(["q_proj"], modules_to_save=["input_layernorm", "up_proj"])),
    "DoRA": ("llama", lora(LINEARS, use_dora=True)),
    "DoRA with biases": ("qwen2", lora(LINEARS, 20, use_dora=True, use_rslora=True)),
    "DoRA, fused": ("phi3", lora(["qkv_proj", "down_proj"], 5, use_dora=True)),
    "DoRA of the head": ("llama", lora(["lm_head"], use_dora=True)),
}
"""What is made of which checkpoint of `oracle.CHECKPOINTS`."""
RESIZES = {
    "resized": ("llama", lora(["q_proj"])),
    "resized, trained whole": ("llama", lora(["q_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "resized, tied": ("llama-tied", lora(["q_proj"])),
    "resized, updated": ("llama", lora(["embed_tokens", "lm_head"])),
}
QUANTIZED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "nf4": ("llama", "nf4", lora("all-linear")),
    "nf4, rank 20": ("llama", "nf4", lora(LINEARS, 20, use_rslora=True)),
    "nf4, biases": ("qwen2", "nf4", lora(LINEARS)),
    "nf4, fused": ("phi3", "nf4", lora(["qkv_proj", "down_proj"])),
    "nf4, head": ("llama", "nf4", lora(["q_proj", "lm_head"])),
    "nf4, whole": ("llama", "nf4", lora(["q_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "nf4, DoRA": ("qwen2", "nf4", lora(LINEARS, use_dora=True)),
    "fp4": ("llama", "fp4-single", lora("all-linear")),
    "int8": ("llama", "int8-plain", lora(LINEARS)),
}
CODES = {"nf4": "nf4", "fp4-single": "fp4", "int8-plain": "int8"}
"""What make_adapters.py calls those of `oracle.QUANTS`."""


@pytest.fixture(scope="module")
def made(checkpoint_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    cases = {
        name: Case(base=checkpoint_folder(base), settings=settings, prompts=some_prompts())
        for name, (base, settings) in SETTINGS.items()
    }
    for name, (base, settings) in RESIZES.items():
        cases[name] = Case(base=checkpoint_folder(base), settings=settings, vocab=RESIZED, prompts=some_prompts(2, 515))
    for name, (base, quant, settings) in QUANTIZED.items():
        cases[name] = Case(base=checkpoint_folder(base), settings=settings, code=CODES[quant], prompts=some_prompts())
    for name, count in {"answers": 4, "nf4 answers": 6}.items():
        cases[name] = Case(
            base=checkpoint_folder("llama"),
            settings=lora("all-linear"),
            code="nf4" if name.startswith("nf4") else None,
            prompts=some_prompts(count),
            new_tokens=NEW_TOKENS,
        )
    bfloat16 = {"base": checkpoint_folder("llama-wide"), "settings": lora("all-linear"), "prompts": some_prompts()}
    cases["bfloat16"] = Case(**bfloat16, dtype="bfloat16")
    cases["bfloat16 in float32"] = Case(**bfloat16)
    return make_adapters(cases, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def decoder(load_decoder: Callable[..., Any]) -> Callable[..., Any]:
    """An adapter that was made, and a quantization, to this project's model in float32."""

    def load(found: Made, quant: str = "none", dtype: torch.dtype = torch.float32) -> Any:
        return load_decoder(found.case.base, dtype, quant, adapter=found.folder)

    return load


def assert_alike(found: Made, decoder: Any, close: float = CLOSE) -> None:
    for n, prompt in enumerate(found.case.prompts):
        assert furthest(pass_logits(decoder, prompt), found.logits(n)) < close


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_pefts(name: str, made: dict[str, Made], decoder: Any, reference: Callable[..., Any]) -> None:
    found = made[name]
    assert_alike(found, decoder(found))
    base = oracle_logits(reference(found.case.base), found.case.prompts[0])
    assert furthest(base, found.logits(0)) > 1000 * CLOSE, "the adapter changes next to nothing"


@pytest.mark.parametrize("name", RESIZES)
def test_vocabularies_that_training_has_resized(name: str, made: dict[str, Made], decoder: Any) -> None:
    found = made[name]
    assert found.logits(0).shape[1] == RESIZED
    assert_alike(found, decoder(found))


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_bases(name: str, made: dict[str, Made], decoder: Any) -> None:
    """Against PEFT on weights that bitsandbytes has rounded; 8 bits round the inputs too, where a last bit counts."""
    found, quant = made[name], QUANTIZED[name][1]
    assert len(list(decoder(found, quant).quant_linears())) >= 12
    assert_alike(found, decoder(found, quant), 1000 * CLOSE if quant == "int8-plain" else 2 * CLOSE)


@pytest.mark.parametrize(("name", "quant"), [("answers", "none"), ("nf4 answers", "nf4")])
def test_greedy_answers(name: str, quant: str, made: dict[str, Made], build_engine: Callable[..., Any]) -> None:
    found = made[name]
    under_test = build_engine(found.case.base, torch.float32, quant, adapter=found.folder)
    rows = [greedy(n, prompt, NEW_TOKENS) for n, prompt in enumerate(found.case.prompts)]
    answers = under_test.answer(rows)
    assert {n: answers[n].token_ids for n in answers} == {n: found.tokens(n) for n in range(len(rows))}
    assert len({token for n in range(len(rows)) for token in found.tokens(n)}) > 50


def test_bfloat16_is_as_close_to_float32_as_pefts(made: dict[str, Made], decoder: Any) -> None:
    found, exact = made["bfloat16"], made["bfloat16 in float32"]
    for n, prompt in enumerate(found.case.prompts):
        ours = furthest(pass_logits(decoder(found, dtype=torch.bfloat16), prompt), exact.logits(n))
        assert ours < 1.2 * furthest(found.logits(n), exact.logits(n))


def test_updates_stay_in_float32_and_the_rest_in_the_models_dtype(made: dict[str, Made], decoder: Any) -> None:
    model = decoder(made["bfloat16"], dtype=torch.bfloat16).model
    update = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert (update.a_RK.dtype, update.base.weight.dtype) == (torch.float32, torch.bfloat16)


# --- every architecture -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_architectures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """An adapter for every Linear, the head and the embedding of each."""
    root = tmp_path_factory.mktemp("architectures")
    targets = r".*(proj|dense|query_key_value|dense_h_to_4h|dense_4h_to_h|fc1|fc2|lm_head|embed_tokens|embed_in|c_fc)"
    cases = {
        name: Case(
            base=save_random(name, root / f"{name}-base"),
            settings=lora(targets, 4),
            prompts=some_prompts(1, BASE["vocab_size"]),
        )
        for name in MODELS
    }
    return make_adapters(cases, root)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(name: str, of_architectures: dict[str, Made], decoder: Any) -> None:
    found = of_architectures[name]
    model = decoder(found).model
    bare = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and "base" not in path]
    assert not bare, "all are updated"
    assert_alike(found, decoder(found), 10 * CLOSE)
