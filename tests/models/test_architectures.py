"""Every supported architecture against transformers: greedy answers token for token, and log-probabilities.

Random weights of one small model each. Where an architecture has windows, they are shorter than most
prompts, and every multiplier and cap is set to a value that can be seen in the answers.
"""

from __future__ import annotations

import random
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import drive, greedy, oracle_generate_all, oracle_logits, oracle_logprob, pass_logits, random_prompt
from tape import TapeRecorder
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.core import Completion, Request
from pipeline.errors import ConfigError
from pipeline.kernels.cache_attention import attend_cached_reference
from pipeline.kernels.elementwise import seamless
from pipeline.models.architecture import ROPE_TYPES, SUPPORTED, load_config

CLOSE = 1e-4
VOCAB = 256
WINDOW = 16
MAX_LEN = 128
NEW_TOKENS = 12
LENGTHS = (1, 3, 9, 20, 60)
CANDIDATES = ((5, 6, 7), (5, 8), (9,), (5, 6, 12, 13))
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EVERY_LAYER = {"sliding_window": WINDOW}
ALTERNATING = {**EVERY_LAYER, "layer_types": ["sliding_attention", "full_attention"] * 2}
HEAD = {"head_dim": 16}
SMALL_CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 6.0}
"""Caps that the scores of weights this small reach, as trained models reach 50 and 30."""
MULTIPLIERS = {"residual_multiplier": 0.7, "attention_multiplier": 0.4, "logits_scaling": 0.6}
LOCAL_AND_GLOBAL_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
}
SCALED_QUERIES = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    "max_position_embeddings": 512,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": HEAD,
    "cohere": {"tie_word_embeddings": True, "logit_scale": 0.5, "use_qk_norm": True},
    "cohere2": {**HEAD, **ALTERNATING, "tie_word_embeddings": True, "logit_scale": 0.5},
    "cwm": {**HEAD, **ALTERNATING},
    "exaone4": ALTERNATING,
    "gemma": HEAD,
    "gemma2": {**HEAD, **ALTERNATING, **SMALL_CAPS, "query_pre_attn_scalar": 24},
    "gemma3_text": {**HEAD, **ALTERNATING, "rope_parameters": LOCAL_AND_GLOBAL_ROPE, "query_pre_attn_scalar": 24},
    "glm": HEAD,
    "glm4": HEAD,
    "gpt_neox": {"num_key_value_heads": ...},
    "gpt_neox-serial": {"num_key_value_heads": ..., "use_parallel_residual": False},
    "granite": {**MULTIPLIERS, "embedding_multiplier": 2.0},
    "helium": HEAD,
    "hyperclovax": {**HEAD, **MULTIPLIERS, "embedding_multiplier": 2.0},
    "internlm3": {**HEAD, "bias": True, "qkv_bias": True},
    "jais2": HEAD,
    "llama": HEAD,
    "ministral": {**HEAD, **ALTERNATING},
    "ministral3": {**HEAD, **EVERY_LAYER, "rope_parameters": SCALED_QUERIES},
    "mistral": {**HEAD, **EVERY_LAYER},
    "nanochat": {"final_logit_softcapping": 6.0},
    "olmo": {"clip_qkv": 1.0},
    "olmo2": {},
    "olmo3": ALTERNATING,
    "phi": {"qk_layernorm": True},
    "phi3": EVERY_LAYER,
    "qwen2": {**ALTERNATING, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {**HEAD, **ALTERNATING, "use_sliding_window": True, "max_window_layers": 2},
    "seed_oss": {**HEAD, "attention_out_bias": True},
    "smollm3": {**ALTERNATING, "use_sliding_window": True, "no_rope_layers": [1, 0, 1, 1]},
    "starcoder2": EVERY_LAYER,
    "vaultgemma": {**HEAD, **ALTERNATING, **SMALL_CAPS, "query_pre_attn_scalar": 24},
}
"""What each model type (up to a dash) has beside or in place of BASE's values; ... takes a value out."""
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": YARN,
    "yarn-scaled": {**YARN, "attention_factor": 0.7, "beta_fast": 8.0, "beta_slow": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
}  # fmt: skip
ORIGINAL_POSITIONS = 32
SHORT_FACTORS = [1.0 + 0.1 * n for n in range(8)]
LONG_FACTORS = [1.0 + 0.7 * n for n in range(8)]


def long_rope(short: list[float], long: list[float]) -> dict[str, Any]:
    """What a Phi-3 config says; its top level says where the short factors end."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long}
    if len(long) < 8:
        rope["partial_rotary_factor"] = len(long) / 8
    return {
        "rope_parameters": rope,
        "original_max_position_embeddings": ORIGINAL_POSITIONS,
        "sliding_window": None,
    }


def save_random(name: str, folder: Path, **changes: Any) -> Path:
    """Write a checkpoint of a model type with weights, biases and norms that all matter to the answers."""
    values = {**BASE, **MODELS[name], **changes}
    given = {key: value for key, value in values.items() if value is not ...}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.split("-")[0], **given), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A model type, a name for the changes, and the changes, to the folder of that checkpoint."""
    folders: dict[tuple[str, str], Path] = {}

    def folder(name: str, variant: str = "", **changes: Any) -> Path:
        if (name, variant) not in folders:
            path = tmp_path_factory.mktemp("architectures") / f"{name}{variant}"
            folders[name, variant] = save_random(name, path, **changes)
        return folders[name, variant]

    return folder


@pytest.fixture(scope="module")
def check(reference: Callable[..., Any], build_engine: Callable[..., Any]) -> Callable[..., None]:
    """Checkpoint to whether engine and transformers agree on it."""

    def check(folder: Path, lengths: Sequence[int] = LENGTHS, max_len: int = MAX_LEN, cached: bool = True) -> None:
        model = reference(folder)
        rows = rows_of(lengths)
        expected = oracle_generate_all(model, rows, use_cache=cached)
        assert_diverse([t for answer in expected.values() for t in answer.token_ids])
        under_test = build_engine(folder, slots=16, max_len=max_len, prefill_tokens=256)
        assert under_test.decoder.unused_tensors == ()
        answers = under_test.answer([*rows, *scored(rows), *texts(rows)])
        for row in rows:
            assert answers[row.id].token_ids == expected[row.id].token_ids, f"{len(row.prompt_ids)} tokens"
        for row in scored(rows):
            logprobs = [oracle_logprob(model, row.prompt_ids, c) for c in CANDIDATES]
            assert answers[row.id].candidate_logprobs == pytest.approx(logprobs, abs=CLOSE)
        for row in texts(rows):
            check_text(model, row, answers[row.id])
        for row in (rows[-1], scored(rows)[0], texts(rows)[-1]):
            assert under_test.answer([row]) == {row.id: answers[row.id]}, "the row alone"
        plain = replace(under_test, attend=attend_cached_reference)
        captured = drive(plain.engine(recorder=TapeRecorder()), rows[: len(lengths)])
        assert captured == plain.answer(rows[: len(lengths)]), "a captured step"

    return check


@cache
def rows_of(lengths: Sequence[int]) -> list[Request]:
    rng = random.Random(0)
    return [greedy(n, random_prompt(rng, lengths[n % len(lengths)], VOCAB), NEW_TOKENS) for n in range(24)]


def scored(rows: Sequence[Request]) -> list[Request]:
    """One row of each length with candidates."""
    by_length = {len(r.prompt_ids): r for r in rows}
    return [
        Request(id=("scored", n), prompt_ids=r.prompt_ids, candidates=CANDIDATES) for n, r in sorted(by_length.items())
    ]


def texts(rows: Sequence[Request]) -> list[Request]:
    """One row of each length with a target, its prompt scored too; together longer than the windows."""
    rng = random.Random(1)
    by_length = {len(r.prompt_ids): r for r in rows}
    return [
        Request(
            id=("text", n),
            prompt_ids=r.prompt_ids,
            target_ids=random_prompt(rng, NEW_TOKENS + n % 2, VOCAB),
            score_prompt=True,
        )
        for n, r in sorted(by_length.items())
    ]


def check_text(model: Any, row: Request, answer: Completion) -> None:
    """Prompt and target of a scored row against one forward over both."""
    text = (*row.prompt_ids, *row.target_ids)
    expected = (oracle_logprob(model, text[:1], text[1:]), oracle_logprob(model, row.prompt_ids, row.target_ids))
    assert answer.cumulative_logprob == pytest.approx(expected[1], abs=CLOSE)
    assert (answer.prompt_logprob or 0.0) + (answer.cumulative_logprob or 0.0) == pytest.approx(expected[0], abs=CLOSE)


def assert_diverse(tokens: Sequence[int]) -> None:
    """One token over and over would hide most bugs."""
    counts = Counter(tokens)
    assert len(counts) > 50
    assert counts.most_common(1)[0][1] < 0.25 * len(tokens)


class SeamWatch(TorchDispatchMode):
    """Notes the operators of one argument that a forward calls, and those of them that round otherwise at seams."""

    ROUNDS = ("sigmoid", "silu", "gelu", "mish", "softplus", "elu", "rsqrt", "log_sigmoid_forward")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.beside: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        in_seamless = any(frame.f_code is seamless.__code__ for frame, _ in traceback.walk_stack(None))
        self.seen += [name] if in_seamless else []
        rounds = name in self.ROUNDS and not (name == "rsqrt" and args[0].dtype == torch.float32)
        self.beside += [name] if rounds and not in_seamless else []
        return func(*args, **(kwargs or {}))


def test_every_supported_architecture_is_here() -> None:
    assert {name.split("-")[0] for name in MODELS} == set(SUPPORTED)


@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers(name: str, random_folder: Callable[..., Path], check: Callable[..., None]) -> None:
    check(random_folder(name))


@pytest.mark.parametrize("name", MODELS)
def test_no_function_has_bits_that_depend_on_a_tokens_place(
    name: str, random_folder: Callable[..., Path], load_decoder: Callable[..., Any]
) -> None:
    """Every call of torch's that rounds otherwise at the ends of its pieces is made by `seamless`."""
    decoder = load_decoder(random_folder(name), torch.float32)
    with SeamWatch() as watch:
        pass_logits(decoder, random_prompt(random.Random(0), 20, VOCAB))
    assert watch.seen, "no activation function was seen at all"
    assert not watch.beside, "called outside of seamless"


@pytest.mark.parametrize("window", [1, 2, LENGTHS[-1] + NEW_TOKENS])
def test_windows_of_extreme_length(window: int, random_folder: Any, check: Callable[..., None]) -> None:
    """A token that sees itself only, for which transformers' cache keeps too much; a window that a row just fills."""
    check(random_folder("gemma3_text", f"window{window}", sliding_window=window), cached=window > 1)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"sliding_window": 400}),
        ("mistral", {"sliding_window": 400}),
        ("gemma3_text", {"rope_parameters": {**LOCAL_AND_GLOBAL_ROPE, "full_attention": {"rope_theta": 100.0}}}),
        ("ministral3", {"rope_parameters": {**SCALED_QUERIES, "llama_4_scaling_beta": 0.0}}),
    ],
    ids=["attention cap", "logit cap", "alternating windows", "windows", "two ropes", "scaled queries"],
)
def test_what_the_config_says_can_be_seen(
    name: str, changes: dict[str, Any], random_folder: Any, reference: Callable[..., Any]
) -> None:
    """Without it the model answers otherwise, so the comparisons above would notice if it were left out."""
    prompt = random_prompt(random.Random(1), 60, VOCAB)
    with_it = oracle_logits(reference(random_folder(name)), prompt)
    without = oracle_logits(reference(random_folder(name, f"-{sorted(changes)}{changes}"[:40], **changes)), prompt)
    assert float((with_it - without).abs().max()) > 100 * CLOSE


# --- RoPE ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", ROPES)
def test_rope_types(rope: str, random_folder: Any, check: Callable[..., None]) -> None:
    check(random_folder("llama", rope, rope_parameters=ROPES[rope], max_position_embeddings=96), max_len=96)


def test_every_rope_type_is_tested() -> None:
    assert {name.split("-")[0] for name in ROPES} | {"default", "longrope"} == set(ROPE_TYPES)


@pytest.fixture(scope="module")
def long_folder(random_folder: Callable[..., Path]) -> Path:
    return random_folder("phi3", "longrope", **long_rope(SHORT_FACTORS, LONG_FACTORS))


@pytest.mark.parametrize("factors", [8, 6], ids=["whole head", "part of a head"])
def test_long_rope_for_rows_within_and_beyond_the_original_positions(
    factors: int, random_folder: Callable[..., Path], check: Callable[..., None]
) -> None:
    """All in one batch, against transformers with each row beside its likes."""
    within = (1, 9, ORIGINAL_POSITIONS - NEW_TOKENS)
    beyond = (ORIGINAL_POSITIONS + 1, 70)
    changes = long_rope(SHORT_FACTORS[:factors], LONG_FACTORS[:factors])
    check(random_folder("phi3", f"longrope{factors}", **changes), (*within, *beyond))


def test_long_rope_is_chosen_by_what_the_row_can_reach(
    long_folder: Path, random_folder: Any, reference: Callable[..., Any], build_engine: Callable[..., Any]
) -> None:
    """A row that grows beyond the original positions has the long factors from its first token on."""
    long_model = reference(random_folder("phi3", "always-long", **long_rope(LONG_FACTORS, LONG_FACTORS)))
    model = reference(long_folder)
    rng = random.Random(2)
    first = ORIGINAL_POSITIONS - NEW_TOKENS
    rows = [greedy(n, random_prompt(rng, n, VOCAB), NEW_TOKENS) for n in range(first - 2, ORIGINAL_POSITIONS + 3)]
    expected = oracle_generate_all(model, rows[:3]) | oracle_generate_all(long_model, rows[3:])
    under_test = build_engine(long_folder, slots=16, max_len=MAX_LEN)
    together = under_test.answer(rows)
    assert {n: a.token_ids for n, a in together.items()} == {n: a.token_ids for n, a in expected.items()}
    for row in rows:
        assert under_test.answer([row]) == {row.id: together[row.id]}
    prompt = random_prompt(rng, ORIGINAL_POSITIONS - 2, VOCAB)
    candidates = {"within": ((5, 6), (7,)), "beyond": ((5, 6, 7), (7,))}
    requests = [Request(id=name, prompt_ids=prompt, candidates=c) for name, c in candidates.items()]
    answers = under_test.answer([*rows, *requests])
    for name, oracle in (("within", model), ("beyond", long_model)):
        logprobs = [oracle_logprob(oracle, prompt, c) for c in candidates[name]]
        assert answers[name].candidate_logprobs == pytest.approx(logprobs, abs=CLOSE)
    for length, oracle in ((2, model), (3, long_model)):
        row = Request(id=0, prompt_ids=prompt, target_ids=(5, 6, 7)[:length], score_prompt=True)
        check_text(oracle, row, under_test.answer([row])[0])


def test_short_and_long_factors_differ_in_the_answers(long_folder: Path, load_decoder: Callable[..., Any]) -> None:
    decoder = load_decoder(long_folder, torch.float32)
    prompt = random_prompt(random.Random(3), ORIGINAL_POSITIONS + 1, VOCAB)
    long, short = pass_logits(decoder, prompt)[:-1], pass_logits(decoder, prompt[:-1])
    assert float((long - short).abs().max()) > 0.1


# --- what does not run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mamba", "mixtral", "gpt_oss", "t5", "gemma3"])
def test_other_architectures_are_refused(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"is a {model_type} model, which is not supported") as caught:
        load_config("there", str(tmp_path), False)
    assert "model.path=there" in str(caught.value)
    assert "llama" in str(caught.value)
