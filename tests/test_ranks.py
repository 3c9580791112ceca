"""Processes forked for tests have the environment of the test."""

from ranks import start_two


def test_two_processes_have_the_environment_of_the_test(tmp_path, monkeypatch):
    script = tmp_path / "say.py"
    script.write_text("import os; print(os.environ['RANK'], os.environ.get('OF_THE_TEST'))")
    for value in ("first", "second"):  # they are forked from a process that has the first, or an older one
        monkeypatch.setenv("OF_THE_TEST", value)
        ended = start_two(script)
        assert sorted(ended.stdout.splitlines()) == [f"0 {value}", f"1 {value}"], ended.stderr
