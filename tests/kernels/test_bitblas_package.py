"""The bitblas package as a kernel, without a GPU: what it says it can run, what it builds, how operators are called.

Operators that run here are written in C, with the functions that the package's own libraries export.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.kernels import bitblas_child, bitblas_operators, registry
from pipeline.kernels.bitblas_operators import (
    Operator,
    OperatorKey,
    OperatorStore,
    default_folder,
    run_child,
    toolchain_obstacle,
)
from pipeline.kernels.bitblas_package import BitblasPackage, check_operator, key_of
from pipeline.kernels.need import Need
from pipeline.kernels.packed_bitblas import BitblasWeight, dequantize_bitblas_reference, pack_codes

NEED = Need(
    device_type="cuda", capability=(9, 0), dtype=torch.float16, bits=4, group_size=128, shape=(4096, 11008),
)  # fmt: skip
CPU = torch.device("cpu")


def key(**changes: Any) -> OperatorKey:
    whole = {"outputs": 48, "inputs": 128, "bits": 4, "group_size": 64, "zeros_mode": "original"}
    return OperatorKey(**{**whole, "capability": (8, 0), **changes})


@pytest.fixture
def store(tmp_path: Path) -> OperatorStore:
    return OperatorStore(tmp_path / "operators")


@pytest.fixture(autouse=True)
def fresh_toolchain() -> Iterator[None]:
    """Each test asks anew whether operators can be built."""
    toolchain_obstacle.cache_clear()
    yield
    toolchain_obstacle.cache_clear()


# --- what it says it can run -------------------------------------------------------------------------------------

OBSTACLES = [
    ({"device_type": "cpu", "capability": None}, r"runs on NVIDIA GPUs \(cuda\), not on cpu"),
    ({"capability": (7, 5)}, r"needs compute capability 8\.0, this device has 7\.5"),
    ({"dtype": torch.float32}, r"multiplies in float16, not in float32; set model\.dtype=float16"),
    ({"bits": 8}, r"runs 2 and 4 bits, not 8"),
    ({"bits": 3}, r"runs 2 and 4 bits, not 3"),
    ({"scale_dtype": "BF16"}, r"takes scales in float16, and the checkpoint's are BF16"),
    ({"group_size": 16}, r"runs groups of 32, 64, 128 or all inputs, not of 16"),
    ({"shape": (4090, 11008)}, r"not 4090 x 11008"),
    ({"shape": (4096, 4112)}, r"4 bits with outputs in multiples of 16 and inputs in those of 32, not 4096 x 4112"),
    ({"shape": (4160, 4096), "bits": 2}, r"2 bits with outputs in multiples of 128 and .*, not 4160 x 4096"),
]


@pytest.mark.parametrize(("change", "sentence"), OBSTACLES, ids=str)
def test_what_it_cannot_run_has_a_reason(
    change: dict[str, Any], sentence: str, store: OperatorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.kernels.bitblas_package.toolchain_obstacle", lambda: None)
    need = dataclasses.replace(NEED, **change)
    assert BitblasPackage(store).can_run(NEED) is None
    assert re.search(sentence, BitblasPackage(store).can_run(need) or "it can run")
    with pytest.raises(ConfigError, match=rf"^quant\.kernel=bitblas cannot run here: .*{sentence}"):
        registry.choose(registry.BITBLAS, "bitblas", [need])


@pytest.mark.parametrize("need", [NEED, dataclasses.replace(NEED, device_type="cpu", capability=None)])
def test_auto_passes_it_over_with_a_reason(need: Need) -> None:
    kernel, why = registry.choose(registry.BITBLAS, "auto", [need])
    assert kernel.name != "bitblas"
    reason = "only when asked for .* its speed is not measured" if need.device_type == "cuda" else "not on cpu"
    assert re.search(f"bitblas: .*{reason}", why)


def test_a_stored_operator_needs_no_package(store: OperatorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pipeline.kernels.bitblas_package.toolchain_obstacle", lambda: "the bitblas package is not installed"
    )
    assert BitblasPackage(store).can_run(NEED) == "the bitblas package is not installed"
    file = store.folder / key_of(NEED).file
    file.parent.mkdir(parents=True)
    file.touch()
    assert BitblasPackage(store).can_run(NEED) is None
    assert BitblasPackage(store).can_run(dataclasses.replace(NEED, capability=(8, 0))) is not None
    assert BitblasPackage(store).can_run(dataclasses.replace(NEED, zeros_mode="none")) is not None


# --- the program that builds, with the real package --------------------------------------------------------------


def with_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@needs_nvcc
def test_the_package_is_found_where_its_libraries_are(
    bitblas_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_environment(monkeypatch, bitblas_environment)
    assert toolchain_obstacle() is None


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="the libraries are there")
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    assert toolchain_obstacle() == "libcuda.so.1 is missing (the NVIDIA driver)"


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(bitblas_child, "TOOLKIT", str(tmp_path))
    with pytest.raises(bitblas_child.Refused, match=r"^nvcc, .* is not on PATH; install the CUDA toolkit"):
        bitblas_child.prepare_compiler(tmp_path)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(bitblas_child.Refused, match=r"not installed \(pip install bitblas==0\.1\.0\.post1\)"):
        bitblas_child.import_package("0.1.0.post1")


@needs_nvcc
def test_another_version_is_refused(
    bitblas_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_environment(monkeypatch, bitblas_environment)
    monkeypatch.setattr(bitblas_operators, "VERSION", "0.2.0")
    assert run_child(tmp_path, {}) == "bitblas 0.1.0.post1 is installed, but only 0.2.0 is supported"


@needs_nvcc
@pytest.mark.parametrize(
    ("package", "reason"),
    [
        ("import os; os.abort()", r"the bitblas package crashed \(signal 6\)"),
        ("raise ImportError('no GLIBC_9')", r"the bitblas package failed \(ImportError: no GLIBC_9\)"),
    ],
)
def test_a_package_that_crashes_is_an_answer(
    package: str, reason: str, bitblas_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bitblas.py").write_text(package)
    with_environment(monkeypatch, bitblas_environment | {"PYTHONPATH": str(tmp_path)})
    assert re.fullmatch(reason, toolchain_obstacle() or "it can build")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({}, "half_t* A, int8_t* B, half_t* Scale, half_t* Zeros, float* C, int m, cudaStream_t stream"),
        (
            {"outputs": 128, "bits": 2, "zeros_mode": "none", "group_size": 128},
            "half_t* A, int8_t* B, half_t* Scale, float* C, int m, cudaStream_t stream",
        ),
    ],
)
def test_an_operator_is_generated_and_compiled(
    changes: dict[str, Any], parameters: str, bitblas_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Compiled by nvcc for sm_90; with the parameters that `Operator` passes."""
    with_environment(monkeypatch, bitblas_environment)
    assert run_child(tmp_path, key(capability=(9, 0), **changes).order()) is None
    Operator(tmp_path / "operator.so")
    source = next(tmp_path.glob("tmp*.cu")).read_text()
    declared = re.search(r'extern "C" void call\((.*?)\)', source)
    assert declared
    assert re.sub(r" __restrict__|=\w+", "", declared[1]) == parameters
    linked = subprocess.run(["ldd", tmp_path / "operator.so"], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in linked, "the operator stands on its own"


@needs_nvcc
@pytest.mark.slow
def test_what_the_package_cannot_build_is_a_sentence(
    bitblas_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, store: OperatorStore
) -> None:
    with_environment(monkeypatch, bitblas_environment)
    with pytest.raises(ConfigError, match=r"no operator for 48 x 48 weights of 4 bits .* cannot build it .*error"):
        store.build([key(inputs=48, group_size=48)], iter)
    assert not list(store.folder.rglob("*.so"))


# --- the store ---------------------------------------------------------------------------------------------------


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Orders as they come in; each is carried out by writing a file."""
    received: list[dict[str, Any]] = []

    def carry_out(work: Path, order: dict[str, Any]) -> str | None:
        received.append(order)
        if order["inputs"] == 96:
            return "there is no such thing"
        (work / "operator.so").write_bytes(b"library")
        return None

    monkeypatch.setattr(bitblas_operators, "run_child", carry_out)
    return received


def test_operators_are_built_once_and_shown(store: OperatorStore, orders: list[dict[str, Any]]) -> None:
    shown: list[Any] = []

    def progress(items: Sequence[Any]) -> Iterator[Any]:
        for item in items:
            shown.append(item)
            yield item

    keys = [key(), key(outputs=64), key()]
    store.build(keys, progress)
    assert shown == keys[:2]
    assert sorted(order["outputs"] for order in orders) == [48, 64]
    OperatorStore(store.folder).build([*keys, key(bits=2)], progress)
    assert shown == [*keys[:2], key(bits=2)]
    assert len(orders) == 3
    assert all(store.holds(k) for k in keys)


def test_files_are_named_after_all_that_matters() -> None:
    changes: list[dict[str, Any]] = [
        {}, {"outputs": 64}, {"inputs": 256}, {"bits": 2}, {"group_size": 32}, {"zeros_mode": "none"},
        {"capability": (9, 0)},
    ]  # fmt: skip
    assert len({key(**change).file for change in changes}) == len(changes)
    assert str(key().file) == "bitblas-0.1.0.post1/sm_80-on-sm_80/n48-k128-b4-g64-original.so"


def test_an_operator_that_cannot_be_built_ends_it(store: OperatorStore, orders: list[dict[str, Any]]) -> None:
    with pytest.raises(
        ConfigError, match=r"no operator for 48 x 96 .* there is no such thing; choose quant\.kernel=auto"
    ):
        store.build([key(inputs=96)], iter)
    assert not list(store.folder.rglob("*"))


def test_processes_that_build_the_same_one_do_not_meet(store: OperatorStore, orders: list[dict[str, Any]]) -> None:
    stores = [OperatorStore(store.folder) for _ in range(8)]
    threads = [threading.Thread(target=each.build, args=([key()], iter)) for each in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [file.name for file in store.folder.rglob("*") if file.is_file()] == [key().file.name]
    assert (store.folder / key().file).read_bytes() == b"library"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, orders: list[dict[str, Any]]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"quant\.tuning_cache=.*file cannot be written"):
        OperatorStore(tmp_path / "file").build([key()], iter)


def test_a_cut_library_is_named(store: OperatorStore, orders: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=r"n48-k128-b4-g64-original\.so is no operator .*; delete it"):
        store.load(key())


def test_the_users_own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "quantized-batch-pipeline" / "operators"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "quantized-batch-pipeline" / "operators"


# --- calling operators -------------------------------------------------------------------------------------------

IN_C = r"""
#include <math.h>
#include <stdint.h>
static float half(uint16_t h) {
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    float size = exponent ? ldexpf(mantissa + 1024, exponent - 25) : ldexpf(mantissa, -24);
    return h & 0x8000 ? -size : size;
}
static int field(int p) {
    return BITS == 4 ? 16 * (p % 2) + 4 * (p / 2) : 16 * (p / 8) + 8 * (p % 8 % 2) + 2 * (p % 8 / 2);
}
static int initialized = 0;
void init(void) { initialized = 1; }
void call(uint16_t *a, uint32_t *b, uint16_t *scale, PARAMETER_ZEROS float *c, int m, void *stream) {
    for (int i = 0; i < m; i++)
        for (int n = 0; n < N; n++) {
            double sum = initialized ? 0 : NAN;
            for (int k = 0; k < K; k++) {
                int place = n * K + k, group = n * (K / G) + k / G;
                int code = b[place / (32 / BITS)] >> field(place % (32 / BITS)) & ((1 << BITS) - 1);
                float s = half(scale[group]);
                sum += (double)half(a[i * K + k]) * (WEIGHT);
            }
            c[i * N + n] = sum;
        }
}
"""
WEIGHTS = {
    "none": "(code - (1 << (BITS - 1))) * s",
    "original": "(code - half(zeros[group])) * s",
    "rescale": "code * s - half(zeros[group])",
}


@pytest.fixture
def write_operator(store: OperatorStore, tmp_path: Path) -> Callable[..., None]:
    """Compile an operator in C into the store."""
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")

    def write(k: OperatorKey, weight: str = "") -> None:
        zeros = "" if k.zeros_mode == "none" else "uint16_t *zeros,"
        values = {"N": k.outputs, "K": k.inputs, "G": k.group_size, "BITS": k.bits, "PARAMETER_ZEROS": zeros}
        values["WEIGHT"] = weight or WEIGHTS[k.zeros_mode]
        source = tmp_path / "operator.c"
        source.write_text(IN_C)
        file = store.folder / k.file
        file.parent.mkdir(parents=True, exist_ok=True)
        defined = [f"-D{name}={value}" for name, value in values.items()]
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", *defined, "-o", file, source, "-lm"], check=True)

    return write


def random_weight(k: OperatorKey, *, ordered: bool = False) -> BitblasWeight:
    generator = torch.Generator().manual_seed(3)
    codes_NK = torch.randint(0, 1 << k.bits, (k.outputs, k.inputs), generator=generator)
    shape_NG = (k.outputs, k.inputs // k.group_size)
    scales_NG = (torch.rand(shape_NG, generator=generator) / 8).half()
    zeros_NG = torch.randint(0, 1 << k.bits, shape_NG, generator=generator).half()
    return BitblasWeight(
        codes_NB=pack_codes(codes_NK, k.bits),
        scales_NG=scales_NG,
        zeros_NG=None if k.zeros_mode == "none" else zeros_NG * (scales_NG if k.zeros_mode == "rescale" else 1),
        zeros_mode=k.zeros_mode,  # type: ignore[arg-type]
        order_K=torch.randperm(k.inputs, generator=generator) if ordered else None,
        bits=k.bits,
        group_size=k.group_size,
    )


KEYS = [key(bits=bits, zeros_mode=mode) for bits in (2, 4) for mode in WEIGHTS]
KEYS += [key(group_size=128), key(group_size=32, outputs=16)]


@pytest.mark.parametrize("k", KEYS, ids=lambda k: k.file.stem)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 17])
def test_products_are_those_of_the_reference(
    k: OperatorKey, dtype: torch.dtype, rows: int, store: OperatorStore, write_operator: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write_operator(k)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: k.capability)
    x_MK = torch.randn(rows, 2 * k.inputs).to(dtype)[:, ::2]  # not contiguous
    bias_N = torch.randn(k.outputs).to(dtype)
    for ordered, bias in ((False, None), (True, bias_N)):
        weight = random_weight(k, ordered=ordered)
        exact = x_MK.double() @ dequantize_bitblas_reference(weight, torch.float32).double().T
        exact = exact if bias is None else exact + bias.double()
        out_MN = BitblasPackage(store).linear(x_MK, weight, bias)
        assert out_MN.dtype == dtype
        error = float((out_MN.double() - exact).abs().max() / exact.abs().max())
        assert error < torch.finfo(dtype).eps  # rounded once, at the end


@pytest.mark.parametrize("k", KEYS, ids=lambda k: k.file.stem)
def test_a_right_operator_passes_the_check(
    k: OperatorKey, store: OperatorStore, write_operator: Callable[..., None]
) -> None:
    write_operator(k)
    check_operator(store.load(k), k, CPU)


@pytest.mark.parametrize(
    "wrong", ["0", "NAN", "(code - half(zeros[group]) - 1) * s", "code * s", "(n == N - 1 ? 0 : 1)"]
)
def test_a_wrong_operator_does_not(wrong: str, store: OperatorStore, write_operator: Callable[..., None]) -> None:
    write_operator(key(), wrong)
    with pytest.raises(ConfigError, match=r"n48-k128-b4-g64-original\.so differs from the reference by .*auto"):
        check_operator(store.load(key()), key(), CPU)


def test_preparing_builds_and_checks(
    store: OperatorStore, write_operator: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    need = Need(device_type="cuda", capability=(8, 0), dtype=torch.float16, bits=4, group_size=64, shape=(48, 128))
    built: list[OperatorKey] = []

    def build(self: OperatorStore, keys: Sequence[OperatorKey], progress: Any) -> None:
        for each in progress([k for k in keys if not self.holds(k)]):
            built.append(each)
            write_operator(each, "" if each.bits == 4 else "0")

    monkeypatch.setattr(OperatorStore, "build", build)
    package = BitblasPackage(store)
    package.prepare([need, dataclasses.replace(need, dtype=torch.bfloat16)], CPU, iter)
    assert built == [key()]
    with pytest.raises(ConfigError, match="differs from the reference"):
        package.prepare([dataclasses.replace(need, bits=2)], CPU, iter)


def test_nothing_is_imported_for_it() -> None:
    """The package runs in programs of its own, never in this process."""
    program = "import sys, pipeline.kernels.registry; sys.exit(any(n in sys.modules for n in ('bitblas', 'tvm')))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", program], check=False, env=environment).returncode == 0
