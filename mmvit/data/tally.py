"""The tally of a stream: what became of the samples, and when too many were bad."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mmvit.errors import UserError

MIN_BAD = 10  # so many bad samples are borne however little has been read


@dataclass
class Tally:
    """Samples read, samples skipped by reason (with the first case of each), and the decoder's own counts."""

    read: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str, example: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.examples.setdefault(reason, example)

    def count(self, counts: Mapping[str, int]) -> None:
        for name, number in counts.items():
            self.counts[name] = self.counts.get(name, 0) + number

    def plus(self, other: "Tally") -> "Tally":
        return Tally(
            self.read + other.read,
            add_counts(self.skipped, other.skipped),
            other.examples | self.examples,
            add_counts(self.counts, other.counts),
        )

    def check(self, max_bad: float) -> None:
        """Raises UserError if more samples were bad than `max_bad` of those read and than `MIN_BAD`."""
        num_bad = sum(self.skipped.values())
        if num_bad > max(MIN_BAD, max_bad * self.read):
            raise UserError(
                f"{num_bad} bad samples among {self.read} read: {self.reasons()}. Mend or remove them; "
                f"a share of {max_bad:.0%} (and {MIN_BAD} in all) would be skipped"
            )

    def reasons(self) -> str:
        """Why samples were skipped: counts, each with its first case."""
        return "; ".join(
            f"{number} x {reason}, the first: {self.examples[reason]}"
            for reason, number in self.skipped.items()
        )

    def describe(self) -> str:
        """One line for the end of a run."""
        counts = "".join(f", {number:,} {name}" for name, number in self.counts.items())
        reasons = f" ({self.reasons()})" if self.skipped else ""
        return f"{self.read:,} samples read{counts}, {sum(self.skipped.values()):,} skipped{reasons}"


def add_counts(left: Mapping[str, int], right: Mapping[str, int]) -> dict[str, int]:
    return {name: left.get(name, 0) + right.get(name, 0) for name in dict.fromkeys([*left, *right])}
