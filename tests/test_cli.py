"""The command: its groups, its help, and what it says to a mistake."""

import os
import subprocess
import sys

import pytest

import mmvit
from mmvit.cli import COMMANDS, GROUPS, main


def test_alone_it_lists_every_command_with_a_line(mmvit_command):
    shown = mmvit_command()
    assert shown.returncode == 0
    for title, commands in GROUPS.items():
        assert title in shown.stdout
        for name, command in commands.items():
            assert f"  {name} " in shown.stdout
            assert command.summary in shown.stdout


def test_the_list_of_commands_imports_nothing_heavy():
    code = (
        "import sys, mmvit.cli\n"
        "try: mmvit.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'PIL', 'rich', 'pydantic', 'deepspeed', 'webdataset'} & {*sys.modules}\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("smaple x", "unknown command smaple: did you mean sample?"),
        ("tokenizer imag", "unknown command tokenizer imag: did you mean image?"),
        ("presets --imges 3", "unknown option --imges: did you mean --images?; see mmvit presets --help"),
        ("presets --epochs", "option '--epochs' requires an argument"),
        ("presets --epochs 0", "--epochs and --batch must be greater than 0"),
        ("presets vit-b61", "did you mean vit-b16?"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_name(mmvit_command, line, words):
    refused = mmvit_command(*line.split())
    assert refused.returncode == 2
    assert words in refused.stderr
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1


def test_python_m_mmvit_is_the_command():
    shown = subprocess.run([sys.executable, "-m", "mmvit", "prepare"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "prepare emoji-groups" in shown.stdout
    assert "sample" not in shown.stdout.replace("mmvit sample", "")
    assert len(COMMANDS) > 15


@pytest.mark.parametrize(
    ("words", "completions"),
    [("mmvit s", "sample serve shards subset"), ("mmvit prepare e", "emoji emoji-groups")],
)
def test_the_shell_completes_commands(words, completions):
    place = str(len(words.split()) - 1)
    environment = {"_MMVIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": place}
    command = [sys.executable, "-X", "importtime", "-m", "mmvit"]
    ran = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert ran.stdout.split() == completions.split()
    assert "mmvit.cli" in ran.stderr
    assert "torch" not in ran.stderr  # it would take seconds


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_two_examples(mmvit_command, name):
    shown = mmvit_command(*name.split(), "--help")
    assert shown.returncode == 0, shown.stderr
    first = name.split()[0]
    examples = [line for line in shown.stdout.splitlines() if line.strip().startswith(f"mmvit {first}")]
    assert len(examples) >= 2 or name == "demo", shown.stdout


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("recipes", "unknown command recipes: mmvit train --list shows them"),
        ("copy --list", "unknown option --list; see mmvit copy --help"),
        ("presets --batch x", "expected a whole number; see mmvit presets --help"),
        ("train emoji_demo --lr 1", "did you mean --optimizer.lr?"),
    ],
)
def test_what_newcomers_type_is_understood(mmvit_command, line, words):
    refused = mmvit_command(*line.split())
    assert refused.returncode == 2
    assert words in refused.stderr


def test_the_version_is_told(mmvit_command):
    assert mmvit_command("--version").stdout == f"mmvit {mmvit.__version__}\n"


def test_a_shipped_recipe_without_its_data_says_how_to_make_them(mmvit_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = mmvit_command("train", "emoji_demo")
    assert refused.returncode == 2
    assert "mmvit prepare emoji data/emoji; mmvit encode data/emoji data/emoji-codes" in refused.stderr


@pytest.mark.parametrize(
    "line",
    [
        "encode here s3://a:b@c/d",
        "train fashion_mnist --dry-run --output s3://a:b@c/d",
        "copy emoji_demo s3://a:b@c/d",
    ],
)
def test_results_are_not_written_to_a_folder_named_as_an_address(line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(line.split())
    assert "expected a path on this machine, got s3://***@c/d; copy" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
