"""Imports are inert: nothing heavy where it is not needed, no device and no network anywhere."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import pipeline

HEAVY = (
    "torch",
    "transformers",
    "bitsandbytes",
    "bitblas",
    "triton",
    "numba",
    "datasets",
    "accelerate",
    "huggingface_hub",
    "ray",
)
NEEDS_TORCH = (
    "pipeline.engine.attention",
    "pipeline.engine.dedup",
    "pipeline.engine.engine",
    "pipeline.engine.graphs",
    "pipeline.engine.kv_cache",
    "pipeline.engine.packing",
    "pipeline.engine.prefix",
    "pipeline.engine.sampler",
    "pipeline.engine.scoring",
    "pipeline.engine.seat",
    "pipeline.engine.slots",
    "pipeline.kernels.*",
    "pipeline.models.architecture",
    "pipeline.models.decoder",
    "pipeline.models.export",
    "pipeline.models.failures",
    "pipeline.models.head",
    "pipeline.models.loader",
    "pipeline.models.lora",
    "pipeline.models.packed_linear",
    "pipeline.models.rope",
    "pipeline.models.runtime",
    "pipeline.quant.bitblas",
    "pipeline.models.seamless",
    "pipeline.models.shards",
    "pipeline.models.smaller_shapes",
    "pipeline.quant.bnb*",
    "pipeline.quant.format",
    "pipeline.quant.gptq",
    "pipeline.quant.linear",
)
"""The modules that compute with tensors; all others answer before torch is imported."""
NEEDS_COMPILER = ("pipeline.kernels.triton_code.*", "pipeline.kernels.numba_code.*")
"""Imported only when a kernel of theirs runs: Triton has no packages for some platforms, Numba takes a second."""
MODULES = sorted(info.name for info in pkgutil.walk_packages([str(Path(pipeline.__file__).parent)], "pipeline."))
CHEAP = [name for name in MODULES if not any(fnmatchcase(name, pattern) for pattern in NEEDS_TORCH)]

# Reads module names and heavy packages as JSON; writes, for each module, the heavy packages that came with it.
IMPORT_CHEAP = """
import importlib, json, sys
modules, heavy = json.load(sys.stdin)
came = {}
for name in modules:
    before = {h for h in heavy if h in sys.modules}
    importlib.import_module(name)
    came[name] = sorted({h for h in heavy if h in sys.modules} - before)
print(json.dumps({name: found for name, found in came.items() if found}))
"""
# The same with torch there already, every way to a network or a device recorded and closed, and threads counted.
IMPORT_ALL = """
import importlib, json, socket, sys, threading
import torch
modules, heavy = json.load(sys.stdin)
touched = []
def closed(name):
    def call(*args, **kwargs):
        touched.append(name)
        raise RuntimeError(f"{name} at import")
    return call
for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, closed(f"socket.{name}"))
for name in ("create_connection", "getaddrinfo", "gethostbyname"):
    setattr(socket, name, closed(f"socket.{name}"))
for name in ("init", "_lazy_init", "is_available", "device_count", "current_device", "get_device_properties",
             "get_device_capability", "mem_get_info", "synchronize"):
    setattr(torch.cuda, name, closed(f"torch.cuda.{name}"))
for name in modules:
    importlib.import_module(name)
came = [h for h in heavy if h != "torch" and h in sys.modules]
print(json.dumps([touched, came, torch.cuda.is_initialized(), threading.active_count()]))
"""


def run(script: str, modules: list[str], heavy: tuple[str, ...] = HEAVY) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], input=json.dumps([modules, heavy]), capture_output=True, text=True
    )


def test_cheap_modules_import_nothing_heavy() -> None:
    done = run(IMPORT_CHEAP, CHEAP)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}, "move the import to where it is used, or list the module in NEEDS_TORCH"


@pytest.mark.parametrize("module", ["pipeline.config", "pipeline.prompts", "pipeline.console", "pipeline.core"])
def test_the_first_modules_do_not_even_need_arrow(module: str) -> None:
    done = run(IMPORT_CHEAP, [module], (*HEAVY, "pyarrow", "numpy"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}


def test_no_module_touches_network_or_device_when_imported() -> None:
    done = run(
        IMPORT_ALL, [name for name in MODULES if not any(fnmatchcase(name, pattern) for pattern in NEEDS_COMPILER)]
    )
    assert done.returncode == 0, done.stderr
    touched, came, initialized, threads = json.loads(done.stdout)
    assert touched == []
    assert came == [], "imported where it is used, not at the top of a module"
    assert not initialized
    assert threads == 1
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_the_list_of_modules_is_complete() -> None:
    root = Path(pipeline.__file__).parent
    files = {
        "pipeline." + ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for file in root.rglob("*.py")
        if file != root / "__init__.py"
    }
    assert set(MODULES) == files, "a folder without __init__.py"
