"""Write the documents of a corpus into splits, and each finished part into a journal, from which a killed preparation resumes.

A line of the journal is written when a part is finished. It counts, from the first part on, what was read, dropped, and given to
each split. After a kill, the preparation resumes after the last part whose documents are all in finished shards. It reads the
later parts again and skips the documents that are in shards already, so no shard is written twice, and no document is lost or
doubled. It reads at most `CUT_BYTES` of files and one part again, because all splits begin a new shard after that many bytes. A
text or compressed file is one part.

A validation split keeps only its first `VALIDATION_TOKENS`, because no evaluation reads more. For a corpus that is given for
validation, the split keys of all documents are kept as well. Training leaves these out, so other programs can measure on them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from osler.data.config import FIRST_SHARD_TOKENS, VALIDATION_TOKENS, CleanConfig
from osler.data.documents import EMPTY
from osler.data.duplicates import Seen
from osler.data.shards import SHARD_TOKENS, SPLITS, ShardWriter
from osler.data.tokenise import Chunk, PartEnd
from osler.runtime.faults import fault
from osler.runtime.files import no_pause, open_durable

CUT_BYTES = 1 << 27
KEYS_FILE = "keys.bin"  # the split keys of the documents of a validation corpus
SEEN_FILE = "seen.bin"  # the rows by which copies are found
COPIES = "copies"  # the reason why a copy of a held-out document is dropped
_NUM_DISTINCT = "kept"  # counts the documents that are no copies of earlier ones
_NUM_KEYS = "keys"  # counts the documents of a validation corpus
_OTHER_COUNTS = {"bytes", "documents", "train", "validation", _NUM_DISTINCT, _NUM_KEYS, EMPTY, COPIES}  # not drops by reason

Choice = Mapping[str, npt.NDArray[np.bool_]]  # by split: which documents of a chunk belong to it


class CorpusWriter:
    """Writes one corpus into the splits of a folder; `choose` takes split keys and says which split each document belongs to."""

    def __init__(
        self,
        folder: Path,
        splits: Sequence[str],
        choose: Callable[[npt.NDArray[np.uint64]], Choice],
        *,
        vocab_size: int,
        clean: CleanConfig | None = None,
        before_shard: Callable[[int], None] = no_pause,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        sizes = {SPLITS[0]: SHARD_TOKENS, SPLITS[1]: FIRST_SHARD_TOKENS}
        self.splits = {split: ShardWriter(folder / split, vocab_size=vocab_size, shard_tokens=sizes[split]) for split in splits}
        for shards in self.splits.values():
            shards.before_shard = before_shard
        self._choose = choose
        self._journal = journal_of(folder, splits)
        self._keys_file = folder / KEYS_FILE if splits == ("validation",) else None
        self._keys_of_part: list[npt.NDArray[np.uint64]] = []
        self._seen = None
        if clean is not None and clean.duplicates != "keep":
            memory_bytes, near = clean.duplicates_memory_mb << 20, clean.duplicates == "near"
            self._seen = Seen(folder / SEEN_FILE, near=near, similarity=clean.similarity, memory_bytes=memory_bytes)
        self.num_parts, self.counts = self._go_on()
        self._skip = {split: shards.num_documents - self.counts[split] for split, shards in self.splits.items()}

    def _go_on(self) -> tuple[int, Counter[str]]:
        """Return how many parts are finished, and their counts; delete the journal's lines about later parts."""
        finished = {split: shards.num_documents for split, shards in self.splits.items()}
        if self._keys_file is not None and self._keys_file.exists():
            finished[_NUM_KEYS] = self._keys_file.stat().st_size // 8
        if self._seen is not None:
            finished[_NUM_DISTINCT] = self._seen.num_written
        parts, end, counts = 0, 0, Counter[str]()
        for number, (line, place) in enumerate(_journal_lines(self._journal), 1):
            if any(line["counts"].get(split, 0) > documents for split, documents in finished.items()):
                break
            parts, end, counts = number, place, Counter(line["counts"])
        if self._journal.exists():
            os.truncate(self._journal, end)
        if self._keys_file is not None and self._keys_file.exists():
            os.truncate(self._keys_file, 8 * counts[_NUM_KEYS])
        if self._seen is not None:
            self._seen.restore(counts[_NUM_DISTINCT])
        return parts, counts

    @property
    def is_full(self) -> bool:
        """Whether no more documents are written, because this is a validation corpus that has enough of them."""
        return self._keys_file is not None and self.splits[SPLITS[1]].num_tokens >= VALIDATION_TOKENS

    def add(self, chunk: Chunk) -> None:
        """Take documents of the next part."""
        fault("prepare-chunk")
        num_chosen, is_new, choice = 0, self._without_copies(chunk), self._choose(chunk.keys)
        for split, shards in self.splits.items():
            places = np.flatnonzero(choice[split] & is_new).tolist()
            skipped = min(self._skip[split], len(places))
            self._skip[split] -= skipped
            self.counts[split] += skipped
            num_chosen += len(places)
            for place in places[skipped:]:
                if split == SPLITS[1] and shards.num_tokens >= VALIDATION_TOKENS:
                    shards.cut()  # so that a streamed run can evaluate on it from now on
                    break
                tokens = slice(int(chunk.ends[place - 1]) if place else 0, int(chunk.ends[place]))
                has_mask = chunk.is_masked is not None and chunk.is_masked[place]
                mask = chunk.masks[tokens] if chunk.masks is not None and has_mask else None
                shards.add(chunk.tokens[tokens], mask, int(chunk.num_bytes[place]))
                self.counts[split] += 1
        self.counts[COPIES] += int(is_new.sum()) - num_chosen
        if self._keys_file is not None:
            self._keys_of_part.append(chunk.keys)
            self.counts[_NUM_KEYS] += len(chunk.keys)

    def _without_copies(self, chunk: Chunk) -> npt.NDArray[np.bool_]:
        """Return which documents are no copies of earlier ones; count the others."""
        is_new = np.ones(len(chunk.keys), bool)
        if self._seen is not None and chunk.rows is not None:
            for place, reason in enumerate(self._seen.add(chunk.rows)):
                if reason:
                    is_new[place] = False
                    self.counts[reason] += 1
            self.counts[_NUM_DISTINCT] += int(is_new.sum())
        return is_new

    def end_part(self, num_bytes: int, end: PartEnd) -> None:
        """Write into the journal that a part with `num_bytes` of its file is finished."""
        before = self.counts["bytes"]
        self.counts.update({"bytes": num_bytes, "documents": end.documents, **end.drops})
        if self.counts["bytes"] // CUT_BYTES > before // CUT_BYTES:
            for shards in self.splits.values():
                shards.cut()
        if self._keys_file is not None and self._keys_of_part:
            with open_durable(self._keys_file, "ab") as file:
                file.write(np.concatenate(self._keys_of_part).tobytes())
            self._keys_of_part.clear()
        if self._seen is not None:
            self._seen.write()
        line: dict[str, Any] = {"digest": end.digest, "counts": self.counts}
        line |= {name: found for name, found in (("examples", end.examples), ("exam_items", end.exam_items)) if found}
        fault("prepare-journal")
        with open(self._journal, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
        self.num_parts += 1

    def close(self) -> dict[str, Any]:
        """Write the last shards, and return what the manifest says of the corpus."""
        for shards in self.splits.values():
            shards.close()
        return {
            "splits": {
                split: {
                    "documents": shards.num_documents,
                    "tokens": shards.num_tokens,
                    "bytes": shards.num_bytes,
                    "fingerprint": shards.fingerprint,
                }
                for split, shards in self.splits.items()
            },
            "empty_documents": self.counts[EMPTY],
            "dropped_copies": self.counts[COPIES],
            "dropped": {reason: count for reason, count in sorted(self.counts.items()) if reason not in _OTHER_COUNTS},
        }


def journal_of(folder: Path, splits: Sequence[str]) -> Path:
    """Return the journal of a corpus that is written into some splits of a folder."""
    return folder / f"{splits[0]}.jsonl"


class Journal(NamedTuple):
    """What a journal says: the digest of each part, the counts so far, examples of drops by reason, ids of exam items."""

    digests: list[str]
    counts: Counter[str]
    examples: dict[str, list[str]]
    exam_items: set[str]


def read_journal(folder: Path, splits: Sequence[str] = SPLITS[:1]) -> Journal:
    """Read the journal of a corpus that was written into some splits of a folder; by default it is that of a source."""
    journal = Journal([], Counter(), {}, set())
    for line, _ in _journal_lines(journal_of(folder, splits)):
        journal.digests.append(line["digest"])
        journal = journal._replace(counts=Counter(line["counts"]))
        for reason, texts in line.get("examples", {}).items():
            journal.examples.setdefault(reason, []).extend(texts)
        journal.exam_items.update(line.get("exam_items", ()))
    return journal


def read_keys(folder: Path) -> npt.NDArray[np.uint64]:
    """Return the split keys of a validation corpus that was written into a folder."""
    path = folder / KEYS_FILE
    return np.fromfile(path, np.uint64) if path.exists() else np.zeros(0, np.uint64)


def _journal_lines(journal: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each line of a journal with the byte at which it ends; stop at a torn line, which a kill can leave."""
    place = 0
    if journal.exists():
        with open(journal, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                place += len(line)
                yield json.loads(line), place
