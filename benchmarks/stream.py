"""How fast the data stream is: beside webdataset's own pipeline, and from a server beside from the disk.

    python benchmarks/stream.py
    python benchmarks/stream.py --samples 2000 --rounds 1      # two minutes on two busy cores

Pixels are JPEGs of 128 pixels a side that are decoded to float32, codes samples of a caption and 256 codes.
Each figure is the median over rounds of an epoch from shards of 1,000 samples, in which the ways take turns;
starting the workers is not counted. webdataset reads the same shards with the same decoder, batches and
shuffle buffer. The server gives 100 MB/s in all over loopback, and the cache is emptied before each epoch.
Memory is that of all processes, at a tenth of an epoch and at its end.
"""

import contextlib
import io
import multiprocessing
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from typer import Option

from mmvit.cli import run_script
from mmvit.data.captions import TextTokenizer
from mmvit.data.codes import pack_codes
from mmvit.data.samples import CaptionCodesSample, PixelsSample
from mmvit.data.writing import ShardWriter
from mmvit.streams.reader import Decode, collate
from mmvit.streams.shards import Sample
from mmvit.streams.stream import ShardStream

RATE = 100e6  # bytes a second of the server
BATCH, BUFFER = 64, 1000


def main(
    samples: Annotated[int, Option(help="samples of each kind")] = 20_000,
    rounds: Annotated[int, Option(help="epochs of each way")] = 5,
    workers: Annotated[str, Option(help="numbers of data workers")] = "1,2",
) -> None:
    torch.set_num_threads(1)
    rates, table = Table(title="samples a second"), Table(title="memory of an epoch, MB")
    for column in ("", "workers", "webdataset", "mmvit", "ratio", "from a server", "ratio"):
        rates.add_column(column, justify="right")
    for column in ("", "workers", "at a tenth", "at the end"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MMVIT_CACHE": f"{folder}/pieces", "XDG_CACHE_HOME": f"{folder}/cache"}
        for name, decode in make_shards(Path(folder), samples).items():
            with served(Path(folder) / name) as address:
                for number in map(int, workers.split(",")):
                    ways = {
                        "webdataset": lambda n=number, d=decode, p=f"{folder}/{name}": theirs(p, d, n),
                        "mmvit": lambda n=number, d=decode, p=f"{folder}/{name}": ours(p, d, n),
                        "server": lambda n=number, d=decode, p=address: ours(p, d, n),
                    }
                    found: dict[str, list[float]] = {way: [] for way in ways}
                    memory = []
                    for _ in range(rounds):
                        for way, batches in ways.items():
                            for cache in ("pieces", "cache"):
                                shutil.rmtree(f"{folder}/{cache}", ignore_errors=True)
                            rate, used = measure(batches(), samples)
                            found[way].append(rate)
                            memory += [used] if way == "mmvit" else []
                    ratios = [
                        statistics.median(a / b for a, b in zip(found[one], found[other], strict=True))
                        for one, other in (("mmvit", "webdataset"), ("server", "mmvit"))
                    ]
                    median = [f"{statistics.median(found[way]):,.0f}" for way in ways]
                    rates.add_row(
                        name, str(number), *median[:2], f"{ratios[0]:.2f}", median[2], f"{ratios[1]:.2f}"
                    )
                    early, late = (statistics.median(each) for each in zip(*memory, strict=True))
                    table.add_row(name, str(number), f"{early:,.0f}", f"{late:,.0f}")
    Console().print(rates, table)


def make_shards(folder: Path, number: int) -> dict[str, Decode]:
    """Shards of pixels and of codes, in folders of these names, and how they are decoded."""
    rng = np.random.default_rng(0)
    image = Image.effect_noise((128, 128), 64).convert("RGB")
    for name in ("pixels", "codes"):
        with ShardWriter(folder / name, "train", samples_per_shard=1000) as writer:
            for key in range(number):
                if name == "pixels":
                    file = io.BytesIO()
                    image.rotate(key).save(file, "JPEG", quality=90)
                    files = {"jpg": file.getvalue()}
                else:
                    files = {"codes.npy": pack_codes(rng.integers(0, 1024, (16, 16)))}
                writer.write(f"{key:08d}", {**files, "txt": b"a noisy square on a black ground"})
    tokenizer = TextTokenizer.from_file("tokenizers/emoji-words")
    return {"pixels": PixelsSample((128, 128)), "codes": CaptionCodesSample(tokenizer, 32, (16, 16), 1024)}


def ours(place: str, decode: Decode, workers: int) -> Iterator[dict[str, Any]]:
    names = "train-*.tar"
    if "://" in place:
        names = f"train-{{000000..{int(place.rpartition('#')[2]) - 1:06d}}}.tar"
        place = place.rpartition("#")[0]
    stream = ShardStream(
        f"{place}/{names}", decode, BATCH, shuffle_buffer=BUFFER, num_workers=workers, repeat=False
    )
    return iter(stream)


def theirs(place: str, decode: Decode, workers: int) -> Iterator[dict[str, Any]]:
    def decoded(sample: dict[str, Any]) -> dict[str, Any]:
        files = {name: data for name, data in sample.items() if not name.startswith("__")}
        found = decode(Sample(sample["__key__"], Path(), files), random.Random(0))
        found.pop("counts", None)
        return {**found, "keys": sample["__key__"]}

    shards = [*map(str, sorted(Path(place).glob("*.tar")))]
    dataset = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(BUFFER).map(decoded)
    batches = dataset.batched(BATCH, collation_fn=collate)
    return iter(DataLoader(batches, batch_size=None, num_workers=workers))


def measure(batches: Iterator[dict[str, Any]], samples: int) -> tuple[float, tuple[float, float]]:
    """Samples a second after the first batch, and the memory in MB at a tenth of them and at the end."""
    next(batches)
    start, seen, early = time.perf_counter(), 0, 0.0
    for batch in batches:
        seen += len(batch["keys"])
        if not early and seen >= samples / 10:
            early = memory()
        late = time.perf_counter()
        if seen + 2 * BATCH >= samples:
            break
    rate, end = seen / (late - start), memory()
    for _ in batches:
        pass
    return rate, (early, end)


def memory() -> float:
    """Of this process and its workers, shared parts once for each, in MB."""
    own = psutil.Process()
    total = 0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total / 1e6


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serves a folder from another process; the address ends in `#` and the number of shards."""
    port = multiprocessing.Queue()
    process = multiprocessing.Process(target=serve, args=(folder, port), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{port.get()}#{len([*folder.glob('*.tar')])}"
    finally:
        process.terminate()


def serve(folder: Path, port: Any) -> None:
    lock, free = threading.Lock(), [0.0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            with path.open("rb") as file:
                file.seek(int(first))
                data = file.read(int(last) + 1 - int(first))
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            end = int(first) + len(data) - 1
            self.send_header("Content-Range", f"bytes {first}-{end}/{path.stat().st_size}")
            self.end_headers()
            for start in range(0, len(data), 2**18):
                part = data[start : start + 2**18]
                with lock:
                    now = time.monotonic()
                    free[0] = max(now, free[0]) + len(part) / RATE
                    pause = free[0] - now
                time.sleep(pause)
                self.wfile.write(part)

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """A reader that ends before its pieces have come is no error."""

    server = Server(("127.0.0.1", 0), Handler)
    port.put(server.server_address[1])
    server.serve_forever()


if __name__ == "__main__":
    run_script(main)
