"""How often the label is the true one."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow.compute as pc
import pyarrow.dataset as ds


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`judged` rows have a true label; abstentions and error rows among them count as wrong."""

    judged: int
    correct: int

    @property
    def value(self) -> float | None:
        """Share of judged rows that are right, or None without any."""
        return self.correct / self.judged if self.judged else None


def accuracy(results: ds.Dataset, truth: str) -> Accuracy:
    """Compare the columns `label` and `truth` (as text) over all Parts, streamed."""
    judged = correct = 0
    for batch in results.to_batches(columns=["label", truth]):
        expected = pc.cast(batch.column(truth), "string")
        judged += len(batch) - expected.null_count
        correct += pc.sum(pc.equal(batch.column("label"), expected)).as_py() or 0
    return Accuracy(judged, correct)
