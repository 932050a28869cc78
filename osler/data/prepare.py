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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from osler.data.card import CARD, data_card
from osler.data.content import OPTIONS, Stream, difference_of, first_change, manifest_of, other_data, streams_of
from osler.data.documents import Corpus
from osler.data.exams import EXAMS, look_through
from osler.data.holdout import HeldOut, Keys, find_limits
from osler.data.prepared import Prepared, open_folder
from osler.data.shards import DATA_MANIFEST, INDEX, SPLITS, TOKENIZER, read_data_manifest
from osler.data.tokenise import PartEnd, Task
from osler.data.workers import process_count, tokenise
from osler.data.writing import SEEN, Choice, CorpusWriter, journal_of, read_keys
from osler.runtime.errors import UserError
from osler.runtime.faults import fault
from osler.runtime.files import fingerprint, locked, no_pause, write_atomic, write_json
from osler.runtime.log import Progress
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.round_trip import Losses

logger = logging.getLogger(__name__)


def prepare(
    corpora: Mapping[str, Corpus],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    validation: Mapping[str, Corpus] | None = None,
    consent: str | None = "",
    processes: int | None = None,
    before_shard: Callable[[int], None] = no_pause,
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
    wanted = manifest_of(corpora, validation or {}, weights, tokenizer)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out, "--out"):
            if _is_ready(out, wanted, corpora, validation or {}, consent):
                _keep_weights(out, weights)
                return open_folder(out)
            sets, sources = streams_of(out, wanted, corpora, validation or {})
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
    what, difference = difference_of(found, wanted)
    if not difference:
        sets, sources = streams_of(out, found, corpora, validation)
        what, difference = "content", first_change([*sets, *sources])
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
        raise other_data(out, what, difference, consent)
    return False


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
    sets: Sequence[Stream],
    sources: Sequence[Stream],
    tokenizer: Tokenizer,
    processes: int | None,
    before_shard: Callable[[int], None],
) -> None:
    """Write what is missing of a folder; what is there already is a part of the same data."""
    for torn in out.glob(".*.tmp"):  # what a killed writer leaves of the two files below
        torn.unlink()
    fault("prepare-manifest")
    write_json(out / DATA_MANIFEST, manifest)
    write_atomic(out / TOKENIZER, tokenizer.to_bytes())
    size = sum(file.size for stream in (*sets, *sources) for file in stream.corpus.files)
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
    journals = {journal_of(stream.folder, stream.splits): stream.corpus.clean for stream in sources}
    write_atomic(out / EXAMS, look_through(journals).to_bytes())
    write_atomic(out / CARD, data_card(manifest, list(journals)).encode())
    fault("prepare-complete")
    write_json(out / DATA_MANIFEST, manifest)
    for stream in sources:
        (stream.folder / SEEN).unlink(missing_ok=True)


def _choose(stream: Stream, keys: Keys, held: HeldOut) -> Choice:
    """Return which documents of a source are learned, and which it holds out."""
    learned = {SPLITS[0]: ~held.by_any(keys)}
    return learned if stream.splits == SPLITS[:1] else {**learned, SPLITS[1]: held.by(str(stream.folder), keys)}


class _Work:
    """Tokenises corpora and writes them."""

    def __init__(
        self, tokenizer: Tokenizer, processes: int, before_shard: Callable[[int], None], write_manifest: Callable[[], None]
    ) -> None:
        self.tokenizer, self.processes = tokenizer, processes
        self.before_shard, self.write_manifest = before_shard, write_manifest
        self.progress: Progress
        self.losses = Losses()
        self.digests: dict[int, str] = {}  # of the content of finished streams
        self.bytes_done = self.tokens = 0
        self.began = time.monotonic()

    def run(self, streams: Sequence[Stream], choose: Callable[[Stream, Keys], Choice]) -> None:
        """Write all parts of these streams that are not written yet, and complete their entries."""
        writers = [
            CorpusWriter(
                stream.folder,
                stream.splits,
                partial(choose, stream),
                vocab_size=self.tokenizer.vocab_size,
                clean=None if stream.corpus.clean is None else stream.corpus.clean.config,
            )
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
        tasks = _in_turns(streams, writers)
        with closing(tokenise([stream.corpus for stream in streams], self.tokenizer, tasks, self.processes)) as results:
            for task, result in results:
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
                rate = self.tokens / max(1e-9, time.monotonic() - self.began)
                self.progress.update(self.bytes_done, tokens=self.tokens, **{"tokens/s": round(rate)})

    def _close(self, stream: Stream, writer: CorpusWriter) -> None:
        """Write the last shards of a corpus as soon as it has no more parts, and describe it in the manifest."""
        found = writer.close()
        entry = stream.entry
        for name in ("splits", "dropped"):
            entry[name] = {**entry.get(name, {}), **found.pop(name)}
        self.digests[id(stream)] = writer.digest()
        for name, count in found.items():
            entry[name] = entry.get(name, 0) + count
        self.write_manifest()  # a run that reads along may go round again, or evaluate


def _in_turns(streams: Sequence[Stream], writers: Sequence[CorpusWriter]) -> Iterator[Task]:
    """Yield the parts of streams that are not finished; each has its share of the bytes, by weight, at any time."""
    orders = [stream.corpus.order() for stream in streams]
    turns = [(writer.counts["bytes"] / streams[number].weight, number, writer.parts) for number, writer in enumerate(writers)]
    heapq.heapify(turns)
    while turns:
        done, number, place = heapq.heappop(turns)
        stream = streams[number]
        if place < len(orders[number]):
            part = stream.corpus.parts[int(orders[number][place])]
            yield Task(number, int(orders[number][place]), part, only_keys=writers[number].is_full)
            heapq.heappush(turns, (done + part.num_bytes / stream.weight, number, place + 1))


def _check_source(stream: Stream, is_one_of_many: bool) -> None:
    """Raise UserError when nothing of a source is left to learn from; warn when it holds nothing out."""
    entry, of_source = stream.entry, f" in the source {stream.folder.name}" if is_one_of_many else ""
    learned, held = (entry["splits"].get(split, {}).get("documents", 0) if split in stream.splits else 0 for split in SPLITS)
    if not learned:
        copies, dropped = entry["dropped_copies"] + held, entry["dropped"]
        reasons = [f"{entry['empty_documents']:,} are empty", f"{copies:,} are copies of validation documents"]
        if dropped:
            reasons.append(f"cleaning leaves out {sum(dropped.values()):,} ({', '.join(dropped)})")
        raise UserError(
            f"There is nothing to learn from{of_source}: of {entry['empty_documents'] + copies + sum(dropped.values()):,} "
            f"documents {', '.join(reasons[:-1])} and {reasons[-1]}."
        )
    if stream.splits == SPLITS and not held:
        same = f"the {learned:,} documents that are not empty are equal but for case and spacing"
        reason = same if learned > 1 else "there is only one document"
        logger.warning(f"Nothing is held out{of_source}, so there is no held-out loss: {reason}.")
