"""Messages about the user's mistakes."""

import sys
from unittest import mock

import pytest

from mmvit.errors import did_you_mean, nearest, without_secrets
from mmvit.lock import this_process


def test_did_you_mean_names_the_nearest_choice_or_all_of_them():
    choices = ["steps", "batch_size"]
    assert did_you_mean("stepz", choices) == ": did you mean steps?"
    assert did_you_mean("colour", choices) == ": choose from steps, batch_size"
    assert did_you_mean("colour", iter(choices)) == ": choose from steps, batch_size"


def test_nearest_is_none_where_nothing_is_close():
    assert nearest("generator", ["generators", "configs"]) == "generators"
    assert nearest("colour", ["steps", "batch_size"]) is None


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://ann:p@ss@host/a.tar", "https://***@host/a.tar"),
        ("HTTPS://ann:pass@host/a.tar?token=abc", "HTTPS://***@host/a.tar?token=***"),
        ("s3:/key:pass@bucket/run", "s3:/***@bucket/run"),  # as a path has it
        ("https://host/a.tar?abc", "https://host/a.tar?***"),
        ("https://host/a.tar?password=ab#cd123", "https://host/a.tar?password=***#***"),  # a # in a secret
        ("https://host/guide#install", "https://host/guide#install"),
        ("https://host/a.tar?$TOKEN&raw&x=$X&y=abc", "https://host/a.tar?$TOKEN&raw&x=$X&y=***"),
        ("zip://a.tar::https://ann:pass@host/b.zip?x=abc", "zip://a.tar::https://***@host/b.zip?x=***"),
        ("https://$NAME:$PASS@host/a.tar", "https://$NAME:$PASS@host/a.tar"),
        ("hf://datasets/ann/set@main/a.tar?", "hf://datasets/ann/set@main/a.tar?"),
        ("did you mean https://host? C:/a@b", "did you mean https://host? C:/a@b"),
    ],
)
def test_secrets_in_addresses_are_masked(address, shown):
    assert without_secrets(address) == shown
    assert without_secrets(shown) == shown


def test_a_lock_names_the_command_without_its_secrets():
    command = ["mmvit", "train", "x", "--data.train", "https://host/a.tar?token=abc"]
    with mock.patch.object(sys, "argv", command):
        assert this_process()["command"] == "mmvit train x --data.train 'https://host/a.tar?token=***'"
