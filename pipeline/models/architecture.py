"""Which transformers architectures run here, their geometry, and our attention in place of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.engine.plan import ModelGeometry
from pipeline.errors import ConfigError
from pipeline.kernels.attention import AttentionRule

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

    from pipeline.engine.attention import AttentionPass

ATTENTION = "pipeline_segments"
"""The name our attention is registered under in transformers' AttentionInterface."""
SUPPORTED = (
    "apertus", "arcee", "cohere", "cohere2", "cwm", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "gpt_neox", "granite", "helium", "hyperclovax", "internlm3", "jais2", "llama", "ministral", "ministral3", "mistral",
    "nanochat", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2",
    "vaultgemma",
)  # fmt: skip
"""Decoders with full or sliding-window attention; each is held against transformers' own in the tests."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
"""RoPE variants. Dynamic NTK changes its angles only beyond the model's positions, where no row goes;
long RoPE is chosen per row (`rope.py`)."""


def load_config(path: str, folder: str, trust_remote_code: bool) -> PretrainedConfig:
    """transformers' config of a checkpoint, checked; raises ConfigError when the architecture does not run here."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, TypeError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.path={path}: config.json is not one transformers can read ({first_line})") from error
    check_supported(config, path)
    return config


def check_supported(config: PretrainedConfig, path: str) -> None:
    """Raise ConfigError unless the model is a decoder that has been held against transformers' own."""
    if config.model_type not in SUPPORTED:
        raise ConfigError(
            f"model.path={path} is a {config.model_type} model, which is not supported; "
            f"supported are {', '.join(SUPPORTED)}"
        )
    for rope in rope_types(config):
        if rope not in ROPE_TYPES:
            raise ConfigError(
                f"model.path={path} uses {rope} RoPE, which is not supported; supported are {', '.join(ROPE_TYPES)}"
            )


def rope_types(config: PretrainedConfig) -> set[str]:
    """The RoPE variants' names in transformers' terms: one, or one for each type of layer."""
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    nested: list[Mapping[str, Any]] = [p for p in parameters.values() if isinstance(p, dict)]
    return {str(p.get("rope_type", "default")) for p in (nested or [parameters])}


def geometry_of(config: PretrainedConfig) -> ModelGeometry:
    """What the engine's shapes depend on."""
    heads = config.num_attention_heads
    return ModelGeometry(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
    )


def register_attention() -> None:
    """Make `attention_segments` known to transformers; doing it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attention_segments)


def attention_segments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_pass: AttentionPass,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """transformers' attention call on a flat pass: query [1, H, T, D], key and value [1, K, T, D] to [1, T, H, D]."""
    assert attention_mask is None, "masks are the pass's own matter"
    assert s_aux is None, "attention sinks are refused before loading"
    layer = module.layer_idx
    assert isinstance(layer, int)
    rule = AttentionRule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    out_THD = attention_pass.attend(layer, query[0], key[0], value[0], rule)
    return out_THD[None], None
