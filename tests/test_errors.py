"""Messages about the user's mistakes."""

from mmvit.errors import did_you_mean, nearest


def test_did_you_mean_names_the_nearest_choice_or_all_of_them():
    choices = ["steps", "batch_size"]
    assert did_you_mean("stepz", choices) == ": did you mean steps?"
    assert did_you_mean("colour", choices) == ": choose from steps, batch_size"
    assert did_you_mean("colour", iter(choices)) == ": choose from steps, batch_size"


def test_nearest_is_none_where_nothing_is_close():
    assert nearest("generator", ["generators", "configs"]) == "generators"
    assert nearest("colour", ["steps", "batch_size"]) is None
