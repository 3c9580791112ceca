"""Reading files elsewhere: what there is, how long it is, and its bytes, tried again when a network fails.

`http://` and `https://` go through requests, all other addresses through fsspec's file systems. Both are
imported when they are needed: a command that reads local files should not wait for them.
"""

import os
import random
import re
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urljoin, urlsplit

from mmvit.errors import MissingData, UserError
from mmvit.streams.address import Address

if TYPE_CHECKING:
    import requests

TRIES = 8
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds between tries: twice as long each time
NO_ANSWER = 30  # seconds without a byte, after which a server counts as gone
SLOWEST = 50_000  # bytes a second; what is slower counts as hanging
CHUNK = 2**20
MOST_AT_ONCE = 2**28  # bytes of a file that is read into memory
CHANGED = "the file has changed since it was opened"
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # protocol → extra of mmvit that reads it
VERSIONS = ("ETag", "etag", "VersionId", "md5Hash", "blob_id", "content_hash", "LastModified", "mtime")
Result = TypeVar("Result")


class Failed(Exception):
    """A try that may succeed when repeated."""


class Missing(MissingData):
    """There is no such file, or it may not be read: many servers answer the same to both."""


class NotFound(Missing):
    """There is no such file."""


class NoCredentials(UserError):
    """Nothing was asked, for want of credentials: there may be such a file."""


@dataclass(frozen=True)
class Facts:
    """A file's length, what changes when its content does, and whether parts of it can be asked for."""

    size: int
    version: str
    has_ranges: bool


def tried(address: Address, attempt: Callable[[], Result]) -> Result:
    """`attempt()`, repeated when it raises `Failed` or loses its connection.

    Raises:
        Missing: if there is no such file, or it may not be read.
        UserError: if there are no credentials, or all tries fail.
    """
    pause, start = FIRST_PAUSE, time.monotonic()
    for number in range(1, TRIES + 1):
        try:
            return attempt()
        except UserError:
            raise
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"{address}: not found") from None
        except PermissionError:
            raise Missing(f"{address}: access denied; {how_to_sign_in(address)}") from None
        except Exception as error:  # of any library below; its text may hold the address with its secrets
            if "Credentials" in type(error).__name__:
                raise NoCredentials(f"{address}: no credentials; {how_to_sign_in(address)}") from None
            if number == TRIES or is_hopeless(error) or (number == 3 and has_no_such_host(error)):
                seconds = time.monotonic() - start
                tries = "1 try" if number == 1 else f"{number} tries"
                raise UserError(f"{address}: {described(error)} ({tries} in {seconds:.0f} s)") from None
            if number == 3:
                warnings.warn(f"{address}: {described(error)}, trying again", stacklevel=2)
        time.sleep(pause * random.SystemRandom().uniform(0.5, 1))
        pause = min(2 * pause, LONGEST_PAUSE)
    raise AssertionError


def is_hopeless(error: Exception) -> bool:
    from requests.exceptions import InvalidSchema, InvalidURL, SSLError, TooManyRedirects

    return isinstance(error, InvalidSchema | InvalidURL | SSLError | TooManyRedirects)


def has_no_such_host(error: Exception) -> bool:
    """Whether a name is said not to exist, rather than that no name server answers."""
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    cause = getattr(reason, "__cause__", None)
    return isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME


def described(error: Exception) -> str:
    import requests
    import urllib3

    if isinstance(error, Failed):
        return str(error)
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate cannot be verified"
    if isinstance(error, requests.exceptions.InvalidSchema | requests.TooManyRedirects):
        return "the server redirects in a circle, or to something other than http:// and https://"
    if isinstance(error, requests.Timeout | TimeoutError):
        return f"no answer within {NO_ANSWER} s"
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    if isinstance(reason, urllib3.exceptions.NameResolutionError):
        return f"cannot resolve {reason.conn.host}"
    is_new = isinstance(reason, urllib3.exceptions.NewConnectionError)
    if is_new and isinstance(reason.__cause__, ConnectionRefusedError):
        return f"connection refused by {reason.conn.host}:{reason.conn.port}"
    if isinstance(error, requests.ConnectionError | urllib3.exceptions.HTTPError | ConnectionError):
        return "no connection, or it was cut"
    return f"it cannot be read ({type(error).__name__})"


def how_to_sign_in(address: Address) -> str:
    if address.protocol == "hf":
        return "log in with hf auth login, or set HF_TOKEN"
    if EXTRAS.get(address.protocol) == "s3":
        return "set AWS_PROFILE or AWS_ACCESS_KEY_ID, or for public data FSSPEC_S3='{\"anon\": true}'"
    if EXTRAS.get(address.protocol) == "gcs":
        return 'set GOOGLE_APPLICATION_CREDENTIALS, or for public data FSSPEC_GS=\'{"token": "anon"}\''
    return "check its user, password or token"


@lru_cache(maxsize=2**16)
def facts_of(address: Address) -> Facts:
    """Asked once a process. Raises as `tried`."""
    return tried(address, lambda: ask_http(address) if is_http(address) else ask_fsspec(address))


def read_part(address: Address, facts: Facts, start: int, end: int) -> Iterator[bytes]:
    """The bytes from `start` to `end`, in one try. Raises whatever goes wrong, `Failed` if they are fewer."""
    deadline = time.monotonic() + NO_ANSWER + (end - start) / SLOWEST
    got = 0
    get_part = http_part if is_http(address) else fsspec_part
    for part in get_part(address, facts, start, end):
        got += len(part)
        if got > end - start:
            break
        if time.monotonic() > deadline:
            raise Failed(f"{got:,} of {end - start:,} bytes in {deadline - time.monotonic():.0f} s")
        yield part
    if got != end - start:
        raise Failed(f"expected {end - start:,} bytes from byte {start:,} on, got {got:,}")


def read_file(address: Address) -> bytes | None:
    """A small file; None if there is none, or it may not be read, which servers that do not list their files
    also answer where there is none. Raises as `tried`."""
    try:
        facts = facts_of(address)
        if facts.size > MOST_AT_ONCE:
            raise UserError(f"{address}: expected at most {MOST_AT_ONCE:,} bytes, got {facts.size:,}")
        return tried(address, lambda: b"".join(read_part(address, facts, 0, facts.size)))
    except Missing:
        return None


@lru_cache(maxsize=2**10)
def files_in(folder: Address) -> list[Address]:
    """The files of a folder, sorted; asked once a process. Raises as `tried`, and UserError if a server does
    not list them."""
    names = tried(folder, lambda: list_http(folder) if is_http(folder) else list_fsspec(folder))
    return [folder / name for name in sorted(names)]


# http


def is_http(address: Address) -> bool:
    return address.protocol in ("http", "https") and "::" not in address.text


own = threading.local()


def session() -> "requests.Session":
    """Of this thread: sessions are shared by neither threads nor forked processes."""
    import requests

    if getattr(own, "process", None) != os.getpid():
        own.process, own.session = os.getpid(), requests.Session()
    return own.session


def get(address: Address, headers: dict[str, str]) -> "requests.Response":
    answer = session().get(
        address.with_secrets,
        headers={"Accept-Encoding": "identity", **headers},
        stream=True,
        timeout=NO_ANSWER,
    )
    status = answer.status_code
    if status < 400 or status == 416:
        return answer
    answer.close()
    if status in (404, 410):
        raise FileNotFoundError
    if status in (401, 403):
        raise PermissionError
    if status in (408, 425, 429) or status >= 500:
        raise Failed(f"the server answered {status}")
    raise Missing(f"{address}: the server answered {status}")


def ask_http(address: Address) -> Facts:
    with get(address, {"Range": "bytes=0-0"}) as answer:
        refuse_compressed(address, answer)
        headers = answer.headers
        found = re.fullmatch(r"bytes (?:0-0|\*)/(\d+)", headers.get("Content-Range", ""))
        has_ranges = answer.status_code in (206, 416) and found is not None
        size = found[1] if found else headers.get("Content-Length", "")
        if not size.isdecimal():
            raise UserError(f"{address}: the server does not tell the length of the file")
        return Facts(int(size), version_in(headers), has_ranges)


def refuse_compressed(address: Address, answer: "requests.Response") -> None:
    """Raises UserError for what cannot be read in parts, and of which the length is not the file's."""
    if (encoding := answer.headers.get("Content-Encoding", "identity")) != "identity":
        raise UserError(
            f"{address}: the server compresses it (Content-Encoding: {encoding}), though asked not to; "
            "turn that off for shards"
        )


def version_in(headers: Any) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def http_part(address: Address, facts: Facts, start: int, end: int) -> Iterator[bytes]:
    with get(address, {"Range": f"bytes={start}-{end - 1}"} if facts.has_ranges else {}) as answer:
        if facts.has_ranges != (answer.status_code == 206):
            raise Failed(f"asked for bytes {start:,} to {end:,}, the server answered {answer.status_code}")
        if facts.version and version_in(answer.headers) not in ("", facts.version):
            raise Failed(CHANGED)
        refuse_compressed(address, answer)
        sent, span = answer.headers.get("Content-Range", "no range"), f"bytes {start}-{end - 1}/"
        if facts.has_ranges and sent not in (f"{span}{facts.size}", f"{span}*"):
            raise Failed(f"asked for {span}{facts.size}, the server sent {sent}")
        yield from answer.raw.stream(CHUNK, decode_content=False)


class Links(HTMLParser):
    """The links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attributes if tag == "a" and name == "href" and value]


def list_http(folder: Address) -> set[str]:
    """The files that a server's page about a folder links to."""
    folder = folder / ""
    with get(folder, {}) as answer:
        if "html" not in answer.headers.get("Content-Type", ""):
            raise UserError(
                f"{folder}: the server does not list a folder; name its shards by a range {{0..9}}"
            )
        page = Links()
        page.feed(answer.text)
        base = answer.url
    places = [urlsplit(urljoin(base, link)) for link in page.found]
    own = urlsplit(base)
    inside = [place.path[len(own.path) :] for place in places if place.path.startswith(own.path)]
    return {unquote(name) for name in inside if name and "/" not in name}


# fsspec


def open_fsspec(address: Address) -> tuple[Any, str]:
    """fsspec's file system, which it keeps by process and thread, and the path in it.

    Raises:
        UserError: for an unknown protocol, or one that needs another package.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(address.with_secrets)
    except ImportError as error:
        extra = EXTRAS.get(address.protocol)
        how = f"pip install 'mmvit[{extra}]'" if extra else str(error)
        raise UserError(f"{address}: {address.protocol}:// needs another package: {how}") from None
    except ValueError:
        raise UserError(
            f"{address}: unknown protocol {address.protocol}://; expected https://, http://, s3://, gs://, "
            "hf:// or another of fsspec's"
        ) from None


def ask_fsspec(address: Address) -> Facts:
    system, path = open_fsspec(address)
    info = system.info(path)
    if info["type"] == "directory":
        raise Missing(f"{address} is a folder")
    version = next((str(info[name]) for name in VERSIONS if info.get(name)), "")
    return Facts(int(info["size"]), version, has_ranges=True)


def fsspec_part(address: Address, facts: Facts, start: int, end: int) -> Iterator[bytes]:
    system, path = open_fsspec(address)
    no_more = {"cache_type": "none"} if address.protocol == "hf" else {}  # it would read on to the next 5 MiB
    data = system.cat_file(path, start=start, end=end, **no_more)
    if address.protocol in EXTRAS:  # stores whose files may be replaced, and that are not asked for a version
        system.invalidate_cache(system._parent(path))
        if ask_fsspec(address).version != facts.version:
            raise Failed(CHANGED)
    yield data


def list_fsspec(folder: Address) -> set[str]:
    system, path = open_fsspec(folder)
    infos = system.ls(path, detail=True)
    return {info["name"].rpartition("/")[2] for info in infos if info["type"] == "file"}
