"""Which error the rows of a run have most often."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow.dataset as ds

LONGEST = 200
"""Characters of a reason that are told apart and shown."""


def commonest_error(results: ds.Dataset) -> dict[str, Any] | None:
    """The commonest reason over all Parts, streamed, with the number of its rows; None without error rows."""
    counts: Counter[str] = Counter()
    errors = results.to_batches(columns=["error"], filter=ds.field("error").is_valid())
    for batch in errors:
        counts.update(reason.as_py()[:LONGEST] for reason in batch.column("error"))
    return None if not counts else dict(zip(("error", "rows"), counts.most_common(1)[0], strict=True))
