"""Rows labelled a second on the GPU: prompts that begin alike, labels of one token or of several that share some.

The first wave warms up (kernels are compiled), the second is measured. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any

from random_model import SIZES, Limits, engine_of, linear_weights, peak_gib, random_decoder, synchronize

from pipeline.core import Request
from pipeline.engine.engine import Engine, EngineCounters
from pipeline.engine.plan import EngineSettings
from pipeline.engine.prefix import Splits
from pipeline.engine.trie import build_trie

LABELS = {"token": ((5,), (6,), (7,), (8,)), "phrase": ((5, 9, 10), (5, 11, 10), (6, 10), (7, 12, 13, 10))}
"""Four labels: of a token each; or as words of several tokens become, with an end of text behind each."""


def wave(engine: Engine, args: argparse.Namespace, head: tuple[int, ...], seed: int) -> float:
    """Seconds to label rows, each with a text of its own behind the head."""
    engine.counters = EngineCounters()
    rng = random.Random(seed)
    for index in range(args.rows):
        own = tuple(rng.randrange(3, engine.plan.vocab) for _ in range(args.prompt - len(head)))
        engine.submit(Request(id=index, prompt_ids=head + own, candidates=LABELS[args.labels]))
    synchronize()
    started = time.perf_counter()
    while engine.unfinished:
        for output in engine.poll():
            assert output.completion is not None
            assert output.completion.error is None, output.completion
    return time.perf_counter() - started


def measure(args: argparse.Namespace) -> dict[str, Any]:
    limits = Limits.measured()
    decoder = random_decoder(args.size, args.quant)
    if args.quant != "none":
        decoder.cache_dequantized(1 << 62)
    rng = random.Random(2)
    head = tuple(rng.randrange(3, SIZES[args.size]["vocab_size"]) for _ in range(args.shared))
    engine, _, attention = engine_of(decoder, EngineSettings(), args.prompt + 16, Splits(head=head))
    wave(engine, args, head, seed=0)
    seconds = wave(engine, args, head, seed=1)
    tokens = args.prompt - args.shared + len(build_trie(LABELS[args.labels]).tokens)
    ideal = limits.compute / (2 * linear_weights(args.size, head=False) * tokens)
    return {
        "size": args.size, "quant": args.quant, "labels": args.labels, "prompt": args.prompt, "shared": args.shared,
        "attention": attention, "rows": args.rows, "rows_per_s": round(args.rows / seconds, 1),
        "passes": engine.counters.prefill_passes, "pass_ms": round(1e3 * seconds / engine.counters.prefill_passes, 1),
        "share_of_roofline": round(args.rows / seconds / ideal, 3), "ideal_rows_per_s": round(ideal),
        "measured_tflop_s": round(limits.compute / 1e12), "peak_gib": peak_gib(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=sorted(SIZES), default="llama3-8b")
    parser.add_argument("--quant", choices=("none", "bnb"), default="none")
    parser.add_argument("--labels", choices=sorted(LABELS), default="phrase")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--shared", type=int, default=448, help="of which all prompts begin with so many")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
