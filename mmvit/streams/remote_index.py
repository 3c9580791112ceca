"""Indexes of many shards, local and remote: how many samples each has, and, when needed, where they lie.

Of a remote shard the count comes from the first of these that exists: a list of shards that names it or lies
beside it, as `mmvit index` and webdataset's wids write; the index beside it; img2dataset's statistics.
Otherwise the shard is fetched.
"""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from mmvit.errors import UserError
from mmvit.progress import with_progress
from mmvit.streams.address import Address
from mmvit.streams.index import (
    FORMAT,
    Index,
    beside,
    headers_checksum,
    index_of,
    load_index,
    save_index,
    scan,
    write_index,
)
from mmvit.streams.packed import cache, length_of
from mmvit.streams.pieces import RemoteFile
from mmvit.streams.remote import read_file
from mmvit.streams.shard_lists import LIST, list_beside, number_in, read_json

AT_ONCE = 16
KEPT = "remote-index"  # in the cache
SLOW_TO_INDEX = 2**30  # bytes of shards without an index


class CountedShard:
    """The `Index` of a remote shard of which the count is known; the rest is fetched when needed."""

    def __init__(self, shard: Address, samples: int):
        self.shard, self.samples, self.problem = shard, samples, ""
        self.index: Index | None = None

    @property
    def ranges(self) -> np.ndarray:
        if self.index is None:
            index = remote_index(self.shard)
            if index.samples != self.samples:
                raise UserError(
                    f"{self.shard} has {index.samples:,} samples, but {LIST} (or the statistics) beside it "
                    f"says {self.samples:,}: run mmvit index again"
                )
            self.index = index
        return self.index.ranges


def indexes_of(shards: list[Path | Address]) -> list[Index | CountedShard]:
    """The index of every shard. Raises UserError if one cannot be read."""
    local = [shard for shard in shards if isinstance(shard, Path)]
    remote = [shard for shard in shards if isinstance(shard, Address)]
    is_slow = sum(map(length_of, local)) > SLOW_TO_INDEX
    each: Iterable[Path] = with_progress(local, len(local), "indexing shards") if is_slow else local
    found: dict[Path | Address, Index | CountedShard] = {shard: index_of(shard) for shard in each}
    listed = {
        name: count for folder in {s.parent for s in remote} for name, count in list_beside(folder).items()
    }
    todo: list[Address] = []
    for shard in dict.fromkeys(remote):
        samples = listed.get(str(shard)) if shard.samples is None else shard.samples
        if samples is None or shard.suffix != ".tar":  # a compressed one is unpacked in any case
            todo.append(shard)
        else:
            found[shard] = CountedShard(shard, samples)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            indexes = pool.map(counted, todo)
            if todo:
                indexes = with_progress(indexes, len(todo), "indexing remote shards")
            found |= zip(todo, indexes, strict=True)
        finally:
            pool.shutdown(cancel_futures=True)
    return [found[shard] for shard in shards]


def counted(shard: Address) -> Index | CountedShard:
    if shard.suffix != ".tar":
        return index_of(shard)
    index = kept(shard) or of_file_beside(shard)
    if index is None and (samples := of_img2dataset(shard)) is not None:
        return CountedShard(shard, samples)
    return index or remote_index(shard)


def remote_index(shard: Address) -> Index:
    """Where the samples of a remote shard lie: from the cache, from the file beside it, or from its headers,
    for which all of it is read."""
    if (index := kept(shard) or of_file_beside(shard)) is None:
        index = scan(shard)
        keep(index)
    return index


def write_any_index(shard: Path | Address, out: Path | None) -> tuple[int, int, str]:
    """As `write_index`, in the folder `out` where it is given, else that of a remote shard in the cache;
    returns the number of samples, the bytes of the shard, and what could not be read."""
    path = out and out / beside(shard).name
    if isinstance(shard, Path):
        samples, problem = write_index(shard, path)
        return samples, length_of(shard), problem
    index = remote_index(shard)
    if path:
        try:
            save_index(index, path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
    return index.samples, length_of(shard), index.problem


def kept(shard: Address) -> Index | None:
    if index := load_index(cache(KEPT, shard), shard):
        index.checksum = None  # its place says the state of the shard
    return index


def keep(index: Index) -> None:
    with suppress(OSError):  # a cache is no duty
        save_index(index, cache(KEPT, index.shard))


def of_file_beside(shard: Address) -> Index | None:
    """The index that lies beside a shard; None if there is none that fits."""
    try:
        head, _, body = (read_file(beside(shard)) or b"").partition(b"\n")
        head, ranges = json.loads(head), np.frombuffer(body, "<i8").reshape(-1, 2)
        expected = (FORMAT, RemoteFile(shard).length, len(ranges), headers_checksum(shard, ranges))
        if (head["format"], head["size"], head["samples"], head["headers"]) != expected:
            return None
        index = Index.of(shard, ranges, str(head["problem"]))
        index.checksum = head["headers"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    keep(index)
    return index


def of_img2dataset(shard: Address) -> int | None:
    """`00000.tar` → the successes in `00000_stats.json`."""
    return number_in(read_json(shard.with_name(f"{shard.stem}_stats.json")), "successes")
