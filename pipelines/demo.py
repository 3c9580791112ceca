"""The whole way, from pictures to a generator that draws captions it has never seen, in 12 minutes on 2
cores.

    python pipelines/demo.py        (or: make demo, which makes the environment first)

Each step is a command of its own, printed as you would type it: emoji become shards, the shipped image
tokenizer turns them into codes, a generator learns codes from captions, and the held-out combinations are
drawn beside the real ones. Steps that are done are not done again.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

PIXELS, CODES, RUN = Path("data/emoji"), Path("data/emoji-codes"), Path("runs/emoji-demo")


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    start = time.perf_counter()
    step(root, "prepare_emoji.py", PIXELS, done=PIXELS / "dataset.json")
    step(root, "encode_images.py", PIXELS, CODES, done=CODES / "dataset.json")
    resume = ["--resume"] if (root / RUN).is_dir() else []
    step(root, "train_caption_to_image.py", "configs/emoji_demo.toml", *resume)
    step(root, "evaluate.py", RUN, PIXELS, "--split", "combinations", "--out", "demo.png")
    print(f"done in {(time.perf_counter() - start) / 60:.1f} minutes; draw your own captions with")
    print(f'  .venv/bin/python pipelines/sample_images.py --model {RUN} "woman astronaut dark skin tone"')


def step(root: Path, script: str, *arguments: object, done: Path | None = None) -> None:
    """Runs a pipeline in the checkout's root, unless the file `done` is there; a failing step ends the
    demo."""
    command = [sys.executable, f"pipelines/{script}", *map(str, arguments)]
    shown = shlex.join(["python", *command[1:]])
    if done is not None and (root / done).exists():
        print(f"$ {shown}   (done before: {done} exists)", flush=True)
        return
    print(f"$ {shown}", flush=True)
    process = subprocess.Popen(command, cwd=root, env={"GOMP_SPINCOUNT": "10000", **os.environ})
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the step has seen Ctrl-C, too, and saves first
        code = process.wait()
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
