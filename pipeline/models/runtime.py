"""What runs the model, settled before weights are read: device, dtype, quantization, kernel, shapes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.engine.plan import EnginePlan, EngineSettings, LengthClass, ModelGeometry
from pipeline.errors import ConfigError
from pipeline.models.adapter import Adapter
from pipeline.models.architecture import geometry_of, load_config
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.memory import (
    MemoryPlan,
    Placement,
    capability_of,
    memory_budget,
    plan_memory,
    plan_shapes,
    resolve_device,
    resolve_dtype,
)
from pipeline.quant.detect import resolve_spec
from pipeline.quant.spec import QuantSpec
from pipeline.settings import RunConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from transformers import PretrainedConfig

    from pipeline.engine.dedup import RequestEngine
    from pipeline.engine.kv_cache import KVCache
    from pipeline.engine.prefix import Splits
    from pipeline.engine.seat import Decode
    from pipeline.kernels.cache_attention import AttentionKernel, AttentionNeed
    from pipeline.kernels.need import Need, Progress
    from pipeline.models.decoder import TransformersDecoder
    from pipeline.quant.format import StorageFormat


@dataclass(frozen=True)
class Runtime:
    """A model's settled place: everything but the weights."""

    place: Placement
    transformers_config: PretrainedConfig
    device: torch.device
    quant: StorageFormat | None
    kernel_reason: str
    shapes: EnginePlan
    memory: MemoryPlan
    needs: Sequence[Need]
    attention: AttentionKernel
    attention_reason: str
    reads: AttentionNeed
    adapter: Adapter | None = None
    kv_dtype: str = "auto"

    @property
    def spec(self) -> QuantSpec:
        """How the Linears are stored."""
        return self.place.spec

    @property
    def kernel_name(self) -> str:
        """The kernel of the quantized Linears, or torch where none is quantized."""
        return "torch" if self.quant is None else self.quant.kernel.name

    def resolved(self) -> dict[str, Any]:
        """What was settled and changes bits: part of the fingerprint."""
        adapter = {} if self.adapter is None else {"resolved.adapter": self.adapter.describe()}
        return {
            "resolved.device": self.device.type,
            "resolved.dtype": str(self.place.dtype).removeprefix("torch."),
            "resolved.kernel": self.kernel_name,
            "resolved.attention": self.attention.name,
            "resolved.quantization": self.spec.describe(),
        } | adapter

    def computes_on(self) -> dict[str, Any]:
        """What can change the last bits of a result and is no reason to refuse, for the record."""
        import torch

        if self.device.type == "cpu":
            return {"threads": torch.get_num_threads(), "cpu": _instructions()}
        return {"gpu": torch.cuda.get_device_name(self.device), "cuda": torch.version.cuda}

    def describe(self) -> str:
        """One line for the log."""
        dtype = str(self.place.dtype).removeprefix("torch.")
        return (
            f"{self.place.checkpoint.name}: {self.spec.describe()} weights, {dtype}, on {self.device}, "
            f"kernel {self.kernel_name}"
            + (f" ({self.kernel_reason})" if self.quant else "")
            + f", attention {self.attention.name}"
            + (f" ({self.attention_reason})" if self.device.type != "cpu" else "")
            + (f", keys and values in {self.kv_dtype}" if self.kv_dtype != "auto" else "")
            + (f", adapter {self.adapter.name}: {self.adapter.describe()}" if self.adapter else "")
        )

    def prepare(self, progress: Progress) -> None:
        """Let the kernel compile what it lacks for this model; ConfigError with the reason if it cannot."""
        if self.quant is not None and self.quant.kernel.prepare is not None:
            self.quant.kernel.prepare(self.needs, self.device, progress)

    def load(
        self,
        trust_remote_code: bool,
        progress: Progress,
        decode: Decode,
        settings: EngineSettings,
        head: tuple[int, ...] = (),
    ) -> tuple[TransformersDecoder, RequestEngine]:
        """Read the weights and make the engine; ConfigError on a bad checkpoint.

        It finds stop texts by `decode`; `head` are the token ids that the template begins every prompt with.
        """
        from pipeline.engine.dedup import DedupEngine
        from pipeline.engine.engine import Engine
        from pipeline.engine.graphs import recorder_for
        from pipeline.engine.kv_cache import KVCache
        from pipeline.models.loader import load_model

        place = self.place
        with ThreadPoolExecutor(1, "compile") as aside:
            compiled = aside.submit(self.attention.prepare or _nothing, self.reads)
            model = load_model(
                place.checkpoint,
                self.transformers_config,
                self.quant,
                place.dtype,
                self.device,
                adapter=self.adapter,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
            compiled.result()
        plan = self._settle_weights(model)
        made: list[LengthClass] = []

        def make_cache(length_class: LengthClass) -> KVCache:
            made.append(length_class)
            float8, attend = settings.kv_dtype != "auto", self.attention.attend
            return giving_way(
                model,
                self.device,
                lambda: KVCache(place.geometry, length_class, place.dtype, self.device, float8=float8, attend=attend),
                first=len(made) == 1,
            )

        engine = Engine(
            model,
            plan,
            make_cache,
            self.device,
            decode,
            _splits(settings, model, head),
            recorder=recorder_for(settings.compile, self.device, model.capture_obstacle()),
            rows_kernel=self.attention.rows_in(place.dtype),
        )
        return model, DedupEngine(engine) if settings.dedup else engine

    def _settle_weights(self, model: TransformersDecoder) -> EnginePlan:
        """Put the weights into the form in which they are multiplied; the plan with what that proves of its shapes."""
        from pipeline.models.smaller_shapes import prove

        rows = [*(shape.rows for shape in self.shapes.shapes), *self.shapes.smaller]
        model.cache_dequantized(self.memory.dequant_cache_budget, rows)
        model.pack()
        if not self.spec.batch_invariant:
            return self.shapes
        return replace(self.shapes, proven=prove(model.model, self.shapes, self.place.dtype))


def giving_way(model: TransformersDecoder, device: torch.device, make: Callable[[], KVCache], first: bool) -> KVCache:
    """What `make` allocates; where a GPU lacks memory, since others have taken some, dequantized weights are given up.

    Only for the `first` cache: later a captured step may hold their addresses. On a CPU they stay: their layout is part
    of what the smaller shapes were proven with.
    """
    import torch

    try:
        return make()
    except torch.OutOfMemoryError:
        if device.type != "cuda" or not first or not model.drop_dequantized():
            raise
    torch.cuda.empty_cache()  # outside, where the failure no longer holds half a cache
    return make()


def _instructions() -> str:
    """The vector and matrix instructions that decide on which products a CPU's libraries run."""
    import torch

    found = [
        name
        for name, has in (
            ("BF16", torch.cpu._is_avx512_bf16_supported()),
            ("AMX", torch.cpu._is_amx_tile_supported()),
        )
        if has
    ]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *found])


def _nothing(reads: AttentionNeed) -> None:
    """What there is to compile for most kernels."""


def _splits(settings: EngineSettings, model: TransformersDecoder, head: tuple[int, ...]) -> Splits:
    """Where prompts are cut; nowhere if equal beginnings have other keys in longer rows."""
    from pipeline.engine.prefix import Splits

    if settings.share_prefix is None or model.rope_by_row:
        return Splits()
    return Splits(head=head, grid=settings.share_prefix)


def resolve_runtime(
    config: RunConfig,
    checkpoint: Checkpoint,
    stored_shapes: Mapping[str, Any] | None,
    adapter: Adapter | None = None,
) -> Runtime:
    """Settle where and how the model runs; raises ConfigError with sizes or reasons if it cannot.

    `stored_shapes` are those of run.json: a resumed run keeps them whatever memory is free now.
    """
    from pipeline.kernels.cache_attention import AttentionNeed
    from pipeline.kernels.registry import choose_attention
    from pipeline.models.loader import check_adapter
    from pipeline.quant.format import format_of, needs_of

    spec = resolve_spec(config.quant, checkpoint.quantization, checkpoint.name)
    transformers_config = load_config(checkpoint.name, str(checkpoint.folder), config.model.trust_remote_code)
    device = resolve_device(config.model, config.place)
    dtype = resolve_dtype(config.model, checkpoint)
    if adapter is not None:
        check_adapter(adapter, transformers_config, dtype, config.model.trust_remote_code)
    modules = spec.stored_modules(checkpoint.tensors)
    needs = needs_of(spec, modules, device.type, capability_of(device), dtype)
    quant, reason = format_of(spec, config.quant.kernel, needs, config.quant.tuning_cache)
    geometry = _geometry(transformers_config, adapter)
    reads = AttentionNeed(
        device_type=device.type,
        capability=capability_of(device),
        dtype=dtype,
        head_dim=geometry.head_dim,
        float8=config.engine.kv_dtype != "auto",
    )
    attention, attention_reason = choose_attention(config.engine.attention, reads)
    if config.engine.compile == "graphs" and device.type != "cuda":
        raise ConfigError(f"engine.compile=graphs needs a CUDA device, this is {device.type}; use engine.compile=auto")
    place = Placement(
        checkpoint=checkpoint,
        geometry=geometry,
        spec=spec,
        dtype=dtype,
        device_type=device.type,
        budget=memory_budget(config.model, device, config.place),
        dense_product=quant is not None and quant.kernel.dequantizes,
        adapter_bytes=0 if adapter is None else adapter.num_bytes(dtype.itemsize),
    )
    if stored_shapes is None:
        shapes, memory = plan_shapes(
            place, config.engine, config.quant, config.model.max_len, stops_at_length=attention.stops_at_length(reads)
        )
    else:
        shapes = EnginePlan.from_dict(stored_shapes)
        memory = plan_memory(place, config.engine, config.quant, shapes.max_len)
    return Runtime(
        place,
        transformers_config,
        device,
        quant,
        reason,
        shapes,
        memory,
        needs,
        attention,
        attention_reason,
        reads,
        adapter,
        config.engine.kv_dtype,
    )


def _geometry(config: PretrainedConfig, adapter: Adapter | None) -> ModelGeometry:
    """The model's, with the vocabulary that an adapter may bring."""
    geometry = geometry_of(config)
    vocab = None if adapter is None else adapter.vocab
    return geometry if vocab is None else replace(geometry, vocab=vocab)
