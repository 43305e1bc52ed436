"""Adapters that cannot run: a ConfigError that names file and tensor, or setting and value, and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import WEIGHTS, low_rank, write_adapter
from safetensors.torch import load_file, save_file

from pipeline.errors import ConfigError
from pipeline.models.adapter import Adapter, open_adapter
from pipeline.models.checkpoint import open_checkpoint

QUERY = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of the checkpoint "llama"."""
    return write_adapter(tmp_path / "adapter", low_rank(QUERY, 64, 64) | low_rank("lm_head", 64, 509))


@pytest.fixture
def load(load_decoder: Callable[..., Any], checkpoint_folder: Callable[[str], Path]) -> Callable[..., Any]:
    return lambda folder, base="llama": load_decoder(checkpoint_folder(base), torch.float32, adapter=folder)


def change_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def refusal(folder: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        open_adapter(str(folder))
    return str(caught.value)


def test_the_adapter_that_these_are_made_of_runs(folder: Path, load: Callable[..., Any]) -> None:
    assert type(load(folder).model.get_submodule(QUERY)).__name__ == "LoraLinear"


@pytest.mark.parametrize("kind", ["IA3", "PREFIX_TUNING", "ADALORA", "LOHA", None])
def test_other_peft_types(kind: str | None, folder: Path) -> None:
    message = refusal(change_config(folder, peft_type=kind))
    assert f"model.adapter={folder}" in message
    assert f"type {kind or 'an unnamed kind'}" in message
    assert "LORA" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer_replication", [[0, 2], [1, 3]]),
        ("trainable_token_indices", [3, 4]),
        ("alora_invocation_tokens", [5, 6]),
        ("use_qalora", True),
        ("target_parameters", ["experts.up"]),
        ("kasa_config", {"beta": 1e-4}),
    ],
)
def test_what_is_no_plain_lora(name: str, value: Any, folder: Path) -> None:
    assert f"made with {name}, which is not supported" in refusal(change_config(folder, **{name: value}))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_training_that_began_by_changing_the_base(start: str, folder: Path) -> None:
    message = refusal(change_config(folder, init_lora_weights=start))
    assert f"init_lora_weights={start}" in message
    assert "path_initial_model_for_weight_conversion" in message


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_training_that_began_otherwise(start: Any, folder: Path, load: Callable[..., Any]) -> None:
    assert open_adapter(str(change_config(folder, init_lora_weights=start))).updates


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0}, {"r": "8"}, {"r": 2.5}, {"r": True}, {"lora_alpha": None}, {"rank_pattern": {"q_proj": -1}},
        {"alpha_pattern": {"q_proj": "much"}}, {"rank_pattern": {"(": 4}}, {"rank_pattern": ["q_proj"]},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_and_patterns_out_of_range(changes: dict[str, Any], folder: Path) -> None:
    assert str(folder / "adapter_config.json") in refusal(change_config(folder, **changes))


def test_folders_that_are_none(tmp_path: Path, folder: Path, checkpoint_folder: Callable[[str], Path]) -> None:
    assert "does not exist" in refusal(tmp_path / "gone")
    message = refusal(checkpoint_folder("llama"))
    assert "has no adapter_config.json" in message and "model.adapter=" in message
    (folder / "adapter_config.json").write_text("[]")
    assert str(folder / "adapter_config.json") in refusal(folder)


def test_an_adapter_in_place_of_the_model(folder: Path) -> None:
    change_config(folder, base_model_name_or_path="some/base")
    with pytest.raises(ConfigError, match=r"is an adapter, no model; use model.path=some/base model.adapter="):
        open_checkpoint(str(folder))


def test_only_pickled_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "only pickled weights (adapter_model.bin), which are never loaded" in refusal(folder)
    (folder / "adapter_model.bin").unlink()
    assert f"has no {WEIGHTS}" in refusal(folder)


def test_a_truncated_file(folder: Path, load: Callable[..., Any]) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1])
    with pytest.raises(ConfigError, match="truncated") as caught:
        load(folder)
    assert str(folder / WEIGHTS) in str(caught.value)


A, B = (f"base_model.model.{QUERY}.lora_{matrix}.weight" for matrix in "AB")
MAGNITUDE = f"base_model.model.{QUERY}.lora_magnitude_vector"
NORM, HEAD = "base_model.model.model.norm.weight", "base_model.model.lm_head.weight"
HEAD_B = "base_model.model.lm_head.lora_B.weight"


def moved(name: str, to: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({to: tensors.pop(name)})


@pytest.mark.parametrize(
    ("change", "named", "reason"),
    [
        (lambda t: t.pop(B), B, "lacks tensor"),
        (lambda t: t.pop(A), A, "lacks tensor"),
        (lambda t: t.update({A: t[A][:, :-1].contiguous()}), A, r"has shape [4, 63], but"),
        (lambda t: t.update({B: t[B][:-1].contiguous()}), B, r"asks for [64, 4]"),
        (lambda t: t.update({HEAD_B: torch.zeros(512, 4)}), HEAD_B, r"has shape [512, 4]"),
        (lambda t: t.update({A: t[A][:3].contiguous()}), A, "says rank 4"),
        (lambda t: t.update({A: t[A][0].contiguous()}), A, "is no matrix"),
        (lambda t: t.update({A: t[A].to(torch.int8)}), A, "has dtype I8"),
        (moved(A, A.replace("layers.1", "layers.7")), "layers.1", "lacks tensor"),
        (moved(A, A.removeprefix("base_model.model.")), QUERY, "does not begin with base_model.model."),
        (moved(A, A.replace(".weight", ".default.weight")), "lora_A.default.weight", "none that LoRA or DoRA has"),
        (lambda t: t.update({MAGNITUDE: torch.ones(64)}), "magnitude", "use_dora: false"),
        (lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 64)}), "score.weight", "no place"),
        (lambda t: t.update({NORM: torch.ones(63)}), "norm.weight", r"the model's is [64]"),
        (lambda t: t.update({HEAD: torch.ones(512, 64)}), "lm_head.weight", "embed_tokens"),
        (lambda t: t.update({f"{QUERY}.bias": torch.ones(64)}), "bias", "does not begin"),
        (lambda t: t.update({f"base_model.model.{QUERY}.base_layer.bias": torch.ones(64)}), "bias", "no place"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(
    change: Callable[..., Any], named: str, reason: str, folder: Path, load: Callable[..., Any]
) -> None:
    change_tensors(folder, change)
    with pytest.raises(ConfigError) as caught:
        load(folder)
    message = str(caught.value)
    assert str(folder / WEIGHTS) in message
    assert named in message and reason in message


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("model.layers.9.self_attn.q_proj", "Linear"),
        ("model.layers.0.self_attn.qkv_proj", "Linear"),
        ("model", "Linear"),
    ],
)
def test_modules_that_the_model_does_not_have(path: str, kind: str, tmp_path: Path, load: Callable[..., Any]) -> None:
    folder = write_adapter(tmp_path / "other", low_rank(path, 64, 64))
    with pytest.raises(ConfigError, match=f"belongs to {path}, which is no {kind} of the model"):
        load(folder)


def test_dora_without_its_magnitudes(folder: Path) -> None:
    adapter = open_adapter(str(change_config(folder, use_dora=True)))
    with pytest.raises(ConfigError, match=r"lacks tensor .*lora_magnitude_vector"):
        _ = adapter.updates


def test_an_adapter_of_another_size_of_model(folder: Path, load: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"use the base model that the adapter was trained on"):
        load(folder, "llama-wide")


def test_nothing_in_it(tmp_path: Path) -> None:
    adapter = open_adapter(str(write_adapter(tmp_path / "empty", {})))
    with pytest.raises(ConfigError, match="holds no tensors"):
        _ = adapter.updates


# --- what is known before anything is loaded ------------------------------------------------------------------


def test_identity_changes_with_either_file(folder: Path) -> None:
    before = open_adapter(str(folder)).identity()
    assert open_adapter(str(folder)).identity() == before
    change_tensors(folder, lambda tensors: tensors[B][7, 2].add_(1e-3))
    after = open_adapter(str(folder)).identity()
    assert {name for name in before if before[name] != after[name]} == {WEIGHTS}
    last = open_adapter(str(change_config(folder, lora_alpha=9))).identity()
    assert {name for name in before if last[name] != after[name]} == {"adapter_config.json"}


@pytest.mark.parametrize(
    ("base", "model", "noted"),
    [
        ("meta/Llama-7B", "meta/Llama-7B", False),
        ("meta/Llama-7B", "/models/llama-7b", False),
        ("/train/llama/", "llama", False),
        ("", "llama", False),
        (None, "llama", False),
        ("meta/Llama-7B", "unsloth/llama-7b-bnb-4bit", True),
    ],
)
def test_a_base_of_another_name_is_noted(base: str | None, model: str, noted: bool, folder: Path) -> None:
    adapter = open_adapter(str(change_config(folder, base_model_name_or_path=base)))
    sentence = adapter.trained_elsewhere(model)
    assert (sentence is not None) == noted
    assert sentence is None or (str(base) in sentence and model in sentence)


def test_bytes_are_those_that_loading_takes(folder: Path, load: Callable[..., Any]) -> None:
    """Ranks are padded to 16 once loaded."""
    decoder = load(folder)
    taken = sum(tensor.numel() * 4 for name, tensor in decoder.model.named_buffers() if name.endswith(("a_RK", "b_NR")))
    assert open_adapter(str(folder)).num_bytes(2) == taken


def test_description(folder: Path, tmp_path: Path) -> None:
    assert open_adapter(str(folder)).describe() == "LoRA of rank 4 on 2 modules"
    tensors = low_rank("a", 8, 8) | low_rank("b", 8, 8, 9) | {"lm_head.weight": torch.ones(9, 8)}
    other = open_adapter(str(write_adapter(tmp_path / "other", tensors, rank_pattern={"b": 9})))
    assert other.describe() == "LoRA of rank 4 to 9 on 2 modules and 1 whole tensor"
    assert (other.vocab, open_adapter(str(folder)).vocab) == (9, None)


def test_a_tokenizer_of_its_own(folder: Path) -> None:
    assert open_adapter(str(folder)).tokenizer is None
    (folder / "tokenizer_config.json").write_text("{}")
    assert open_adapter(str(folder)).tokenizer is None, "there is no tokenizer that this would configure"
    (folder / "tokenizer.json").write_text("{}")
    own = open_adapter(str(folder)).tokenizer
    assert own is not None and own.folder == folder
    assert isinstance(open_adapter(str(folder)), Adapter)
