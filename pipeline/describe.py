"""`python -m pipeline.describe [--json] [overrides]`: what a checkpoint is and how it would run here.

Reads headers and small files alone. Takes the overrides of a run; only `model` and `quant` are looked at.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from pipeline import config
from pipeline.command import guarded
from pipeline.console import Console, size_text
from pipeline.models.description import Description, KernelAnswer, Place, describe_checkpoint
from pipeline.models.inventory import Kind
from pipeline.process import ExitCode

USAGE = """usage: python -m pipeline.describe [--json] [model=choice] [quant=choice] [key=value ...]

Says what a checkpoint is and how it would run here, without reading its weights: format, architecture, modules,
memory, and of every kernel whether it can run it and why not. Takes the overrides of a run (python -m pipeline --help).
Example: python -m pipeline.describe model=path model.path=/models/llama-13b-gptq

  --json   the same as one JSON document

exit codes
  0 a run would take it; 2 a run would refuse it, for the reason that standard error has
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Describe with the given command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(USAGE)
        return ExitCode.DONE
    as_json = "--json" in arguments
    overrides = [argument for argument in arguments if argument != "--json"]
    return guarded(lambda console, stopping: describe(overrides, console, as_json), "nothing was changed")


def describe(overrides: Sequence[str], console: Console, as_json: bool) -> int:
    """Print the description; what a run would refuse follows as its sentence."""
    description = describe_checkpoint(config.load_model_config(overrides, ["model", "quant"]))
    if as_json:
        console.result(json.dumps(asdict(description), indent=2))
    else:
        for line in lines_of(description):
            console.result(line)
    if description.problem is None:
        return ExitCode.DONE
    console.note(f"error: {description.problem}")
    return ExitCode.BAD_CONFIG


def lines_of(description: Description) -> Iterator[str]:
    """The description for a person."""
    for name, value in (*_facts(description), *(_place_facts(description.place) if description.place else ())):
        yield f"{name:<13} {value}"
    if description.modules:
        yield from _table([("modules", "", "format", "shape", "each", "all"), *map(_row, description.modules)])


def _facts(description: Description) -> Iterator[tuple[str, str]]:
    yield "model", description.model
    yield "format", description.format
    if description.runs_as not in (None, description.format):
        yield "runs as", str(description.runs_as)
    if description.adapter is not None:
        yield "adapter", description.adapter
    shape = description.architecture
    sizes = [f"{shape[key]:,} {word}" for key, word in SIZES.items() if key in shape]
    yield "architecture", ", ".join([f"{shape['model_type']} ({shape['class']})", *sizes])
    if description.parameters is not None:
        yield "parameters", f"{description.parameters:,}"
    if description.context_length is not None:
        yield "context", f"{description.context_length:,} tokens"
    template = "with a chat template" if description.chat_template else "no chat template"
    yield "tokenizer", f"{description.tokenizer}, {template}" if description.tokenizer else "none"
    files = f"{description.weight_files} file{'' if description.weight_files == 1 else 's'}"
    yield "on disk", f"{size_text(description.disk_bytes)} of weights in {files}"
    if description.batch_invariant is not None:
        yield "rows", "do not depend on each other" if description.batch_invariant else OUTLIERS


SIZES = {
    "num_hidden_layers": "layers",
    "hidden_size": "wide",
    "num_attention_heads": "heads",
    "num_key_value_heads": "of them for keys and values",
    "vocab_size": "tokens known",
}
"""What of the architecture a person is shown, and the word for it."""


OUTLIERS = "can depend on those computed with them (outliers are found over the batch; not with quant.int8_threshold=0)"


def _place_facts(place: Place) -> Iterator[tuple[str, str]]:
    yield "here", f"{place.device}, {place.dtype}"
    yield (
        "in memory",
        f"{size_text(place.resident_bytes)} once loaded; {size_text(place.dequantized_bytes)} if dequantized",
    )
    yield "keys/values", f"{size_text(place.kv_bytes_per_token)} a token"
    if not place.kernels:
        yield "kernel", "torch, as nothing is quantized"
    for answer in place.kernels:
        yield "kernel", f"{answer.name:<13} {_verdict(answer, place)}"


def _verdict(answer: KernelAnswer, place: Place) -> str:
    if not answer.can_run:
        return f"cannot: {answer.reason}"
    if answer.reason:
        return f"can run when asked for; auto does not take it: {answer.reason}"
    return "can run, auto takes it" if answer.name == place.auto_kernel else "can run"


def _row(kind: Kind) -> tuple[str, ...]:
    shape = " x ".join(map(str, kind.shape))
    times = f"x {kind.count}" if kind.count > 1 else ""
    return (
        kind.name,
        times,
        kind.format,
        shape,
        size_text(kind.resident_bytes / kind.count),
        size_text(kind.resident_bytes),
    )


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


if __name__ == "__main__":
    sys.exit(main())
