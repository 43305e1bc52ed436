"""Operators of the bitblas package: compiled once for each shape, kept in a folder, called through ctypes.

An operator is a shared library that stands on its own: where it lies in the folder, neither the package nor a
compiler is needed to run it. Its name says what it is, so a folder can be copied to other machines and shared
by any number of processes.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.kernels import bitblas_child
from pipeline.kernels.need import Progress
from pipeline.kernels.packed_bitblas import BitblasWeight

VERSION = "0.1.0.post1"
"""Of the package, the last one. Its operators are called as it generates them."""
BUILDERS = 4
"""Operators built at a time, at most; each keeps a processor busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorKey:
    """What an operator multiplies: x float16 [M, K] with a `BitblasWeight` [N, K]; and the device's capability."""

    outputs: int
    inputs: int
    bits: int
    group_size: int
    zeros_mode: str
    capability: tuple[int, int]

    @property
    def file(self) -> Path:
        """Where it lies in the folder."""
        target = bitblas_child.TARGET.split("=")[1]
        device = "sm_{}{}".format(*self.capability)
        shape = f"n{self.outputs}-k{self.inputs}-b{self.bits}-g{self.group_size}-{self.zeros_mode}"
        return Path(f"bitblas-{VERSION}", f"{target}-on-{device}", f"{shape}.so")

    def order(self) -> dict[str, Any]:
        """For the program that builds it."""
        compute = "{}{}".format(*self.capability)
        return {name: getattr(self, name) for name in self.__slots__ if name != "capability"} | {"compute": compute}


class Operator:
    """A loaded library; `init` has to run once on each device."""

    def __init__(self, file: Path) -> None:
        """Load it; raises ConfigError for a file that is no library of this kind."""
        try:
            library = ctypes.CDLL(str(file))
            self._init, self._call = library.init, library.call
        except (OSError, AttributeError) as error:
            raise ConfigError(f"{file} is no operator that can be loaded ({error}); delete it") from error
        self._ready: set[torch.device] = set()

    def __call__(self, x_MK: Tensor, weight: BitblasWeight) -> Tensor:
        """x W^T in float32 [M, N], x float16 with its inputs in the weight's order."""
        out_MN = torch.empty((x_MK.shape[0], weight.shape[0]), dtype=torch.float32, device=x_MK.device)
        tensors = [x_MK.contiguous(), weight.codes_NB, weight.scales_NG, weight.zeros_NG, out_MN]
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors if tensor is not None]
        with torch.cuda.device(x_MK.device if x_MK.is_cuda else -1):
            if x_MK.device not in self._ready:
                self._init()
                self._ready.add(x_MK.device)
            stream = torch.cuda.current_stream(x_MK.device).cuda_stream if x_MK.is_cuda else 0
            self._call(*pointers, ctypes.c_int(x_MK.shape[0]), ctypes.c_void_p(stream))
        return out_MN


@dataclass(frozen=True, slots=True)
class OperatorStore:
    """The operators of a folder: `quant.tuning_cache`, or one of the user's."""

    folder: Path
    _loaded: dict[OperatorKey, Operator] = field(default_factory=dict)

    def holds(self, key: OperatorKey) -> bool:
        """Whether it is there already."""
        return (self.folder / key.file).is_file()

    def build(self, keys: Iterable[OperatorKey], progress: Progress) -> None:
        """Compile those that are missing, several at a time; raises ConfigError with the reason if one cannot be."""
        missing = [key for key in dict.fromkeys(keys) if not self.holds(key)]
        if not missing:
            return
        with ThreadPoolExecutor(max_workers=min(BUILDERS, os.cpu_count() or 1, len(missing))) as pool:
            building = {key: pool.submit(self._build_one, key) for key in missing}
            try:
                for key in progress(missing):
                    building[key].result()
            finally:
                for future in building.values():
                    future.cancel()

    def _build_one(self, key: OperatorKey) -> None:
        with tempfile.TemporaryDirectory(prefix="bitblas-") as work:
            reason = run_child(Path(work), key.order())
            if reason is not None:
                raise ConfigError(
                    f"quant.kernel=bitblas: no operator for {key.outputs} x {key.inputs} weights of {key.bits} bits in "
                    f"groups of {key.group_size}: {reason}; choose quant.kernel=auto"
                )
            self._publish(Path(work) / "operator.so", self.folder / key.file)

    def _publish(self, built: Path, file: Path) -> None:
        """Whole or not at all, also where other processes build the same one; the last one stays."""
        draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(built, draft)
            with draft.open("rb") as stream:
                os.fsync(stream.fileno())
            draft.replace(file)
        except OSError as error:
            if draft.is_file():
                draft.unlink()
            raise ConfigError(
                f"quant.tuning_cache={self.folder} cannot be written ({error}); name a folder that can"
            ) from error

    def load(self, key: OperatorKey) -> Operator:
        """The operator, built first if it is missing."""
        if key not in self._loaded:
            self.build([key], iter)
            self._loaded[key] = Operator(self.folder / key.file)
        return self._loaded[key]


def default_folder() -> Path:
    """The user's own."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "quantized-batch-pipeline" / "operators"


@functools.cache
def toolchain_obstacle() -> str | None:
    """Why operators cannot be built here, or None; tries the package in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="bitblas-") as work:
        return run_child(Path(work), {})


def run_child(work: Path, order: dict[str, Any]) -> str | None:
    """Carry out an order in a process of its own, which litters the folder it runs in; returns why it could not."""
    program = [sys.executable, "-P", bitblas_child.__file__, str(work), json.dumps(order | {"version": VERSION})]
    quiet: Any = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    done = subprocess.run(program, cwd=work, check=False, **quiet)  # noqa: S603  # our own program
    if done.returncode == 0:
        return None
    told = work / "reason"
    if told.is_file():
        return told.read_text()
    if done.returncode < 0:
        return f"the bitblas package crashed (signal {-done.returncode})"
    lines = done.stderr.strip().splitlines()
    return f"the bitblas package failed ({lines[-1] if lines else 'without a word'})"
