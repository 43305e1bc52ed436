"""Which transformers architectures run here, their geometry, and our attention in place of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.engine.plan import ModelGeometry
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

    from pipeline.engine.attention import AttentionPass

ATTENTION = "pipeline_segments"
"""The name our attention is registered under in transformers' AttentionInterface."""
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
FIXED_ROPE = ("default", "linear", "llama3")
"""RoPE types whose angles do not depend on the length of the row."""


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
    """Raise ConfigError unless the model is a decoder with full attention and a fixed RoPE."""
    if config.model_type not in SUPPORTED:
        raise ConfigError(
            f"model.path={path} is a {config.model_type} model, which is not supported; "
            f"choose one of {', '.join(SUPPORTED)}"
        )
    layer_types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    windowed = window is not None and (config.model_type == "mistral" or "sliding_attention" in layer_types)
    if windowed and window < config.max_position_embeddings:
        raise ConfigError(
            f"model.path={path} uses sliding-window attention ({window} tokens), which is not supported yet"
        )
    rope = rope_type(config)
    if rope not in FIXED_ROPE:
        raise ConfigError(
            f"model.path={path} uses {rope} RoPE, whose angles depend on the row's length, which is not supported yet"
        )


def rope_type(config: PretrainedConfig) -> str:
    """The RoPE variant's name in transformers' terms."""
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    return str(parameters.get("rope_type", "default"))


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
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """transformers' attention call on a flat pass: query [1, H, T, D], key and value [1, K, T, D] to [1, T, H, D]."""
    assert attention_mask is None, "masks are the pass's own matter"
    assert softcap is None, "soft-capped attention is refused before loading"
    assert s_aux is None, "attention sinks are refused before loading"
    layer = module.layer_idx
    assert isinstance(layer, int)
    out_THD = attention_pass.attend(layer, query[0], key[0], value[0], scaling)
    return out_THD[None], None
