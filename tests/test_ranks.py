"""Processes forked for tests have the environment of the test, and leave nothing behind."""

import os
import signal
import subprocess
import sys

import pytest
from ranks import running, start_two


def test_two_processes_have_the_environment_of_the_test(tmp_path, monkeypatch):
    script = tmp_path / "say.py"
    script.write_text("import os; print(os.environ['RANK'], os.environ.get('OF_THE_TEST'))")
    for value in ("first", "second"):  # they are forked from a process that has the first, or an older one
        monkeypatch.setenv("OF_THE_TEST", value)
        ended = start_two(script)
        assert sorted(ended.stdout.splitlines()) == [f"0 {value}", f"1 {value}"], ended.stderr


def launch() -> None:
    """As torchrun does: its child has a session of its own, and ends when this process is asked to."""
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)

    def end(*_: object) -> None:
        child.kill()
        child.wait()
        sys.exit()

    signal.signal(signal.SIGTERM, end)
    print(child.pid)
    signal.pause()


def test_what_a_launcher_has_started_ends_with_it():
    with running(launch) as launcher:
        child = int(launcher.lines.readline())
        os.kill(child, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
