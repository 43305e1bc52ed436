"""Loading is streamed: beside the weights that stay, no more anonymous memory than a few of the largest tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

MIB = 1 << 20
HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 1024, 2816, 4, 3000
LARGEST = INTERMEDIATE * HIDDEN * 2
SLACK = 12 * MIB
JOBS = {
    "nf4": ("plain", "bnb", "bfloat16"),
    "nf4 in float32": ("plain", "bnb", "float32"),
    "int8": ("plain", "bnb-int8", "bfloat16"),
    "unquantized": ("plain", "none", "bfloat16"),
    "unquantized in float32": ("plain", "none", "float32"),
    "gptq": ("gptq", "auto", "bfloat16"),
    "written as nf4": ("plain", "bnb", "bfloat16"),
    "written as int8 of float32": ("plain", "bnb-int8", "float32"),
}


def linears(layers: int, hidden: int, intermediate: int) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{x}_proj": (hidden, hidden) for x in "qkvo"}
        shapes |= {f"{prefix}.mlp.{x}_proj": (intermediate, hidden) for x in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj"] = (hidden, intermediate)
    return shapes


def write(folder: Path, quantization: dict[str, Any] | None, layers: int = LAYERS, hidden: int = HIDDEN) -> Path:
    """A random Llama in bfloat16, or with random codes in GPTQ's layout."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=INTERMEDIATE, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=VOCAB, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
        dtype="bfloat16", quantization_config=quantization,
    )  # fmt: skip
    config.save_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    for path, (outputs, inputs) in linears(layers, hidden, INTERMEDIATE).items():
        if quantization is None:
            tensors[f"{path}.weight"] = torch.randn(outputs, inputs, dtype=torch.bfloat16)
            continue
        tensors[f"{path}.qweight"] = torch.randint(-(2**31), 2**31, (inputs // 8, outputs), dtype=torch.int32)
        tensors[f"{path}.qzeros"] = torch.randint(-(2**31), 2**31, (inputs // 128, outputs // 8), dtype=torch.int32)
        tensors[f"{path}.scales"] = torch.rand(inputs // 128, outputs, dtype=torch.float16)
    for path in {"model", *(name.rsplit(".", 2)[0] for name in linears(layers, hidden, INTERMEDIATE))}:
        norms = ("norm",) if path == "model" else ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"{path}.{norm}.weight": torch.ones(hidden, dtype=torch.bfloat16) for norm in norms}
    tensors |= {
        name: torch.randn(VOCAB, hidden, dtype=torch.bfloat16)
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """What one process took for each of JOBS, one after the other."""
    root = tmp_path_factory.mktemp("memory")
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False, "desc_act": False}
    folders = {"plain": write(root / "plain", None), "gptq": write(root / "gptq", gptq)}
    jobs = [{"folder": str(write(root / "first", None, layers=1, hidden=64))}]
    for job, (name, method, dtype) in JOBS.items():
        target = {"target": str(root / f"{job}.out")} if "written" in job else {}
        jobs.append({"folder": str(folders[name]), "method": method, "dtype": dtype, **target})
    program = [sys.executable, str(Path(__file__).parents[2] / "scripts" / "load_memory.py")]
    done = subprocess.run(program, input=json.dumps(jobs), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(JOBS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("job", JOBS)
def test_beside_the_weights_there_are_three_of_the_largest_tensor(job: str, measured: dict[str, Any]) -> None:
    took = measured[job]
    itemsize = 2 if "float32" in job else 1
    beside = took["peak"] - took["before"] - took["quantized"] - took["other"]
    assert beside < 3 * LARGEST * itemsize + SLACK, f"{beside / MIB:.0f} MiB"
    assert took["after"] - took["before"] - took["quantized"] - took["other"] < SLACK, "and they are given back"


def test_the_whole_checkpoint_would_not_pass(measured: dict[str, Any]) -> None:
    """The bound above is far below what reading everything first would take."""
    whole = sum(2 * outputs * inputs for outputs, inputs in linears(LAYERS, HIDDEN, INTERMEDIATE).values())
    assert whole > 2 * (3 * LARGEST + SLACK)
    assert measured["int8"]["quantized"] > 0.4 * whole, "and the weights were there"
