"""transformers' generate with a static cache on the GPU, on the same shapes as bench_decode.py, as far as they fit.

The time of a step is that of a long answer less that of one token, by the steps between. The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from random_model import DEVICE, SIZES, peak_gib, random_peer, rows_that_fit, synchronize

from pipeline.engine.plan import ModelGeometry
from pipeline.models.architecture import geometry_of


def seconds(model: Any, ids: torch.Tensor, new: int, compiled: bool) -> float:
    synchronize()
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new, do_sample=False,
            pad_token_id=0, cache_implementation="static", disable_compile=not compiled,
        )  # fmt: skip
    synchronize()
    return time.perf_counter() - started


def row_bytes(geometry: ModelGeometry, prompt: int, new: int) -> int:
    """What a row takes: its keys and values, and its part of the one pass in which all prompts are run."""
    activations = 2 * prompt * (3 * geometry.intermediate + 8 * geometry.hidden)
    return (prompt + new) * geometry.kv_bytes_per_token(2) + activations


def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = random_peer(args.size, args.quant)
    vocab = SIZES[args.size]["vocab_size"]
    batch = rows_that_fit(args.batch, row_bytes(geometry_of(model.config), args.prompt, args.new))
    ids = torch.randint(3, vocab, (batch, args.prompt), device=DEVICE)
    for new in (args.new, 1):
        seconds(model, ids, new, args.compile)
    first_s, whole_s = seconds(model, ids, 1, args.compile), seconds(model, ids, args.new, args.compile)
    step_s = (whole_s - first_s) / (args.new - 1)
    return {
        "system": "transformers generate, static cache" + (", compiled" if args.compile else ""),
        "size": args.size, "quant": args.quant, "batch": batch, "prompt": args.prompt, "new": args.new,
        "step_ms": round(1e3 * step_s, 3), "decode_tokens_per_s": round(batch / step_s),
        "prefill_tokens_per_s": round(batch * args.prompt / first_s),
        "peak_gib": peak_gib(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=sorted(SIZES), default="llama3-8b")
    parser.add_argument("--quant", choices=("none", "bnb"), default="none")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=384)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--compile", action="store_true")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
