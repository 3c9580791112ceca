"""How long a resumed run waits for its first batch, far into a large epoch.

    python benchmarks/stream_resume.py

Samples are a caption and 256 codes, 2.5 kB each in a shard, in few large shards and in many small ones. At
each position, the time from opening the stream, as a run does when it starts, to its first batch: the median
over rounds. Python's imports are not counted; the shards have their indexes and are in the system's memory.
"""

import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
from rich.console import Console
from rich.table import Table
from typer import Option

from mmvit.cli import run_script
from mmvit.data.captions import TextTokenizer
from mmvit.data.codes import pack_codes
from mmvit.data.samples import CaptionCodesSample
from mmvit.data.writing import ShardWriter
from mmvit.streams.stream import ShardStream

BATCH = 64
SAMPLE = 2560  # bytes in a shard: two files with their headers


def main(
    gigabytes: Annotated[float, Option(help="size of an epoch")] = 2.0,
    shards: Annotated[str, Option(help="numbers of shards")] = "800,10000",
    workers: Annotated[str, Option(help="numbers of data workers")] = "0,2",
    rounds: Annotated[int, Option(help="starts at each position")] = 5,
) -> None:
    table = Table(title="seconds to the first batch")
    columns = ("samples", "GB", "shards", "workers", "at the start", "at 50%", "at 90%", "next epoch")
    for column in columns:
        table.add_column(column, justify="right")
    tokenizer = TextTokenizer.from_file("tokenizers/emoji-words")
    decode = CaptionCodesSample(tokenizer, 32, (16, 16), 1024)
    for number in map(int, shards.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            samples = write_shards(Path(folder), round(gigabytes * 1e9 / SAMPLE / number), number)
            size = sum(path.stat().st_size for path in Path(folder).glob("*.tar")) / 1e9
            for count in map(int, workers.split(",")):
                times = [
                    statistics.median(first_batch(folder, decode, count, at) for _ in range(rounds))
                    for at in (0, samples // 2, samples * 9 // 10, samples * 19 // 10)
                ]
                row = (f"{samples:,}", f"{size:.2f}", f"{number:,}", str(count))
                table.add_row(*row, *(f"{seconds:.2f}" for seconds in times))
    Console().print(table)


def write_shards(folder: Path, per_shard: int, number: int) -> int:
    """Writes `number` shards of `per_shard` samples each; returns how many samples there are."""
    rng = np.random.default_rng(0)
    several = [pack_codes(rng.integers(0, 1024, (16, 16))) for _ in range(100)]
    with ShardWriter(folder, "train", samples_per_shard=per_shard) as writer:
        for key, codes in zip(range(per_shard * number), itertools.cycle(several), strict=False):
            writer.write(f"{key:08d}", {"codes.npy": codes, "txt": b"a noisy square on a black ground"})
    return per_shard * number


def first_batch(folder: str, decode: CaptionCodesSample, workers: int, consumed: int) -> float:
    """Seconds from opening the stream at the position to its first batch."""
    state = ShardStream(f"{folder}/train-*.tar", decode, BATCH).state_dict() | {"consumed": consumed}
    start = time.perf_counter()
    stream = ShardStream(f"{folder}/train-*.tar", decode, BATCH, num_workers=workers)
    stream.load_state_dict(state)
    batches = iter(stream)
    assert len(next(batches)["keys"]) == BATCH
    seconds = time.perf_counter() - start
    batches.close()
    return seconds


if __name__ == "__main__":
    run_script(main)
