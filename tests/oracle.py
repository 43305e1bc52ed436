"""What the tests compare with: transformers' own models on small random checkpoints.

Nothing here computes an answer with this project's code, except `EngineUnderTest`, the thing under test.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from pipeline.core import Completion, FinishReason, Request, SamplingParams
from pipeline.engine.attention import PackedPrefill, RowSpan
from pipeline.engine.engine import NO_SPLITS, Engine
from pipeline.engine.graphs import Recorder
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.plan import EnginePlan, ModelGeometry
from pipeline.engine.prefix import Splits
from pipeline.kernels.cache_attention import AttendCached
from pipeline.kernels.registry import CACHE_ATTENTION
from pipeline.models.decoder import TransformersDecoder

MAX_POSITIONS = 640
VOCAB = 509

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "head_dim": 32, "num_hidden_layers": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-one-head": ("Llama", {"num_key_value_heads": 1}),
    "llama-ungrouped": ("Llama", {"num_key_value_heads": 4}),
    "llama-rope3": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-rope-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama-wide": ("Llama", WIDE),
    "llama-vocab32": ("Llama", {"vocab_size": 32, "initializer_range": 0.15}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "phi3": ("Phi3", {"sliding_window": None}),
}
"""Each checkpoint's architecture, and what its config has in place of SMALL's values."""
QUANTS: dict[str, dict[str, Any]] = {
    "auto": {"method": "auto"},
    "none": {"method": "none"},
    "nf4": {"method": "bnb", "double_quant": True},
    "nf4-single": {"method": "bnb", "double_quant": False},
    "fp4": {"method": "bnb-fp4", "double_quant": True},
    "fp4-single": {"method": "bnb-fp4", "double_quant": False},
    "int8": {"method": "bnb-int8", "int8_threshold": 6.0},
    "int8-plain": {"method": "bnb-int8", "int8_threshold": 0.0},
    "gptq": {"method": "gptq"},
    "bitblas": {"method": "bitblas"},
}
"""What is asked for under `quant`, by a short name."""


def save_checkpoint(name: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a random checkpoint with save_pretrained; biases and norms are random too, or no test would see them."""
    architecture, values = CHECKPOINTS[name]
    config = getattr(transformers, f"{architecture}Config")(**{**SMALL, **values, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif "norm" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The checkpoint as transformers itself runs it, with its plainest attention."""
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]  # only a request's own stop tokens end it
    return model.eval()


@dataclass(frozen=True)
class EngineUnderTest:
    """A loaded model and its shapes; each `engine()` is a fresh one, with fresh keys and values."""

    decoder: Any
    plan: EnginePlan
    geometry: ModelGeometry
    dtype: torch.dtype
    splits: Splits = NO_SPLITS
    prefix_tokens: int = 4096
    float8: bool = False
    attend: AttendCached = CACHE_ATTENTION["numba"].attend

    def engine(
        self,
        decoder: TransformersDecoder | None = None,
        *,
        steps_per_poll: int | None = None,
        recorder: Recorder | None = None,
    ) -> Engine:
        device = torch.device("cpu")
        engine = Engine(
            decoder or self.decoder,
            self.plan,
            lambda c: KVCache(self.geometry, c, self.dtype, device, float8=self.float8, attend=self.attend),
            device,
            text_of,
            self.splits,
            self.prefix_tokens,
            recorder,
        )
        engine._steps_per_poll = steps_per_poll or engine._steps_per_poll
        return engine

    def answer(self, requests: Iterable[Request]) -> dict[Any, Completion]:
        """Submit everything, then poll to the end."""
        return drive(self.engine(), requests)


def _pieces() -> list[bytes]:
    """The text of each token: letters, and characters of two to four bytes, some of them in parts."""
    rng = random.Random(0)
    letters = [bytes(rng.choices(b"abcdefgh", k=rng.choice([1, 1, 2, 3]))) for _ in range(VOCAB)]
    for token in range(0, VOCAB, 3):
        character = rng.choice("éñ€語🙂").encode()
        cut = rng.randrange(len(character))
        letters[token] = rng.choice([character, character[cut:] + b"a", b"b" + character[:cut], character[:1]])
    return letters


PIECES = _pieces()


def text_of(token_ids: Sequence[int]) -> str:
    """A decoder like those of byte-level tokenizers: bytes put together, what is no UTF-8 replaced."""
    return b"".join(PIECES[token] for token in token_ids).decode("utf-8", errors="replace")


BuildEngine = Callable[..., EngineUnderTest]


@dataclass
class Collector:
    """Polls an engine; checks that nothing follows a completion and that all its tokens were reported before."""

    engine: Engine
    done: dict[Any, Completion] = field(default_factory=dict)
    streamed: dict[tuple[Any, int], tuple[int, ...]] = field(default_factory=dict)

    def poll(self) -> None:
        for output in self.engine.poll():
            assert output.request_id not in self.done, "news of a request that has ended"
            key = (output.request_id, output.choice)
            self.streamed[key] = self.streamed.get(key, ()) + output.new_token_ids
            if output.completion is not None:
                self.done[output.request_id] = output.completion
                for choice, answer in enumerate(output.completion.choices or [output.completion]):
                    assert answer.error or self.streamed[output.request_id, choice] == answer.token_ids


def drive(engine: Engine, requests: Iterable[Request], *, polls_between: int = 0) -> dict[Any, Completion]:
    """Submit, then poll until nothing is left; completions by request id."""
    collector = Collector(engine)
    for request in requests:
        engine.submit(request)
        for _ in range(polls_between):
            collector.poll()
    while engine.unfinished:
        collector.poll()
    return collector.done


@dataclass(frozen=True)
class OracleAnswer:
    """What transformers' generate makes of a request."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason


def oracle_generate(model: nn.Module, request: Request, max_len: int = MAX_POSITIONS) -> OracleAnswer:
    """Greedy `generate` of one request; rows end at `max_len` tokens, prompt included."""
    return oracle_generate_alike(model, [request], max_len)[0]


def oracle_generate_alike(
    model: nn.Module, requests: Sequence[Request], max_len: int, **settings: Any
) -> list[OracleAnswer]:
    """Greedy `generate` of requests with equally long prompts and equal settings: a batch without padding."""
    sampling = requests[0].sampling
    prompts = torch.tensor([r.prompt_ids for r in requests])
    limit = min(sampling.max_new_tokens, max_len - prompts.shape[1])
    config = transformers.GenerationConfig(
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=list(sampling.stop_token_ids) or None,
        pad_token_id=0,
        repetition_penalty=sampling.repetition_penalty,
        **settings,
    )
    out = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
    return [_until_stop(row[prompts.shape[1] :].tolist(), sampling.stop_token_ids) for row in out]


def _until_stop(tokens: list[int], stop_token_ids: Sequence[int]) -> OracleAnswer:
    ends = [i for i, token in enumerate(tokens) if token in stop_token_ids]
    if ends:
        return OracleAnswer(tuple(tokens[: ends[0]]), FinishReason.STOP)
    return OracleAnswer(tuple(tokens), FinishReason.LENGTH)


def oracle_generate_all(
    model: nn.Module, requests: Iterable[Request], max_len: int = MAX_POSITIONS, **settings: Any
) -> dict[Any, OracleAnswer]:
    """`oracle_generate` of many requests, those that are alike in one batch; `settings` go to GenerationConfig."""
    groups: dict[Any, list[Request]] = {}
    for request in requests:
        groups.setdefault((len(request.prompt_ids), request.sampling), []).append(request)
    answers: dict[Any, OracleAnswer] = {}
    for group in groups.values():
        for request, answer in zip(group, oracle_generate_alike(model, group, max_len, **settings), strict=True):
            answers[request.id] = answer
    return answers


@torch.no_grad()
def oracle_logits(model: nn.Module, token_ids: Sequence[int]) -> Tensor:
    """Logits [T, V] of a transformers forward over the whole sequence, in float64."""
    logits: Tensor = model(torch.tensor([list(token_ids)])).logits[0].double()
    return logits


def oracle_logprob(model: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Summed log-probability of `answer` after `prompt` under the unmodified softmax, in float64."""
    logprobs = torch.log_softmax(oracle_logits(model, [*prompt, *answer]), dim=-1)
    places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return float(logprobs[places, torch.tensor(list(answer), dtype=torch.long)].sum())


@torch.inference_mode()
def pass_logits(decoder: Any, prompt: Sequence[int]) -> Tensor:
    """This project's logits [T, V] of every position of a prompt, from one pass."""
    length = len(prompt)
    attention = PackedPrefill((RowSpan(0, length),), None, torch.arange(length), torch.full((length,), length))
    logits: Tensor = decoder.head(decoder.hidden(torch.tensor(list(prompt)), torch.arange(length), attention))
    return logits


def random_prompt(rng: random.Random, length: int, vocab: int = VOCAB) -> tuple[int, ...]:
    return tuple(rng.randrange(3, vocab) for _ in range(length))


def greedy(request_id: Any, prompt: Sequence[int], max_new_tokens: int, *stop: int) -> Request:
    return Request(
        id=request_id,
        prompt_ids=tuple(prompt),
        sampling=SamplingParams(max_new_tokens=max_new_tokens, stop_token_ids=stop),
    )
