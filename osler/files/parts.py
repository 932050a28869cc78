"""Files on this machine or on the hub, and parts of them that can be read alone, in any order and in any process.

The size of a file decides where it is cut, so nothing is opened to know the parts of a corpus. A part of a parquet file holds the
row groups that begin in its range of bytes; the sizes of the earlier groups say where a group begins. A part of plain JSON lines
holds the lines that begin in its range. A text file, or a file that is compressed as a whole, is one part.

Where that makes fewer than ``MIN_PARTS``, each range is dealt out among several parts, which have every k-th document of it. So
a few books, which would follow one another, are mixed when the parts are taken in a drawn order.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from itertools import accumulate, islice
from pathlib import Path
from typing import Protocol, TypeVar

from osler.files.find import PARQUET_ENDING, TEXT_ENDINGS, compression, ending, find_files, shown
from osler.runtime.errors import UserError

T = TypeVar("T")

PART_BYTES = 1 << 22
MIN_PARTS = 16  # a range is read again for each of its parts, and more of them would mix hardly better


class File(Protocol):
    """A file that can be read: a name for messages, whose ending tells the kind, and a stamp that changes with the content."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def stamp(self) -> str: ...

    def open(self) -> BufferedReader:
        """Open the file for reading at any position; raises UserError when it is no longer what `stamp` says."""

    def check(self) -> None:
        """Raise UserError when the file is no longer what `stamp` says."""

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class LocalFile:
    """A file on a disk of this machine."""

    path: Path
    size: int
    stamp: str

    @classmethod
    def at(cls, path: str | Path) -> LocalFile:
        """Return the file at a path as it is now; raises UserError when there is none."""
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"{shown(path)} cannot be read: {error.strerror}. Run the same command again when it can.") from None
        return cls(Path(path), status.st_size, str(status.st_mtime_ns))

    @property
    def name(self) -> str:
        """Return the path as it can be printed."""
        return shown(self.path)

    def open(self) -> BufferedReader:
        """Open the file by Python, because pyarrow takes no names that are not UTF-8."""
        self.check()
        return open(self.path, "rb")

    def check(self) -> None:
        """Raise UserError when the file's size or time of change differs from when it was found."""
        if LocalFile.at(self.path) != self:
            raise UserError(f"{self.name} changed while it was being read. Run the same command again when it is complete.")


def find_local(path: str | Path, endings: Sequence[str], key: str) -> list[File]:
    """Return the files at a path of this machine, by name; see `find_files`."""
    return list(map(LocalFile.at, find_files(path, endings, key=key)))


@dataclass(frozen=True)
class Part:
    """The rows that begin in the bytes `start` to `stop` of a file, or the whole text; `stop` None means the end of the file.

    With `every` it has each `every`-th of these documents, from number `first` on.
    """

    file: File
    start: int = 0
    stop: int | None = None
    first: int = 0
    every: int = 1

    @property
    def num_bytes(self) -> int:
        """Return the size of the part; the parts among which a range is dealt share its size."""
        size = min(self.file.size, self.file.size if self.stop is None else self.stop) - self.start
        return size * (self.first + 1) // self.every - size * self.first // self.every

    def dealt(self, documents: Iterator[T]) -> Iterator[T]:
        """Yield those of the documents in the range of bytes that belong to the part."""
        return islice(documents, self.first, None, self.every)


class Parts:
    """The parts of files in their order; each is made when it is asked for, so millions of them take no memory."""

    def __init__(self, files: Sequence[File], min_parts: int = MIN_PARTS) -> None:
        self.files, self.min_parts = files, min_parts
        self._part_bytes = PART_BYTES  # kept here, so that other processes cut files alike
        self._every = max(1, -(-min_parts // max(1, sum(map(self._ranges, files)))))
        self._ends = list(accumulate(self._ranges(file) * self._shares(file) for file in files))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Part]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Part:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        place = index - (self._ends[number - 1] if number else 0)
        file = self.files[number]
        in_file, first = divmod(place, every := self._shares(file))
        if self._ranges(file) == 1:
            return Part(file, first=first, every=every)
        start, stop = in_file * self._part_bytes, (in_file + 1) * self._part_bytes
        return Part(file, start, None if stop >= file.size else stop, first, every)

    def _ranges(self, file: File) -> int:
        """Return into how many ranges of bytes a file is cut."""
        kind = ending(file.name)
        is_whole = kind in TEXT_ENDINGS or (kind != PARQUET_ENDING and compression(file.name) is not None)
        return 1 if is_whole else max(1, -(-file.size // self._part_bytes))

    def _shares(self, file: File) -> int:
        """Return among how many parts each range is dealt: no text, which is few documents, and nothing that is long to read."""
        is_long = self._ranges(file) == 1 and file.size > self._part_bytes
        return 1 if is_long or ending(file.name) in TEXT_ENDINGS else self._every
