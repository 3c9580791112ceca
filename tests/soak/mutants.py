"""Which bugs the tests notice: puts each bug of mutants.toml into a copy of the tree and runs tests there.

    python tests/soak/mutants.py                          # all: 5 s each on an idle core
    python tests/soak/mutants.py new --only sampling/     # those of some files, or new-3,
    python tests/soak/mutants.py --check                  # that the tests named there pass without a bug

Prints a line per bug: killed by which test, SURVIVED, or OUTDATED where a file no longer has its text once.
The exit status is 0 if all are killed.
"""

import argparse
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300  # for the tests of one bug: an endless loop is noticed, too
USAGE_ERROR, NO_TESTS = 4, 5  # of pytest
PRELOADED = (
    "numpy", "torch", "PIL.Image", "pydantic", "tokenizers", "safetensors.torch", "webdataset", "rich",
    "typer", "einops", "pytest",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sections", nargs="*", help="of mutants.toml; all by default")
    parser.add_argument("--only", default="-", help="bugs whose number or file has one of these")
    parser.add_argument("--tests", help="run these instead, such as 'core models -k positions'")
    parser.add_argument("--check", action="store_true", help="run the named tests without any bug")
    options = parser.parse_args()
    sections = tomllib.loads((ROOT / "tests/soak/mutants.toml").read_text(encoding="utf-8"))
    chosen = [
        (f"{section}-{number}", mutant)
        for section in options.sections or sections
        for number, mutant in enumerate(sections[section], start=1)
        if any(part in f"{section}-{number}, {mutant['path']}" for part in options.only.split())
    ]
    for name in PRELOADED:
        with suppress(ImportError):
            __import__(name)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = copy_of_tree(Path(folder))
        if options.check:
            wrong = {
                tests: result
                for tests in dict.fromkeys(mutant["tests"] for _, mutant in chosen)
                if (result := run_tests(tree, shlex.split(tests))) != "passed"
            }
            sys.exit("\n".join(f"{tests}: {result}" for tests, result in wrong.items()) or 0)
        results = Counter()
        for name, mutant in chosen:
            results[show(tree, name, mutant, shlex.split(options.tests or mutant["tests"]))] += 1
    print(", ".join(f"{number} {result}" for result, number in results.items()))
    sys.exit(results.keys() != {"killed"})


def copy_of_tree(folder: Path) -> Path:
    """All files that git does not ignore, also those not committed yet."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def show(tree: Path, name: str, mutant: dict[str, str], tests: list[str]) -> str:
    """Runs the tests of one bug, prints a line, and returns the result in a word."""
    path, start = tree / mutant["path"], time.monotonic()
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    line = text[: text.find(mutant["old"])].count("\n") + 1
    place = f"{name:9} {mutant['path']}:{line}"
    if (found := text.count(mutant["old"])) != 1:
        print(f"{place}  OUTDATED: its text is there {found} times: {mutant['suffers']}", flush=True)
        return "outdated"
    path.write_text(text.replace(mutant["old"], mutant["new"]), encoding="utf-8")
    try:
        result = run_tests(tree, tests)
    finally:
        path.write_text(text, encoding="utf-8")
    seconds = f"{time.monotonic() - start:.0f} s"
    if result == "passed":
        print(f"{place}  SURVIVED {' '.join(tests)}, {seconds}: {mutant['suffers']}", flush=True)
        return "survived"
    print(f"{place}  killed, {seconds}: {result}", flush=True)
    return "killed"


def run_tests(tree: Path, tests: list[str]) -> str:
    """Runs tests in a forked process, which spares importing torch again; returns "passed", or the first that
    failed."""
    output = tree / ".pytest-output"
    output.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setpgrp()
            code = run_pytest(tree, tests, output)
        finally:
            os._exit(code)
    code, ends = None, time.monotonic() + SECONDS
    try:
        while code is None and time.monotonic() < ends:
            done, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else None
            time.sleep(0 if done else 0.1)
    finally:  # also on Ctrl-C
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # and what the tests have started
    if code is None:
        os.waitpid(child, 0)
        return f"no end within {SECONDS} s"
    if code == 0:
        return "passed"
    if code in (USAGE_ERROR, NO_TESTS):
        sys.exit(f"{' '.join(tests)}: no such tests")
    lines = output.read_text(encoding="utf-8").splitlines() if output.is_file() else []
    found = [text for text in lines if text.startswith(("FAILED", "ERROR"))]
    return found[0][:150] if found else f"pytest ended with {code}: {' / '.join(lines[-3:])}"


def run_pytest(tree: Path, tests: list[str], output: Path) -> int:
    import pytest

    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path[:] = [str(tree), *(place for place in sys.path if Path(place).resolve() != ROOT)]
    sys.dont_write_bytecode = True
    end = tests.index("-k") if "-k" in tests else len(tests)
    files, options = [f"tests/test_{name}.py" for name in tests[:end]], tests[end:]
    text = io.StringIO()
    with redirect_stdout(text), redirect_stderr(text):
        code = pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *files, *options])
    output.write_text(text.getvalue(), encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    main()
