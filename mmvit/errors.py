"""The user's mistakes: one exception for them, and how a script reports it (a message and exit code 2, no
traceback)."""

import difflib
import errno
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# a file that is not there, may not be opened, has another kind in its way or too long a name, a full disk
OF_FILES = {getattr(errno, name) for name in (
    "ENOENT", "EACCES", "EPERM", "EEXIST", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "EROFS", "ENOSPC", "EDQUOT",
)}  # fmt: skip


MASK = "***"  # in place of a secret
HARMLESS = {"versionid", "generation", "revision", "download", "raw"}  # parts of a query that are no secret


class UserError(Exception):
    """Something that the user can mend: the message says what was found, where, and what to do; addresses in
    it are without their secrets."""

    def __init__(self, message: str = ""):
        super().__init__(without_secrets(message))


class MissingData(UserError):
    """A place where data should be, and are not."""


def without_secrets(text: str) -> str:
    """`text` with the addresses in it as all may read them: without user and password, and without the values
    of a query or fragment, which may be a signature or a token. Names of environment variables (`$TOKEN`)
    stay, and so does an anchor of a page (`#install`), but not behind a query, where it may be the rest of a
    secret."""

    def masked(found: re.Match[str]) -> str:
        return found[1] + re.sub(r"([?&#])((?:[^=&#]*=)?)([^&#]*)", masked_pair, found[2])

    def masked_pair(pair: re.Match[str]) -> str:
        start, name, value = pair.groups()
        is_anchor = start == "#" and not name and pair.string[0] == "#"
        is_shown = is_anchor or (name[:-1] or value).lower() in HARMLESS or value[:1] in ("$", "")
        return pair[0] if is_shown else f"{start}{name}{MASK}"

    # with one slash where it was taken for a path
    text = re.sub(r"(?i)(?<=[a-z\d]{2}:)(//?)(?!\$\w+(?::\$\w+)?@)[^/\s]+@", rf"\1{MASK}@", text)
    return re.sub(
        r"(?i)([a-z][a-z\d+.-]+:/[^\s?#]*)([?#][^\s\"'<>]*?)(?=[:;,.)]*(?:[\s\"'<>]|$))", masked, text
    )


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most similar to a mistyped `name`; None if none is close."""
    return next(iter(difflib.get_close_matches(name, choices, n=1, cutoff=0.5)), None)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The end of an error message about an unknown `name`: ": did you mean X?", or ": choose from A, B, C" if
    nothing is close."""
    choices = [*choices]
    match = nearest(name, choices)
    return f": did you mean {match}?" if match else f": choose from {', '.join(choices)}"


def shorten(names: list[str], most: int = 5, separator: str = ", ") -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def refuse_source(out: Path, *sources: Path) -> None:
    """Raises UserError when a script would write over what it reads."""
    local = [source for source in sources if isinstance(source, Path)]  # others have an address
    if os.path.realpath(out) in map(os.path.realpath, local):  # which takes links in a circle, too
        raise UserError(f"{out} is the source itself; name another place to write to")


@contextmanager
def refuse_damage(source: object) -> Iterator[None]:
    """Raises UserError that names `source` for whatever goes wrong while something that others made is read:
    no list of what its decoders raise is complete. A file that cannot be opened, and a device without
    memory, stay what they are."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # of a library in Rust; not an Exception
        if not (isinstance(error, Exception) or is_panic) or is_out_of_memory(error):
            raise
        if isinstance(error, OSError) and error.errno in OF_FILES:
            raise
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
        raise UserError(f"{source} is damaged, or not what it should be ({reason})") from error


@contextmanager
def reported_errors() -> Iterator[None]:
    """Ends the program on a user's mistake with one `error:` line and exit code 2 instead of a traceback.

    So ends a `UserError`, a lack of memory, and a file that cannot be read or written. A warning becomes one
    line, and Ctrl-C exit code 130.
    """
    warnings.showwarning = show_warning
    try:
        yield
    except UserError as error:
        refuse(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, `head` for one, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        refuse(f"out of memory ({str(error).splitlines()[0]}); use a smaller model or batch (mmvit plan)")
    except OSError as error:
        if error.errno not in OF_FILES:
            raise
        where = f"{error.filename}: " if error.filename else ""
        refuse(f"{where}{os.strerror(error.errno)}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device ran out of memory: on a GPU the exception's class says so, on a CPU its message."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def run_script(main: Callable[[], None]) -> None:
    with reported_errors():
        main()


def refuse(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.stderr.flush()
    sys.exit(2)


def show_warning(message: Warning | str, category: type[Warning], *place: object, **more: object) -> None:
    """A warning in one line; where in the code it was given is added only where that is for a programmer."""
    name = "" if category is UserWarning else f" ({category.__name__} at {place[0]}:{place[1]})"
    print(f"warning: {without_secrets(str(message))}{name}", file=sys.stderr, flush=True)
