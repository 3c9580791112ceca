"""What the tests of the generator's scripts share: settings of a run of seconds, and a check of refusals."""

SMALL_MODEL = "--model.text_length 8 --model.core.width 32 --model.core.depth 1"
SHORT_RUN = "--train.steps 4 --train.batch_size 8 --train.num_workers 0 --train.evaluate_every 2"
SMALL = [*SMALL_MODEL.split(), "--model.core.num_heads=2", *SHORT_RUN.split(), "--train.checkpoint_every=2"]


def refused(ran, *words: str) -> None:
    """The script ended with code 2 and a message of these words, without a traceback."""
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
    for word in words:
        assert word in ran.stderr
