"""`python -m pipeline.quantize [overrides]`: a checkpoint quantized once, so that every start after it is fast.

Takes the overrides of a run. quant=bnb, bnb-fp4 and bnb-int8 write what a run would make of the weights in flight;
quant=gptq calibrates on rows of the data source.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline import config
from pipeline.calibrate import calibrate
from pipeline.command import guarded
from pipeline.console import Console, size_text
from pipeline.errors import ConfigError, Interrupted
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.models.memory import resolve_device, resolve_dtype
from pipeline.models.small_files import copy_small_files, tokenizer_folder
from pipeline.output.durable import new_folder
from pipeline.output.open import local_folder
from pipeline.process import ExitCode, Stopping
from pipeline.quant.detect import resolve_spec
from pipeline.quant.spec import QuantSettings
from pipeline.settings import ModelConfig

SHARD_BYTES = 4 << 30
"""The largest file of weights that is written."""
WRITTEN = ("bnb", "bnb-fp4", "bnb-int8", "gptq")
USAGE = """usage: python -m pipeline.quantize model=choice quant=choice output.dir=DIR [key=value ...]

Writes a quantized copy of a checkpoint, which this pipeline and transformers load.
Takes the overrides of a run (python -m pipeline --help).

  quant=bnb, bnb-fp4, bnb-int8   bitsandbytes, as a run would quantize in flight: the same bits
  quant=gptq                     GPTQ by the gptqmodel library (the extra gptq), calibrated on rows: data.path=...
                                 task.prompt=... data.limit=128 quant.bits=4 quant.group_size=128
Example: python -m pipeline.quantize model=path model.path=/models/llama-7b quant=bnb output.dir=/models/llama-7b-nf4

exit codes
  0 written; 1 failed; 2 bad configuration or checkpoint; 75 interrupted, nothing is left in output.dir
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Quantize with the given command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(USAGE)
        return ExitCode.DONE
    return guarded(
        lambda console, stopping: quantize(arguments, console, stopping),
        "nothing was left in output.dir; run the same command again",
    )


def quantize(overrides: Sequence[str], console: Console, stopping: Stopping) -> int:
    """Write the quantized checkpoint; raises ConfigError, RunFailed or Interrupted, which leave nothing behind."""
    asked = config.load_model_config(overrides, ["model", "quant", "output"])
    assert asked.output is not None  # it is required
    if asked.model.adapter is not None:
        raise ConfigError(
            f"model.adapter={asked.model.adapter} is never merged into weights; quantize without it, and name it again "
            "when the quantized checkpoint runs"
        )
    checkpoint = open_checkpoint(asked.model.path, asked.model.revision)
    _refuse_quantized(asked.quant, checkpoint)
    tokenizer = tokenizer_folder(checkpoint, asked.model)
    final = local_folder(asked.output.dir)
    with new_folder(final) as folder:
        if asked.quant.method == "gptq":
            made = calibrate(asked, checkpoint, tokenizer, folder, console, stopping)
        else:
            made = _write_in_flight(asked, checkpoint, folder, console, stopping)
        copy_small_files(checkpoint.folder, tokenizer, folder)
    before, after = (sum(file.stat().st_size for file in found) for found in (checkpoint.weight_files, _weights(final)))
    console.result(f"checkpoint  {final} ({made})")
    console.result(f"weights     {size_text(after)}, {size_text(before)} before")
    console.result(f"use         python -m pipeline model=path model.path={final} ...")
    return ExitCode.DONE


def _refuse_quantized(settings: QuantSettings, checkpoint: Checkpoint) -> None:
    """Raise ConfigError if what is asked for is no format to write, or the checkpoint is quantized already."""
    if settings.method not in WRITTEN:
        raise ConfigError(
            f"quant={settings.method} is no format that pipeline.quantize writes; choose quant={', '.join(WRITTEN)}"
        )
    if checkpoint.quantization:
        spec = resolve_spec(settings, checkpoint.quantization, checkpoint.name)
        raise ConfigError(
            f"model.path={checkpoint.name} is {spec.describe()} already; name an unquantized checkpoint, or run this "
            "one as it is"
        )


def _write_in_flight(
    asked: ModelConfig, checkpoint: Checkpoint, folder: Path, console: Console, stopping: Stopping
) -> str:
    """A tensor at a time, on the device; a signal ends it at once. Returns what was made."""
    from pipeline.models.architecture import load_config
    from pipeline.models.export import write_quantized
    from pipeline.quant.format import format_of, needs_of

    spec = resolve_spec(asked.quant, checkpoint.quantization, checkpoint.name)
    transformers_config = load_config(checkpoint.name, str(checkpoint.folder), asked.model.trust_remote_code)
    device, dtype = resolve_device(asked.model), resolve_dtype(asked.model, checkpoint)
    quant, _ = format_of(spec, "auto", needs_of(spec, [], device.type, None, dtype))
    assert quant is not None

    def watched(items: Sequence[Any]) -> Iterator[Any]:
        for item in console.loading(items):
            if stopping():
                raise Interrupted("stopped while quantizing")
            yield item

    unused = write_quantized(
        checkpoint, transformers_config, quant, dtype, device, folder,
        trust_remote_code=asked.model.trust_remote_code, progress=watched, shard_bytes=SHARD_BYTES,
    )  # fmt: skip
    if unused:
        console.note(
            f"{checkpoint.name}: {len(unused)} tensors have no place in the model and are left out ({unused[0]}, ...)"
        )
    return spec.describe().split(",")[0]


def _weights(folder: Path) -> list[Path]:
    return list(folder.glob("*.safetensors"))


if __name__ == "__main__":
    sys.exit(main())
