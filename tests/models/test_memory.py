"""How a device's memory is shared out between weights, dequantized weights, keys and values: models of real sizes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.engine.plan import GIB, EngineSettings, ModelGeometry
from pipeline.errors import ConfigError
from pipeline.models import memory
from pipeline.models.memory import Placement, plan_memory, plan_shapes, resolve_device
from pipeline.quant.spec import QuantSettings
from pipeline.settings import ModelSettings

LLAMA2 = ModelGeometry(
    layers=32, kv_heads=32, head_dim=128, hidden=4096, intermediate=11008, vocab=32000, max_positions=4096
)
LLAMA3 = ModelGeometry(
    layers=32, kv_heads=8, head_dim=128, hidden=4096, intermediate=14336, vocab=128256, max_positions=8192
)
NF4 = {LLAMA2: (int(4.0 * GIB), int(12.1 * GIB)), LLAMA3: (int(5.6 * GIB), int(13.0 * GIB))}
"""Bytes of the weights in NF4, and of what is quantized if it were dequantized."""


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A geometry and the memory of a GPU in GiB to where its model is to run."""

    def placed(geometry: ModelGeometry, gib: float) -> Placement:
        monkeypatch.setattr(memory, "weight_bytes", lambda *args, **kwargs: NF4[geometry])
        return Placement(
            checkpoint=SimpleNamespace(name="a model"),  # type: ignore[arg-type]
            geometry=geometry,
            spec=SimpleNamespace(describe=lambda: "NF4"),  # type: ignore[arg-type]
            dtype=torch.bfloat16,
            device_type="cuda",
            budget=int(gib * memory.AUTO_SHARE * GIB),
        )

    return placed


def test_dequantized_weights_give_way_to_the_fewest_slots(placed: Any) -> None:
    """On 22 GiB, where half of what the weights leave is less than 16 slots of Llama-2-7B take."""
    place = placed(LLAMA2, 22)
    shapes, shares = plan_shapes(place, EngineSettings(), QuantSettings(), None, stops_at_length=True)
    assert [c.slots for c in shapes.length_classes] == [16, 16]
    assert shapes.max_len == 1024
    assert shapes.kv_bytes <= shares.kv_cache_budget
    assert 0 < shares.dequant_cache_budget < GIB * 2
    assert sum((shares.weights, shares.passes, shares.kv_cache_budget, shares.dequant_cache_budget)) == shares.budget
    assert plan_memory(place, EngineSettings(), QuantSettings(), shapes.max_len) == shares, "a resumed run"


def test_they_give_way_to_the_slots_that_are_asked_for(placed: Any) -> None:
    place, asked = placed(LLAMA3, 78.5), EngineSettings(slots=896, max_len=1024)
    shapes, shares = plan_shapes(place, asked, QuantSettings(), None, stops_at_length=True)
    assert [(c.slots, c.max_len) for c in shapes.length_classes] == [(896, 256), (224, 1024)]
    assert shapes.kv_bytes <= shares.kv_cache_budget
    assert shares.dequant_cache_budget < NF4[LLAMA3][1]
    with pytest.raises(ConfigError, match=r"engine\.slots=896 and rows of up to 1024"):
        plan_shapes(place, asked, QuantSettings(dequant_cache_gib=13.0), None, stops_at_length=True)
    with pytest.raises(ConfigError, match=r"engine\.slots=1024 .* need 64\.\d\d GiB but 57\.\d\d GiB are left"):
        plan_shapes(place, EngineSettings(slots=1024, max_len=1024), QuantSettings(), None)


def test_rows_are_shorter_before_weights_give_way(placed: Any) -> None:
    """Where nothing is asked for: 16 slots without them would be slower than more slots of shorter rows with them."""
    place = placed(LLAMA3, 22)
    shapes, shares = plan_shapes(place, EngineSettings(), QuantSettings(), None, stops_at_length=True)
    assert shapes.max_len == 1024
    assert shapes.length_classes[0].slots > 16
    assert shares.dequant_cache_budget == int((shares.kv_cache_budget + shares.dequant_cache_budget) / 2)


def test_products_in_float32_are_not_rounded_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says; the setting is the process's and is put back behind the test."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert resolve_device(ModelSettings(path="there", device="cpu")) == torch.device("cpu")
        assert torch.get_float32_matmul_precision() == "high"
        assert resolve_device(ModelSettings(path="there", device="cuda:0")) == torch.device("cuda:0")
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
