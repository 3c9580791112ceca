"""`mmvit sample --watch` in terminals: one with sixel graphics, one with Kitty's, one with neither."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from generator_scripts import refused
from PIL import Image

from mmvit.sampling.terminal import GAP, side_by_side

ROOT = Path(__file__).resolve().parent.parent


def run_in_terminal(command: list, answers: dict[bytes, bytes], folder: Path) -> str:
    """What a command writes to a terminal that gives `answers` to queries."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))  # rows, columns, no pixels
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdin=child, stdout=child, stderr=child, close_fds=True, env=environment, cwd=folder,
        start_new_session=True,
    )  # fmt: skip
    os.close(child)
    written, unanswered, end = b"", dict(answers), time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([parent], [], [], 0.2)[0]:
            try:
                new = os.read(parent, 65536)
            except OSError:  # the other end is closed
                break
            written += new
            for query in [query for query in unanswered if query in written]:
                os.write(parent, unanswered.pop(query))
        elif process.poll() is not None:
            break
    process.terminate() if time.monotonic() > end else None
    assert process.wait(10) == 0, written.decode(errors="replace")[-3000:]
    os.close(parent)
    return written.decode(errors="replace")


@pytest.mark.parametrize(
    ("answers", "shown"),
    [
        ({}, "▀"),
        ({b"\x1b[c": b"\x1b[?62;4;22c"}, "\x1bP"),
        ({b"\x1b_G": b"\x1b_Gi=1;OK\x1b\\"}, "\x1b_G"),
    ],
    ids=["blocks", "sixel", "kitty"],
)
def test_images_appear_in_the_terminal(answers, shown, tmp_path):
    command = [sys.executable, "-m", "mmvit", "sample", "red apple", "--num", "2", "--watch"]
    written = run_in_terminal(command, answers, tmp_path)
    assert shown in written
    assert len(list((tmp_path / "samples").iterdir())) == 2


def test_without_a_terminal_there_is_nothing_to_watch(run_script, tmp_path):
    ran = run_script("pipelines/sample_images.py", "red apple", "--watch", "--out", tmp_path / "a.png")
    refused(ran, "--watch shows images in a terminal; input or output is not one")


def test_images_stand_side_by_side():
    images = [Image.new("RGB", (64, 64), (i, 0, 0)) for i in range(10)]
    sheet = side_by_side(images)
    assert sheet.size == (8 * 64 + 7 * GAP, 2 * 64 + GAP)
    assert sheet.getpixel((64 + GAP, 64 + GAP)) == (9, 0, 0)
    assert sheet.getpixel((64, 0)) == (255, 255, 255)
