"""Where Triton kernels run in tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_process import HAS_TRITON, TritonProcess

TRITON_DEVICES = [
    "interpreter",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonProcess]:
    """A process in which Triton interprets its kernels."""
    if not HAS_TRITON:
        pytest.skip("needs triton, which has packages for Linux on x86-64 only")
    process = TritonProcess(tmp_path_factory.mktemp("triton"), interpret=True)
    yield process
    process.close()


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonProcess]:
    """A process in which Triton compiles its kernels, with or without a GPU."""
    if not HAS_TRITON:
        pytest.skip("needs triton, which has packages for Linux on x86-64 only")
    process = TritonProcess(tmp_path_factory.mktemp("triton"), interpret=False)
    yield process
    process.close()


@pytest.fixture(params=TRITON_DEVICES)
def run_triton(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """Calls a Triton kernel with arguments on the CPU, in the interpreter and on the GPU."""
    if request.param == "interpreter":
        process: TritonProcess = request.getfixturevalue("interpreter")
        return process
    return lambda function, *args: function(*map(_on_cuda, args)).cpu()


def _on_cuda(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cuda()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        moved = {field.name: _on_cuda(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **moved)
    return value
