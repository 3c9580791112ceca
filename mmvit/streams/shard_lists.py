"""Lists of shards with the number of their samples, in the form of webdataset's wids."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmvit.errors import UserError
from mmvit.files import write_json
from mmvit.streams.address import Address, place
from mmvit.streams.remote import read_file

LIST = "shards.json"  # beside shards: {"shardlist": [{"url": NAME, "nsamples": 500}, ...]}
LISTED = ("http", "https", "s3", "s3a", "gs", "gcs", "hf")  # protocols that lists made by strangers may name


def write_list(folder: Path, counts: Mapping[str, tuple[int, int]]) -> None:
    """Writes a folder's `LIST`, from the samples and bytes of shards by name. Others that it has stay."""
    try:
        listed = json.loads((folder / LIST).read_bytes())["shardlist"]
        others = [
            entry for entry in listed if entry["url"] not in counts and (folder / entry["url"]).is_file()
        ]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        others = []
    own = [{"url": name, "nsamples": count, "filesize": size} for name, (count, size) in counts.items()]
    shards = sorted([*others, *own], key=lambda entry: entry["url"])
    write_json({"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}, folder / LIST)


def list_beside(folder: Address) -> dict[str, int]:
    """The samples of the shards of a folder, by address, as its `LIST` has them; {} without one."""
    return {str(shard): shard.samples for shard in shards_listed(folder / LIST) if shard.samples is not None}


def shards_listed(file: Address) -> list[Address]:
    """The shards of a list such as wids has, with their samples; [] if it is none.

    Raises:
        UserError: if it names environment variables, which a server would be sent, or files that only fsspec
            knows how to get at.
    """
    content = read_json(file)
    entries = content.get("shardlist") if isinstance(content, dict) else None
    shards = []
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and isinstance(url := entry.get("url"), str) and url:
            shard = place(url)
            shard = shard if isinstance(shard, Address) else file.with_name(url)
            if "$" in url or "::" in url or shard.protocol not in (*LISTED, file.protocol):
                raise UserError(
                    f"{file}: refused the shard {url!r}: a list may name files beside it and "
                    "addresses such as https:// or s3://, without environment variables ($) and chains (::)"
                )
            shards.append(Address(shard.text, number_in(entry, "nsamples")))
    return shards


def number_in(content: Any, name: str) -> int | None:
    number = content.get(name) if isinstance(content, dict) else None
    return number if type(number) is int and number >= 0 else None


def read_json(file: Address) -> Any:
    """None if there is no such file, or it is not JSON."""
    try:
        return json.loads(read_file(file) or b"")
    except (ValueError, RecursionError):
        return None
