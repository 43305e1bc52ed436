"""How long a checkpoint of 7B shape takes to load, and how much memory: in flight, from a quantized copy, by a peer.

Makes a random Llama checkpoint in bfloat16 (27 GB of disk for 7B with its copies), then measures, each in a process
of its own and with the files out of the page cache: quantization in flight (NF4), `pipeline.quantize` of the same,
the load of what it wrote, and transformers loading both. The last line is one JSON document.

    python scripts/bench_load.py --shape 7b --folder /scratch/load
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from pipeline import fingerprint

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 4096},
    "first": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 512},
}
LAYERS_PER_SHARD = 8
GIB = 1 << 30


def tensors_of(config: LlamaConfig) -> Iterator[dict[str, Tensor]]:
    """The random weights, a shard at a time."""

    def random(outputs: int, inputs: int) -> Tensor:
        return torch.empty(outputs, inputs, dtype=torch.bfloat16).normal_(std=0.02)

    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {f"self_attn.{x}_proj": (hidden, hidden) for x in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    for first in range(0, config.num_hidden_layers, LAYERS_PER_SHARD):
        shard = {}
        for layer in range(first, min(first + LAYERS_PER_SHARD, config.num_hidden_layers)):
            prefix = f"model.layers.{layer}"
            shard |= {f"{prefix}.{name}.weight": random(*shape) for name, shape in shapes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shard[f"{prefix}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        yield shard
    ends = {f"{name}.weight": random(config.vocab_size, hidden) for name in ("model.embed_tokens", "lm_head")}
    yield ends | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}


def write_checkpoint(folder: Path, shape: str) -> Path:
    """A sharded checkpoint with its index."""
    config = LlamaConfig(
        **SHAPES[shape], num_attention_heads=SHAPES[shape]["hidden_size"] // 128, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    where: dict[str, str] = {}
    for number, shard in enumerate(tensors_of(config)):
        name = f"model-{number:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def forget(folder: Path) -> None:
    """Take the folder's files out of the page cache."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(first: Path, folder: Path, threads: int, **job: Any) -> dict[str, float]:
    """One job of load_memory.py, in a process of its own: seconds and GiB."""
    forget(folder)
    program = [sys.executable, str(Path(__file__).with_name("load_memory.py")), str(threads)]
    jobs = [{"folder": str(first)}, {"folder": str(folder), "dtype": "bfloat16", **job}]
    started = time.perf_counter()
    done = subprocess.run(program, input=json.dumps(jobs), stdout=subprocess.PIPE, text=True, check=True)
    took = json.loads(done.stdout.splitlines()[-1])
    found = {
        "seconds": round(took["seconds"], 1),
        "process_seconds": round(time.perf_counter() - started, 1),
        "peak_anonymous_gib": round((took["peak"] - took["before"]) / GIB, 2),
        "weights_gib": round((took["quantized"] + took["other"]) / GIB, 2),
        "beside_weights_mib": round((took["peak"] - took["before"] - took["quantized"] - took["other"]) / (1 << 20)),
    }
    print(job, found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder; made, and removed at the end")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    root: Path = arguments.folder
    root.mkdir(parents=True)
    try:
        first = write_checkpoint(root / "first", "first")
        folder = write_checkpoint(root / "plain", arguments.shape)
        copy = root / "nf4"
        steps = {
            "in_flight": {"folder": folder, "method": "bnb"},
            "quantize": {"folder": folder, "method": "bnb", "target": str(copy)},
            "quantized_copy": {"folder": copy, "method": "auto"},
            "transformers_in_flight": {"folder": folder, "method": "bnb", "peer": True},
            "transformers_quantized_copy": {"folder": copy, "method": "auto", "peer": True},
        }
        figures = {name: measure(first, threads=arguments.threads, **step) for name, step in steps.items()}
        parameters = sum(t.numel() for shard in tensors_of_meta(arguments.shape) for t in shard.values())
    finally:
        shutil.rmtree(root)
    seconds = {name: took["seconds"] for name, took in figures.items()}
    document = {
        "command": f"python scripts/bench_load.py --shape {arguments.shape}",
        "date": time.strftime("%Y-%m-%d"),
        "shape": SHAPES[arguments.shape],
        "parameters": parameters,
        "figures": figures,
        "copy_over_in_flight": round(seconds["in_flight"] / seconds["quantized_copy"], 2),
        "over_transformers_in_flight": round(seconds["transformers_in_flight"] / seconds["in_flight"], 2),
        "over_transformers_copy": round(seconds["transformers_quantized_copy"] / seconds["quantized_copy"], 2),
        "threads": arguments.threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": fingerprint.versions(),
    }
    print(json.dumps(document))


def tensors_of_meta(shape: str) -> Iterator[dict[str, Tensor]]:
    """The same tensors without content."""
    with torch.device("meta"):
        yield from tensors_of(LlamaConfig(**SHAPES[shape]))


if __name__ == "__main__":
    main()
