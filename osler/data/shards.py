"""Tokens on disk: flat memory-mapped arrays in shards, and a manifest that describes them.

A prepared folder holds `manifest.json`, `tokenizer.json` and one folder per split (`train`, `validation`). A split is a list of
shards. Each shard is three raw little-endian files: `tokens-00000.bin` (uint16 while ids fit, else uint32), `offsets-00000.bin`
(uint64, where each document starts, and the end) and, if some document has a loss mask, `mask-00000.bin` (uint8, 1 = learn this
token). No document crosses a shard. The fingerprint of a split is a hash of the files' hashes: equal fingerprints mean equal
tokens in equal order, which exact resume depends on. The manifest also lists the sources of the documents, as runs of equal
ones; they are for metrics and in no fingerprint.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from osler.runtime.errors import UserError
from osler.runtime.files import fingerprint, read_json, sha256_file

FORMAT_VERSION = 1
DATA_MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"  # of the shards
SHARD_TOKENS = 1 << 26
MOST_SOURCES = 32  # that are counted separately; documents of all further ones are counted as OTHER_SOURCES
OTHER_SOURCES = "others"

Int64Array = npt.NDArray[np.int64]
TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
MaskArray = npt.NDArray[np.uint8]


class ShardWriter:
    """Writes one split into a folder that does not exist yet; `close` returns its part of the manifest."""

    def __init__(self, folder: Path, *, vocab_size: int, with_mask: bool, shard_tokens: int = SHARD_TOKENS) -> None:
        folder.mkdir()
        self._folder = folder
        self._dtype = np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")
        self._with_mask = with_mask
        self._shard_tokens = shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._tokens: _HashedFile | None = None
        self._mask: _HashedFile | None = None
        self._offsets: list[int] = [0]
        self.num_documents = 0
        self.num_tokens = 0
        self.num_loss_tokens = 0
        self.num_bytes = 0
        self._source_names: dict[str, str] = {}
        self._sources: list[tuple[str, int]] = []  # runs of documents of one source

    def add(self, ids: Sequence[int], mask: Sequence[int] | None, num_bytes: int, source: str = "") -> None:
        """Append one document: its ids, loss mask (None = learn all), number of UTF-8 bytes of text, and source."""
        if self._offsets[-1] and self._offsets[-1] + len(ids) > self._shard_tokens:
            self._finish_shard()
        if self._tokens is None:
            number = len(self._shards)
            self._tokens = _HashedFile(self._folder / f"tokens-{number:05d}.bin")
            if self._with_mask:
                self._mask = _HashedFile(self._folder / f"mask-{number:05d}.bin")
        self._tokens.write(np.asarray(ids, dtype=self._dtype).tobytes())
        if self._mask is not None:
            self._mask.write(b"\x01" * len(ids) if mask is None else bytes(mask))
        self._offsets.append(self._offsets[-1] + len(ids))
        self.num_documents += 1
        self.num_tokens += len(ids)
        self.num_loss_tokens += len(ids) if mask is None else sum(mask)
        self.num_bytes += num_bytes
        self._count(source)

    def _count(self, source: str) -> None:
        if source not in self._source_names:
            name = re.sub(r"[^\w.\-]+", "-", source) or "documents"  # only what the name of a metric may hold
            self._source_names[source] = name if len(self._source_names) < MOST_SOURCES else OTHER_SOURCES
        name = self._source_names[source]
        run = self._sources.pop()[1] if self._sources and self._sources[-1][0] == name else 0
        self._sources.append((name, run + 1))

    def close(self) -> dict[str, Any]:
        """Finish the last shard, flush all files to the disk and return the split's part of the manifest."""
        if self._tokens is not None:
            self._finish_shard()
        return {
            "dtype": self._dtype.name,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "loss_tokens": self.num_loss_tokens,
            "bytes": self.num_bytes,
            "sources": self._sources,
            "fingerprint": fingerprint([self._dtype.name, [shard["files"] for shard in self._shards]]),
            "shards": self._shards,
        }

    def abort(self) -> None:
        """Close the files of an unfinished shard."""
        for file in (self._tokens, self._mask):
            if file is not None:
                file.close()

    def _finish_shard(self) -> None:
        assert self._tokens is not None
        offsets = _HashedFile(self._folder / f"offsets-{len(self._shards):05d}.bin")
        offsets.write(np.asarray(self._offsets, dtype="<u8").tobytes())
        files = [file for file in (self._tokens, offsets, self._mask) if file is not None]
        shard = {"documents": len(self._offsets) - 1, "tokens": self._offsets[-1]}
        self._shards.append({**shard, "files": {file.path.name: file.close() for file in files}})
        self._tokens, self._mask, self._offsets = None, None, [0]


class ShardSet:
    """A prepared split, open for reading; safe to share between threads."""

    def __init__(self, folder: Path, entry: dict[str, Any], *, tokenizer_fingerprint: str, eos_id: int) -> None:
        self.folder = folder
        self.fingerprint: str = entry["fingerprint"]
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.eos_id = eos_id
        self.num_documents: int = entry["documents"]
        self.num_tokens: int = entry["tokens"]
        self.num_loss_tokens: int = entry["loss_tokens"]
        self.num_bytes: int = entry["bytes"]
        self._entry = entry
        runs = entry.get("sources") or [("documents", self.num_documents)]
        self.sources: list[str] = list(dict.fromkeys(name for name, _ in runs))
        numbers = [self.sources.index(name) for name, _ in runs]
        self.source_of_document: Int64Array = np.repeat(np.array(numbers, np.int64), [count for _, count in runs])
        dtype = np.dtype(entry["dtype"]).newbyteorder("<")
        self._tokens: list[TokenArray] = []
        self._masks: list[MaskArray | None] = []
        self._offsets: list[npt.NDArray[np.uint64]] = []
        self._first_document = [0]  # of each shard, and the end
        for number, shard in enumerate(entry["shards"]):
            mask_path = folder / f"mask-{number:05d}.bin"
            count, documents = shard["tokens"], shard["documents"]
            self._tokens.append(_map(folder / f"tokens-{number:05d}.bin", dtype, count))
            self._offsets.append(_map(folder / f"offsets-{number:05d}.bin", np.dtype("<u8"), documents + 1))
            has_mask = mask_path.name in shard["files"]
            self._masks.append(_map(mask_path, np.dtype("u1"), count) if has_mask else None)
            self._first_document.append(self._first_document[-1] + documents)
        lengths = [np.diff(offsets.astype(np.int64)) for offsets in self._offsets]
        self.lengths: Int64Array = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)

    @classmethod
    def open(cls, path: str | Path, split: str = "train") -> ShardSet:
        """Open one split of a prepared folder; this checks the sizes of its files, and `verify` their bytes.

        Raises UserError when the folder, the split or a file is missing, or a file has the wrong size.
        """
        manifest = read_data_manifest(path)
        if split not in manifest["splits"]:
            have = ", ".join(manifest["splits"]) or "none"
            raise UserError(f"The prepared data in {path} have no split '{split}' (they have: {have}).")
        return cls(
            Path(path) / split,
            manifest["splits"][split],
            tokenizer_fingerprint=manifest["tokenizer_fingerprint"],
            eos_id=manifest["eos_id"],
        )

    def document(self, index: int, start: int = 0, stop: int | None = None) -> tuple[TokenArray, MaskArray | None]:
        """Return ids and loss mask (None = all ones) of a document, or of its tokens `start:stop`, without copying."""
        shard = bisect.bisect_right(self._first_document, index) - 1
        local = index - self._first_document[shard]
        begin, end = (int(offset) for offset in self._offsets[shard][local : local + 2])
        first, last = begin + start, end if stop is None else min(begin + stop, end)
        mask = self._masks[shard]
        return self._tokens[shard][first:last], None if mask is None else mask[first:last]

    def documents(self) -> Iterator[list[int]]:
        """Yield the ids of every document in order, each ended by the end-of-text token."""
        for index in range(self.num_documents):
            yield self.document(index)[0].tolist()

    @property
    def file_bytes(self) -> int:
        """Return the size of all files of the split."""
        return sum(array.nbytes for array in (*self._tokens, *self._offsets, *self._masks) if array is not None)

    def verify(self) -> list[str]:
        """Hash every file and return one sentence for each that is missing or changed."""
        problems = []
        for shard in self._entry["shards"]:
            for name, digest in shard["files"].items():
                path = self.folder / name
                if not path.is_file():
                    problems.append(f"{path} is missing.")
                elif sha256_file(path) != digest:
                    problems.append(f"{path} has changed since it was prepared (its sha256 is not the manifest's).")
        return problems


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


class _HashedFile:
    """A file that is hashed as it is written; `close` flushes it to the disk and returns its sha256."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest = hashlib.sha256()
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - open until its shard is finished

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)

    def close(self) -> str:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return self._digest.hexdigest()


def _map(path: Path, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    """Memory-map a file of exactly `count` items."""
    if not path.is_file():
        raise UserError(f"{path} is missing; prepare the data again.")
    size, expected = path.stat().st_size, count * dtype.itemsize
    if size != expected:
        raise UserError(f"{path} has {size} bytes instead of {expected}: it is torn or changed; prepare the data again.")
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(count,)))  # a plain array slices twice as fast
