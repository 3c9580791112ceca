"""Ctrl-C and SIGTERM as a request: the loop sees it, saves, and leaves; a second one leaves at once."""

import os
import signal
from typing import Self

CAUGHT = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While open, the first SIGINT or SIGTERM is kept in `signal` (0 before) and does not end the process."""

    def __init__(self):
        self.signal = 0
        self.owner = os.getpid()

    def __enter__(self) -> Self:
        self.earlier = {number: signal.signal(number, self.receive) for number in CAUGHT}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: object) -> None:
        if (
            os.getpid() != self.owner
        ):  # a forked data worker: its parent saves and ends it; SIGTERM is that end
            if number == signal.SIGTERM:
                os._exit(128 + number)
        elif self.signal:
            raise SystemExit(128 + number)
        else:
            self.signal = number
