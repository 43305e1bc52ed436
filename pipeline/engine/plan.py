"""The static shapes of the engine, listed before a run and fixed in run.json. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pipeline.errors import ConfigError

ROW_MULTIPLE = 16
"""Rows of every matrix product are a multiple of this: with fewer than 8 rows, or a remainder of one
row, BLAS libraries switch kernels within a product and the bits of a row would depend on its place."""
SHORTEST_CLASS = 256
CLASS_RATIO = 4
CPU_SLOTS = 64
CUDA_SLOTS = 512
CPU_PREFILL_TOKENS = 512
CUDA_PREFILL_TOKENS = 8192
CPU_LOGIT_ROWS = 64
CUDA_LOGIT_ROWS = 256
LEAST_SHARED = 16
"""A beginning of fewer tokens is not worth a segment of its own."""
PREFIX_TOKENS = 2048
"""Tokens of shared beginnings whose keys and values are kept."""
AUTO_MAX_LEN = 8192
"""The longest row planned for when nothing is asked: models with 128k positions would leave no room for slots."""
MIB, GIB = 1024**2, 1024**3
COMPILE = ("auto", "graphs", "off")
ATTENTION = ("auto", "numba", "reference", "slotwise", "triton")
KV_DTYPES = ("auto", "float8_e4m3")
SCALE_BYTES = 4
"""Of the float32 scale that each token and head has beside its keys, and one beside its values, in FP8."""
WANTED_PROGRAMS = 512
"""Programs of a decode attention that fill a GPU: about four for each multiprocessor of the largest ones."""
SHORTEST_SPLIT = 256
"""Positions; shorter splits would spend their time on starting and merging."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelGeometry:
    """What the shapes depend on; `max_positions` is the longest row in tokens the model can take."""

    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    max_positions: int

    def kv_bytes_per_token(self, itemsize: int, scale_bytes: int = 0) -> int:
        """Bytes of keys and values, each with a scale per head if they have one, that one token keeps in all layers."""
        return 2 * self.layers * self.kv_heads * (self.head_dim * itemsize + scale_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What was asked for under `engine`; None is auto.

    `share_prefix` None shares no beginnings of prompts, 0 those of the template, a number also cuts prompts
    every so many tokens. `compile` says whether decode steps are captured in CUDA graphs (auto: wherever they can be),
    `attention` which kernel reads the cache, `kv_dtype` what it holds (auto: the model's dtype).
    """

    slots: int | None = None
    max_len: int | None = None
    prefill_tokens: int | None = None
    share_prefix: int | None = 0
    dedup: bool = True
    compile: str = "auto"
    kv_dtype: str = "auto"
    attention: str = "auto"

    def cache_bytes_per_token(self, geometry: ModelGeometry, itemsize: int) -> int:
        """Bytes that the cache takes for one token of a model with values of `itemsize` bytes."""
        if self.kv_dtype == "auto":
            return geometry.kv_bytes_per_token(itemsize)
        return geometry.kv_bytes_per_token(1, SCALE_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthClass:
    """A static decode shape: so many slots, each for a row of at most `max_len` tokens, answer included.

    `splits` is the number of equal parts in which a kernel may read the positions of a slot: how the parts are merged
    decides on bits, so it is fixed with the shape.
    """

    slots: int
    max_len: int
    splits: int = 1


Kind = Literal["prefill", "decode", "logits"]
Proven = Mapping[tuple[Kind, int], tuple[int, ...]]
"""For rows of a kind of pass, the smaller numbers of rows in which a row has the same bits, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One static shape of a pass: `rows` tokens of a prefill, slots of a decode step, or positions for the logits.

    `max_len` is the length of a decode shape's slots.
    """

    kind: Kind
    rows: int
    max_len: int | None = None

    def describe(self) -> str:
        """For the log: prefill 512, decode 64 x 256, logits 64."""
        return f"{self.kind} {self.rows}" + (f" x {self.max_len}" if self.max_len else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """Every shape the engine may run.

    `prefill_tokens` are the sizes of a packed prefill pass in tokens, ascending. The first is what rows
    share, as many as fit; a row that needs more runs alone in the smallest that holds it. So the row
    decides on the size, never its neighbours: libraries choose their way of summing up by the size of a
    product. For the same reason a decode step always runs all slots of its class, and the logits of a
    prefill pass are computed in slices of always `logit_rows` positions.

    `smaller` are numbers of rows that a pass may have in place of these when the rest would be padding: `proven` says
    where they may on this machine, since a row has been seen to keep its bits. It is not part of what is stored.
    """

    length_classes: tuple[LengthClass, ...]
    prefill_tokens: tuple[int, ...]
    logit_rows: int
    vocab: int
    kv_bytes: int
    smaller: tuple[int, ...] = ()
    proven: Proven = field(default_factory=dict, compare=False)

    @property
    def max_len(self) -> int:
        """The longest row, prompt and answer together, in tokens."""
        return self.length_classes[-1].max_len

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Every shape that is ever run; beginnings that prompts share run as prefill passes do."""
        return (
            *(Shape(kind="prefill", rows=tokens) for tokens in self.prefill_tokens),
            *(Shape(kind="decode", rows=c.slots, max_len=c.max_len) for c in self.length_classes),
            Shape(kind="logits", rows=self.logit_rows),
        )

    def candidates(self, shape: Shape) -> tuple[int, ...]:
        """Numbers of rows that may be run in place of a shape; none for prefill passes of a row alone."""
        alone = shape.kind == "prefill" and shape.rows != self.prefill_tokens[0]
        return () if alone else tuple(rows for rows in self.smaller if rows < shape.rows)

    def rows(self, kind: Kind, listed: int, needed: int) -> int:
        """The rows of a pass that holds `needed`: as listed, or fewer that give the same bits."""
        return next((rows for rows in self.proven.get((kind, listed), ()) if rows >= needed), listed)

    def prefill_rows(self, tokens: int) -> int:
        """The tokens of a prefill pass that holds so many."""
        return self.rows("prefill", next(size for size in self.prefill_tokens if size >= tokens), tokens)

    @property
    def num_shapes(self) -> int:
        """How many shapes may be run on this machine."""
        return len(self.shapes) + sum(map(len, self.proven.values()))

    def describe(self) -> str:
        """One line for the log."""
        return f"{len(self.shapes)} static shapes: " + ", ".join(shape.describe() for shape in self.shapes)

    def describe_smaller(self) -> str:
        """One line for the log on what became of the smaller numbers of rows."""
        proven = [
            f"{kind} {listed}: {', '.join(map(str, rows))}" for (kind, listed), rows in self.proven.items() if rows
        ]
        if not proven:
            return "every pass is padded to its shape: in smaller ones a row would have other bits"
        return f"in place of shapes that would be padded, with the same bits (tried out): {'; '.join(proven)}"

    def as_dict(self) -> dict[str, Any]:
        """JSON form, as stored in run.json."""
        stored = asdict(replace(self, proven={}))
        del stored["proven"]
        return stored

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> EnginePlan:
        """Rebuild from `as_dict`'s form."""
        values = {"smaller": ()} | dict(stored)
        values["smaller"] = tuple(values["smaller"])
        values["length_classes"] = tuple(LengthClass(**c) for c in stored["length_classes"])
        values["prefill_tokens"] = tuple(stored["prefill_tokens"])
        return cls(**values)


def round_up(value: int, multiple: int = ROW_MULTIPLE) -> int:
    """The least multiple that is not below the value."""
    return -(-value // multiple) * multiple


def longest_rows(geometry: ModelGeometry, settings: EngineSettings, model_max_len: int | None) -> list[int]:
    """The longest row to plan for, in tokens: what was asked for, or lengths to try in turn, falling.

    Raises ConfigError when more is asked for than the model has positions.
    """
    asked = {"engine.max_len": settings.max_len, "model.max_len": model_max_len}
    for key, value in asked.items():
        if value is not None and value > geometry.max_positions:
            raise ConfigError(
                f"{key}={value} is more than the {geometry.max_positions} positions of the model; lower it"
            )
    given = [value for value in asked.values() if value is not None]
    if given:
        return [min(given)]
    longest = min(geometry.max_positions, AUTO_MAX_LEN)
    return [longest, *(n for n in (longest // 2, longest // 4, longest // 8) if n >= SHORTEST_CLASS)]


def largest_pass(settings: EngineSettings, longest: int, device_type: str) -> tuple[int, int]:
    """Tokens of the largest pass that rows up to `longest` tokens share or fill, and positions of a slice of logits."""
    tokens = _shared_tokens(settings, device_type)
    logit_rows = CUDA_LOGIT_ROWS if device_type == "cuda" else CPU_LOGIT_ROWS
    return max(tokens, round_up(longest)), min(logit_rows, tokens)


def plan_engine(
    geometry: ModelGeometry,
    settings: EngineSettings,
    *,
    longest: int,
    device_type: str,
    kv_budget_bytes: int,
    kv_itemsize: int,
    stops_at_length: bool = False,
) -> EnginePlan:
    """List the shapes for rows of at most `longest` tokens, within a budget for keys and values.

    Where attention `stops_at_length`, at the end of each row, shorter classes only save memory: there are as few
    as it allows. Raises ConfigError when `engine.slots` does not fit, or not even the fewest slots do.
    """
    token_bytes = settings.cache_bytes_per_token(geometry, kv_itemsize)
    slots = round_up(settings.slots or (CUDA_SLOTS if device_type == "cuda" else CPU_SLOTS))
    lengths = _class_lengths(longest)
    if stops_at_length:
        lengths = _fewest_lengths(lengths, slots, token_bytes, kv_budget_bytes)
    classes = _fit_classes(lengths, slots, token_bytes, kv_budget_bytes, fixed=settings.slots is not None)
    largest, logit_rows = largest_pass(settings, longest, device_type)
    return EnginePlan(
        length_classes=tuple(replace(c, splits=_splits(c, geometry.kv_heads, device_type)) for c in classes),
        prefill_tokens=_sizes(_shared_tokens(settings, device_type), largest),
        logit_rows=logit_rows,
        vocab=geometry.vocab,
        kv_bytes=_total_bytes(classes, token_bytes),
        smaller=_smaller(max(slots, _shared_tokens(settings, device_type))) if device_type == "cpu" else (),
    )


def _shared_tokens(settings: EngineSettings, device_type: str) -> int:
    default = CUDA_PREFILL_TOKENS if device_type == "cuda" else CPU_PREFILL_TOKENS
    return round_up(settings.prefill_tokens or default)


def _smaller(largest: int) -> tuple[int, ...]:
    """Numbers of rows below the largest: multiples of 16 at first, then in steps of a third to a half."""
    ladder = [ROW_MULTIPLE * factor << power for power in range(20) for factor in (2, 3)]
    return tuple(rows for rows in (ROW_MULTIPLE, *ladder) if rows < largest)


def _class_lengths(longest: int) -> list[int]:
    lengths = []
    length = SHORTEST_CLASS
    while length < longest:
        lengths.append(length)
        length *= CLASS_RATIO
    return [*lengths, longest]


def _fewest_lengths(lengths: list[int], slots: int, token_bytes: int, budget: int) -> list[int]:
    """The longest of the lengths, as many as it takes for all slots to fit; all of them where nothing does."""
    for first in reversed(range(len(lengths))):
        if _total_bytes(_classes(lengths[first:], slots), token_bytes) <= budget:
            return lengths[first:]
    return lengths


def _classes(lengths: list[int], slots: int) -> tuple[LengthClass, ...]:
    """Longer classes get fewer slots: equal memory for each."""
    return tuple(LengthClass(slots=_class_slots(slots, lengths[0], n), max_len=n) for n in lengths)


def _fit_classes(
    lengths: list[int], wanted: int, token_bytes: int, budget: int, *, fixed: bool
) -> tuple[LengthClass, ...]:
    """Lower the slots of all classes until they fit."""
    slots = wanted
    while True:
        classes = _classes(lengths, slots)
        needed = _total_bytes(classes, token_bytes)
        if needed <= budget:
            return classes
        if fixed or slots == ROW_MULTIPLE:
            remedy = "lower engine.slots or engine.max_len" if fixed else "lower engine.max_len"
            raise ConfigError(
                f"keys and values for engine.slots={slots} and rows of up to {lengths[-1]} tokens need "
                f"{_sized(needed)} but {_sized(budget)} are left for them; "
                f"{remedy}, or raise model.memory"
            )
        slots = max(ROW_MULTIPLE, (slots * 3 // 4) // ROW_MULTIPLE * ROW_MULTIPLE)


def _splits(length_class: LengthClass, kv_heads: int, device_type: str) -> int:
    """Enough to fill a GPU with the programs of few long slots; on a CPU a slot is read in one piece."""
    if device_type != "cuda":
        return 1
    wanted = -(-WANTED_PROGRAMS // (length_class.slots * kv_heads))
    return max(1, min(wanted, length_class.max_len // SHORTEST_SPLIT))


def _sized(num_bytes: int) -> str:
    """A size to read, in GiB, or in MiB below one."""
    if num_bytes >= GIB:
        return f"{num_bytes / GIB:.2f} GiB"
    return f"{max(0, num_bytes) / MIB:.2f} MiB"


def _class_slots(slots: int, shortest: int, length: int) -> int:
    return max(ROW_MULTIPLE, slots * shortest // length // ROW_MULTIPLE * ROW_MULTIPLE)


def _total_bytes(classes: tuple[LengthClass, ...], token_bytes: int) -> int:
    return sum((c.slots + 1) * c.max_len * token_bytes for c in classes)


def _sizes(shared: int, largest: int) -> tuple[int, ...]:
    """The shared size, then twice and twice again, for rows longer than it, up to the largest."""
    sizes = [shared]
    while sizes[-1] < largest:
        sizes.append(min(2 * sizes[-1], largest))
    return tuple(sizes)
