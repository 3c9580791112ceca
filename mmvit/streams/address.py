"""Addresses of shards elsewhere: `https://`, `s3://`, `gs://`, `hf://datasets/...` and whatever else fsspec
reads. They print without their secrets."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from mmvit.errors import MASK, UserError, without_secrets

PARTS = re.compile(r"([a-z][a-z0-9+.-]*://[^/?]*)([^?]*?)((?:\?.*?)?(?:::.*)?)", re.DOTALL)


@dataclass(frozen=True, order=True, repr=False)
class Address:
    """What a `Path` is for a local file: with `name`, `parent`, `/` and the like, and `str` for messages.

    A query or a chain of fsspec's (`zip://a.tar::s3://bucket/b.zip`) belongs to all files of a folder.
    """

    text: str  # as given: $NAME stands for an environment variable
    samples: int | None = field(default=None, compare=False)  # of a shard, where a list of shards says it

    @property
    def with_secrets(self) -> str:
        """The address to read from. Raises UserError if a secret is not known."""
        if MASK in self.text:
            raise UserError(f"{self}: expected the address with its secret, got {MASK}; give it again")
        text = os.path.expandvars(self.text)
        if unset := re.search(r"\$(\w+)", text):
            raise UserError(f"{self}: the environment variable {unset[1]} is not set")
        return text

    def __str__(self) -> str:
        return without_secrets(self.text)

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"

    @property
    def parts(self) -> tuple[str, str, str]:
        """Server or bucket, path, and the rest."""
        return PARTS.fullmatch(self.text).groups()

    @property
    def protocol(self) -> str:
        return self.text.partition("://")[0]

    @property
    def name(self) -> str:
        return self.parts[1].rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def parent(self) -> "Address":
        server, path, rest = self.parts
        return Address(server + path.rpartition("/")[0] + rest)

    def __truediv__(self, name: str) -> "Address":
        server, path, rest = self.parts
        return Address(f"{server}{path.rstrip('/')}/{name}{rest}")

    def with_name(self, name: str) -> "Address":
        return self.parent / name

    def resolve(self) -> "Address":
        return self


def is_address(text: str | Path | Address) -> bool:
    return isinstance(place(text), Address)


def on_this_machine(path: Path) -> Path:
    """Raises ValueError if `path` is an address, of which a folder called `s3:` would be made."""
    if is_address(path):
        raise ValueError(
            f"expected a path on this machine, got {place(path)}; copy the result there afterwards"
        )
    return path


def place(text: str | Path | Address) -> Path | Address:
    """What `text` names: an address, or a path on this machine."""
    if isinstance(text, Address):
        return text
    if isinstance(text, Path):  # which takes one of two slashes away
        text = re.sub(r"^([A-Za-z][A-Za-z0-9+.-]+):/(?=[^/])", r"\1://", str(text))
    text = re.sub(r"^[A-Za-z0-9+.-]+(?=://)", lambda protocol: protocol[0].lower(), text)
    text = re.sub(r"^(file|local)://", "", text)
    return Address(text.rstrip("/")) if PARTS.fullmatch(text) else Path(text)
