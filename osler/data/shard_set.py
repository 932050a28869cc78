"""Open a split of a source for reading, finished or while it is being written."""

from __future__ import annotations

import bisect
import copy
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from osler.data.shards import (
    DATA_MANIFEST,
    INDEX,
    NO_SHARDS,
    RECORD,
    VALIDATION_PREFIX,
    Int64Array,
    MaskArray,
    Shard,
    TokenArray,
    chained,
    order_of,
    read_data_manifest,
    shard_name,
    token_dtype,
)
from osler.runtime.errors import UserError
from osler.runtime.files import fingerprint, read_json, sha256_file, write_atomic

OPEN_SHARDS = 128  # memory maps that are kept open
SIZES_CHECKED = 4096  # shards whose file sizes are checked when a split is opened; this takes a second on a slow disk
EVICTED = "evicted"  # a file beside an index; it holds how many of the first shards were deleted to keep within a disk budget


class NotPreparedYet(Exception):
    """The data asked for are in shards that are still being written; ask again later. The message says what is there."""


def identity_of(path: Path) -> tuple[int, int] | None:
    """Return a value that changes whenever the file is written again; None when there is no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


@functools.lru_cache(4)
def _read_manifest(path: Path, identity: tuple[int, int]) -> dict[str, Any]:
    return dict(read_json(path))


def _manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder of data, or an incomplete one before it exists; it is read only when it has changed."""
    identity = identity_of(folder / DATA_MANIFEST)
    return {"complete": False} if identity is None else _read_manifest(folder / DATA_MANIFEST, identity)


def is_finished(folder: Path) -> bool:
    """Return whether everything in a folder of data is prepared."""
    return bool(_manifest(folder)["complete"])


def _is_split_finished(folder: Path) -> bool:
    """Return whether nothing more will be written to a split. `Preparer.tend` tells whether somebody is writing."""
    manifest = _manifest(folder.parents[1])
    return manifest["complete"] or ("sources" in manifest and folder.name in _entry(manifest, folder.parent.name)["splits"])


def _entry(manifest: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the entry of a source in a manifest, or that of a validation set, by the name of its folder."""
    return dict(manifest["sources"].get(source) or manifest["validation"][source.removeprefix(VALIDATION_PREFIX)])


class _Count:
    """The number of documents, tokens or bytes in the shards so far, as an attribute of a ``ShardSet``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, shards: ShardSet, owner: type[ShardSet]) -> int:
        records = shards._records  # read once, because other threads may take in new shards
        return int(records[self.name][-1]) if len(records) else 0


class ShardSet:
    """A split of a source, open for reading; safe to share between threads.

    While the split is `growing`, `refresh` takes in new shards until it `is_complete`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vocab_size: int,
        tokenizer_fingerprint: str,
        eos_id: int,
        first_window_tokens: int = 0,
        growing: bool = False,
    ) -> None:
        self.folder = folder
        self.first_window_tokens = first_window_tokens  # in the first window of the order, which depends on it
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.eos_id = eos_id
        self._dtype = token_dtype(vocab_size)
        self.is_complete = not growing  # no shard will follow those that this reader knows
        self.is_streamed = growing  # whether the split was growing when it was opened
        self._lock = threading.Lock()
        self._records = _read_index(folder / INDEX, np.zeros(0, RECORD), must_exist=not growing)
        self.shard = functools.lru_cache(OPEN_SHARDS)(self._map)
        evicted = num_evicted(folder)
        for number in range(evicted, min(self.num_shards, evicted + SIZES_CHECKED)):
            self._check_size(number)

    @classmethod
    def open(cls, path: str | Path, source: str, split: str, *, growing: bool = False) -> ShardSet:
        """Open a split of a source in a prepared folder; with `growing`, the folder may still be in preparation.

        Only `verify` checks the bytes. Raises UserError when the folder or a file is missing, or a file has the wrong size.
        """
        folder = Path(path) / source / split
        growing = growing and not _is_split_finished(folder)  # asked first: the manifest read below then has the split
        manifest = read_data_manifest(path)
        described = {name: manifest[name] for name in ("vocab_size", "tokenizer_fingerprint", "eos_id")}
        first_window_tokens = order_of(_entry(manifest, source))["first_window_tokens"]
        shards = cls(folder, **described, first_window_tokens=first_window_tokens, growing=growing)
        if not growing and shards.fingerprint != _entry(manifest, source)["splits"][split]["fingerprint"]:
            raise UserError(f"{shards.folder / INDEX} is not the one that the manifest describes; prepare the data again.")
        return shards

    def refresh(self) -> None:
        """Take in the shards that were written since the last look."""
        if self.is_complete:
            return
        with self._lock:
            is_finished = _is_split_finished(self.folder)  # asked first: the index read below then has all shards
            self._records = _read_index(self.folder / INDEX, self._records, must_exist=False)
            self.is_complete = is_finished

    def head(self, num_shards: int) -> ShardSet:
        """Return the first `num_shards` as a complete split of its own; raises NotPreparedYet while some are not written."""
        if self.num_shards < num_shards:
            self.refresh()
            if self.num_shards < num_shards and not self.is_complete:
                raise self.not_yet()
        head = copy.copy(self)
        head._records, head.is_complete = self._records[:num_shards], True
        return head

    def head_within(self, num_tokens: int) -> ShardSet:
        """Return the first shards that have at most `num_tokens` together, but at least one shard; see `head`."""
        count = int(np.searchsorted(self.ends_of_tokens, num_tokens, "right"))
        if count == self.num_shards and not self.is_complete:
            self.head(count + 1)  # raises NotPreparedYet while nobody knows whether the next shard fits
            return self.head_within(num_tokens)
        return self.head(max(1, count))

    def not_yet(self) -> NotPreparedYet:
        """Return the error that says how far the split is prepared."""
        return NotPreparedYet(f"{self.folder} has {self.num_tokens:,} tokens so far")

    @property
    def num_shards(self) -> int:
        """The number of shards so far."""
        return len(self._records)

    @property
    def ends_of_documents(self) -> Int64Array:
        """The number of documents up to the end of each shard."""
        return self._records["documents"].view(np.int64)

    @property
    def ends_of_tokens(self) -> Int64Array:
        """The number of tokens up to the end of each shard."""
        return self._records["tokens"].view(np.int64)

    num_documents = _Count("documents")
    num_tokens = _Count("tokens")
    num_loss_tokens = _Count("loss_tokens")  # tokens that the model learns, by the loss masks
    num_bytes = _Count("num_bytes")  # the size of the text in UTF-8

    def bytes_per_token(self, token: int) -> float:
        """Return the average bytes of text per token, up to the end of the shard that holds this token of the first epoch."""
        records = self._records
        number = min(int(np.searchsorted(records["tokens"], token)), len(records) - 1)
        return float(records["num_bytes"][number] / records["tokens"][number])

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the shards so far."""
        return self.fingerprint_up_to(self.num_shards)

    def fingerprint_up_to(self, num_shards: int) -> str:
        """Return the fingerprint of the first shards."""
        return str(self._records["fingerprint"][num_shards - 1].tobytes().hex()) if num_shards else NO_SHARDS

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
        """Return the number of tokens of each document of a shard."""
        lengths: Int64Array = np.diff(self.shard(number).ends, prepend=np.uint32(0)).astype(np.int64)
        return lengths

    def documents(self) -> Iterator[list[int]]:
        """Yield the ids of every document in order, each ended by the end-of-text token."""
        for index in range(self.num_documents):
            yield self.document(index)[0].tolist()

    @property
    def file_bytes(self) -> int:
        """Return the size of the files of all shards, deleted ones included."""
        masked = np.diff(self.ends_of_tokens, prepend=0)[self._records["is_masked"] > 0].sum()
        return int(4 * self.num_documents + self._dtype.itemsize * self.num_tokens + masked)

    def verify(self) -> list[str]:
        """Hash every file and return one sentence for each that is missing or changed."""
        problems, chain = [], NO_SHARDS
        evicted = num_evicted(self.folder)
        for number in range(self.num_shards):
            path, chain = self.folder / shard_name(number), chained(chain, self._records[number])
            if chain != self.fingerprint_up_to(number + 1):
                return [f"{self.folder / INDEX} has changed since it was written, from the record of {path.name} on."]
            if number < evicted:
                continue
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

    def _check_size(self, number: int) -> Path:
        documents, tokens, is_masked = self._counts(number)
        path, expected = self.folder / shard_name(number), 4 * documents + tokens * (self._dtype.itemsize + is_masked)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            if number < num_evicted(self.folder):
                raise UserError(
                    f"{path} was deleted to keep within data.disk_budget_gb, and is needed again. Delete "
                    f"{self.folder.parents[1]}: then the same command prepares everything again, to the same bytes."
                ) from None
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


def _read_index(path: Path, known: npt.NDArray[Any], *, must_exist: bool) -> npt.NDArray[Any]:
    """Return the records of an index; the first of them are `known`.

    A torn last record, which a killed writer leaves, does not count.
    """
    if not path.is_file():
        if must_exist:
            raise UserError(f"{path} is missing; prepare the data again.")
        return known
    with open(path, "rb") as file:
        file.seek(known.nbytes)
        data = file.read()
    new = np.frombuffer(data, RECORD, len(data) // RECORD.itemsize)
    return np.concatenate([known, new]) if len(known) else new


def num_evicted(folder: Path) -> int:
    """Return how many of the first shards of a split were deleted to keep within a disk budget."""
    try:
        return int((folder / EVICTED).read_text())
    except FileNotFoundError:
        return 0


def evict(folder: Path, num_shards: int) -> None:
    """Delete the first shards of a split. Their number is recorded first, so a kill half way does no damage."""
    if num_shards > num_evicted(folder):
        write_atomic(folder / EVICTED, str(num_shards).encode())
    for path in folder.glob(shard_name(0).replace("0", "?")):
        if path.name < shard_name(num_shards):
            path.unlink(missing_ok=True)


def fingerprint_of(shards: Sequence[ShardSet]) -> str:
    """Return a text that identifies the training data of the sources of a run, in their order.

    While sources are being prepared, the text tells how many shards each one has.
    """
    if not all(part.is_complete for part in shards):
        counts = [part.num_shards for part in shards]  # counted once, as other threads take in new shards at any time
        return ",".join(f"{_identity(part.head(count))}@{count}" for part, count in zip(shards, counts, strict=True))
    found = [_identity(part) for part in shards]
    return found[0] if len(found) == 1 else fingerprint(found)


def _identity(part: ShardSet) -> str:
    """Return a text for the shards so far and for what else decides their order; older data have no first window."""
    return f"{part.fingerprint}{f'+{part.first_window_tokens}' if part.first_window_tokens else ''}"


def is_partial(recorded: str) -> bool:
    """Return whether `fingerprint_of` identified data that were only partly prepared."""
    return "@" in recorded


def is_continuation(shards: Sequence[ShardSet], recorded: str) -> bool:
    """Return whether the data are those that `fingerprint_of` identified once, or have grown from them.

    Raises NotPreparedYet while the shards to compare are missing, because the data are being prepared again.
    """
    if not is_partial(recorded):
        return recorded == fingerprint_of(shards)
    known = [entry.split("@") for entry in recorded.split(",")]
    if len(known) != len(shards):
        return False
    return all(_identity(part.head(int(count))) == found for part, (found, count) in zip(shards, known, strict=True))
