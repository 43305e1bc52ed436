"""Which errors the rows of a run have most often."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow.dataset as ds

LONGEST = 200
"""Characters of a reason that are told apart and shown."""
MOST_APART = 20_000
"""Reasons that are counted at a time; where there are more, such as one for each line, the rarest are forgotten."""


def commonest_errors(results: ds.Dataset, most: int = 10) -> list[dict[str, Any]]:
    """The commonest reasons over all Parts, streamed, each with the number of its rows; the commonest first."""
    counts: Counter[str] = Counter()
    errors = results.to_batches(columns=["error"], filter=ds.field("error").is_valid())
    for batch in errors:
        counts.update(reason.as_py()[:LONGEST] for reason in batch.column("error"))
        if len(counts) > MOST_APART:
            counts = Counter(dict(counts.most_common(MOST_APART // 2)))
    return [{"error": reason, "rows": rows} for reason, rows in counts.most_common(most)]
