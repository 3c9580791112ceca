"""Progress and the time left of anything that may take longer than a few seconds."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

Item = TypeVar("Item")

EVERY = 5  # seconds between lines


def with_progress(
    items: Iterable[Item], total: int | None, what: str, count: Callable[[Item], int] = lambda item: 1
) -> Iterator[Item]:
    """Yields `items` and shows progress and the time left: a bar on a terminal, a line every five seconds
    elsewhere.

    Args:
        total: how many there are, None if unknown.
        count: how many an item counts for, such as the samples of a batch.
    """
    if sys.stdout.isatty():
        from rich import progress

        columns = (
            progress.TextColumn(what),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("left"),
        )
        with progress.Progress(*columns) as bar:
            task = bar.add_task(what, total=total)
            for item in items:
                yield item
                bar.advance(task, count(item))
        return
    start = shown = time.monotonic()
    number = 0
    for item in items:
        yield item
        number += count(item)
        if number != total and time.monotonic() - shown >= EVERY:
            shown = time.monotonic()
            print(progress_line(what, number, total, shown - start), flush=True)
    if time.monotonic() - start >= EVERY:
        print(progress_line(what, number, total, time.monotonic() - start, is_done=True), flush=True)


def progress_line(what: str, number: int, total: int | None, seconds: float, is_done: bool = False) -> str:
    """`writing train: 1,200 of 6,000, 400/s, 0:00:12 left`."""
    of_total = f" of {total:,}" if total is not None else ""
    speed = number / max(seconds, 1e-9)
    remaining = round(seconds / max(number, 1) * max(0, (total or 0) - number))
    left = "" if is_done or total is None else f", {timedelta(seconds=remaining)} left"
    return f"{what}: {number:,}{of_total}, {speed:,.{0 if speed >= 10 else 2}f}/s{left}"
