"""Ctrl-C, SIGTERM, SIGHUP (a terminal or connection that goes) and SIGUSR1 (a scheduler's warning, as of
Slurm's --signal) as requests: the loop saves and stops; a second one stops at once."""

import os
import signal
import time
from typing import Self

ECHO = 3.0  # seconds; a launcher (torchrun, deepspeed) repeats a signal, which then is still the same one
CAUGHT = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
]
HANGUP = getattr(signal, "SIGHUP", None)


class Interruption:
    """A context in which the first of `CAUGHT` is only noted in `signal` (0 before)."""

    def __init__(self):
        self.signal, self.since = 0, 0.0
        self.owner = os.getpid()

    def __enter__(self) -> Self:
        self.earlier = {
            number: signal.signal(number, self.receive)
            for number in CAUGHT
            if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN  # nohup's wish
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: object) -> None:
        if os.getpid() != self.owner:
            return  # a data worker just forked; its parent handles signals
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > ECHO:
            raise SystemExit(128 + number)
