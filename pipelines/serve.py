"""Open a page in the browser that draws, edits and describes images.

    mmvit serve
    mmvit serve runs/emoji-demo --classifier runs/emoji-groups --port 7861

Works with a generator, a joint model or a classifier. The page appears on this computer only, at the address
that is printed; --host 0.0.0.0 opens it to everyone on the network, --share to everyone with a link (through
Gradio's servers). Press Ctrl-C to stop. Needs `pip install "mmvit[demo]"`.
"""

import errno
import os
import socket
import tempfile
from contextlib import suppress
from threading import Event
from typing import Annotated

from typer import Argument, Option

from mmvit.cli import run_script
from mmvit.errors import UserError
from mmvit.hub import SHIPPED


def main(
    model: Annotated[
        str, Argument(help="a generator, a joint model or a classifier", show_default="the shipped one")
    ] = str(SHIPPED),
    classifier: Annotated[
        str | None, Option(help="a classifier for uploaded images: its folder, a run or a Hub repository")
    ] = None,
    host: Annotated[str, Option(help="the address to listen on")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="the port, 0 for any free one")] = 7860,
    share: Annotated[bool, Option("--share", help="make a public link through Gradio's servers")] = False,
) -> None:
    try:
        from mmvit.serving.page import build_page, launch
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError('the page needs Gradio: pip install "mmvit[demo]"') from None
    from mmvit.serving.studio import Studio

    port = free_port(host, port)
    with tempfile.TemporaryDirectory(prefix="mmvit-serve-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and drawn images
        page = build_page(Studio.from_pretrained(model, classifier))
        _, address, _ = launch(page, host, port, share, prevent_thread_lock=True)
        with suppress(KeyboardInterrupt):
            print(f"open {page.share_url or address} in your browser; Ctrl-C stops", flush=True)
            Event().wait()
        page.close(verbose=False)
    os._exit(0)  # threads may still draw, and would not survive a slower end


def free_port(host: str, port: int = 0) -> int:
    """`port`, or any free one for 0. Raises UserError where nothing can listen."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as error:
        other = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise UserError(
            f"cannot listen on {host}, port {port} ({error.strerror}): choose another {other}"
        ) from None


if __name__ == "__main__":
    run_script(main)
