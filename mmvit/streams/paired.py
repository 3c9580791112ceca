"""Batches of several streams merged into one, for a model that learns from all of them at once."""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from functools import reduce
from itertools import zip_longest
from typing import Any

from mmvit.streams.stream import ShardStream
from mmvit.streams.tally import Tally


class PairedStream:
    """Merges one batch of each of `streams`: the entries of all, and their keys in turn. Ends with the
    shortest stream; its position is the position of all.

    Raises:
        ValueError: if two streams have an entry of the same name.
    """

    def __init__(self, streams: Sequence[ShardStream]):
        self.streams = list(streams)

    def __iter__(self) -> Generator[dict[str, Any], None, None]:
        with ExitStack() as stack:
            open_streams = [stack.enter_context(closing(iter(stream))) for stream in self.streams]
            for batches in zip(*open_streams, strict=False):
                yield join(batches)

    @property
    def tally(self) -> Tally:
        return reduce(Tally.plus, (stream.tally for stream in self.streams))

    def state_dict(self) -> dict[str, Any]:
        return {"streams": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for stream, own in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(own)


def join(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The entries of all batches, and their `keys` in turn."""
    in_turn = zip_longest(*(batch["keys"] for batch in batches))
    joined: dict[str, Any] = {"keys": [key for keys in in_turn for key in keys if key is not None]}
    for batch in batches:
        own = {name: value for name, value in batch.items() if name != "keys"}
        if twice := own.keys() & joined.keys():
            raise ValueError(f"two streams have the entry {', '.join(sorted(twice))}")
        joined |= own
    return joined
