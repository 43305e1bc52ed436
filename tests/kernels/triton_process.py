"""A process of its own for Triton: whether its kernels are interpreted is settled once, when triton is imported."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

HAS_TRITON = importlib.util.find_spec("triton") is not None


class TritonProcess:
    """Runs functions of importable modules where Triton interprets its kernels on the CPU, or compiles them."""

    def __init__(self, cache: Path, *, interpret: bool) -> None:
        """`cache` is the folder for what it compiles."""
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_begin, initargs=(cache, interpret))

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function returns there; tensors travel as copies, not as shared memory."""
        return pickle.loads(self._pool.submit(_call, pickle.dumps((function, args))).result())

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def _begin(cache: Path, interpret: bool) -> None:
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    os.environ["TRITON_INTERPRET"] = "1" if interpret else "0"
    import torch

    torch.set_num_threads(1)


def _call(task: bytes) -> bytes:
    function, args = pickle.loads(task)
    return pickle.dumps(function(*args))
