"""Models of well-known sizes with random weights, made on the GPU: speed does not depend on the values."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.engine.engine import NO_SPLITS, Engine
from pipeline.engine.graphs import recorder_for
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.plan import GIB, EnginePlan, EngineSettings, plan_engine
from pipeline.engine.prefix import Splits
from pipeline.kernels.cache_attention import AttentionNeed
from pipeline.kernels.registry import choose_attention
from pipeline.models.architecture import geometry_of
from pipeline.models.decoder import TransformersDecoder
from pipeline.models.loader import build_skeleton, place_weight, widen_head
from pipeline.models.memory import capability_of, peak_bytes
from pipeline.quant.detect import resolve_spec
from pipeline.quant.format import format_of, needs_of
from pipeline.quant.spec import QuantSettings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""On a CPU only to try the scripts out, with the size `small`."""
DTYPE = torch.bfloat16
PASSES_BYTES = 4 * GIB
"""What prefill passes, a step and libraries may take beside weights, keys and values."""
SIZES: dict[str, dict[str, int]] = {
    "llama3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 8, "vocab_size": 128256},
    "llama2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 32, "vocab_size": 32000},
    "small": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_gib() -> float:
    return round(peak_bytes(DEVICE) / GIB, 1)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device reaches: bytes and bf16 FLOP a second."""

    bandwidth: float
    compute: float

    @classmethod
    def measured(cls) -> Limits:
        """In a long copy, whose bytes are read and written, and in a large square product."""
        size, count = (8192, GIB) if DEVICE.type == "cuda" else (256, 1 << 20)
        source = torch.zeros(count, dtype=torch.uint8, device=DEVICE)
        factor = torch.randn(size, size, dtype=DTYPE, device=DEVICE)
        target, product = torch.empty_like(source), torch.empty_like(factor)
        copy_s, product_s = best_s(lambda: target.copy_(source)), best_s(lambda: torch.mm(factor, factor, out=product))
        return cls(2 * count / copy_s, 2 * size**3 / product_s)


def best_s(work: Callable[[], Any], calls: int = 5) -> float:
    """Seconds of a call at its best, of several rounds of calls; the first round warms up."""
    rounds = []
    for _ in range(5):
        synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize()
        rounds.append((time.perf_counter() - started) / calls)
    return min(rounds[1:])


def rows_that_fit(wanted: int, row_bytes: int) -> int:
    """As many rows as the memory that is free now has room for, in multiples of 16; no more than wanted."""
    if DEVICE.type != "cuda":
        return wanted
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] - PASSES_BYTES
    return min(wanted, max(16, free // row_bytes // 16 * 16))


def config_of(size: str) -> LlamaConfig:
    return LlamaConfig(**SIZES[size], max_position_embeddings=8192, tie_word_embeddings=False, dtype=DTYPE)


def random_weight(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Norms of one, everything else small enough that activations stay finite."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=DTYPE, device=DEVICE)
    return torch.randn(shape, dtype=DTYPE, device=DEVICE, generator=generator) * 0.02


def random_decoder(size: str, method: str) -> TransformersDecoder:
    """The project's own model, quantized in flight; `method` as in `quant.method` (none, bnb)."""
    config = config_of(size)
    spec = resolve_spec(QuantSettings(method=method), {}, size)
    quant, _ = format_of(spec, "auto", needs_of(spec, [], DEVICE.type, capability_of(DEVICE), DTYPE))
    model = build_skeleton(config, DTYPE, trust_remote_code=False)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        place_weight(model, path, leaf, random_weight(parameter.shape, generator), quant)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(DEVICE))
    widen_head(model)
    return TransformersDecoder(model.eval().requires_grad_(False), DTYPE, DEVICE)


def engine_of(
    decoder: TransformersDecoder, settings: EngineSettings, longest: int, splits: Splits = NO_SPLITS
) -> tuple[Engine, EnginePlan, str]:
    """An engine whose slots take whatever memory they need; and the attention kernel that was chosen, with reasons."""
    geometry = geometry_of(decoder.model.config)
    plan = plan_engine(
        geometry, settings, longest=longest, device_type=DEVICE.type, kv_budget_bytes=10_000 * GIB, kv_itemsize=2
    )
    need = AttentionNeed(
        device_type=DEVICE.type, capability=capability_of(DEVICE), dtype=DTYPE, head_dim=geometry.head_dim
    )
    kernel, reason = choose_attention(settings.attention, need)
    float8 = settings.kv_dtype != "auto"
    engine = Engine(
        decoder,
        plan,
        lambda c: KVCache(geometry, c, DTYPE, DEVICE, float8=float8, attend=kernel.attend),
        DEVICE,
        splits=splits,
        recorder=recorder_for(settings.compile, DEVICE, decoder.capture_obstacle()),
        rows_kernel=kernel.rows_in(DTYPE),
    )
    return engine, plan, f"{kernel.name} ({reason})"


def random_peer(size: str, method: str) -> nn.Module:
    """transformers' own model of the same size; with bnb its Linears but the head are bitsandbytes' 4-bit ones."""
    with torch.device(DEVICE):
        model: Any = LlamaForCausalLM._from_config(config_of(size), dtype=DTYPE, attn_implementation="sdpa")
    if method == "bnb":
        _quantize_linears(model)
    model.generation_config.eos_token_id = None
    return model.eval()  # type: ignore[no-any-return]


def _quantize_linears(model: nn.Module) -> None:
    import bitsandbytes as bnb

    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not path.endswith("lm_head"):
            linear = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=DTYPE,
                quant_type="nf4",
                device="meta",
            )
            linear.weight = bnb.nn.Params4bit(
                module.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to(DEVICE)
            model.set_submodule(path, linear)


def linear_weights(size: str, *, head: bool = True) -> int:
    """Weights of all matrix products of a token, with the output head's or without."""
    shape = SIZES[size]
    hidden, head_dim = shape["hidden_size"], shape["hidden_size"] // shape["num_attention_heads"]
    attention = hidden * (2 * hidden + 2 * shape["num_key_value_heads"] * head_dim)
    layer = attention + 3 * hidden * shape["intermediate_size"]
    return shape["num_hidden_layers"] * layer + head * hidden * shape["vocab_size"]
