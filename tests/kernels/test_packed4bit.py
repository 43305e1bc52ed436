"""The 4-bit kernels against bitsandbytes called directly, and its import that must not fetch anything."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.kernels import bnb
from pipeline.kernels.need import Need
from pipeline.kernels.packed4bit import dequantize_4bit_reference
from pipeline.kernels.registry import BNB_4BIT, choose

DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (torch.float32, torch.bfloat16, torch.float16)]
SHAPES = [(64, 64), (1, 64), (112, 64), (256, 704), (64, 4096)]
ODD_SHAPES = [(33, 48), (7, 10), (509, 130), (64, 112), (64, 80), (2, 32), (3, 100), (64, 65)]


def unpacked(packed: Any, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """The format spelled out in numpy: code value times the block's maximum, in float32, rounded once."""
    pairs = packed.numpy().reshape(-1)
    codes = np.stack([pairs >> 4, pairs & 15], axis=1).reshape(-1)
    absmax = state.absmax.numpy()
    if state.nested:
        inner = state.state2
        scales = np.repeat(inner.absmax.numpy(), inner.blocksize)[: len(absmax)]
        absmax = inner.code.numpy()[absmax] * scales + np.float32(state.offset)
    values = state.code.numpy()[codes] * np.repeat(absmax, state.blocksize)[: len(codes)]
    count = state.shape[0] * state.shape[1]
    return torch.from_numpy(values[:count].astype(np.float32)).to(dtype).reshape(tuple(state.shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES + ODD_SHAPES, ids=str)
def test_both_kernels_dequantize_to_the_bits_of_the_format(
    shape: tuple[int, int], quant_type: str, double_quant: bool, dtype: torch.dtype
) -> None:
    """And of bitsandbytes itself, where its CPU kernel is right: rows of whole blocks."""
    functional = bnb.bitsandbytes().functional
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    weight[0, 0] = 0.0
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=double_quant, quant_type=quant_type
    )
    expected = unpacked(packed, state, dtype)
    assert float((expected - weight).abs().max()) < (0.8 if quant_type == "fp4" else 0.6)
    if shape in SHAPES:
        assert torch.equal(functional.dequantize_4bit(packed, state), expected)
    ours = bnb.quantize_4bit(weight, quant_type, 64, double_quant)
    assert torch.equal(ours.packed, packed.reshape(-1))
    for name, kernel in BNB_4BIT.items():
        out = kernel.dequantize(ours, dtype)
        assert out.dtype == dtype
        assert out.shape == shape
        assert torch.equal(out, expected), name


def test_a_block_of_zeros_stays_zero() -> None:
    weight = torch.zeros(4, 64)
    weight[1] = torch.linspace(-1, 1, 64)
    for double_quant in (True, False):
        packed = bnb.quantize_4bit(weight, "nf4", 64, double_quant)
        theirs, reference = bnb.dequantize_4bit(packed, torch.float32), dequantize_4bit_reference(packed, torch.float32)
        assert torch.equal(theirs, reference)
        assert float(reference[[0, 2, 3]].abs().max()) == 0.0


@pytest.mark.parametrize(
    ("wanted", "device", "chosen"),
    [("auto", "cpu", "bitsandbytes"), ("auto", "cuda", "bitsandbytes"), ("auto", "mps", "reference"),
     ("reference", "cpu", "reference"), ("bitsandbytes", "cuda", "bitsandbytes")],
)  # fmt: skip
def test_the_kernel_that_is_chosen(wanted: str, device: str, chosen: str) -> None:
    assert choose(BNB_4BIT, wanted, [Need(device_type=device)])[0].name == chosen


@pytest.mark.parametrize(("wanted", "device"), [("bitsandbytes", "mps"), ("marlin", "cpu")])
def test_a_kernel_that_cannot_run_is_refused(wanted: str, device: str) -> None:
    with pytest.raises(ConfigError, match=f"quant.kernel={wanted}"):
        choose(BNB_4BIT, wanted, [Need(device_type=device)])


# --- importing bitsandbytes -------------------------------------------------------------------------------


def fake_package(folder: Path, name: str, source: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(textwrap.dedent(source))


def run_python(path: Path, source: str) -> str:
    """Standard output of a fresh interpreter that finds the packages of `path` first."""
    root = Path(bnb.__file__).parents[2]
    script = f"import sys; sys.path[:0] = [{str(path)!r}, {str(root)!r}]\n" + textwrap.dedent(source)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def fetched(tmp_path: Path) -> Path:
    """A file that a fake `kernels` package writes when it is imported."""
    file = tmp_path / "fetched"
    fake_package(tmp_path / "path", "kernels", f"open({str(file)!r}, 'w').write('x')\ndef get_kernel(*a, **k): ...")
    return file


def test_bitsandbytes_is_imported_without_the_kernels_package(tmp_path: Path, fetched: Path) -> None:
    run_python(
        tmp_path / "path",
        """
        from pipeline.kernels.bnb import bitsandbytes
        import sys
        assert bitsandbytes().functional.quantize_4bit
        assert "kernels" not in sys.modules
        """,
    )
    assert not fetched.exists()


def test_the_kernels_package_is_hidden_only_while_bitsandbytes_is_imported(tmp_path: Path, fetched: Path) -> None:
    """With a bitsandbytes that asks for `kernels` on every CPU, as the real one does on those with AVX512-BF16."""
    fake_package(
        tmp_path / "path",
        "bitsandbytes",
        """
        try:
            import kernels
            found = True
        except ImportError:
            found = False
        """,
    )
    assert run_python(tmp_path / "path", "import bitsandbytes; print(bitsandbytes.found)") == "True"
    assert fetched.exists(), "the fake would be noticed"
    fetched.unlink()
    hidden = "from pipeline.kernels.bnb import bitsandbytes; print(bitsandbytes().found)"
    assert run_python(tmp_path / "path", hidden) == "False"
    assert not fetched.exists()
    restored = "import kernels; from pipeline.kernels.bnb import bitsandbytes as b; b(); import sys; "
    assert run_python(tmp_path / "path", restored + "print(sys.modules['kernels'] is kernels)") == "True"
    later = "from pipeline.kernels.bnb import bitsandbytes as b; b(); import kernels; print(kernels.__name__)"
    assert run_python(tmp_path / "path", later) == "kernels"


def test_a_broken_bitsandbytes_is_a_config_error(tmp_path: Path) -> None:
    fake_package(tmp_path / "path", "bitsandbytes", "raise RuntimeError('no library for this GPU')")
    told = run_python(
        tmp_path / "path",
        """
        from pipeline.errors import ConfigError
        from pipeline.kernels.bnb import bitsandbytes
        try:
            bitsandbytes()
        except ConfigError as error:
            print(error)
        """,
    )
    assert "no library for this GPU" in told
    assert "quant=none" in told
