"""When Triton kernels run, and what is said where they cannot."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_process import HAS_TRITON

from pipeline.errors import ConfigError
from pipeline.kernels.cache_attention import AttentionNeed
from pipeline.kernels.need import Need
from pipeline.kernels.registry import BITBLAS, CACHE_ATTENTION, GPTQ, Kernel, choose, choose_attention

KERNELS = pytest.mark.parametrize("kernels", [GPTQ, BITBLAS], ids=["gptq", "bitblas"])
H200 = Need(device_type="cuda", capability=(9, 0), dtype=torch.bfloat16, bits=4, group_size=128, shape=(4096, 4096))
ATTENTION = AttentionNeed(device_type="cuda", capability=(9, 0), dtype=torch.bfloat16)
CPU = Need(device_type="cpu", bits=4, group_size=128, shape=(64, 128))
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")


def needing(**changes: Any) -> Need:
    """What an H200 would be asked, but for `changes`."""
    known = {name: getattr(H200, name) for name in Need.__slots__}
    return Need(**{**known, **changes})


@needs_triton
@KERNELS
def test_auto_takes_it_on_a_gpu(kernels: Mapping[str, Kernel[Any]]) -> None:
    assert choose(kernels, "auto", [H200])[0].name == "triton"


@KERNELS
def test_auto_stays_with_the_reference_on_a_cpu(kernels: Mapping[str, Kernel[Any]]) -> None:
    kernel, reason = choose(kernels, "auto", [CPU])
    assert kernel.name == "reference"
    assert "not on cpu" in reason
    with pytest.raises(ConfigError, match=r"quant\.kernel=triton cannot run here: .* not on cpu"):
        choose(kernels, "triton", [CPU])


@needs_triton
@KERNELS
@pytest.mark.parametrize("need", [CPU, H200], ids=["cpu", "cuda"])
def test_the_interpreter_has_to_be_asked_for(
    kernels: Mapping[str, Kernel[Any]], need: Need, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernel, reason = choose(kernels, "auto", [need])
    assert kernel.name == "reference"
    assert "asked for" in reason
    assert choose(kernels, "triton", [need])[0].name == "triton"


@KERNELS
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"device_type": "mps", "capability": None}, "run on cuda devices, not on mps"),
        ({"capability": (7, 5)}, "need compute capability 8.0, this device has 7.5"),
        ({"dtype": torch.float64}, "not in float64"),
        ({"bits": 5}, "not for 5"),
    ],
)
def test_what_it_cannot_run(kernels: Mapping[str, Kernel[Any]], changes: dict[str, Any], told: str) -> None:
    reason = kernels["triton"].can_run(needing(**changes))
    assert reason is not None
    assert told in reason
    assert "torch." not in reason


@needs_triton
def test_three_bits() -> None:
    whole, part = needing(bits=3), needing(bits=3, shape=(64, 80))
    assert GPTQ["triton"].can_run(whole) is None
    assert "multiples of 32, not 80" in str(GPTQ["triton"].can_run(part))
    assert "not for 3" in str(GPTQ["triton-fused"].can_run(whole))
    assert "not for 3" in str(BITBLAS["triton"].can_run(whole))
    assert "not for 3" in str(BITBLAS["triton-fused"].can_run(whole))


@needs_triton
def test_groups_that_cross_words() -> None:
    odd = needing(group_size=20, shape=(64, 160))
    assert BITBLAS["triton"].can_run(odd) is None
    assert GPTQ["triton-fused"].can_run(odd) is None
    assert "a multiple of 8 inputs, not of 20" in str(BITBLAS["triton-fused"].can_run(odd))


@KERNELS
def test_without_triton(kernels: Mapping[str, Kernel[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "cannot be imported" in str(kernels["triton"].can_run(H200))
    assert choose(kernels, "auto", [H200])[0].name == "reference"


@needs_triton
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton looks for it when it first starts a kernel; the choice has been made by then."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no compiler" in str(GPTQ["triton"].can_run(H200))
    assert "no compiler" in str(CACHE_ATTENTION["triton"].can_run(ATTENTION))
    assert choose_attention("auto", ATTENTION)[0].name == "reference"
    monkeypatch.setenv("CC", "cc")
    assert GPTQ["triton"].can_run(H200) is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert GPTQ["triton"].can_run(H200) is None


@needs_triton
def test_without_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "cc")
    monkeypatch.delenv("CPATH", raising=False)
    monkeypatch.delenv("C_INCLUDE_PATH", raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert str(tmp_path / "Python.h") in str(GPTQ["triton"].can_run(H200))
    (tmp_path / "Python.h").touch()
    assert GPTQ["triton"].can_run(H200) is None
