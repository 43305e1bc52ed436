"""Everything that only a GPU can show, in one trip: correctness first, then speed beside the machine's limits.

Each part is a process of its own under its own time limit, so that one that hangs or crashes leaves the others their
results. What a part prints goes to log.txt, its last line (one JSON document for a benchmark) to results.json; both
are written again after every part. The last line on stdout is that document. Exit code 0: every part passed; 1: some
did not; 2: there is no GPU here.

    python scripts/gpu_check.py                 all parts, in $OUT or outputs/gpu_check
    python scripts/gpu_check.py --list          the parts and their limits
    python scripts/gpu_check.py tests decode    those whose names begin so
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=25")
DECODE, LABEL, PEER = (f"scripts/gpu/bench_{name}.py" for name in ("decode", "label", "peer"))


@dataclass(frozen=True, slots=True)
class Part:
    """A command of the Python that runs this, and the seconds it may take."""

    name: str
    limit_s: int
    command: tuple[str, ...]
    needs: str = "torch"
    """A package without which the part is left out."""


def tests(name: str, limit_s: int, *arguments: str) -> Part:
    return Part(f"tests-{name}", limit_s, (*PYTEST, *arguments))


def decode(name: str, *arguments: str, needs: str = "torch") -> Part:
    return Part(f"decode-{name}", 100, (DECODE, *arguments), needs)


def label(name: str, *arguments: str) -> Part:
    return Part(f"label-{name}", 100, (LABEL, *arguments))


def peer(name: str, limit_s: int, *arguments: str, needs: str = "torch") -> Part:
    return Part(f"peer-{name}", limit_s, (PEER, *arguments), needs)


PARTS = (
    tests("products", 120, "tests/gpu/test_products_cuda.py"),
    tests("attention", 120, "tests/gpu/test_cache_attention_cuda.py"),
    tests("graphs", 180, "tests/gpu/test_cuda.py", "-k", "captured or after_a_capture"),
    tests("permuted", 180, "tests/gpu/test_cuda.py", "-k", "permuted"),
    tests("answers", 120, "tests/gpu/test_cuda.py", "-k", "not permuted and not captured and not after_a_capture"),
    tests("kernels", 240, "tests/kernels/test_triton_gptq.py", "tests/kernels/test_triton_bitblas.py", "-k", "cuda"),
    tests("bitblas", 240, "tests/gpu/test_bitblas_cuda.py"),
    decode("llama3-bf16"),
    decode("llama3-nf4-cached", "--quant=bnb", "--cache", needs="bitsandbytes"),
    decode("llama3-nf4", "--quant=bnb", needs="bitsandbytes"),
    label("llama3-tokens", "--labels=token"),
    label("llama3-phrases", "--labels=phrase"),
    decode("llama3-bf16-drawn", "--top-p=0.9"),
    decode("llama3-bf16-float8", "--kv-dtype=float8_e4m3"),
    decode("llama2-bf16", "--size=llama2-7b", "--slots=256"),
    decode("llama2-nf4-cached", "--size=llama2-7b", "--slots=256", "--quant=bnb", "--cache", needs="bitsandbytes"),
    decode("llama2-bf16-float8", "--size=llama2-7b", "--slots=256", "--kv-dtype=float8_e4m3"),
    decode("llama3-bf16-eager", "--compile=off"),
    decode("llama3-bf16-reference", "--attention=reference"),
    decode("llama3-bf16-long", "--slots=64", "--prompt=900", "--new=100"),
    peer("llama3-bf16", 120),
    peer("llama3-nf4", 150, "--quant=bnb", needs="bitsandbytes"),
    peer("llama2-bf16", 120, "--size=llama2-7b"),
    peer("llama3-bf16-compiled", 300, "--compile"),
)


def obstacle() -> str | None:
    """Why nothing can be run here, or None."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device"


def left_out(part: Part) -> str | None:
    import importlib.util

    return None if importlib.util.find_spec(part.needs) else f"{part.needs} is not installed"


def run_part(part: Part, log: IO[str]) -> dict[str, Any]:
    """Run a part and end its whole process group at its limit."""
    reason = left_out(part)
    if reason is not None:
        return {"status": "left out", "reason": reason}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *part.command], cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=part.limit_s)
        status = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        status = "too long"
    log.write(f"=== {part.name}: {' '.join(part.command)}\n{printed}\n")
    log.flush()
    return {"status": status, "seconds": round(time.perf_counter() - started, 1), "result": last_line(printed)}


def last_line(printed: str) -> Any:
    """The last line, as JSON if it is."""
    line = (printed.strip().splitlines() or [""])[-1]
    try:
        return json.loads(line)
    except ValueError:
        return line[:300]


def machine() -> dict[str, Any]:
    import torch
    import transformers
    import triton

    return {
        "date": time.strftime("%Y-%m-%d"), "device": torch.cuda.get_device_name(), "cuda": torch.version.cuda,
        "torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


def run_all(parts: list[Part], folder: Path, budget_s: float) -> dict[str, Any]:
    """Run the parts one after another; those that the budget has no room for are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(), "parts": {}}
    deadline = time.monotonic() + budget_s
    with (folder / "log.txt").open("w") as log:
        for part in parts:
            room = time.monotonic() + part.limit_s <= deadline
            found = run_part(part, log) if room else {"status": "left out", "reason": "the budget is spent"}
            results["parts"][part.name] = found
            (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
            print(f"{part.name}: {json.dumps(found)}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of the names of the parts to run; all if none")
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "outputs/gpu_check")))
    parser.add_argument("--budget", type=float, default=1e9, help="seconds for all parts together")
    args = parser.parse_args()
    parts = [part for part in PARTS if not args.names or part.name.startswith(tuple(args.names))]
    if args.list:
        for part in parts:
            print(f"{part.name:<26} {part.limit_s:>4} s  python {' '.join(part.command)}")
        return 0
    if not parts:
        print(f"no part's name begins with {' or '.join(args.names)}; see --list", file=sys.stderr)
        return 2
    reason = obstacle()
    if reason is not None:
        print(f"no GPU here: {reason}", file=sys.stderr)
        return 2
    results = run_all(parts, args.out, args.budget)
    print(json.dumps(results))
    return 0 if all(part["status"] == "passed" for part in results["parts"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
