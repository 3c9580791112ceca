"""A few hundred inputs of the fuzzer, of which `make soak` reads 100,000; and whether it sees harm."""

import os
import signal
from pathlib import Path

import fuzz
import pytest
from inputs import Harm, Kind, model_folders, put


@pytest.mark.parametrize(
    ("what", "number"), [("samples", 150), ("shards", 50), ("sources", 15), ("models", 45)]
)
def test_damaged_inputs_are_refused_or_counted(tmp_path, what, number):
    found = fuzz.fuzz(what, number, seed=1, folder=tmp_path)
    assert found == {"tried": number, "held": number, "failures": []}


def test_what_is_not_damaged_is_loaded(tmp_path):
    folders = model_folders(tmp_path / "models")
    for name, (files, load) in folders.items():
        put(files, tmp_path / "copies" / name)
        load(tmp_path / "copies" / name)
    assert len(folders) == 18


def raises(files, folder, rng):
    raise KeyError("unforeseen")


def miscounts(files, folder, rng):
    raise Harm("3 samples delivered, 4 read")


def crashes(files, folder, rng):
    os.kill(os.getpid(), signal.SIGKILL)


def never_ends(files, folder, rng):
    while True:
        pass


def waits(files, folder, rng):
    signal.pause()


def grows(files, folder, rng):
    b"x" * 2**27


def writes_outside(files, folder, rng):
    Path(folder.parent.parent / "evil").write_text("")


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (raises, "KeyError: 'unforeseen' (test_fuzz.py:"),
        (miscounts, "Harm: 3 samples delivered, 4 read"),
        (crashes, "its process ended: SIGKILL"),
        (never_ends, "its process ended: SIGPROF"),
        (waits, "no answer within 0.5 seconds"),
        (grows, "took 1"),
        (writes_outside, "files were written outside: ['evil']"),
    ],
)
def test_harm_is_told_with_the_input_that_did_it(tmp_path, monkeypatch, read, told):
    def in_some(files, folder, rng):
        if files["input"] == b"evil":
            read(files, folder, rng)

    kind = Kind(lambda rng: {"input": b"evil" if rng.random() < 0.3 else b"good"}, in_some)
    monkeypatch.setattr(fuzz, "kinds", lambda folder: {"kind": kind})
    monkeypatch.setattr(fuzz, "MOST_SECONDS", 0.1 if read == never_ends else 20)
    monkeypatch.setattr(fuzz, "MOST_WAITING", 0.5 if read == waits else 60)
    monkeypatch.setattr(fuzz, "MOST_MEMORY", 2**26)
    found = fuzz.fuzz("kind", 4, seed=0, folder=tmp_path)
    assert found["tried"] == 4
    assert 0 < len(found["failures"]) == 4 - found["held"] < 4
    assert told in found["failures"][0]
    if read != writes_outside:
        kept = [path.read_bytes() for path in tmp_path.glob("failures/kind-0-*/input")]
        assert kept == [b"evil"] * len(found["failures"])
