"""Tokens on disk: shards of about a million tokens, and an index of them that only grows.

A split of a source is a folder with `index.bin` and one file per shard. A shard file holds three arrays one after another: where
each document ends in it (uint32), the tokens (uint16 while ids fit, else uint32) and, if some document has a loss mask, the mask
(uint8, 1 = learn this token). No document crosses a shard. The index has one record of fixed size per shard, whose counts
run from the first shard on, so that any token is found without reading the shards before it. A record is written after its
shard is on the disk: what a killed writer leaves is a whole number of shards and perhaps a torn record, which does not count.

The fingerprint of a shard list is a hash over the hashes of its files. Equal fingerprints mean equal tokens in equal order,
which exact resume depends on; every record has the one of the list up to it, which covers its counts too.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from osler.runtime.errors import UserError
from osler.runtime.files import fingerprint, fsync_dir, open_durable, read_json, sha256_file

FORMAT_VERSION = 2
DATA_MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"  # of the shards
INDEX = "index.bin"
SPLITS = ("train", "validation")
SHARD_TOKENS = 1 << 20
OPEN_SHARDS = 128  # memory maps that are kept open
SIZES_CHECKED = 4096  # shards, whose files' sizes are checked when a split is opened: a second of work on a slow disk

Int64Array = npt.NDArray[np.int64]
TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
MaskArray = npt.NDArray[np.uint8]

# Counts include all shards before; `digest` is the sha256 of the shard's file, `fingerprint` that of the list up to here.
_NOTHING = "0" * 16  # the fingerprint of no shard
_COUNTS = ("documents", "tokens", "loss_tokens", "num_bytes")
RECORD = np.dtype([*((name, "<u8") for name in _COUNTS), ("is_masked", "<u8"), ("digest", "V32"), ("fingerprint", "V8")])


class Shard(NamedTuple):
    """The arrays of one shard: where each document ends, the tokens, and the loss mask (None: all are learned)."""

    ends: npt.NDArray[np.uint32]
    tokens: TokenArray
    mask: MaskArray | None


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type of the tokens on disk."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class ShardWriter:
    """Writes a split into a folder that does not exist yet; `close` writes the last shard."""

    def __init__(self, folder: Path, *, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        folder.mkdir(parents=True)
        self.num_documents = self.num_tokens = 0
        self.fingerprint = _NOTHING
        self._folder = folder
        self._dtype = token_dtype(vocab_size)
        self._shard_tokens = shard_tokens
        self._record = np.zeros((), RECORD)
        self._number = 0
        self._empty()

    def add(self, ids: Sequence[int], mask: Sequence[int] | None, num_bytes: int) -> None:
        """Append one document: its ids, loss mask (None: all are learned) and number of UTF-8 bytes of text."""
        if self._ends and self._ends[-1] + len(ids) > self._shard_tokens:
            self._write_shard()
        self._tokens.append(np.asarray(ids, self._dtype).tobytes())
        self._masks.append(None if mask is None else bytes(mask))
        self._ends.append(len(ids) + (self._ends[-1] if self._ends else 0))
        self._loss_tokens += len(ids) if mask is None else sum(mask)
        self._num_bytes += num_bytes
        self.num_documents += 1
        self.num_tokens += len(ids)

    def close(self) -> None:
        """Write the last shard; everything is on the disk when it returns."""
        if self._ends:
            self._write_shard()
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
        self.fingerprint = _chained(self.fingerprint, record)
        record["fingerprint"] = np.void(bytes.fromhex(self.fingerprint))
        with open_durable(self._folder / shard_name(self._number)) as file:
            file.write(data)
        fsync_dir(self._folder)  # the index never names a shard that a power cut takes away
        with open_durable(self._folder / INDEX, "ab") as file:
            file.write(record.tobytes())
        self._number += 1
        self._empty()


class ShardSet:
    """A split of a source, open for reading; safe to share between threads."""

    def __init__(self, folder: Path, *, vocab_size: int, tokenizer_fingerprint: str, eos_id: int) -> None:
        self.folder = folder
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.eos_id = eos_id
        self._dtype = token_dtype(vocab_size)
        index = _read_index(folder / INDEX)
        self._records = index
        self.ends_of_documents: Int64Array = index["documents"].astype(np.int64)  # up to the end of each shard
        self.ends_of_tokens: Int64Array = index["tokens"].astype(np.int64)
        last = index[-1] if len(index) else np.zeros((), RECORD)
        self.num_shards = len(index)
        self.num_documents, self.num_tokens, self.num_loss_tokens, self.num_bytes = (int(last[name]) for name in _COUNTS)
        self.fingerprint: str = self.fingerprint_up_to(len(index))
        self.shard = functools.lru_cache(OPEN_SHARDS)(self._map)
        for number in range(min(len(index), SIZES_CHECKED)):
            self._check_size(number)

    @classmethod
    def open(cls, path: str | Path, source: str, split: str) -> ShardSet:
        """Open a split of a source in a prepared folder; `verify` checks its bytes.

        Raises UserError when the folder or a file is missing, or a file has the wrong size.
        """
        manifest = read_data_manifest(path)
        names = ("vocab_size", "tokenizer_fingerprint", "eos_id")
        shards = cls(Path(path) / source / split, **{name: manifest[name] for name in names})
        if shards.fingerprint != manifest["sources"][source]["splits"][split]["fingerprint"]:
            raise UserError(f"{shards.folder / INDEX} is not the one that the manifest describes; prepare the data again.")
        return shards

    def fingerprint_up_to(self, num_shards: int) -> str:
        """Return the fingerprint of the first shards."""
        return str(self._records["fingerprint"][num_shards - 1].tobytes().hex()) if num_shards else _NOTHING

    def document(self, index: int, start: int = 0, stop: int | None = None) -> tuple[TokenArray, MaskArray | None]:
        """Return ids and loss mask (None = all ones) of a document, or of its tokens `start:stop`, without copying."""
        number = bisect.bisect_right(self.ends_of_documents, index)
        shard, local = self.shard(number), index - self.first_document(number)
        begin, end = int(shard.ends[local - 1]) if local else 0, int(shard.ends[local])
        place = slice(begin + start, end if stop is None else min(begin + stop, end))
        return shard.tokens[place], None if shard.mask is None else shard.mask[place]

    def first_document(self, number: int) -> int:
        """Return the number of the first document of a shard."""
        return int(self.ends_of_documents[number - 1]) if number else 0

    def lengths(self, number: int) -> Int64Array:
        """Return the tokens of each document of a shard."""
        lengths: Int64Array = np.diff(self.shard(number).ends, prepend=np.uint32(0)).astype(np.int64)
        return lengths

    def documents(self) -> Iterator[list[int]]:
        """Yield the ids of every document in order, each ended by the end-of-text token."""
        for index in range(self.num_documents):
            yield self.document(index)[0].tolist()

    @property
    def file_bytes(self) -> int:
        """Return the size of all shards."""
        masked = np.diff(self.ends_of_tokens, prepend=0)[self._records["is_masked"] > 0].sum()
        return int(4 * self.num_documents + self._dtype.itemsize * self.num_tokens + masked)

    def verify(self) -> list[str]:
        """Hash every file and return one sentence for each that is missing or changed."""
        problems, fingerprint = [], _NOTHING
        for number in range(self.num_shards):
            path, fingerprint = self.folder / shard_name(number), _chained(fingerprint, self._records[number])
            if fingerprint != self.fingerprint_up_to(number + 1):
                return [f"{self.folder / INDEX} has changed since it was written, from the record of {path.name} on."]
            if not path.is_file():
                problems.append(f"{path} is missing.")
            elif sha256_file(path) != self._records["digest"][number].tobytes().hex():
                problems.append(f"{path} has changed since it was prepared (its sha256 is not the index's).")
        return problems

    def _counts(self, number: int) -> tuple[int, int, bool]:
        """Return the documents and tokens of one shard, and whether it has a mask."""
        before = self._records[number - 1] if number else np.zeros((), RECORD)
        here = self._records[number]
        return (int(here["documents"] - before["documents"]), int(here["tokens"] - before["tokens"]), bool(here["is_masked"]))

    def _size(self, number: int) -> int:
        documents, tokens, is_masked = self._counts(number)
        return 4 * documents + tokens * (self._dtype.itemsize + is_masked)

    def _check_size(self, number: int) -> Path:
        path, expected = self.folder / shard_name(number), self._size(number)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise UserError(f"{path} is missing; prepare the data again.") from None
        if size != expected:
            raise UserError(f"{path} has {size} bytes instead of {expected}: it is torn or changed; prepare the data again.")
        return path

    def _map(self, number: int) -> Shard:
        path, (documents, tokens, is_masked) = self._check_size(number), self._counts(number)
        data = np.asarray(np.memmap(path, np.uint8, "r"))  # a plain array slices twice as fast
        middle = 4 * documents
        end = middle + tokens * self._dtype.itemsize
        mask = data[end:] if is_masked else None
        return Shard(data[:middle].view("<u4"), data[middle:end].view(self._dtype), mask)


def _chained(before: str, record: np.void | npt.NDArray[Any]) -> str:
    """Return the fingerprint of a shard list from that of the list before its last record, and that record."""
    return hashlib.sha256(bytes.fromhex(before) + record.tobytes()[: -len(before) // 2]).hexdigest()[: len(before)]


def shard_name(number: int) -> str:
    """Return the name of a shard's file."""
    return f"shard-{number:07d}.bin"


def open_split(path: str | Path, split: str) -> list[ShardSet]:
    """Open a split of every source of a prepared folder that has it."""
    sources = read_data_manifest(path)["sources"]
    return [ShardSet.open(path, source, split) for source, entry in sources.items() if split in entry["splits"]]


def read_data_manifest(path: str | Path) -> dict[str, Any]:
    """Return the manifest of a prepared folder; raises UserError when there is none that this version can read."""
    file = Path(path) / DATA_MANIFEST
    if not file.is_file():
        raise UserError(f"{path} is no folder that `osler data prepare` wrote: it has no {DATA_MANIFEST}.")
    manifest = read_json(file)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{file} has format {version}, this version of Osler reads {FORMAT_VERSION}; prepare the data again.")
    return dict(manifest)


def data_fingerprint(manifest: Mapping[str, Any]) -> str:
    """Return what identifies the training data of all sources of a prepared folder, in their order."""
    found = [entry["splits"]["train"]["fingerprint"] for entry in manifest["sources"].values()]
    return str(found[0]) if len(found) == 1 else fingerprint(found)


def _read_index(path: Path) -> npt.NDArray[Any]:
    """Return the records of an index; a torn last one, which a killed writer leaves, does not count."""
    if not path.is_file():
        raise UserError(f"{path} is missing; prepare the data again.")
    data = path.read_bytes()
    return np.frombuffer(data, RECORD, len(data) // RECORD.itemsize)
