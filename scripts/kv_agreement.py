"""How often greedy tokens are the same with keys and values in FP8 as in the model's own dtype.

Prompts are the beginnings of the texts in a dataset's column, answers have a fixed number of tokens and nothing ends
them. Both runs are the pipeline's engine on the same weights. Once two answers differ they go on from different texts,
so a token counts only while all before it are equal. The last line is one JSON document.

    python scripts/kv_agreement.py model=tiny quant=bnb
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pyarrow.parquet as pq

from pipeline import fingerprint
from pipeline.config import PACKAGE, load_config
from pipeline.core import Request, SamplingParams
from pipeline.engine.plan import KV_DTYPES
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.runtime import resolve_runtime
from pipeline.models.tokenizer import Tokenizer

TICKETS = PACKAGE / "assets" / "tickets" / "tickets.parquet"
Answers = list[tuple[int, ...]]


def answers(overrides: Sequence[str], kv_dtype: str, texts: Sequence[str], args: argparse.Namespace) -> Answers:
    """The greedy tokens of every prompt."""
    unused = ("data=parquet", "data.path=unused", "output.dir=unused")
    config = load_config([*unused, *overrides, f"engine.kv_dtype={kv_dtype}"])
    checkpoint = open_checkpoint(config.model.path)
    runtime = resolve_runtime(config, checkpoint, None)
    tokenizer = Tokenizer(str(checkpoint.folder), trust_remote_code=False)
    _, engine = runtime.load(False, iter, lambda ids: "", config.engine)
    print(f"engine.kv_dtype={kv_dtype}: {runtime.describe()}", flush=True)
    sampling = SamplingParams(max_new_tokens=args.new_tokens)
    for row, ids in enumerate(tokenizer.encode(texts, True)):
        engine.submit(Request(id=row, prompt_ids=tuple(ids)[: args.prompt_tokens], sampling=sampling))
    done: dict[object, tuple[int, ...]] = {}
    while engine.unfinished:
        done |= {o.request_id: o.completion.token_ids for o in engine.poll() if o.completion is not None}
    return [done[row] for row in range(len(texts))]


def compare(ours: Answers, theirs: Answers) -> dict[str, float]:
    """Tokens decided after equal beginnings, how many of them are equal, and how many whole answers are."""
    decided = equal = 0
    for one, other in zip(ours, theirs, strict=True):
        first = next((n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
        equal += first
        decided += first + (first < len(one))
    whole = sum(one == other for one, other in zip(ours, theirs, strict=True))
    return {"tokens": decided, "equal_tokens": equal / decided, "equal_answers": whole / len(ours)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Greedy agreement of engine.kv_dtype=float8_e4m3 with auto.")
    parser.add_argument("--data", type=Path, default=TICKETS, help="a Parquet file")
    parser.add_argument("--column", default="ticket")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("overrides", nargs="*", default=["model=tiny", "quant=bnb"])
    args = parser.parse_args()
    texts = list(dict.fromkeys(pq.read_table(args.data, columns=[args.column])[args.column].to_pylist()))[: args.rows]
    plain, float8 = (answers(args.overrides, kv_dtype, texts, args) for kv_dtype in KV_DTYPES)
    result = {"rows": len(texts), "new_tokens": args.new_tokens, "overrides": args.overrides}
    made = {"command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d")}
    print(json.dumps(result | compare(float8, plain) | made | {"versions": fingerprint.versions()}))


if __name__ == "__main__":
    main()
