"""Worker processes keep the order, are few items ahead, and do not hang when one of them is killed."""

import os
import signal
import time

import pytest

from mmvit.errors import UserError
from mmvit.streams.workers import AHEAD, default_workers, map_ahead


def slow_if_even(number: int) -> int:
    time.sleep(0.02 * (number % 2 == 0))
    return number


def killed_at_five(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fails_at_five(number: int) -> int:
    if number == 5:
        raise UserError("five")
    return number


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order_and_little_is_taken_ahead(workers):
    taken = []
    results = map_ahead(slow_if_even, (taken.append(number) or number for number in range(30)), workers)
    for expected, number in enumerate(results):
        assert number == expected
        assert len(taken) <= expected + 2 + AHEAD * workers
    assert len(taken) == 30


@pytest.mark.parametrize(
    ("function", "message"), [(killed_at_five, "was killed, often"), (fails_at_five, "five")]
)
def test_what_a_worker_cannot_do_is_said_once_and_ends_the_others(function, message):
    results = map_ahead(function, iter(range(1000)), 2)
    with pytest.raises(UserError, match=message):
        list(results)


def test_workers_end_with_a_main_process_that_is_killed():
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        for _ in map_ahead(slow_if_even, range(10_000), 2):
            os.write(writing, b"x")
    os.read(reading, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(writing)
    while os.read(reading, 1000):  # until the workers, which hold its other end, are gone
        pass


def test_processes_of_a_launcher_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64))
    assert default_workers() == 8
    for processes, workers in (("8", 7), ("32", 1), ("64", 0), ("100", 0), ("x", 8)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert default_workers() == workers
