"""Open a page in the browser that draws, edits and describes images.

    mmvit serve
    mmvit serve runs/emoji-demo --classifier runs/emoji-groups --port 7861

Works with a generator, a joint model or a classifier. The page appears on this computer only, at the address
that is printed; --host 0.0.0.0 opens it to everyone on the network, --share to everyone with a link (through
Gradio's servers). Press Ctrl-C to stop. Needs `pip install "mmvit[demo]"`.
"""

import socket
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

    page = build_page(Studio.from_pretrained(model, classifier))
    try:
        _, address, _ = launch(page, host, port or free_port(host), share, prevent_thread_lock=True)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}): choose another --port") from None
    with suppress(KeyboardInterrupt):
        print(f"open {page.share_url or address} in your browser; Ctrl-C stops", flush=True)
        Event().wait()
    page.close(verbose=False)


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    run_script(main)
