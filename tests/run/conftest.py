"""Checkpoints, datasets and reference runs that several end-to-end tests share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from crowd import NUM_ROWS, args
from harness import TICKETS, TINY, give_tokenizer, results, run_here, write


def save_small(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A random float32 Llama with the shipped tokenizer, which here adds <|bos|> to plain text."""
    from oracle import save_checkpoint

    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 512, "vocab_size": 2048}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    save_checkpoint("llama", folder, seed=seed, **{**sizes, **special, **changes})
    return give_tokenizer(folder, adds_bos=True)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="session")
def other_small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights in the same shapes."""
    return save_small(tmp_path_factory.mktemp("small") / "other", seed=1)


@pytest.fixture(scope="session")
def tickets() -> list[str]:
    import pyarrow.parquet as pq

    texts: list[str] = pq.read_table(TICKETS)["ticket"].to_pylist()
    return texts


@pytest.fixture(scope="session")
def varied(tmp_path_factory: pytest.TempPathFactory, tickets: list[str]) -> Path:
    """60 rows with a key and prompts of one word to some 300 tokens, in no order of length."""
    rng = random.Random(7)
    words = " ".join(tickets).split()
    lengths = [1, 2, 3, 190, 230, *(rng.randrange(1, 40) for _ in range(55))]
    rng.shuffle(lengths)
    prompts = [" ".join(rng.choice(words) for _ in range(length)) for length in lengths]
    folder = tmp_path_factory.mktemp("varied")
    return write(folder / "varied.parquet", {"key": list(range(60)), "prompt": prompts}, row_group_size=25)


@pytest.fixture(scope="session")
def tiny_reference() -> Any:
    """The shipped model in float32 and its tokenizer, as transformers runs them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager").eval()
    return model, AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="session")
def small_reference(small_model: Path) -> Any:
    """The random model and its tokenizer, as transformers loads and runs them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32, attn_implementation="eager").eval()
    return model, AutoTokenizer.from_pretrained(small_model)


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory, tickets: list[str]) -> Path:
    """The rows that several processes work on together."""
    columns = {"key": list(range(NUM_ROWS)), "prompt": tickets[:NUM_ROWS]}
    return write(tmp_path_factory.mktemp("many") / "in.parquet", columns)


@pytest.fixture(scope="session")
def alone(small_model: Path, many: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process makes of them."""
    out = tmp_path_factory.mktemp("alone") / "out"
    run_here(*args(small_model, many, out)).done()
    return results(out)
