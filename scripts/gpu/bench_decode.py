"""Prefill and decode of the engine on the GPU, beside what the machine's memory and arithmetic allow.

All slots of one length class, as many as asked for or as memory has room for, are filled with rows of one shape. The
first wave warms up (kernels are compiled, the decode step is captured), the second is measured. The last line is one
JSON document.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from typing import Any

from random_model import (
    SIZES,
    Limits,
    engine_of,
    linear_weights,
    peak_gib,
    random_decoder,
    rows_that_fit,
    synchronize,
)

from pipeline.core import Request, SamplingParams
from pipeline.engine.engine import Engine, EngineCounters
from pipeline.engine.plan import CLASS_RATIO, SHORTEST_CLASS, EngineSettings
from pipeline.models.architecture import geometry_of


def wave(engine: Engine, rows: int, prompt: int, sampling: SamplingParams, seed: int) -> EngineCounters:
    """Answer rows that begin and end together; returns what was counted."""
    engine.counters = EngineCounters(graphs=engine.counters.graphs)
    rng = random.Random(seed)
    for index in range(rows):
        ids = tuple(rng.randrange(3, engine.plan.vocab) for _ in range(prompt))
        engine.submit(Request(id=index, prompt_ids=ids, sampling=sampling))
    while engine.unfinished:
        for output in engine.poll():
            assert output.completion is None or output.completion.error is None, output.completion
    return replace(engine.counters)


def ideal_step_s(size: str, rows: int, kv_bytes: float, limits: Limits) -> float:
    """Seconds of a step on the roofline: the products, by bf16 weights or arithmetic, and reading keys and values."""
    weights = linear_weights(size)
    return max(2 * weights / limits.bandwidth, 2 * weights * rows / limits.compute) + kv_bytes / limits.bandwidth


def measure(args: argparse.Namespace) -> dict[str, Any]:
    longest = args.prompt + args.new
    classes = 1 if longest <= SHORTEST_CLASS else 2
    assert longest <= SHORTEST_CLASS * CLASS_RATIO, "one or two length classes"
    settings = EngineSettings(compile=args.compile, kv_dtype=args.kv_dtype, attention=args.attention)
    limits = Limits.measured()
    started = time.perf_counter()
    decoder = random_decoder(args.size, args.quant)
    cached = decoder.cache_dequantized(1 << 62) if args.cache else 0
    synchronize()
    made_s = time.perf_counter() - started
    token_bytes = settings.cache_bytes_per_token(geometry_of(decoder.model.config), 2)
    slots = rows_that_fit(args.slots, token_bytes * longest)
    slots = slots * longest // SHORTEST_CLASS if classes == 2 else slots
    engine, plan, attention = engine_of(decoder, replace(settings, slots=slots), longest)
    rows = plan.length_classes[-1].slots
    drawn = {} if args.top_p is None else {"temperature": 1.0, "top_p": args.top_p}
    sampling = SamplingParams(max_new_tokens=args.new, **drawn)
    warm = wave(engine, rows, args.prompt, sampling, seed=0)  # as long, for the same length class
    done = wave(engine, rows, args.prompt, sampling, seed=1)
    step_s, prefill = done.decode_s / done.decode_steps, done.prompt_tokens / done.prefill_s
    ideal_s = ideal_step_s(args.size, rows, token_bytes * (args.prompt + args.new / 2) * rows, limits)
    ideal_prefill = limits.compute / (2 * linear_weights(args.size, head=False))
    return {
        "size": args.size, "quant": args.quant, "cached_gib": round(cached / 2**30, 2), "kv_dtype": args.kv_dtype,
        "attention": attention, "graphs": done.graphs, "eager": engine.eager_reason, "shapes": plan.describe(),
        "slots": rows, "prompt": args.prompt, "new": args.new, "top_p": args.top_p, "made_s": round(made_s, 1),
        "warm_up_s": round(warm.prefill_s + warm.decode_s, 2), "step_ms": round(1e3 * step_s, 3),
        "decode_tokens_per_s": round(rows / step_s), "step_share_of_roofline": round(ideal_s / step_s, 3),
        "ideal_step_ms": round(1e3 * ideal_s, 3), "prefill_tokens_per_s": round(prefill),
        "prefill_share_of_roofline": round(prefill / ideal_prefill, 3),
        "measured_tb_s": round(limits.bandwidth / 1e12, 2), "measured_tflop_s": round(limits.compute / 1e12),
        "peak_gib": peak_gib(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=sorted(SIZES), default="llama3-8b")
    parser.add_argument("--quant", choices=("none", "bnb"), default="none")
    parser.add_argument("--cache", action="store_true", help="keep dequantized weights")
    parser.add_argument("--slots", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=384)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument(
        "--top-p", type=float, help="draw at temperature 1 from so much probability; else the likeliest"
    )
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--attention", default="auto")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
