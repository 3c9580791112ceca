"""`mmvit sample --watch` in terminals: one with sixel graphics, one with Kitty's, one with neither."""

import fcntl
import os
import pty
import select
import struct
import sys
import termios
from pathlib import Path

import pytest
from generator_scripts import refused
from PIL import Image
from ranks import running

from mmvit.cli import main
from mmvit.sampling.terminal import GAP, side_by_side


def draw_in(terminal: str, folder: Path) -> None:
    child = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
    for number in range(3):
        os.dup2(child, number)
    os.close(child)
    sys.stdin = sys.__stdin__ = open(0)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w")  # noqa: SIM115
    os.environ |= {"TERM": "xterm-256color", "COLUMNS": "100"}
    os.chdir(folder)
    main(["sample", "red apple", "--num", "2", "--watch"])


def draw_in_terminal(answers: dict[bytes, bytes], folder: Path) -> str:
    """What the command writes to a terminal that gives `answers` to queries."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))  # rows, columns, no pixels
    written, unanswered = b"", dict(answers)
    with running(draw_in, os.ttyname(child), folder) as one:
        while parent in select.select([parent, one.process.sentinel], [], [])[0]:
            written += os.read(parent, 65536)
            for query in [query for query in unanswered if query in written]:
                os.write(parent, unanswered.pop(query))
        assert one.end().returncode == 0, written.decode(errors="replace")[-3000:]
    os.close(parent)
    os.close(child)
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
    written = draw_in_terminal(answers, tmp_path)
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
