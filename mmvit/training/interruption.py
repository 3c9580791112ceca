"""Ctrl-C and SIGTERM as a request: the loop sees it, saves, and leaves; a second one leaves at once."""

import os
import signal
import time
from typing import Self

ECHO = 3.0  # seconds; a launcher (torchrun, deepspeed) repeats a signal, which then is still the same one
CAUGHT = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While open, the first SIGINT or SIGTERM is kept in `signal` (0 before) and does not end the process."""

    def __init__(self):
        self.signal, self.since = 0, 0.0
        self.owner = os.getpid()

    def __enter__(self) -> Self:
        self.earlier = {number: signal.signal(number, self.receive) for number in CAUGHT}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: object) -> None:
        if os.getpid() != self.owner:
            return  # a data worker that was forked just now; it leaves signals to its parent
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > ECHO:
            raise SystemExit(128 + number)
