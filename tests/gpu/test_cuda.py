"""The engine on CUDA: against transformers, and against itself with rows in another order."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import low_rank, write_adapter

from pipeline.core import Completion, Request, SamplingParams
from pipeline.engine.engine import Engine
from pipeline.engine.graphs import recorder_for
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.plan import EngineSettings, plan_engine
from pipeline.kernels.cache_attention import AttentionNeed
from pipeline.kernels.registry import choose_attention
from pipeline.models.adapter import open_adapter
from pipeline.models.architecture import geometry_of, load_config
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.loader import load_model
from pipeline.models.memory import capability_of
from pipeline.quant.detect import resolve_spec
from pipeline.quant.format import format_of, needs_of
from pipeline.quant.spec import QuantSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
VOCAB = 512
BNB = pytest.param(
    "bnb", marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, initializer_range=0.1, eos_token_id=3,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = random.Random(1)
    lengths = [rng.choice([1, 7, 40, 130, 400]) for _ in range(200)]
    return [
        Request(
            id=index,
            prompt_ids=tuple(rng.randrange(4, VOCAB) for _ in range(length)),
            sampling=SamplingParams(max_new_tokens=rng.choice([1, 9, 40]), stop_token_ids=(3,)),
        )
        for index, length in enumerate(lengths)
    ]


def engine(
    folder: Path, dtype: torch.dtype, method: str, adapter: Path | None = None, device: torch.device = CUDA,
    **settings: Any,
) -> Engine:  # fmt: skip
    checkpoint = open_checkpoint(str(folder))
    config = load_config(str(folder), str(folder), trust_remote_code=False)
    spec = resolve_spec(QuantSettings(method=method), checkpoint.quantization, str(folder))
    needs = needs_of(spec, [], device.type, capability_of(device), dtype)
    quant, _ = format_of(spec, "auto", needs)
    opened = None if adapter is None else open_adapter(str(adapter))
    model = load_model(checkpoint, config, quant, dtype, device, adapter=opened)
    geometry = geometry_of(config)
    plan = plan_engine(
        geometry, EngineSettings(**settings), longest=1024, device_type=device.type, kv_budget_bytes=4 << 30,
        kv_itemsize=dtype.itemsize,
    )  # fmt: skip
    asked = EngineSettings(**settings)
    need = AttentionNeed(
        device_type=device.type, capability=capability_of(device), dtype=dtype, head_dim=geometry.head_dim
    )
    kernel, _ = choose_attention(asked.attention, need)
    float8 = asked.kv_dtype != "auto"
    return Engine(
        model,
        plan,
        lambda c: KVCache(geometry, c, dtype, device, float8=float8, attend=kernel.attend),
        device,
        recorder=recorder_for(asked.compile, device, model.capture_obstacle()),
        rows_kernel=kernel.rows_in(dtype),
    )


def answers(engine: Engine, requests: list[Request]) -> dict[int, Completion]:
    for request in requests:
        engine.submit(request)
    return dict(completed(engine))


def completed(engine: Engine) -> Iterator[tuple[int, Completion]]:
    while engine.unfinished:
        for output in engine.poll():
            if output.completion is not None:
                yield output.request_id, output.completion  # type: ignore[misc]


def test_greedy_equals_generate(folder: Path, requests: list[Request]) -> None:
    from transformers import LlamaForCausalLM

    oracle = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(CUDA).eval()
    ours = answers(engine(folder, torch.float32, "none", slots=64), requests)
    different = []
    for request in requests:
        prompt = torch.tensor([request.prompt_ids], device=CUDA)
        out = oracle.generate(
            prompt, max_new_tokens=request.sampling.max_new_tokens, do_sample=False, eos_token_id=3, pad_token_id=0
        )[0, prompt.shape[1] :].tolist()
        expected = out[: out.index(3)] if 3 in out else out
        if tuple(expected) != ours[request.id].token_ids:  # type: ignore[index]
            different.append(request.id)
    assert len(different) <= len(requests) // 50, f"rows that differ: {different}"


@pytest.mark.parametrize("method", ["none", BNB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_permuted_give_identical_bits(
    folder: Path, requests: list[Request], dtype: torch.dtype, method: str
) -> None:
    first = answers(engine(folder, dtype, method, slots=64), requests)
    second = answers(engine(folder, dtype, method, slots=64), random.Random(2).sample(requests, len(requests)))
    assert first == second


KINDS = [
    pytest.param({"kv_dtype": kv_dtype, "attention": attention}, id=f"{kv_dtype}-{attention}")
    for kv_dtype in ("auto", "float8_e4m3")
    for attention in ("reference", "triton")
]


@pytest.mark.parametrize("method", ["none", BNB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_give_the_bits_of_those_that_are_not(
    folder: Path, requests: list[Request], dtype: torch.dtype, method: str, kind: dict[str, str]
) -> None:
    """In two length classes, refilled again and again, and whatever the order."""
    eager = engine(folder, dtype, method, slots=32, compile="off", **kind)
    captured = engine(folder, dtype, method, slots=32, compile="graphs", **kind)
    expected = answers(eager, requests)
    assert all(answer.error is None for answer in expected.values())
    assert answers(captured, random.Random(6).sample(requests, len(requests))) == expected
    assert (eager.counters.graphs, captured.counters.graphs) == (0, 2)
    assert eager.counters.decode_steps > 50
    assert answers(captured, requests[:7]) == {n: expected[n] for n in range(7)}


def test_sampled_rows_are_drawn_alike_after_a_capture(folder: Path, requests: list[Request]) -> None:
    drawn = [
        replace(r, sampling=replace(r.sampling, temperature=1.1, seed=n, repetition_penalty=1 + (n % 2) / 5))
        for n, r in enumerate(requests)
    ]
    eager, captured = (
        answers(engine(folder, torch.bfloat16, "none", slots=32, compile=how), drawn) for how in ("off", "graphs")
    )
    assert eager == captured


@pytest.mark.parametrize("method", ["none", BNB])
def test_scores_permuted_give_identical_bits(folder: Path, requests: list[Request], method: str) -> None:
    candidates = ((5, 6, 7), (5, 8), (9,), (10, 11))
    scored = [Request(id=r.id, prompt_ids=r.prompt_ids, candidates=candidates) for r in requests]
    first = answers(engine(folder, torch.bfloat16, method), scored)
    second = answers(engine(folder, torch.bfloat16, method), random.Random(3).sample(scored, len(scored)))
    assert first == second


@pytest.mark.parametrize("method", ["none", BNB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scored_texts_permuted_give_identical_bits(
    folder: Path, requests: list[Request], dtype: torch.dtype, method: str
) -> None:
    texts = [replace(r, target_ids=(5, 6, 7)[: r.id % 4], score_prompt=True) for r in requests if len(r.prompt_ids) > 1]  # type: ignore[operator]
    first = answers(engine(folder, dtype, method), texts)
    second = answers(engine(folder, dtype, method), random.Random(4).sample(texts, len(texts)))
    assert first == second


def test_scored_texts_equal_transformers(folder: Path, requests: list[Request]) -> None:
    from transformers import LlamaForCausalLM

    oracle = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).to(CUDA).eval()
    texts = [replace(r, score_prompt=True) for r in requests[:40] if len(r.prompt_ids) > 1]
    ours = answers(engine(folder, torch.float32, "none"), texts)
    for text in texts:
        ids = torch.tensor([text.prompt_ids], device=CUDA)
        with torch.no_grad():
            logprobs = torch.log_softmax(oracle(ids).logits[0], dim=-1)
        expected = float(logprobs[:-1].gather(1, ids[0, 1:, None]).sum())
        assert ours[text.id].prompt_logprob == pytest.approx(expected, abs=1e-4 * ids.shape[1])  # type: ignore[index]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = low_rank("lm_head", 256, VOCAB, 20)
    for layer in range(3):
        tensors |= low_rank(f"model.layers.{layer}.self_attn.q_proj", 256, 256, 20, seed=layer)
        tensors |= low_rank(f"model.layers.{layer}.mlp.down_proj", 512, 256, 20, seed=layer)
    return write_adapter(tmp_path_factory.mktemp("adapter"), tensors, r=20)


@pytest.mark.parametrize("method", ["none", BNB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_permuted_under_an_adapter_give_identical_bits(
    folder: Path, adapter: Path, requests: list[Request], dtype: torch.dtype, method: str
) -> None:
    first = answers(engine(folder, dtype, method, adapter, slots=64), requests)
    second = answers(engine(folder, dtype, method, adapter, slots=64), random.Random(5).sample(requests, len(requests)))
    assert first == second
    assert answers(engine(folder, dtype, method, slots=64), requests) != first


def test_an_adapter_answers_as_on_the_cpu(folder: Path, adapter: Path, requests: list[Request]) -> None:
    few = requests[:40]
    ours = answers(engine(folder, torch.float32, "none", adapter), few)
    cpu = answers(engine(folder, torch.float32, "none", adapter, torch.device("cpu")), few)
    assert sum(ours[n].token_ids != cpu[n].token_ids for n in cpu) <= 1
