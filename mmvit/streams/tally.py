"""The tally of a stream: how many samples were read and skipped, and whether too many were bad."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mmvit.errors import UserError

DAMAGED = "damaged cache pieces fetched again"  # among the counts
MIN_BAD = 10  # bad samples that are tolerated however few have been read


@dataclass
class Tally:
    """Counts of samples read and of samples skipped by reason (with the first case of each), damaged shards
    (path → problem) and the samples lost in them (path → number, where an index tells), damaged pieces of
    remote shards, and the decoder's own counts."""

    read: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    broken_shards: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)

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
            other.broken_shards | self.broken_shards,
            add_counts(self.counts, other.counts),
            other.lost | self.lost,
        )

    def news(self, before: "Tally") -> list[str]:
        """A line for each kind of problem of samples that `before` did not have."""
        samples = [
            f"skipped a sample, {reason}: {self.examples[reason]}"
            for reason in self.skipped
            if reason not in before.skipped
        ]
        if DAMAGED in self.counts and DAMAGED not in before.counts:
            samples.append(f"{self.examples[DAMAGED]} was damaged and has been fetched again: check its disk")
        return samples

    def check(self, max_bad: float) -> None:
        """Raises UserError if there are more bad samples and broken shards than `MIN_BAD` and than the share
        `max_bad` of the samples read."""
        num_bad = sum(self.skipped.values()) + len(self.broken_shards)
        if num_bad > max(MIN_BAD, max_bad * self.read):
            raise UserError(
                f"{num_bad} bad samples among {self.read} read: {self.reasons()}. Repair or remove them; "
                f"at most {max_bad:.0%} (or {MIN_BAD}) are skipped"
            )

    def reasons(self) -> str:
        """Why samples were skipped: the count and the first case of each reason."""
        reasons = [
            f"{number} x {reason}, the first: {self.examples[reason]}"
            for reason, number in self.skipped.items()
        ]
        return "; ".join([*reasons, *self.broken()])

    def broken(self) -> list[str]:
        if not self.broken_shards:
            return []
        first = next(iter(self.broken_shards.values()))
        lost = f"{plural(sum(self.lost.values()), 'sample')} lost" if self.lost else ""
        if lost and len(self.lost) < len(self.broken_shards):
            lost = f"at least {lost}"
        shards = plural(len(self.broken_shards), "broken shard") + (f" ({lost})" if lost else "")
        return [f"{shards}, the first: {first}"]

    def describe(self) -> str:
        """A line for the end of a run."""
        counts = "".join(
            f", {fetched_again(number) if name == DAMAGED else f'{number:,} {name}'}"
            for name, number in self.counts.items()
        )
        read, skipped = plural(self.read, "sample"), f"{sum(self.skipped.values()):,} skipped"
        if self.skipped:
            skipped += f" ({self.reasons()})"
        elif self.broken_shards:
            skipped += f", and parts of {self.reasons()}"
        return f"{read} read{counts}, {skipped}"


def plural(number: int, thing: str) -> str:
    """`1 sample`, `2,000 samples`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def fetched_again(number: int) -> str:
    return f"{plural(number, 'damaged cache piece')} fetched again"


def add_counts(left: Mapping[str, int], right: Mapping[str, int]) -> dict[str, int]:
    return {name: left.get(name, 0) + right.get(name, 0) for name in dict.fromkeys([*left, *right])}
