"""An HTTP server of the files in a folder, with ranges, that misbehaves as a test says."""

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

from mmvit.streams import remote


class FileServer(ThreadingHTTPServer):
    """`url` is the folder's. `misbehave(handler, range)` may answer a request itself, and returns whether it
    did."""

    daemon_threads = True

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests: Counter[str] = Counter()  # by path
        self.sent: Counter[str] = Counter()  # bytes
        self.misbehave: Callable[..., bool] = lambda handler, span: False
        self.has_ranges = True
        self.version = '"1"'
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_) -> None:
        pass  # a client that has left


class Handler(SimpleHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments):
        super().__init__(*arguments, directory=str(arguments[2].folder))

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.partition("?")[0]
        self.server.requests[name] += 1
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            super().do_GET()  # a folder, or 404
            return
        data, size = path.read_bytes(), path.stat().st_size
        span = self.headers["Range"] if self.server.has_ranges else None
        start, end = 0, size
        if span:
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, end = int(first), min(size, int(last) + 1)
        if self.server.misbehave(self, (start, end) if span else None):
            return
        if span and start >= size:
            self.answer(416, b"", {"Content-Range": f"bytes */{size}"})
        else:
            self.server.sent[name] += end - start
            more = {"Content-Range": f"bytes {start}-{end - 1}/{size}"} if span else {}
            self.answer(206 if span else 200, data[start:end], more)

    def answer(self, status: int, data: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        more = {"ETag": self.server.version} if self.server.version else {}
        for name, value in {**headers, **more}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[FileServer]:
    with FileServer(folder) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


@contextlib.contextmanager
def own_cache(folder: Path) -> Iterator[Path]:
    """Caches within `folder` for what is fetched, and no pause before a request is made again; yields where
    the pieces go."""
    caches = {"MMVIT_CACHE": str(folder / "pieces"), "XDG_CACHE_HOME": str(folder / "cache")}
    with mock.patch.dict(os.environ, caches), mock.patch.object(remote, "FIRST_PAUSE", 0):
        yield folder / "pieces"
