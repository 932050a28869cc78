"""Tokens on disk: shards of about a million tokens, and an index of them that only grows.

A split of a source is a folder with `index.bin` and one file per shard. A shard file holds two or three arrays one after another:
where each document ends (uint32), the tokens (uint16 if all ids fit, else uint32) and, if some document has a loss mask, the mask
(uint8, 1 = learn this token). No document crosses a shard. The index has one record of fixed size per shard. Its counts run from
the first shard on, so that any token is found without reading earlier shards. A record is written after its shard is on the disk,
so every record has a whole shard. A killed writer may leave a torn last record, which does not count.

The fingerprint of a shard list is a hash over the hashes of its files. Equal fingerprints mean equal tokens as they are written,
which exact resume depends on. Every record has the fingerprint of the list up to its shard, which covers its counts too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from osler.data.config import FIRST_SHARD_TOKENS
from osler.runtime.errors import UserError
from osler.runtime.faults import fault
from osler.runtime.files import DATA_MANIFEST, fsync_dir, no_pause, open_durable, read_json

FORMAT_VERSION = 3
TOKENIZER = "tokenizer.json"  # the tokenizer that made the shards
INDEX = "index.bin"
SPLITS = ("train", "validation")
VALIDATION_PREFIX = "validation."  # begins the folder name of a named validation set; no source has a dot in its name
SHARD_TOKENS = 1 << 20  # the most in a shard, unless one document has more

Int64Array = npt.NDArray[np.int64]
TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
MaskArray = npt.NDArray[np.uint8]

# Counts include all earlier shards. `digest` is the sha256 of the shard's file, `fingerprint` stands for the list up to here.
NO_SHARDS = "0" * 16  # the fingerprint of no shard
COUNTS = ("documents", "tokens", "loss_tokens", "num_bytes")
RECORD = np.dtype([*((name, "<u8") for name in COUNTS), ("is_masked", "<u8"), ("digest", "V32"), ("fingerprint", "V8")])


class Shard(NamedTuple):
    """The arrays of one shard: where each document ends, the tokens, and the loss mask (None: all are learned)."""

    ends: npt.NDArray[np.uint32]
    tokens: TokenArray
    mask: MaskArray | None


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type of the tokens on disk."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class ShardWriter:
    """Writes a split into a folder, after the shards that are there already; `close` writes the last one.

    New documents must follow those of the existing shards; at the start their number is `num_documents`.
    """

    def __init__(self, folder: Path, *, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.before_shard: Callable[[int], None] = no_pause  # called with the size of a shard in bytes before it is written
        self._folder = folder
        self._dtype = token_dtype(vocab_size)
        self._shard_tokens = shard_tokens
        self._number, self._record = _last_record(folder / INDEX)
        self.num_documents, self.num_tokens = int(self._record["documents"]), int(self._record["tokens"])
        self.fingerprint = self._record["fingerprint"].tobytes().hex() if self._number else NO_SHARDS
        self._empty()

    def add(self, ids: Sequence[int] | TokenArray, mask: Sequence[int] | MaskArray | None, num_bytes: int) -> None:
        """Append one document: its ids, loss mask (None: all are learned) and number of UTF-8 bytes of text."""
        limit = min(self._shard_tokens, FIRST_SHARD_TOKENS << min(self._number, 32))
        if self._ends and self._ends[-1] + len(ids) > limit:
            self.cut()
        self._tokens.append(np.asarray(ids, self._dtype).tobytes())
        self._masks.append(None if mask is None else bytes(mask))
        self._ends.append(len(ids) + (self._ends[-1] if self._ends else 0))
        self._loss_tokens += len(ids) if mask is None else int(np.count_nonzero(mask))
        self._num_bytes += num_bytes
        self.num_documents += 1
        self.num_tokens += len(ids)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of text in the shards that are written."""
        return int(self._record["num_bytes"])

    def cut(self) -> None:
        """Write the documents added since the last shard as a shard, if there are any."""
        if self._ends:
            self._write_shard()

    def close(self) -> None:
        """Write the last shard; everything is on the disk when it returns."""
        self.cut()
        fsync_dir(self._folder)

    def _empty(self) -> None:
        self._tokens: list[bytes] = []
        self._masks: list[bytes | None] = []
        self._ends: list[int] = []
        self._loss_tokens = self._num_bytes = 0

    def _write_shard(self) -> None:
        is_masked = any(mask is not None for mask in self._masks)
        lengths = np.diff(self._ends, prepend=0).tolist()
        masks = [b"\x01" * length if mask is None else mask for length, mask in zip(lengths, self._masks, strict=True)]
        data = b"".join([np.asarray(self._ends, "<u4").tobytes(), *self._tokens, *(masks if is_masked else [])])
        record = self._record
        record["documents"], record["tokens"] = self.num_documents, self.num_tokens
        record["loss_tokens"] += self._loss_tokens
        record["num_bytes"] += self._num_bytes
        record["is_masked"] = is_masked
        record["digest"] = np.void(hashlib.sha256(data).digest())
        self.fingerprint = chained(self.fingerprint, record)
        record["fingerprint"] = np.void(bytes.fromhex(self.fingerprint))
        self.before_shard(len(data))
        fault("write-shard")
        with open_durable(self._folder / shard_name(self._number)) as file:
            file.write(data)
        fsync_dir(self._folder)  # the index never names a shard that a power cut takes away
        fault("write-index")
        with open_durable(self._folder / INDEX, "ab") as file:
            file.write(record.tobytes())
        self._number += 1
        self._empty()


def chained(before: str, record: np.void | npt.NDArray[Any]) -> str:
    """Return the fingerprint of a shard list, from its last `record` and the fingerprint `before` that record."""
    return hashlib.sha256(bytes.fromhex(before) + record.tobytes()[: -len(before) // 2]).hexdigest()[: len(before)]


def shard_name(number: int) -> str:
    """Return the name of a shard's file."""
    return f"shard-{number:07d}.bin"


def read_data_manifest(path: str | Path) -> dict[str, Any]:
    """Return the manifest of a prepared folder; raises UserError when there is none that this version can read."""
    file = Path(path) / DATA_MANIFEST
    if not file.is_file():
        what = f"it has no {DATA_MANIFEST}" if Path(path).exists() else "it does not exist"
        raise UserError(f"{path} is no folder that `osler data prepare` wrote: {what}.")
    manifest = read_json(file)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{file} has format {version}, this version of Osler reads {FORMAT_VERSION}; prepare the data again.")
    return dict(manifest)


def order_of(entry: Mapping[str, Any]) -> dict[str, int]:
    """Return what an entry of a manifest says of the order of its tokens: ``min_parts`` and ``first_window_tokens``.

    Older versions name neither; they dealt no file out among parts, and their first window is one shard.
    """
    return {name: entry.get(name, older) for name, older in (("min_parts", 1), ("first_window_tokens", 0))}


def _last_record(path: Path) -> tuple[int, npt.NDArray[Any]]:
    """Return how many records an index has, and the last one. Remove a torn record, which a killed writer leaves."""
    count, torn = divmod(path.stat().st_size if path.exists() else 0, RECORD.itemsize)
    if torn:
        os.truncate(path, count * RECORD.itemsize)
    if not count:
        return 0, np.zeros((), RECORD)
    with open(path, "rb") as file:
        file.seek((count - 1) * RECORD.itemsize)
        return count, np.frombuffer(file.read(), RECORD)[0].copy()
