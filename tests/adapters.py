"""Adapters made by PEFT for the tests, by one process of make_adapters.py for all of a module's cases."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from oracle import VOCAB, random_prompt
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Case:
    """An adapter to make and to run: see make_adapters.py."""

    base: Path
    settings: dict[str, Any]
    vocab: int | None = None
    save_embeddings: bool | str = "auto"
    dtype: str = "float32"
    code: str | None = None
    prompts: tuple[tuple[int, ...], ...] = ()
    new_tokens: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Made:
    """An adapter's folder, and PEFT's logits [T, V] and greedy answers for each prompt."""

    case: Case
    folder: Path
    answers: Mapping[str, Tensor] = field(repr=False)

    def logits(self, prompt: int) -> Tensor:
        return self.answers[f"logits.{prompt}"].double()

    def tokens(self, prompt: int) -> tuple[int, ...]:
        return tuple(self.answers[f"tokens.{prompt}"].tolist())


def lora(targets: list[str] | str, rank: int = 8, alpha: int = 16, **settings: Any) -> dict[str, Any]:
    """Settings of a LoraConfig."""
    return {"task_type": "CAUSAL_LM", "target_modules": targets, "r": rank, "lora_alpha": alpha, **settings}


def some_prompts(count: int = 2, vocab: int = VOCAB) -> tuple[tuple[int, ...], ...]:
    rng = random.Random(5)
    return tuple(random_prompt(rng, length, vocab) for length in (37, 9, 1, 60, 22, 14)[:count])


def make_adapters(cases: Mapping[str, Case], root: Path) -> dict[str, Made]:
    """All the cases' adapters, each in a folder of its own below `root`."""
    orders = [
        asdict(case)
        | {"base": str(case.base), "target": str(root / name), "answers": str(root / f"{name}.safetensors")}
        for name, case in cases.items()
    ]
    program = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("make_adapters.py"))]
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        program, input=json.dumps(orders), capture_output=True, text=True, check=False, env={**os.environ, **threads}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {n: Made(case, root / n, load_file(root / f"{n}.safetensors")) for n, case in cases.items()}


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """A folder written by hand: tensors by their names behind PEFT's prefix, and adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def low_rank(path: str, inputs: int, outputs: int, rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of one Linear's update."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{path}.lora_A.weight": torch.randn(rank, inputs, generator=generator) * 0.2,
        f"{path}.lora_B.weight": torch.randn(outputs, rank, generator=generator) * 0.2,
    }


def furthest(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    assert ours.shape == theirs.shape
    assert bool(torch.isfinite(theirs).all())
    return float((ours.double() - theirs).abs().max() / theirs.abs().max())
