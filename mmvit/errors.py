"""The user's mistakes: one exception for them, and how a script reports it (a message and exit code 2, no
traceback)."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something that the user can mend: the message says what was found, where, and what to do."""


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`. A `UserError` becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.stderr.flush()
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output, `head` for one, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
