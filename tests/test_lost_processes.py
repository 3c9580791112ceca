"""A process that fails, dies or stays silent ends the others, and one of them says so."""

import contextlib
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from torch.distributed import HashStore

from mmvit.errors import UserError, run_script
from mmvit.recipes.alike import code, files, settings
from mmvit.training import Processes, Recipe, network
from mmvit.training.distributed import free_port, open_processes
from mmvit.training.network import INTERFACE, choose_interface

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def end_of_processes(
    folder: Path, action: Callable[[Processes], None], started: int = 2, world_size: int = 2
) -> list[tuple[int, str]]:
    """The exit status of each of the processes that do `action`, and what it says on stderr. They wait for
    one another for a second; one that sleeps is killed once the others have ended, as a launcher does."""
    port, children = free_port(), []
    for rank in range(started):
        children.append(os.fork())
        if children[-1] == 0:
            place = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
            try:
                with (folder / str(rank)).open("w") as file, contextlib.redirect_stderr(file):
                    run_script(lambda: enter(action))
                os._exit(0)
            except SystemExit as end:
                os._exit(end.code)
            finally:
                os._exit(1)
    statuses = {}
    for child in children[:1] + children[:0:-1]:  # rank 1, which may sleep, is the last
        if len(statuses) == 2:
            os.kill(child, signal.SIGKILL)
        statuses[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [(statuses[child], (folder / str(rank)).read_text()) for rank, child in enumerate(children)]


def enter(action: Callable[[Processes], None]) -> None:
    with open_processes("cpu", timeout=1) as processes:
        action(processes)
        processes.largest(1)


def test_a_process_that_does_not_answer_is_named_once(tmp_path):
    def sleep_in_rank_1(processes: Processes) -> None:
        if processes.rank == 1:
            time.sleep(60)

    ended = end_of_processes(tmp_path, sleep_in_rank_1, started=3, world_size=3)
    assert [status for status, _ in ended] == [2, -signal.SIGKILL, 2]
    where = rf"process \d+ on {re.escape(socket.gethostname())}"
    expected = rf"error: rank 1 \({where}\) did not answer within train\.timeout = 1 s: .*\n"
    assert re.fullmatch(expected, ended[0][1]), ended
    assert ended[2][1] == ""


def test_a_process_that_dies_is_named(tmp_path):
    def die_in_rank_1(processes: Processes) -> None:
        if processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    ended = end_of_processes(tmp_path, die_in_rank_1)
    assert [status for status, _ in ended] == [2, -signal.SIGKILL]
    assert re.fullmatch(r"error: rank 1 \(process \d+ on .*\) is gone: .*\n", ended[0][1]), ended


@pytest.mark.parametrize("failing", [0, 1])
def test_an_exception_of_one_process_is_told_by_it_alone(tmp_path, failing):
    def fail(processes: Processes) -> None:
        if processes.rank == failing:
            raise ValueError("a bug")

    ended = end_of_processes(tmp_path, fail)
    lost = (
        "error: rank 1 has lost rank 0, which says why.*\n" if failing == 0 else ""
    )  # and its store with it
    assert ended[1 - failing][0] == 2
    assert re.fullmatch(f"({lost})?", ended[1 - failing][1])
    assert ended[failing][0] == 1


@pytest.mark.parametrize("failing", [[0, 1], [1]])
def test_a_mistake_that_all_processes_see_is_told_once(tmp_path, failing):
    def refuse(processes: Processes) -> None:
        if processes.rank in failing:
            raise UserError("a mistake")

    ended = end_of_processes(tmp_path, lambda processes: processes.together(lambda: refuse(processes)))
    expected = [(2, "error: a mistake\n" if rank == failing[0] else "") for rank in range(2)]
    assert ended == expected


def test_a_process_that_does_not_come_is_missed(tmp_path):
    [(status, said)] = end_of_processes(tmp_path, lambda processes: None, started=1)
    assert status == 2
    assert re.fullmatch(
        r"error: rank 0 has not found all 2 processes at 127\.0\.0\.1:\d+ within .* 1 s: .*\n", said
    )


def test_a_process_that_answers_too_late_is_named_once(tmp_path):
    def come_late(processes: Processes) -> None:
        if processes.rank == 0:
            time.sleep(1.5)  # rank 1 has waited for 1 s, and asks for another second

    ended = end_of_processes(tmp_path, come_late)
    assert [status for status, _ in ended] == [2, 2]
    said = r"error: rank 0 \(process \d+ on .*\) did not answer within train\.timeout = 1 s: .*\n"
    assert re.fullmatch(said, ended[1][1]), ended
    assert ended[0][1] == ""


def test_what_processes_have_otherwise_is_named(tmp_path):
    def compare(processes: Processes) -> None:
        own = {"train.steps": 3, "the content of data.train": f"{5 - processes.rank} shards"}
        processes.check_alike(own, "Give both the same")

    ended = end_of_processes(tmp_path, compare)
    host = re.escape(socket.gethostname())
    what = rf"the content of data\.train is 4 shards for rank 1 on {host}, and 5 shards for rank 0 on {host}"
    assert re.fullmatch(rf"error: the processes differ: {what}\. Give both the same\n", ended[0][1]), ended
    assert ended[1] == (2, "")


@pytest.mark.parametrize(("chosen", "expected"), [(None, "lo"), ("eth7", "eth7")])
def test_gloo_takes_the_interface_that_leads_to_the_main_process(monkeypatch, chosen, expected):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv(INTERFACE, chosen or "")
    choose_interface(HashStore(), 0, 1)
    assert os.environ[INTERFACE] == expected


def test_gloo_of_the_main_host_that_calls_itself_loopback_takes_what_leads_to_the_others(monkeypatch):
    ways = {"main": "127.0.1.1", "10.0.0.9": "10.0.0.1"}
    monkeypatch.setattr(network, "address_towards", ways.get)
    addresses = {"lo": [mock.Mock(address="127.0.0.1")], "eth7": [mock.Mock(address="10.0.0.1")]}
    monkeypatch.setattr(network.psutil, "net_if_addrs", lambda: addresses)
    monkeypatch.setenv("MASTER_ADDR", "main")
    monkeypatch.setenv(INTERFACE, "")
    store = HashStore()
    store.set("address/3", "10.0.0.9")
    choose_interface(store, 0, 4)
    assert os.environ[INTERFACE] == "eth7"


def test_hosts_with_other_shards_code_or_settings_are_told_apart(tiny_shards, tmp_path):
    mine, theirs = (
        mock.Mock(train=[str(tiny_shards)], held_out=[str(tmp_path)], text_tokenizer=None) for _ in "12"
    )
    shutil.copy(tiny_shards / "held-out-000000.tar", tmp_path)
    theirs.train = [str(tiny_shards / "train-*.tar")]
    ours, others = dict(files({"data": mine})), dict(files({"data": theirs}))
    assert ours["the content of data.held_out"] == others["the content of data.held_out"]
    assert ours["the content of data.train"].startswith("6 shards, ")
    assert others["the content of data.train"].startswith("5 shards, ")
    assert re.fullmatch(r"\w{8}", code()["the content of mmvit"])
    recipe = Recipe(task="x", output=tmp_path)
    assert {"train.steps", "train.batch_size"} <= settings(recipe).keys()
    assert settings(recipe) == settings(recipe.model_copy(update={"output": tmp_path / "else"}))
