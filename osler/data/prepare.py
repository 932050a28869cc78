"""From sources to a folder of shards: one pass over parts of files, in processes, that a kill only interrupts.

Each part is read and tokenised by whatever process is free (`workers`, `tokenise`). The results are taken in a fixed order and
written by one process (`writing`), so the shards do not depend on the number of processes. Explicit validation documents come
first, because their copies are left out of all training data; then the sources take turns by their weights. What a source holds
out is decided by hash (`holdout`).

The folder is written in place. Its manifest says from the start what is being prepared, and in the end that it is complete. The
same command goes on with an unfinished folder. It reuses a finished one without reading the sources while sizes and times of
change of their files are the same; where only times differ, the content is compared.
"""

from __future__ import annotations

import heapq
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from osler.data.documents import Corpus
from osler.data.holdout import HeldOut, Keys, find_limits
from osler.data.prepared import Prepared, open_folder
from osler.data.shards import DATA_MANIFEST, FORMAT_VERSION, INDEX, SPLITS, TOKENIZER, VALIDATION_PREFIX, read_data_manifest
from osler.data.tokenise import PartEnd, Task
from osler.data.workers import process_count, tokenise
from osler.data.writing import Choice, CorpusWriter, digests, journal_of, read_keys
from osler.files.parts import PART_BYTES
from osler.runtime.errors import UserError
from osler.runtime.faults import fault
from osler.runtime.files import fingerprint, locked, no_pause, write_atomic, write_json
from osler.runtime.log import Progress
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.round_trip import Losses

logger = logging.getLogger(__name__)

OPTIONS = ("holdout_fraction", "seed", "options", "part_bytes")  # what the shards of a corpus depend on besides its files


@dataclass(frozen=True)
class _Stream:
    """A corpus and where it is written; `entry` is its place in the manifest."""

    corpus: Corpus
    folder: Path
    splits: Sequence[str]
    entry: dict[str, Any]
    weight: float = 1.0


def prepare(
    corpora: Mapping[str, Corpus],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    validation: Mapping[str, Corpus] | None = None,
    consent: str | None = "",
    processes: int | None = None,
    before_shard: Callable[[], None] = no_pause,
) -> Prepared:
    """Tokenise the corpora of sources into the folder `out`, go on with it, or reuse it when it was made from the same.

    `validation` are further sets by name; copies of any validation document are dropped from the training data of all
    sources. Of the distinct documents of a source, at least one is held out if there are two and `holdout_fraction` is not 0.
    Empty documents are skipped and counted. `weights` are kept beside the shards for runs that name none. `processes` None is
    as many as are worth while, 0 this one alone.

    Raises UserError when nothing is left to learn from, when another process writes the folder, or when it holds other data;
    the message names `consent`, the setting that allows that, and with None other data are set aside.
    """
    out = Path(out)
    weights = weights or [1.0] * len(corpora)
    wanted = _manifest(corpora, validation or {}, weights, tokenizer)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out, "--out"):
            if _is_ready(out, wanted, corpora, validation or {}, consent):
                _keep_weights(out, weights)
                return open_folder(out)
            sets, sources = _streams(out, wanted, corpora, validation or {})
            try:
                _write(out, wanted, sets, sources, tokenizer, processes, before_shard)
            except UserError:
                if next(out.rglob(INDEX), None) is None:  # nothing was written that is worth going on with
                    _clear(out)
                    out.rmdir()
                raise
        return open_folder(out, reused=False)
    except KeyboardInterrupt:
        logger.info(f"What is prepared so far stays in {out}; the same command goes on from there.")
        raise
    except OSError as error:
        reason = f"{error.strerror or error}. The same command goes on from what is written."
        raise UserError(f"The data could not be written to {out}: {reason}") from error


def _manifest(
    corpora: Mapping[str, Corpus], validation: Mapping[str, Corpus], weights: Sequence[float], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Return the manifest of what is to be prepared."""
    return {
        "format_version": FORMAT_VERSION,
        "complete": False,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "eos_id": tokenizer.eos_id,
        "vocab_size": tokenizer.vocab_size,
        "sources": {
            name: {"weight": weight, "content": _content(corpus), "splits": {}}
            for (name, corpus), weight in zip(corpora.items(), weights, strict=True)
        },
        "validation": {name: {"content": _content(corpus), "splits": {}} for name, corpus in validation.items()},
    }


def _content(corpus: Corpus) -> dict[str, Any]:
    """Return what the shards of a corpus depend on besides the tokenizer."""
    return {
        "files": [[file.name, file.size, file.stamp] for file in corpus.files],
        "options": dict(corpus.options),
        "validation": None if corpus.validation is None else _content(corpus.validation),
        "holdout_fraction": corpus.holdout_fraction if corpus.validation is None else 0.0,
        "seed": corpus.seed,
        "part_bytes": PART_BYTES,
    }


def _streams(
    out: Path, manifest: dict[str, Any], corpora: Mapping[str, Corpus], validation: Mapping[str, Corpus]
) -> tuple[list[_Stream], list[_Stream]]:
    """Return the explicit validation corpora, and the sources, each with its folder."""
    entries = manifest["validation"]
    sets = [_Stream(corpus, out / f"{VALIDATION_PREFIX}{name}", SPLITS[1:], entries[name]) for name, corpus in validation.items()]
    sources = []
    for (name, entry), corpus in zip(manifest["sources"].items(), corpora.values(), strict=True):
        if corpus.validation is not None:
            sets.append(_Stream(corpus.validation, out / name, SPLITS[1:], entry))
        splits = SPLITS if corpus.validation is None and corpus.holdout_fraction > 0 else SPLITS[:1]
        sources.append(_Stream(corpus, out / name, splits, entry, entry["weight"]))
    return sets, sources


# -- is it there already? ----------------------------------------------------------------------------------------------


def _is_ready(
    out: Path, wanted: dict[str, Any], corpora: Mapping[str, Corpus], validation: Mapping[str, Corpus], consent: str | None
) -> bool:
    """Return whether `out` holds exactly these data, finished; after False it holds a part of them, or nothing."""
    if not (out / DATA_MANIFEST).is_file():
        if any(not entry.name.startswith(f".{DATA_MANIFEST}.") for entry in out.iterdir()):
            raise UserError(f"{out} exists but is not a folder of prepared data; give another folder or remove it.")
        return False
    found = read_data_manifest(out)
    what, difference = _difference(found, wanted)
    if not difference:
        sets, sources = _streams(out, found, corpora, validation)
        what, difference = "content", _first_change([*sets, *sources])
    if not difference:
        for kind in ("sources", "validation"):
            for entry, new in zip(found[kind].values(), wanted[kind].values(), strict=True):
                entry["content"] = new["content"]  # the same, with other times and places of files
        if found != read_data_manifest(out):
            write_json(out / DATA_MANIFEST, found)
        return bool(found["complete"])
    if not found["complete"]:
        logger.info(f"{out} held unfinished data of something else ({difference}); they are removed.")
        _clear(out)
    elif consent is None and what == "content":
        _set_aside(out, found["content_fingerprint"])
    else:
        raise _other_data(out, what, difference, consent)
    return False


def check_unchanged(out: Path, corpora: Sequence[Corpus | None], consent: str) -> None:
    """Raise UserError when sources differ from those that a folder was made of; None is a source whose files are gone."""
    entries = list(read_data_manifest(out)["sources"].items())
    known = [(name, entry, corpus) for (name, entry), corpus in zip(entries, corpora, strict=False) if corpus is not None]
    difference = "" if len(entries) == len(corpora) else f"it has {len(entries)} sources, now there are {len(corpora)}"
    for _, entry, corpus in known:
        difference = difference or _other_content(entry["content"], _content(corpus))
    if not difference:
        difference = _first_change([_Stream(corpus, out / name, SPLITS[:1], entry) for name, entry, corpus in known])
    if difference:
        raise _other_data(out, "content", difference, consent)


def _other_data(out: Path, what: str, difference: str, consent: str | None) -> UserError:
    allow = f" allow it with {consent}," if consent else ""
    return UserError(
        f"{out} was prepared with another {what}: {difference}. Put the {what} back to go on with what was prepared,{allow} "
        "or choose another folder."
    )


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, str]:
    """Return what of two manifests differs and how, "" when at most times and names of files do."""
    one, other = found["tokenizer_fingerprint"], wanted["tokenizer_fingerprint"]
    if one != other:
        return "tokenizer", f"its fingerprint is {one}, now it is {other}"
    for kind, title in (("sources", "source"), ("validation", "validation set")):
        if len(found[kind]) != len(wanted[kind]):
            return "content", f"it has {len(found[kind])} {title}s, now there are {len(wanted[kind])}"
        for old, new in zip(found[kind].values(), wanted[kind].values(), strict=True):
            if difference := _other_content(old["content"], new["content"]):
                return "content", difference
    if not found["complete"]:
        weights = [[entry["weight"] for entry in manifest["sources"].values()] for manifest in (found, wanted)]
        names = [[list(manifest[kind]) for kind in ("sources", "validation")] for manifest in (found, wanted)]
        if weights[0] != weights[1] or names[0] != names[1]:
            return "content", "its sources have other names or weights"
    return "", ""


def _other_content(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> str:
    if old is None or new is None:
        return "" if old is new else "one has validation documents, the other has none"
    for name in OPTIONS:
        if old[name] != new[name]:
            return f"{name} is {old[name]}, now it is {new[name]}"
    if len(old["files"]) != len(new["files"]):
        return f"it has {len(old['files']):,} files, now there are {len(new['files']):,}"
    for (_, size, _), (name, new_size, _) in zip(old["files"], new["files"], strict=True):
        if size != new_size:
            return f"{name} has {new_size:,} bytes, it had {size:,}"
    return _other_content(old["validation"], new["validation"])


def _first_change(streams: Sequence[_Stream]) -> str:
    """Return which file with another time of change has another content than a folder was made of; "" if none has.

    Reads the parts of such files that the journals name.
    """
    corpora = [stream.corpus for stream in streams]
    tasks, known = [], []
    for number, stream in enumerate(streams):
        content = stream.entry["content"]
        old = content["files"] if stream.splits != SPLITS[1:] or content["validation"] is None else content["validation"]["files"]
        touched = {file for file, (_, _, stamp) in zip(stream.corpus.files, old, strict=True) if file.stamp != stamp}
        lines = digests(journal_of(stream.folder, stream.splits)) if touched else ()
        for place, digest in zip(stream.corpus.order().tolist(), lines, strict=False):
            part = stream.corpus.parts[place]
            if part.file in touched:
                tasks.append(Task(number, place, part))
                known.append(digest)
    if tasks:
        logger.info("Files have another time of change than when they were prepared; comparing their content.")
    processes = process_count(sum(task.part.num_bytes for task in tasks))
    ends = ((task, result) for task, result in tokenise(corpora, None, tasks, processes) if isinstance(result, PartEnd))
    for digest, (task, end) in zip(known, ends, strict=True):
        if end.digest != digest:
            return f"{task.part.file.name} has changed"
    return ""


def _keep_weights(out: Path, weights: Sequence[float]) -> None:
    """Write other weights into the manifest of shards that are used again."""
    manifest = read_data_manifest(out)
    if [entry["weight"] for entry in manifest["sources"].values()] != list(weights):
        for entry, weight in zip(manifest["sources"].values(), weights, strict=True):
            entry["weight"] = weight
        write_json(out / DATA_MANIFEST, manifest)


def _clear(out: Path) -> None:
    """Remove what is in a folder, its manifest last, so that a kill leaves a folder that can be cleared again."""
    for path in sorted(out.iterdir(), key=lambda path: path.name == DATA_MANIFEST):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _set_aside(out: Path, found: str) -> None:
    """Move prepared data into a folder beside theirs that is named after their fingerprint; the manifest goes last."""
    aside = out.with_name(f"{out.name}-{found}")
    if (aside / DATA_MANIFEST).is_file():
        _clear(out)
    else:
        aside.mkdir(exist_ok=True)
        for path in sorted(out.iterdir(), key=lambda path: path.name == DATA_MANIFEST):
            path.rename(aside / path.name)
    logger.info(f"The data prepared before (fingerprint {found}) are in {aside}.")


# -- writing it --------------------------------------------------------------------------------------------------------


def _write(
    out: Path,
    manifest: dict[str, Any],
    sets: Sequence[_Stream],
    sources: Sequence[_Stream],
    tokenizer: Tokenizer,
    processes: int | None,
    before_shard: Callable[[], None],
) -> None:
    """Write what is missing of a folder; what is there already is a part of the same data."""
    for torn in out.glob(".*.tmp"):  # what a killed writer leaves of the two files below
        torn.unlink()
    fault("prepare-manifest")
    write_json(out / DATA_MANIFEST, manifest)
    write_atomic(out / TOKENIZER, tokenizer.to_bytes())
    size = sum(part.num_bytes for stream in (*sets, *sources) for part in stream.corpus.parts)
    write_manifest = partial(write_json, out / DATA_MANIFEST, manifest)
    work = _Work(tokenizer, process_count(size) if processes is None else processes, before_shard, write_manifest)
    with Progress(size, "bytes", label="Preparing") as work.progress:
        work.run(sets, lambda stream, keys: {SPLITS[1]: np.ones(len(keys), bool)})
        keys = np.sort(np.concatenate([np.zeros(0, np.uint64), *(read_keys(stream.folder) for stream in sets)]))
        held = HeldOut(find_limits({str(stream.folder): stream.corpus for stream in sources}), keys)
        work.run(sources, lambda stream, keys: _choose(stream, keys, held))
    work.losses.warn()
    try:
        for stream in sources:
            _check_source(stream, len(sources) > 1)
    except UserError:
        _clear(out)
        raise
    options = [[stream.entry["content"][name] for name in OPTIONS] for stream in sources]
    manifest["content_fingerprint"] = fingerprint([options, [work.digests[id(stream)] for stream in (*sets, *sources)]])
    manifest["complete"] = True
    fault("prepare-complete")
    write_json(out / DATA_MANIFEST, manifest)


def _choose(stream: _Stream, keys: Keys, held: HeldOut) -> Choice:
    """Return which documents of a source are learned, and which it holds out."""
    learned = {SPLITS[0]: ~held.by_any(keys)}
    return learned if stream.splits == SPLITS[:1] else {**learned, SPLITS[1]: held.by(str(stream.folder), keys)}


class _Work:
    """Tokenises corpora and writes them."""

    def __init__(
        self, tokenizer: Tokenizer, processes: int, before_shard: Callable[[], None], write_manifest: Callable[[], None]
    ) -> None:
        self.tokenizer, self.processes = tokenizer, processes
        self.before_shard, self.write_manifest = before_shard, write_manifest
        self.progress: Progress
        self.losses = Losses()
        self.digests: dict[int, str] = {}  # of the content of finished streams
        self.bytes_done = self.tokens = 0

    def run(self, streams: Sequence[_Stream], choose: Callable[[_Stream, Keys], Choice]) -> None:
        """Write all parts of these streams that are not written yet, and complete their entries."""
        writers = [
            CorpusWriter(stream.folder, stream.splits, partial(choose, stream), vocab_size=self.tokenizer.vocab_size)
            for stream in streams
        ]
        for writer in writers:
            self.bytes_done += writer.counts["bytes"]
            for shards in writer.splits.values():
                shards.before_shard = self.before_shard
        if any(writer.parts for writer in writers):
            logger.info(f"Going on with the {sum(writer.counts['documents'] for writer in writers):,} documents in the folder.")
        for stream, writer in zip(streams, writers, strict=True):
            if writer.parts == len(stream.corpus.parts):
                self._close(stream, writer)
        tasks = _in_turns(streams, [writer.parts for writer in writers])
        for task, result in tokenise([stream.corpus for stream in streams], self.tokenizer, tasks, self.processes):
            writer, stream = writers[task.corpus], streams[task.corpus]
            if not isinstance(result, PartEnd):
                writer.add(result)
                self.tokens += len(result.tokens)
            else:
                writer.end_part(task.part, result)
                self.losses.add(result.losses)
                self.bytes_done += task.part.num_bytes
                if writer.parts == len(stream.corpus.parts):
                    self._close(stream, writer)
            self.progress.update(self.bytes_done, tokens=self.tokens)

    def _close(self, stream: _Stream, writer: CorpusWriter) -> None:
        """Write the last shards of a corpus as soon as it has no more parts, and describe it in the manifest."""
        found = writer.close()
        entry = stream.entry
        entry["splits"] = {**entry["splits"], **found.pop("splits")}
        self.digests[id(stream)] = writer.digest()
        for name, count in found.items():
            entry[name] = entry.get(name, 0) + count
        self.write_manifest()  # a run that reads along may go round again, or evaluate


def _in_turns(streams: Sequence[_Stream], begun: Sequence[int]) -> Iterator[Task]:
    """Yield the parts of streams that are not finished; each has its share of the bytes, by weight, at any time."""
    orders = [stream.corpus.order() for stream in streams]
    turns = [(0.0, number, place) for number, place in enumerate(begun)]
    heapq.heapify(turns)
    while turns:
        done, number, place = heapq.heappop(turns)
        stream = streams[number]
        if place < len(orders[number]):
            part = stream.corpus.parts[int(orders[number][place])]
            yield Task(number, int(orders[number][place]), part)
            heapq.heappush(turns, (done + part.num_bytes / stream.weight, number, place + 1))


def _check_source(stream: _Stream, is_one_of_many: bool) -> None:
    """Raise UserError when nothing of a source is left to learn from; warn when it holds nothing out."""
    entry, of_source = stream.entry, f" in the source {stream.folder.name}" if is_one_of_many else ""
    learned, held = (entry["splits"].get(split, {}).get("documents", 0) if split in stream.splits else 0 for split in SPLITS)
    if not learned:
        copies = entry["dropped_copies"]
        raise UserError(
            f"There is nothing to learn from{of_source}: of {entry['empty_documents'] + copies + held:,} documents "
            f"{entry['empty_documents']:,} are empty and {copies + held:,} are copies of validation documents."
        )
    if stream.splits == SPLITS and not held:
        same = f"the {learned:,} documents that are not empty are equal but for case and spacing"
        reason = same if learned > 1 else "there is only one document"
        logger.warning(f"Nothing is held out{of_source}, so there is no held-out loss: {reason}.")
