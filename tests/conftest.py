"""Small random checkpoints in folders, and engines built on them the way a run builds them."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import importlib.util
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

S3_PACKAGES = ("s3fs", "moto", "flask")


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name (a key of `oracle.CHECKPOINTS`) to the folder of that checkpoint, written when first asked for."""
    from oracle import save_checkpoint

    @cache
    def folder(name: str) -> Path:
        return save_checkpoint(name, tmp_path_factory.mktemp("checkpoints") / name)

    return folder


@pytest.fixture(scope="session")
def reference() -> Callable[..., Any]:
    """Folder and dtype to the checkpoint as transformers runs it, loaded once."""
    from oracle import load_reference

    return cache(load_reference)


@pytest.fixture(scope="session")
def load_decoder() -> Callable[..., Any]:
    """Folder, dtype, quant (a key of `oracle.QUANTS`), kernel and adapter to our model on the CPU, loaded once."""
    import torch
    from oracle import QUANTS

    from pipeline.models.adapter import open_adapter
    from pipeline.models.architecture import load_config
    from pipeline.models.checkpoint import open_checkpoint
    from pipeline.models.loader import load_model
    from pipeline.quant.detect import resolve_spec
    from pipeline.quant.format import format_of, needs_of
    from pipeline.quant.spec import QuantSettings

    @cache
    def load(
        folder: Path, dtype: torch.dtype, quant: str = "none", kernel: str = "auto", adapter: Path | None = None,
        **settings: Any,
    ) -> Any:  # fmt: skip
        checkpoint = open_checkpoint(str(folder))
        asked = QuantSettings(**{**QUANTS[quant], "kernel": kernel, **settings})
        spec = resolve_spec(asked, checkpoint.quantization, str(folder))
        needs = needs_of(spec, spec.stored_modules(checkpoint.tensors), "cpu", None, dtype)
        config = load_config(str(folder), str(folder), False)
        format_ = format_of(spec, kernel, needs)[0]
        opened = None if adapter is None else open_adapter(str(adapter))
        return load_model(checkpoint, config, format_, dtype, torch.device("cpu"), adapter=opened)

    return load


@pytest.fixture(scope="session")
def build_engine(load_decoder: Callable[..., Any]) -> Callable[..., Any]:
    """As `load_decoder`, and engine settings (slots, max_len, prefill_tokens), to an `EngineUnderTest`.

    With `settled` its weights are laid out and its smaller shapes tried out, as for a run.
    """
    import torch
    from oracle import EngineUnderTest

    from pipeline.engine.plan import EngineSettings, longest_rows, plan_engine
    from pipeline.models.architecture import geometry_of
    from pipeline.models.smaller_shapes import prove

    @cache
    def load_settled(*arguments: Any) -> Any:
        decoder = load_decoder.__wrapped__(*arguments)  # type: ignore[attr-defined]  # another one, which is changed
        decoder.pack()
        return decoder

    def build(
        folder: Path, dtype: torch.dtype = torch.float32, quant: str = "none", kernel: str = "auto",
        adapter: Path | None = None, settled: bool = False, **engine: Any,
    ) -> EngineUnderTest:  # fmt: skip
        decoder = (load_settled if settled else load_decoder)(folder, dtype, quant, kernel, adapter)
        geometry = geometry_of(decoder.model.config)
        settings = EngineSettings(**engine)
        plan = plan_engine(
            geometry,
            settings,
            longest=longest_rows(geometry, settings, None)[0],
            device_type="cpu",
            kv_budget_bytes=1 << 30,
            kv_itemsize=dtype.itemsize,
        )
        if settled:
            rows = [*(shape.rows for shape in plan.shapes), *plan.smaller]
            decoder.cache_dequantized(1 << 30, rows)
            plan = replace(plan, proven=prove(decoder.model, plan, dtype))
        return EngineUnderTest(decoder, plan, geometry, dtype, float8=settings.kv_dtype != "auto")

    return build


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """These models are so small that two threads wait for each other longer than they compute."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """A `stores.S3Server`, shared by all tests; each has folders of its own in it."""
    missing = [name for name in S3_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (the extra test)")
    from stores import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest) -> Any:
    """An empty `stores.Place` of each kind."""
    from stores import local_place, memory_place, s3_place

    if request.param == "local":
        return local_place(request.getfixturevalue("tmp_path") / "output")
    folder = f"run-{uuid.uuid4().hex}"
    return memory_place(folder) if request.param == "memory" else s3_place(request.getfixturevalue("s3"), folder)


@pytest.fixture(scope="session")
def bitblas_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which a program can import the bitblas package where there is no GPU."""
    import fake_cuda

    reason = fake_cuda.obstacle()
    if reason is not None:
        pytest.skip(reason)
    return os.environ | {"LD_LIBRARY_PATH": str(fake_cuda.write_libraries(tmp_path_factory.mktemp("fake_cuda")))}
