"""Useful tokens per second of the engine beside transformers' `generate` and `generate_batch`, in one run.

A random Llama (its speed does not depend on the values) answers prompts of random tokens, greedily, each row with
its own number of new tokens; nothing stops early, so that all systems do the same useful work: every row's prompt
and answer tokens. `generate` gets the rows sorted by prompt length in batches, at the best of several batch sizes,
each batch running to its longest answer; `generate_batch` is transformers' continuous batching with its prefix
sharing. Each system is warmed up, then timed `--repeats` times in turn with the others; the medians count. The last
line is one JSON document.

    python scripts/bench.py --workload mixed --quant bnb
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
import transformers
from torch import nn

from pipeline import fingerprint
from pipeline.config import load_config
from pipeline.core import Request, SamplingParams
from pipeline.engine.engine import Engine
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.runtime import resolve_runtime

SPECIAL = 3
"""Token ids below are left out of random prompts."""
BATCHES = {"cpu": (8, 16, 32, 64), "cuda": (32, 64, 128, 256)}
SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
              "num_key_value_heads": 8, "vocab_size": 8192},
    "llama3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 8, "vocab_size": 128256},
    "llama2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip
GPU_SHARE = 0.4
"""Of a GPU's free memory, for the engine."""
WORKLOADS = ("mixed", "long", "prefix", "uniform")


@dataclass(frozen=True)
class Row:
    """A prompt and how many tokens its answer has."""

    prompt: tuple[int, ...]
    new_tokens: int


def make_rows(workload: str, count: int, device: str, vocab: int, seed: int) -> list[Row]:
    """mixed: prompts lognormal, answers geometric; long: long prompts, short answers; prefix: 75 % of each prompt is
    the same and the answer is one token; uniform: all alike."""
    rng = random.Random(seed)
    mean_prompt, mean_new = (60, 40) if device == "cpu" else (300, 128)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(SPECIAL, vocab) for _ in range(length))

    def lengths() -> tuple[int, int]:
        if workload == "mixed":
            prompt = rng.lognormvariate(0, 0.6) / 1.197 * mean_prompt  # the mean of that lognormal is 1.197
            new = 1 + int(rng.expovariate(1 / mean_new))
            return max(4, min(8 * mean_prompt, round(prompt))), min(new, 6 * mean_new)
        if workload == "long":
            return rng.randrange(4 * mean_prompt, 8 * mean_prompt), rng.randrange(1, 9)
        return (2 * mean_prompt, 1) if workload == "prefix" else (mean_prompt, mean_new)

    head = tokens(3 * 2 * mean_prompt // 4) if workload == "prefix" else ()
    rows = []
    for _ in range(count):
        prompt, new = lengths()
        rows.append(Row(head + tokens(prompt - len(head)), new))
    return rows


def common_head(rows: Sequence[Row]) -> tuple[int, ...]:
    """What all prompts begin with, as the pipeline knows it from the template."""
    first, last = min(row.prompt for row in rows), max(row.prompt for row in rows)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def useful_tokens(rows: Sequence[Row]) -> int:
    return sum(len(row.prompt) + row.new_tokens for row in rows)


def make_checkpoint(folder: Path, size: str, dtype: str, device: str) -> Path:
    config = transformers.LlamaConfig(
        **SIZES[size], max_position_embeddings=4096, dtype=dtype, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder


# --- the systems ------------------------------------------------------------------------------------------------

System = Callable[[Sequence[Row]], int]
"""Answers the rows; returns how many answer tokens it made."""


def engine_system(folder: Path, args: argparse.Namespace, head: tuple[int, ...]) -> tuple[System, dict[str, Any]]:
    """This project's engine, with the shapes and the memory it would choose itself."""
    overrides = [
        "model=path", f"model.path={folder}", f"quant={args.quant}", f"model.device={args.device}",
        f"model.dtype={args.dtype}", "data.path=unused", "output.dir=unused",
        "engine.dedup=false",  # the same rows are answered again in each repeat
        *shared_memory(args.device),
        *args.overrides,
    ]  # fmt: skip
    config = load_config(overrides)
    runtime = resolve_runtime(config, open_checkpoint(str(folder)), None)
    _, engine = runtime.load(False, iter, lambda ids: "", config.engine, head)

    def answer(rows: Sequence[Row]) -> int:
        return _drive(engine, rows)

    return answer, {
        "shapes": runtime.shapes.as_dict(),
        "kernel": runtime.kernel_name,
        "runs": runtime.describe().removeprefix(f"{folder}: "),
    }


def shared_memory(device: str) -> list[str]:
    """On a GPU a share of what is free: the peers have their weights and caches there at the same time."""
    if device != "cuda":
        return []
    return [f"model.memory={torch.cuda.mem_get_info()[0] * GPU_SHARE / 2**30:.1f}"]


def _drive(engine: Engine, rows: Sequence[Row]) -> int:
    for index, row in enumerate(rows):
        engine.submit(Request(id=index, prompt_ids=row.prompt, sampling=SamplingParams(max_new_tokens=row.new_tokens)))
    made = 0
    while engine.unfinished:
        made += sum(len(output.new_token_ids) for output in engine.poll())
    return made


def load_peer(folder: Path, args: argparse.Namespace) -> nn.Module:
    quantization = None
    if args.quant == "bnb":
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, args.dtype),
        )  # fmt: skip
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, args.dtype), device_map=args.device, quantization_config=quantization
    )
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    return model.eval()


def generate_system(model: nn.Module, batch: int) -> System:
    """`generate` on batches of rows sorted by prompt length, padded on the left."""

    @torch.inference_mode()
    def answer(rows: Sequence[Row]) -> int:
        ordered = sorted(rows, key=lambda row: len(row.prompt))
        made = 0
        for first in range(0, len(ordered), batch):
            made += _generate(model, ordered[first : first + batch])
        return made

    return answer


def _generate(model: Any, rows: Sequence[Row]) -> int:
    longest = max(len(row.prompt) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row.prompt) :] = torch.tensor(row.prompt)
        mask[index, longest - len(row.prompt) :] = 1
    new = max(row.new_tokens for row in rows)
    model.generate(
        ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return sum(row.new_tokens for row in rows)


def continuous_system(model: Any) -> System:
    """transformers' continuous batching, each request with its own number of new tokens, prefix sharing on."""

    def answer(rows: Sequence[Row]) -> int:
        config = transformers.GenerationConfig(
            max_new_tokens=max(row.new_tokens for row in rows), do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        made = 0
        with model.continuous_batching_context_manager(generation_config=config) as manager:
            for index, row in enumerate(rows):
                manager.add_request(list(row.prompt), request_id=str(index), max_new_tokens=row.new_tokens)
            done = 0
            while done < len(rows):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    done += 1
                    made += len(result.generated_tokens)
        return made

    return answer


# --- timing -----------------------------------------------------------------------------------------------------


def timed(system: System, rows: Sequence[Row], device: str) -> float:
    started = time.perf_counter()
    made = system(rows)
    if device == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - started
    assert made == sum(row.new_tokens for row in rows), f"{made} tokens"
    return elapsed


def best_batch(
    model: nn.Module, rows: Sequence[Row], batches: Sequence[int], device: str
) -> tuple[int, dict[str, float]]:
    """The batch size at which `generate` is fastest on these rows, and the seconds of each that was tried."""
    seconds: dict[str, float] = {}
    for batch in batches:
        system = generate_system(model, batch)
        try:
            timed(system, rows[:batch], device)
            seconds[str(batch)] = timed(system, rows, device)
        except torch.OutOfMemoryError:
            print(f"generate, batch {batch}: out of memory", flush=True)
            torch.cuda.empty_cache()
            break
        print(f"generate, batch {batch}: {useful_tokens(rows) / seconds[str(batch)]:,.0f} useful tokens/s", flush=True)
    if not seconds:
        raise SystemExit("generate has no memory for the smallest batch; name smaller ones with --batches")
    return int(min(seconds, key=lambda key: seconds[key])), seconds


def measure(systems: dict[str, System], rows: Sequence[Row], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each system, in turn, so that a change of the machine's load meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for system in systems.values():
        timed(system, rows[: args.warmup], args.device)
    for _ in range(args.repeats):
        for name, system in systems.items():
            seconds[name].append(timed(system, rows, args.device))
            rate = useful_tokens(rows) / seconds[name][-1]
            print(f"{name}: {rate:,.0f} useful tokens/s, {len(rows) / seconds[name][-1]:,.1f} rows/s", flush=True)
    return seconds


def report(seconds: dict[str, list[float]], rows: Sequence[Row]) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": {name: [round(s, 3) for s in values] for name, values in seconds.items()},
        "useful_tokens_per_s": {name: round(useful_tokens(rows) / s, 1) for name, s in medians.items()},
        "rows_per_s": {name: round(len(rows) / s, 2) for name, s in medians.items()},
        "times_as_fast_as": {n: round(s / medians["engine"], 3) for n, s in medians.items() if n != "engine"},
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    vocab = SIZES[args.size]["vocab_size"]
    rows = make_rows(args.workload, args.rows, args.device, vocab, args.seed)
    with tempfile.TemporaryDirectory() as root:
        folder = make_checkpoint(Path(root) / "model", args.size, args.dtype, args.device)
        engine, runs = engine_system(folder, args, common_head(rows))
        print(runs["runs"], flush=True)
        systems: dict[str, System] = {"engine": engine}
        sweep: dict[str, float] = {}
        if "generate" in args.peers:
            peer = load_peer(folder, args)
            batch, sweep = best_batch(peer, rows, args.batches or BATCHES[args.device], args.device)
            systems[f"generate (batch {batch})"] = generate_system(peer, batch)
        if "generate_batch" in args.peers:
            systems["generate_batch"] = continuous_system(load_peer(folder, args))
        seconds = measure(systems, rows, args)
    return {
        "workload": {"name": args.workload, "rows": len(rows), "prompt_tokens": sum(len(r.prompt) for r in rows),
                     "completion_tokens": sum(r.new_tokens for r in rows), "example": asdict(rows[0])["new_tokens"]},
        **report(seconds, rows),
        "generate_sweep_s": {batch: round(s, 3) for batch, s in sweep.items()},
        "engine": runs,
    }  # fmt: skip


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The engine beside transformers' generate and generate_batch.")
    parser.add_argument("--workload", choices=WORKLOADS, default="mixed")
    parser.add_argument("--quant", choices=("none", "bnb"), default="bnb")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--warmup", type=int, default=48, help="rows that each system answers before it is timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=["generate", "generate_batch"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batches", nargs="*", type=int, help="batch sizes to try for generate; all if absent")
    parser.add_argument("overrides", nargs="*", help="for the engine's configuration: engine.slots=64 ...")
    return parser.parse_args(arguments)


def processor() -> str:
    """The processor's name, where Linux tells it, and the vector instructions that torch uses."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]}, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    args = parse(sys.argv[1:])
    logging.getLogger("transformers").setLevel(logging.ERROR)
    result = run(args)
    result |= {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": fingerprint.versions(),
        "machine": {"cpu": processor(), "threads": torch.get_num_threads(),
                    "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None},
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
