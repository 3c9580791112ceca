"""From images to a generator that draws captions it never saw, in 12 minutes on 2 cores with AMX, or 36.

    mmvit demo

Each step is a command of its own, printed as you would type it: emoji become shards, the shipped image
tokenizer turns them into codes, a generator learns codes from captions, and held-out combinations are drawn
beside the real ones. Steps that are done are skipped, and an interrupted training continues.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from mmvit.cli import run_script

IMAGES, CODES, RUN = Path("data/emoji"), Path("data/emoji-codes"), Path("runs/emoji-demo")


def main() -> None:
    start = time.perf_counter()
    step("prepare", "emoji", IMAGES, done=IMAGES / "dataset.json")
    step("encode", IMAGES, CODES, done=CODES / "dataset.json")
    step("train", "emoji_demo", *(["--resume"] if RUN.is_dir() else []))
    step("evaluate", RUN, IMAGES, "--split", "combinations", "--out", "demo.png")
    print(f"done in {(time.perf_counter() - start) / 60:.1f} minutes; draw your own captions with")
    print(f'  mmvit sample --model {RUN} "woman astronaut dark skin tone"')


def step(*arguments: object, done: Path | None = None) -> None:
    """Runs a command, unless the file `done` exists; a step that fails ends the demo."""
    words = [*map(str, arguments)]
    shown = shlex.join(["mmvit", *words])
    if done is not None and done.exists():
        print(f"$ {shown}   (already done: {done} exists)", flush=True)
        return
    print(f"$ {shown}", flush=True)
    environment = {"GOMP_SPINCOUNT": "10000", **os.environ}  # threads that wait sleep sooner
    process = subprocess.Popen([sys.executable, "-m", "mmvit", *words], env=environment)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the step got Ctrl-C, too, and saves first
        code = process.wait()
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_script(main)
