"""What the parts of a corpus give, written into splits, with a journal of the parts from which a killed preparation goes on.

A line of the journal is written when a part is finished. It counts, from the first part on, what was read, dropped, and given to
each split. After a kill, the preparation goes on behind the last part all of whose documents are in finished shards. What it then
reads again is skipped as far as it is in shards already, so no shard is written twice, and no document is lost or doubled. That
is at most `CUT_BYTES` of files, because every split is cut there.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from osler.data.shards import FIRST_SHARD_TOKENS, SHARD_TOKENS, SPLITS, ShardWriter
from osler.data.tokenise import EMPTY, PartEnd, Piece
from osler.files.parts import Part
from osler.runtime.faults import fault
from osler.runtime.files import fingerprint, open_durable

CUT_BYTES = 1 << 27
KEYS = "keys.bin"  # the split keys of the documents of a validation corpus
COPIES = "copies"  # the reason why a copy of a document that is held out is dropped

Choice = Mapping[str, npt.NDArray[np.bool_]]  # which documents of a piece belong to each split


class CorpusWriter:
    """Writes one corpus into the splits of a folder; `choose` tells from their split keys to which split documents belong."""

    def __init__(
        self, folder: Path, splits: Sequence[str], choose: Callable[[npt.NDArray[np.uint64]], Choice], *, vocab_size: int
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.splits = {
            split: ShardWriter(
                folder / split, vocab_size=vocab_size, shard_tokens=SHARD_TOKENS if split == "train" else FIRST_SHARD_TOKENS
            )
            for split in splits
        }
        self._choose = choose
        self._journal = journal_of(folder, splits)
        self._keys = folder / KEYS if splits == ("validation",) else None
        self._new_keys: list[npt.NDArray[np.uint64]] = []
        self.parts, self.counts = self._go_on()
        self._skip = {split: shards.num_documents - self.counts[split] for split, shards in self.splits.items()}

    def _go_on(self) -> tuple[int, Counter[str]]:
        """Return the parts behind which to go on, and the counts of their journal; drop what the journal has of later parts."""
        finished = {split: shards.num_documents for split, shards in self.splits.items()}
        if self._keys is not None and self._keys.exists():
            finished["validation"] = min(finished["validation"], self._keys.stat().st_size // 8)
        parts, end, counts = 0, 0, Counter[str]()
        for number, (line, place) in enumerate(_lines(self._journal), 1):
            if any(line["counts"].get(split, 0) > documents for split, documents in finished.items()):
                break
            parts, end, counts = number, place, Counter(line["counts"])
        if self._journal.exists():
            os.truncate(self._journal, end)
        if self._keys is not None and self._keys.exists():
            os.truncate(self._keys, 8 * counts["validation"])
        return parts, counts

    def add(self, piece: Piece) -> None:
        """Take documents of the next part."""
        fault("prepare-piece")
        taken = 0
        for split, chosen in self._choose(piece.keys).items():
            places = np.flatnonzero(chosen).tolist()
            skipped = min(self._skip[split], len(places))
            self._skip[split] -= skipped
            self.counts[split] += len(places)
            taken += len(places)
            for place in places[skipped:]:
                tokens = slice(int(piece.ends[place - 1]) if place else 0, int(piece.ends[place]))
                has_mask = piece.is_masked is not None and piece.is_masked[place]
                mask = piece.masks[tokens] if piece.masks is not None and has_mask else None
                self.splits[split].add(piece.tokens[tokens], mask, int(piece.num_bytes[place]))
        self.counts[COPIES] += len(piece.keys) - taken
        if self._keys is not None:
            self._new_keys.append(piece.keys)

    def end_part(self, part: Part, end: PartEnd) -> None:
        """Write down that a part is finished."""
        before = self.counts["bytes"]
        self.counts.update({"bytes": part.num_bytes, "documents": end.documents, **end.drops})
        if self.counts["bytes"] // CUT_BYTES > before // CUT_BYTES:
            self._each(ShardWriter.cut)
        if self._keys is not None and self._new_keys:
            with open_durable(self._keys, "ab") as file:
                file.write(np.concatenate(self._new_keys).tobytes())
            self._new_keys.clear()
        fault("prepare-journal")
        with open(self._journal, "ab") as file:
            file.write(json.dumps({"digest": end.digest, "counts": self.counts}).encode() + b"\n")
        self.parts += 1

    def close(self) -> dict[str, Any]:
        """Write the last shards, and return what the manifest says of the corpus."""
        self._each(ShardWriter.close)
        return {
            "splits": {
                split: {"documents": shards.num_documents, "tokens": shards.num_tokens, "fingerprint": shards.fingerprint}
                for split, shards in self.splits.items()
                if shards.num_documents
            },
            "empty_documents": self.counts[EMPTY],
            "dropped_copies": self.counts[COPIES],
        }

    def _each(self, act: Callable[[ShardWriter], None]) -> None:
        for shards in self.splits.values():
            act(shards)

    def digest(self) -> str:
        """Return what identifies the content of all parts."""
        return fingerprint([line["digest"] for line, _ in _lines(self._journal)])


def journal_of(folder: Path, splits: Sequence[str]) -> Path:
    """Return the journal of a corpus that is written into some splits of a folder."""
    return folder / f"{splits[0]}.jsonl"


def digests(journal: Path) -> Iterator[str]:
    """Yield the digests of the parts in a journal."""
    return (line["digest"] for line, _ in _lines(journal))


def bytes_read(folder: Path) -> int:
    """Return how many bytes of its files were read for the training data in the folder of a source."""
    last = 0
    for line, _ in _lines(journal_of(folder, SPLITS[:1])):
        last = int(line["counts"]["bytes"])
    return last


def read_keys(folder: Path) -> npt.NDArray[np.uint64]:
    """Return the split keys of a validation corpus that was written into a folder."""
    path = folder / KEYS
    return np.fromfile(path, np.uint64) if path.exists() else np.zeros(0, np.uint64)


def _lines(journal: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the lines of a journal with where each ends; a torn one, which a kill leaves, ends them."""
    place = 0
    if journal.exists():
        with open(journal, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                place += len(line)
                yield json.loads(line), place
