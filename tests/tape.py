"""A recorder that captures a step the way a CUDA graph does, on a CPU: operations on the tensors they were done on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from pipeline.engine.graphs import Step

ASKS_THE_HOST = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "argwhere", "item")


@dataclass
class Operation:
    """An operator with the tensors it read, and the tensors it made, whose memory a replay writes again."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[Tensor]

    def replay(self) -> None:
        again, _ = tree_flatten(self.function(*self.args, **self.kwargs))
        for tensor, value in zip(self.made, [v for v in again if isinstance(v, Tensor)], strict=False):
            tensor.copy_(value)


class Tape(TorchDispatchMode):
    """Notes every operation; refuses those that a stream capture refuses because the host would have to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        assert name not in ASKS_THE_HOST, f"{name} asks the host in the middle of a step"
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        outputs = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        made = [t for t in outputs if t.untyped_storage().data_ptr() not in given]
        if made or func._schema.is_mutable:  # a view needs no replay
            self.operations.append(Operation(func, args, dict(kwargs or {}), made))
        return result


@dataclass
class TapeRecorder:
    """Captures each step once; from then on none of the step's own Python is run."""

    eager_reason: str | None = None
    tapes: list[Tape] = field(default_factory=list)
    replays: int = 0

    @property
    def graphs(self) -> int:
        return len(self.tapes)

    def record(self, step: Step) -> Step:
        for _ in range(2):  # as warming up does: what a step writes, it writes again
            step()
        with Tape() as tape:
            out = step()
        self.tapes.append(tape)

        def replay() -> Tensor:
            self.replays += 1
            for operation in tape.operations:
                operation.replay()
            return out

        return replay


def addresses(*tensors: Tensor) -> tuple[int, ...]:
    """Where tensors lie."""
    return tuple(t.data_ptr() for t in tensors)
