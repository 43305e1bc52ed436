"""What a look at an output finds."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.console import Console


@dataclass(slots=True)
class Report:
    """What is wrong, of which the first lines are shown, what is not done yet, and what is only said."""

    most: int
    problems: list[str] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def show(self, console: Console) -> None:
        """A line for each."""
        for note in self.notes:
            console.result(f"note: {note}")
        for row in self.pending:
            console.result(f"pending: {row}")
        for problem in self.problems[: self.most]:
            console.result(f"wrong: {problem}")
        if len(self.problems) > self.most:
            console.result(f"wrong: {len(self.problems) - self.most:,} more (--first {len(self.problems)} shows all)")
