"""Find documents that are copies or near copies of earlier ones of the same source; memory does not grow with their number.

A row of bytes stands for a document. It begins with a key, which ignores case and spacing. Where near copies are looked for, a
MinHash signature of the document's sequences of 5 words follows (Broder 1997; one byte of each of 128 minima, Li and König 2010).
Locality-sensitive hashing finds candidates: earlier documents that share the key or one of 16 bands of 8 bytes. A candidate is a
near copy when enough bytes of the signatures agree. Their share estimates how many sequences the two documents have in common.

Copies are not looked for across the sources of a mixture. Sources are written side by side, and after a kill each resumes at its
own last part. So the kill would decide which of two copies stays. All sources drop copies of held-out documents (`holdout.py`).

A ring holds the rows of the latest documents, as many as fit into memory. For each hash of a band, a chain links the documents
that share it. All rows are in a file too, so a killed preparation resumes from the same state without reading a document again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from osler.data.ngrams import Hashes
from osler.runtime.errors import UserError
from osler.runtime.files import open_durable

EXACT, NEAR = "copy", "near copy"  # the reasons why a document is dropped
KEY_BYTES, BAND_BYTES = 8, 8
SIGNATURE_BYTES = 128
SHINGLE_WORDS = 5
MOST_CANDIDATES = 16  # only the latest documents of a band are compared; a band that many documents share says little
MINHASH_SEED = 1
_ROWS_AT_ONCE = 1 << 16
_MIXER = np.uint64(0xD6E8FEB86659FD93)

Rows = npt.NDArray[np.uint8]


def signatures(shingles: Sequence[Hashes]) -> Rows:
    """Return the MinHash signatures of documents from their sequences of words, one in each row."""
    try:
        from rensa import RMinHash
    except ImportError:
        remedy = "pip install -e '.[clean]' in Osler's source tree, or set clean.duplicates=exact."
        raise UserError(f"Near copies need the package rensa: {remedy}") from None
    ends = np.cumsum([0, *map(len, shingles)], dtype=np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate([np.zeros(0, np.uint64), *shingles]), ends, num_perm=SIGNATURE_BYTES, seed=MINHASH_SEED
    )
    return np.array(matrix.to_rows(), np.uint32).astype(np.uint8).reshape(-1, SIGNATURE_BYTES)


def rows_of(keys: Sequence[int], signatures: Sequence[Rows | None]) -> Rows:
    """Return the rows of documents from their keys and, where near copies are looked for, their signatures."""
    rows = np.array(keys, "<u8").view(np.uint8).reshape(-1, KEY_BYTES)
    given = [signature for signature in signatures if signature is not None]
    return np.concatenate([rows, np.stack(given)], axis=1) if given else rows


class Seen:
    """The documents of a corpus so far, without copies. A row has `width` bytes; near copies are at least `similarity` alike."""

    def __init__(self, path: Path, *, near: bool, similarity: float, memory_bytes: int) -> None:
        self.width = KEY_BYTES + SIGNATURE_BYTES * near
        bands = 1 + SIGNATURE_BYTES // BAND_BYTES * near
        self._path = path
        self._enough = similarity * SIGNATURE_BYTES
        self._capacity = max(1, memory_bytes // (self.width + 8 * bands))
        # Documents are numbered from 1 on, and 0 means none. Untouched pages of the arrays take no memory.
        self._rows = np.zeros((self._capacity, self.width), np.uint8)
        self._latest = np.zeros((bands, self._capacity), np.uint32)  # the latest document with each hash
        self._previous = np.zeros((self._capacity, bands), np.uint32)  # by document: the one before it with the same hash
        self._bands = np.arange(bands)
        self._new: list[bytes] = []
        self.count = 0

    @property
    def num_written(self) -> int:
        """Return how many documents the file holds."""
        return self._path.stat().st_size // self.width if self._path.exists() else 0

    def restore(self, count: int) -> None:
        """Return to the state after `count` documents, and drop later ones from the file."""
        if not self._path.exists():
            return
        os.truncate(self._path, count * self.width)
        self.count = first = max(0, count - self._capacity)
        with open(self._path, "rb") as file:
            file.seek(first * self.width)
            while data := file.read(_ROWS_AT_ONCE * self.width):
                rows = np.frombuffer(data, np.uint8).reshape(-1, self.width)
                for row, slots in zip(rows, self._slots(rows), strict=True):
                    self._insert(row, slots)

    def add(self, rows: Rows) -> Iterator[str]:
        """Yield for each document why it is a copy ("" if it is none), and remember those that are not."""
        for row, slots in zip(rows, self._slots(rows), strict=True):
            reason = self._reason(row, slots)
            if not reason:
                self._insert(row, slots)
                self._new.append(row.tobytes())
            yield reason

    def write(self) -> None:
        """Append to the file the rows that are new since the last call."""
        if self._new:
            with open_durable(self._path, "ab") as file:
                file.write(b"".join(self._new))
            self._new.clear()

    def _slots(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Return the hash of each band of each row."""
        words = np.ascontiguousarray(rows).view("<u8") * _MIXER
        slots: npt.NDArray[np.int64] = ((words >> np.uint64(20)) % np.uint64(self._capacity)).astype(np.int64)
        return slots

    def _insert(self, row: Rows, slots: npt.NDArray[np.int64]) -> None:
        place = self.count % self._capacity
        self.count += 1
        self._rows[place] = row
        self._previous[place] = self._latest[self._bands, slots]
        self._latest[self._bands, slots] = self.count

    def _reason(self, row: Rows, slots: npt.NDArray[np.int64]) -> str:
        bands, documents = self._bands, self._latest[self._bands, slots]
        for _ in range(MOST_CANDIDATES):
            in_ring = documents.astype(np.int64) > max(0, self.count - self._capacity)
            bands, documents = bands[in_ring], documents[in_ring]
            if not len(documents):
                return ""
            places = (documents.astype(np.int64) - 1) % self._capacity
            agree = self._rows[places] == row
            if agree[:, :KEY_BYTES].all(axis=1).any():
                return EXACT
            if self.width > KEY_BYTES and (agree[:, KEY_BYTES:].sum(axis=1) >= self._enough).any():
                return NEAR
            documents = self._previous[places, bands]
        return ""
