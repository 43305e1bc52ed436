"""Checkpoints that are broken on purpose: a ConfigError that names the file or tensor, before any answer."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import greedy, oracle_logits, random_prompt
from safetensors.torch import load_file, save_file

from pipeline.errors import ConfigError
from pipeline.models.architecture import geometry_of, load_config
from pipeline.models.checkpoint import open_checkpoint

WEIGHTS = "model.safetensors"


@pytest.fixture
def copy_of(checkpoint_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint's folder that a test may break."""
    return lambda name: Path(shutil.copytree(checkpoint_folder(name), tmp_path / name))


@pytest.fixture
def load(load_decoder: Callable[..., Any]) -> Callable[..., Any]:
    return lambda folder, quant="none": load_decoder(folder, torch.float32, quant)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def split_weights(folder: Path) -> list[str]:
    """Rewrite the weights as three files and an index."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = [f"model-0000{n + 1}-of-00003.safetensors" for n in range(3)]
    places = {tensor: names[n % 3] for n, tensor in enumerate(sorted(weights))}
    for name in names:
        save_file({t: weights[t] for t, at in places.items() if at == name}, folder / name, metadata={"format": "pt"})
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return names


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("llama", "lm_head.weight"),
        ("llama", "model.norm.weight"),
        ("qwen2", "model.layers.2.self_attn.q_proj.bias"),
    ],
)
def test_a_missing_tensor(name: str, tensor: str, quant: str, copy_of: Any, load: Any) -> None:
    folder = copy_of(name)
    change_weights(folder, lambda weights: weights.pop(tensor))
    with pytest.raises(ConfigError, match="lacks tensor") as caught:
        load(folder, quant)
    assert tensor in str(caught.value)


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("tensor", ["model.layers.0.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_tensor_of_the_wrong_shape(tensor: str, quant: str, copy_of: Any, load: Any) -> None:
    folder = copy_of("llama")

    def shorten(weights: dict[str, torch.Tensor]) -> None:
        weights[tensor] = weights[tensor][:-1].contiguous()

    change_weights(folder, shorten)
    with pytest.raises(ConfigError, match="has shape") as caught:
        load(folder, quant)
    assert tensor in str(caught.value)
    assert WEIGHTS in str(caught.value)


@pytest.mark.parametrize("left", [0, 5, 8, 100, 2000, -1], ids=lambda n: f"{n}bytes")
def test_a_truncated_file(left: int, copy_of: Any, load: Any) -> None:
    folder = copy_of("llama")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:left])
    with pytest.raises(ConfigError, match="truncated or no safetensors file") as caught:
        load(folder)
    assert str(folder / WEIGHTS) in str(caught.value)


@pytest.mark.parametrize(
    "header", [b"[]", b"null", b'{"a": 1}', b'{"a": {}}', b"\xff\xfe", b'{"a": {"data_offsets": [0]}}']
)
def test_a_file_that_is_something_else(header: bytes, copy_of: Any, load: Any) -> None:
    folder = copy_of("llama")
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ConfigError, match=WEIGHTS):
        load(folder)


def test_weights_in_several_files(
    copy_of: Any, load: Any, checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    folder = copy_of("llama-biases")
    split_weights(folder)
    rows = [greedy(0, (5, 6, 7), 12)]
    assert build_engine(folder).answer(rows) == build_engine(checkpoint_folder("llama-biases")).answer(rows)


def test_an_index_that_names_a_missing_file(copy_of: Any, load: Any) -> None:
    folder = copy_of("llama")
    gone = split_weights(folder)[1]
    (folder / gone).unlink()
    with pytest.raises(ConfigError, match="names") as caught:
        load(folder)
    assert gone in str(caught.value)


def test_only_pickled_weights(copy_of: Any, load: Any) -> None:
    folder = copy_of("llama")
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"only pickled weights \(pytorch_model.bin\)"):
        load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match=r"no \*.safetensors file"):
        load(folder)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(ConfigError, match="does not exist") as caught:
        open_checkpoint(str(gone))
    assert str(gone) in str(caught.value)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json") as caught:
        open_checkpoint(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '"llama"'])
def test_a_config_that_is_no_json_object(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "mamba", "nothing-like-it"])
def test_an_architecture_that_is_not_supported(model_type: str, copy_of: Any, load: Any) -> None:
    folder = copy_of("llama")
    change_config(folder, model_type=model_type)
    with pytest.raises(ConfigError, match=f"model.path={folder}") as caught:
        load(folder)
    assert model_type in str(caught.value)


@pytest.mark.parametrize("rope", ["su", "mrope"])
def test_a_rope_that_the_engine_does_not_do_is_refused(rope: str, copy_of: Any, load: Any) -> None:
    folder = copy_of("llama")
    change_config(folder, rope_parameters={"rope_type": rope, "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ConfigError, match=f"model.path={folder} uses {rope} RoPE"):
        load(folder)


def test_tensors_that_have_no_place_are_named(copy_of: Any, load: Any, checkpoint_folder: Any) -> None:
    folder = copy_of("llama")
    extra = {"model.extra.weight": torch.ones(3), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change_weights(folder, lambda weights: weights.update(extra))
    assert load(folder).unused_tensors == ("model.extra.weight",)
    assert load(checkpoint_folder("llama")).unused_tensors == ()


def test_names_without_the_prefix_of_the_whole_model(
    copy_of: Any, checkpoint_folder: Any, build_engine: Callable[..., Any]
) -> None:
    """Some checkpoints were saved from the inner model: `layers.0...` in place of `model.layers.0...`."""
    folder = copy_of("llama-tied")

    def shorten_names(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[name.removeprefix("model.")] = weights.pop(name)

    change_weights(folder, shorten_names)
    rows = [greedy(0, (5, 6, 7), 12)]
    assert build_engine(folder).answer(rows) == build_engine(checkpoint_folder("llama-tied")).answer(rows)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 2}, (5, 6)),
        ({"eos_token_id": 7}, {"eos_token_id": 2}, (7,)),
        ({}, {"eos_token_id": 2}, (2,)),
        (None, {"eos_token_id": [8, 9]}, (8, 9)),
        (None, {"eos_token_id": None}, ()),
    ],
)
def test_stop_tokens(generation: Any, config: dict[str, Any], expected: tuple[int, ...], copy_of: Any) -> None:
    folder = copy_of("llama")
    change_config(folder, **config)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert open_checkpoint(str(folder)).stop_token_ids == expected


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_those_that_transformers_loads(
    name: str,
    dtype: torch.dtype,
    checkpoint_folder: Callable[[str], Path],
    load_decoder: Callable[..., Any],
    reference: Callable[..., Any],
) -> None:
    folder = checkpoint_folder(name)
    theirs = reference(folder, dtype).state_dict()
    ours = load_decoder(folder, dtype).model.state_dict()
    assert set(ours) == set(theirs)
    for path, tensor in theirs.items():
        kept = torch.float32 if path == "lm_head.weight" else dtype
        assert ours[path].dtype == kept
        assert torch.equal(ours[path], tensor.to(kept)), path


def test_the_shapes_of_the_tensors_are_read_from_the_headers(checkpoint_folder: Callable[[str], Path]) -> None:
    folder = checkpoint_folder("llama")
    weights = load_file(folder / WEIGHTS)
    infos = open_checkpoint(str(folder)).tensors
    assert {n: i.shape for n, i in infos.items()} == {n: tuple(t.shape) for n, t in weights.items()}
    assert {n: i.num_bytes for n, i in infos.items()} == {n: t.nbytes for n, t in weights.items()}


def test_identity_changes_with_weights_and_config(copy_of: Any) -> None:
    folder = copy_of("llama")
    before = open_checkpoint(str(folder)).identity()
    assert open_checkpoint(str(folder)).identity() == before
    change_weights(folder, lambda weights: weights["lm_head.weight"].mul_(2.0))
    after = open_checkpoint(str(folder)).identity()
    assert after[WEIGHTS] != before[WEIGHTS]
    assert after["config.json"] == before["config.json"]
    change_config(folder, rms_norm_eps=1e-3)
    assert open_checkpoint(str(folder)).identity()["config.json"] != before["config.json"]


def test_every_byte_counts_where_all_are_hashed(copy_of: Any) -> None:
    """Between the samples, too."""
    folder = copy_of("llama")
    weights = folder / WEIGHTS
    with weights.open("ab") as file:
        file.truncate(200 << 20)  # a long file of zeros behind what counts: the samples are far apart
    before = open_checkpoint(str(folder))
    sampled, whole = before.identity()[WEIGHTS], before.identity(whole=True)[WEIGHTS]
    with weights.open("r+b") as file:
        file.seek((200 << 20) * 3 // 7 + 1)
        file.write(b"\1")
    after = open_checkpoint(str(folder))
    assert after.identity()[WEIGHTS] == sampled
    assert after.identity(whole=True)[WEIGHTS] != whole
    with weights.open("r+b") as file:
        file.seek((200 << 20) * 3 // 7 + 1)
        file.write(b"\0")
    told = subprocess.run(["sha256sum", str(weights)], capture_output=True, text=True, check=True)
    assert whole == f"sha256:{told.stdout.split()[0]}"


@pytest.mark.parametrize("name", ["llama", "llama-one-head", "qwen3", "mistral"])
def test_geometry(name: str, checkpoint_folder: Callable[[str], Path], reference: Callable[..., Any]) -> None:
    """Against the weights' own shapes."""
    folder = checkpoint_folder(name)
    geometry = geometry_of(load_config(str(folder), str(folder), False))
    model = reference(folder)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert geometry.layers == len(model.model.layers)
    assert geometry.kv_heads * geometry.head_dim == attention.k_proj.out_features
    assert geometry.head_dim == attention.head_dim
    assert (geometry.vocab, geometry.hidden) == tuple(model.lm_head.weight.shape)
    assert geometry.intermediate == mlp.up_proj.out_features
    logits = oracle_logits(model, random_prompt(random.Random(0), geometry.max_positions))
    assert logits.shape == (geometry.max_positions, geometry.vocab)
