"""How a decode step is run again and again: as it is, or captured once in a CUDA graph and replayed.

A step reads and writes tensors that stay where they are (tokens, positions, keys and values of all slots), takes
nothing from the host and asks it nothing. So it can be captured; on a CPU the same step is simply called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Step = Callable[[], Tensor]
"""One pass over static tensors; what it returns may be overwritten by the next call."""
WARM_UPS = 2
"""Calls before a capture: kernels are compiled and loaded, libraries make their handles."""


class Recorder(Protocol):
    """What turns a step into the one that is called.

    `graphs` is how many steps were captured, `eager_reason` why others are not, or None.
    """

    @property
    def graphs(self) -> int: ...

    @property
    def eager_reason(self) -> str | None: ...

    def record(self, step: Step) -> Step:
        """The step to call from now on; called once for each shape, when its tensors hold a real step."""
        ...


class Eager:
    """Steps are called as they are."""

    graphs = 0

    def __init__(self, reason: str) -> None:
        self.eager_reason: str | None = reason

    def record(self, step: Step) -> Step:
        """The step itself."""
        return step


class CudaGraphs:
    """Steps are captured in CUDA graphs, which share one pool of memory since only one runs at a time."""

    def __init__(self, device: torch.device, *, required: bool) -> None:
        """`required` says that a step which cannot be captured ends the run instead of running as it is."""
        self.graphs = 0
        self.eager_reason: str | None = None
        self._device = device
        self._required = required
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, step: Step) -> Step:
        """Capture the step; a replay returns the same tensor each time, with new content.

        The calls before the capture do what the first step will do again: they write the same keys and values to
        the same places.
        """
        with torch.cuda.device(self._device):
            self._warm_up(step)
            stream = torch.cuda.current_stream(self._device)
            try:
                return self._capture(step)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # how CUDA reports what a capture does not allow
                if self._required:
                    raise
                torch.cuda.set_stream(stream)  # a capture that fails may leave its own in place
                self.eager_reason = f"a step could not be captured ({str(error).strip().splitlines()[0]})"
                return step

    def _warm_up(self, step: Step) -> None:
        """On another stream, as a capture asks for."""
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream(self._device).wait_stream(side)

    def _capture(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = step()
        self.graphs += 1

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def recorder_for(compile_: str, device: torch.device, obstacle: str | None) -> Recorder:
    """What `engine.compile` comes to on a device, for a model with this obstacle to a capture, or none."""
    if compile_ == "off":
        return Eager("engine.compile=off")
    if device.type != "cuda":
        return Eager(f"CUDA graphs run on cuda devices, not on {device.type}")
    if obstacle is not None:
        return Eager(obstacle)
    return CudaGraphs(device, required=compile_ == "graphs")
