"""Builds one operator of the bitblas package; a program of its own, run by `bitblas_operators`.

    python bitblas_child.py WORK '{"outputs": 4096, ...}'

leaves WORK/operator.so, or WORK/reason with a sentence why not; an order without outputs only tries the package.
The package changes sys.path, logging and the environment of its process, brings a compiler of its own, and for
some configurations crashes; here it can do all that. Nothing of the pipeline is imported.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

TARGET = "cuda -arch=sm_80"
"""What schedules are made for, on newer devices too: none of those that dequantize can be lowered for sm_90."""
LIBRARIES = {
    "libcuda.so.1": "the NVIDIA driver",
    "libcudart.so.12": "pip install nvidia-cuda-runtime-cu12",
    "libnvrtc.so.12": "pip install nvidia-cuda-nvrtc-cu12",
}
"""What the package's compiler is linked with, and what brings it."""
TOOLKIT = "/usr/local/cuda"
HEADER = "template <int in_flight> __device__ void warpgroup_wait();\n"
"""Named without its namespace by a header of the package's; newer nvcc want it declared."""
NO_DRIVER = "/* the operators call nothing of the driver */ INPUT(-lc)\n"
"""Stands in for libcuda.so at link time, which many machines have only as libcuda.so.1."""


class Refused(Exception):
    """Why the operator cannot be built, in one clause."""


def main(work: Path, order: dict[str, Any]) -> None:
    """Build what is ordered, or leave the reason why not."""
    try:
        prepare_compiler(work)
        load_libraries()
        bitblas = import_package(order["version"])
        if "outputs" in order:
            shutil.copyfile(build(bitblas, order), work / "operator.so")
    except Refused as refused:
        (work / "reason").write_text(str(refused))
        sys.exit(1)


def prepare_compiler(work: Path) -> None:
    """Let nvcc be found, compile the package's headers and link without the driver; temporary files go to `work`."""
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), TOOLKIT]
    os.environ["PATH"] = ":".join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])
    if shutil.which("nvcc") is None:
        raise Refused("nvcc, which compiles the operators, is not on PATH; install the CUDA toolkit or set CUDA_HOME")
    (work / "declared.h").write_text(HEADER)
    (work / "libcuda.so").write_text(NO_DRIVER)
    flags = [os.environ.get("NVCC_PREPEND_FLAGS", ""), f"-w -include {work / 'declared.h'}"]
    os.environ["NVCC_PREPEND_FLAGS"] = " ".join(flags).strip()
    os.environ["LIBRARY_PATH"] = ":".join([str(work), *filter(None, [os.environ.get("LIBRARY_PATH")])])
    os.environ["TMPDIR"] = str(work)


def load_libraries() -> None:
    """Load the CUDA 12 libraries from the system or from NVIDIA's Python packages."""
    for name, origin in LIBRARIES.items():
        installed = [str(file) for folder in sys.path for file in Path(folder or ".").glob(f"nvidia/*/lib/{name}")]
        if not any(map(_loads, [name, *installed])):
            raise Refused(f"{name} is missing ({origin})")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def import_package(version: str) -> Any:
    """The package, of the version that is known here, on a device."""
    if importlib.util.find_spec("bitblas") is None:
        raise Refused(f"the bitblas package is not installed (pip install bitblas=={version})")
    warnings.simplefilter("ignore")
    import bitblas

    if bitblas.__version__ != version:
        raise Refused(f"bitblas {bitblas.__version__} is installed, but only {version} is supported")
    try:
        bitblas.base.arch.get_arch(TARGET)
    except RuntimeError as error:
        raise Refused(f"the bitblas package finds no device ({error})") from error
    return bitblas


def build(bitblas: Any, order: dict[str, Any]) -> str:
    """Lower, compile and link one operator; returns the library's path."""
    complaints = Complaints()
    logging.getLogger("bitblas").handlers = [complaints]
    logging.getLogger("bitblas").setLevel(logging.DEBUG)
    has_zeros = order["zeros_mode"] != "none"
    config = bitblas.MatmulConfig(
        N=order["outputs"],
        K=order["inputs"],
        A_dtype="float16",
        W_dtype=f"{'uint' if has_zeros else 'int'}{order['bits']}",
        accum_dtype="float32",
        out_dtype="float32",
        layout="nt",
        group_size=order["group_size"],
        with_scaling=True,
        with_zeros=has_zeros,
        zeros_mode=order["zeros_mode"] if has_zeros else "original",
        propagate_b=False,
    )
    # Not built at once, so that it can be compiled for the device at hand and not for device 0.
    operator = bitblas.Matmul(config, target=TARGET, enable_tuning=False, from_database=True)
    operator.arch.compute_capability = order["compute"]
    operator._build_default_module(operator.target)
    if operator.lib is None:  # which the package itself mentions at the level of debugging only
        raise Refused(f"the bitblas package cannot build it ({complaints.last})")
    return str(operator.libpath)


class Complaints(logging.Handler):
    """Keeps the end of the last thing that went wrong."""

    last = "it does not say why"

    def emit(self, record: logging.LogRecord) -> None:
        """Remember a message that speaks of a failure."""
        message = " ".join(record.getMessage().split())
        if "fail" in message.lower():
            self.last = message[-300:]


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
