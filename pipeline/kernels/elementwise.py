"""Functions of single values whose bits on a CPU do not depend on where a value stands in a tensor.

torch shares a tensor out among its threads in pieces of equal length and computes each piece in vectors, but what is
left at a piece's end one by one, and for some functions (sigmoid, SiLU, GELU) other code rounds otherwise there. Where
a piece ends follows from the size of the whole tensor and the number of threads: a row's bits would depend on its
neighbours. So the values before every end are computed once more, in vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

WHOLE = 64
"""A multiple of all vectors' lengths, unrolled loops included."""
GRAINS = (2048, 32768)
"""The least lengths of a piece that torch's operators ask for."""
SHARED_BY_ALL = 16384
"""From more values than this on GELU has a piece for every thread, however short."""
AT_ONCE = GRAINS[0] // WHOLE - 1
"""So many pieces of 64 values stay on one thread."""


def seamless(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, which acts on each value by itself; on a CPU each value has the bits of a vector's."""
    if x.device.type != "cpu" or not x.numel():
        return function(x)
    flat = x.reshape(-1)
    if flat.numel() < WHOLE:
        return function(F.pad(flat, (0, WHOLE - flat.numel())))[: flat.numel()].reshape(x.shape)
    out = function(flat)
    seams = _seams(flat.numel(), torch.get_num_threads())
    if seams is not None:
        for part in torch.split(seams, AT_ONCE):
            out[part] = function(flat[part].reshape(-1)).reshape(part.shape)
    return out.reshape(x.shape)


@lru_cache(maxsize=4096)
def _seams(count: int, threads: int) -> Tensor | None:
    """The indices [pieces, 64] of the last values of each piece whose length is no whole number of vectors."""
    ends: set[int] = set()
    numbers = {min(threads, -(-count // grain)) if count >= grain else 1 for grain in GRAINS}
    for pieces in numbers | ({threads} if count > SHARED_BY_ALL else set()):
        length = -(-count // pieces)
        bounds = ((begin, min(begin + length, count)) for begin in range(0, count, length))
        ends.update(end for begin, end in bounds if (end - begin) % WHOLE)
    if not ends:
        return None
    return torch.tensor(sorted(ends))[:, None] + torch.arange(-WHOLE, 0)
