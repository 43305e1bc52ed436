"""CUDA 12's libraries as the bitblas package's compiler sees them, where there is no GPU.

The package links against the driver, the runtime and nvrtc, and asks a device for its properties before it does
anything. Its packing of weights and its generation of CUDA code need no more than that. So: libraries with every
function it imports, of which those that describe a device do, and all others fail.
"""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

SONAMES = {"cudart": "libcudart.so.12", "nvrtc": "libnvrtc.so.12", "cuda": "libcuda.so.1"}
PREFIXES = {"cudart": "cuda", "nvrtc": "nvrtc", "cuda": "cu"}
"""What the names of each library's functions begin with, the longer beginnings first."""
USED = ("3rdparty/tvm/build/libtvm.so", "3rdparty/tilelang/build/libtilelang_module.so")
NO_DEVICE = 100
"""cudaErrorNoDevice."""
DEVICE = {
    1: 1024,  # threads of a block
    8: 49152,  # bytes of shared memory for a block
    10: 32,  # threads of a warp
    12: 65536,  # registers of a block
    16: 132,  # multiprocessors
    75: 9, 76: 0,  # compute capability
    81: 233472, 97: 232448,  # bytes of shared memory of a multiprocessor, and for a block that asks for them
}  # fmt: skip
"""Attributes by their number in CUDA's cudaDeviceAttr."""
SPECIAL = {
    "cudaGetDeviceCount": "int cudaGetDeviceCount(int *count) { *count = 1; return 0; }",
    "cudaGetDevice": "int cudaGetDevice(int *device) { *device = 0; return 0; }",
    "cudaSetDevice": f"int cudaSetDevice(int device) {{ return device ? {NO_DEVICE} : 0; }}",
    "cudaDeviceGetAttribute": "int cudaDeviceGetAttribute(int *value, int attribute, int device) { switch (attribute) {"
    + "".join(f" case {number}: *value = {value}; return 0;" for number, value in DEVICE.items())
    + " default: *value = 0; return 0; } }",
    "cudaGetErrorString": 'const char *cudaGetErrorString(int error) { return "there is no GPU here"; }',
    "nvrtcGetErrorString": 'const char *nvrtcGetErrorString(int error) { return "there is no compiler here"; }',
}


def obstacle() -> str | None:
    """Why the package cannot be tried without a GPU on this machine, or None."""
    if find_spec("bitblas") is None:
        return "the bitblas package is not installed (make setup, on Linux x86-64)"
    missing = [tool for tool in ("cc", "nm") if shutil.which(tool) is None]
    return (
        f"{missing[0]} is not installed, which makes CUDA libraries for the package to link with" if missing else None
    )


def write_libraries(folder: Path) -> Path:
    """Compile the libraries into a folder for LD_LIBRARY_PATH."""
    spec = find_spec("bitblas")
    assert spec is not None
    assert spec.origin is not None
    imported = _imported([Path(spec.origin).parent / library for library in USED])
    folder.mkdir(parents=True, exist_ok=True)
    for library, soname in SONAMES.items():
        functions = [name for name in imported if _library_of(name) == library]
        source, versions = folder / f"{library}.c", folder / f"{library}.map"
        source.write_text("\n".join(SPECIAL.get(f, f"int {f}(void) {{ return {NO_DEVICE}; }}") for f in functions))
        versions.write_text(f"{soname} {{ global: *; }};\n")
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-w", "-o", folder / soname, f"-Wl,-soname,{soname}",
             f"-Wl,--version-script={versions}", source],
            check=True,
        )  # fmt: skip
    return folder


def _imported(libraries: list[Path]) -> list[str]:
    """The CUDA functions that the libraries import."""
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", *libraries], check=True, capture_output=True, text=True
    ).stdout
    names = {line.split()[-1].partition("@")[0] for line in listed.splitlines() if " U " in line}
    return sorted(name for name in names if _library_of(name))


def _library_of(name: str) -> str | None:
    fits = (lib for lib, prefix in PREFIXES.items() if name.startswith(prefix) and name[len(prefix)].isupper())
    return next(fits, None)
