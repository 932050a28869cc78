"""From sources to a folder of shards, in one pass over parts of files. A kill only interrupts this pass.

Several processes read and tokenise the parts (`workers`, `tokenise`). The results are taken in a fixed order and written by one
process (`writing`), so the shards do not depend on the number of processes. Explicit validation documents come first, because
their copies are left out of all training data; then the sources take turns by their weights. What a source holds out is decided
by hash (`holdout`).

The folder is written in place. Its manifest says from the start what is being prepared, and in the end that it is complete. The
same command continues an unfinished folder. It reuses a finished one without reading the sources, as long as the sizes and times
of change of their files are the same. If only times differ, it compares the content. A folder of other data is refused, unless it
is unfinished and has no training data yet: then it is cleared.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from osler.data.card import CARD, data_card
from osler.data.content import OPTIONS, Target, difference_of, manifest_of, other_data, targets_of
from osler.data.documents import EMPTY, Corpus
from osler.data.exams import look_through
from osler.data.holdout import HELD_OUT, HeldOut, Keys, check_rest, find_limits, hold_out, nothing_to_learn
from osler.data.prepared import Prepared, open_folder, tell
from osler.data.shards import DATA_MANIFEST, INDEX, SPLITS, TOKENIZER, VALIDATION_PREFIX, order_of, read_data_manifest
from osler.data.tokenise import PartEnd, Task
from osler.data.workers import process_count, tokenise
from osler.data.writing import SEEN_FILE, Choice, CorpusWriter, journal_of, read_journal, read_keys
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
    """Tokenise the corpora of sources into the folder `out`, or continue or reuse it when it was made from the same corpora.

    `validation` are further sets by name; copies of any validation document are dropped from the training data of all
    sources. If a source has two distinct documents and its `holdout_fraction` is not 0, at least one document is held out. Empty
    documents are skipped and counted. `weights` are kept beside the shards for runs that name none. `processes` is how many
    processes help (0: this one works alone, None: as many as pay).

    Raises UserError when nothing is left to learn from, when another process writes the folder, or when the folder holds other
    data, finished or not. The message names `consent`, the setting that allows them; with `consent` None they are set aside.
    """
    out, validation = Path(out), validation or {}
    wanted = manifest_of(corpora, validation, weights or [1.0] * len(corpora), tokenizer)
    try:
        if out.is_file():
            raise UserError(f"{out} is a file; give a folder for the shards.")
        out.mkdir(parents=True, exist_ok=True)
        with locked(out, None):
            of_sources, of_sets = list(corpora.values()), list(validation.values())
            manifest = _begun(out, wanted, partial(difference_of, out, of_sources, of_sets, tokenizer), consent)
            if manifest["complete"]:
                return tell(open_folder(out))
            sets, sources = targets_of(out, manifest, of_sources, of_sets)
            try:
                _write(out, manifest, sets, sources, tokenizer, processes, before_shard)
            except UserError:
                if not any(journal_of(target.folder, target.splits).exists() for target in (*sets, *sources)):
                    _clear(out)  # no part is finished
                    out.rmdir()
                raise
        return tell(open_folder(out, reused=False))
    except KeyboardInterrupt:
        logger.info(f"What is prepared so far stays in {out}; the same command goes on from there.")
        raise
    except OSError as error:
        reason = f"{error.strerror or error}. The same command goes on from what is written."
        raise UserError(f"The data could not be written to {out}: {reason}") from error


# -- is it there already? ----------------------------------------------------------------------------------------------


def _begun(out: Path, wanted: dict[str, Any], differs: Callable[[], tuple[str, str]], consent: str | None) -> dict[str, Any]:
    """Return the manifest of `out` if it holds these data or some of them; else empty the folder and return `wanted`.

    Sources keep the names in `out`, because its folders have them; weights, places and times of files become those of `wanted`.
    """
    if not (out / DATA_MANIFEST).is_file():
        if any(not entry.name.startswith(f".{DATA_MANIFEST}.") for entry in out.iterdir()):
            raise UserError(f"{out} exists but is not a folder of prepared data; give another folder or remove it.")
        return wanted
    found = read_data_manifest(out)
    what, difference = differs()
    if not difference:
        for kind in ("sources", "validation"):
            for (name, old), entry in zip(list(found[kind].items()), wanted[kind].values(), strict=True):
                now = {key: entry[key] for key in ("weight", "content") if key in entry}
                found[kind][name] = old | now if found["complete"] else entry | order_of(old)
        if found["complete"] and found != (before := read_data_manifest(out)):
            write_atomic(out / CARD, data_card(found, out).encode())
            write_json(out / DATA_MANIFEST, found)
            weights = {name: entry["weight"] for name, entry in found["sources"].items()}
            if weights != {name: entry["weight"] for name, entry in before["sources"].items()}:
                logger.info(f"The weights of the sources in {out} are now {', '.join(f'{w:g}' for w in weights.values())}.")
        return found
    if not found["complete"] and next(out.glob(f"*/{SPLITS[0]}/{INDEX}"), None) is None:  # it has no training data
        _clear(out)
    elif consent is None:
        _set_aside(out, found)
    else:
        raise other_data(out, what, difference, consent, is_finished=found["complete"])
    return wanted


def _clear(out: Path) -> None:
    """Remove what is in a folder, its manifest last, so that a kill leaves a folder that can be cleared again."""
    for path in sorted(out.iterdir(), key=lambda path: path.name == DATA_MANIFEST):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _set_aside(out: Path, found: Mapping[str, Any]) -> None:
    """Move data into a folder beside `out`, named after their fingerprint if they are complete; the manifest goes last."""
    names = [found["content_fingerprint"]] if found["complete"] else (f"unfinished-{number}" for number in itertools.count(1))
    places = (out.with_name(f"{out.name}-{name}") for name in names)
    aside = next((place for place in places if not (place / DATA_MANIFEST).is_file()), None)
    if aside is None:  # the folder of this name has the same data already
        return _clear(out)
    aside.mkdir(exist_ok=True)
    for path in sorted(out.iterdir(), key=lambda path: path.name == DATA_MANIFEST):
        path.rename(aside / path.name)
    known = f" (fingerprint {found['content_fingerprint']})" if found["complete"] else ""
    logger.info(f"The data prepared before{known} are in {aside}.")


# -- writing it --------------------------------------------------------------------------------------------------------


def _write(
    out: Path,
    manifest: dict[str, Any],
    sets: Sequence[Target],
    sources: Sequence[Target],
    tokenizer: Tokenizer,
    processes: int | None,
    before_shard: Callable[[int], None],
) -> None:
    """Write what is missing in a folder; what is there is a part of the same data."""
    for torn in out.glob(".*.tmp"):  # what a killed writer leaves of the two files below
        torn.unlink()
    fault("prepare-manifest")
    write_json(out / DATA_MANIFEST, manifest)
    write_atomic(out / TOKENIZER, tokenizer.to_bytes())
    size = sum(file.size for target in (*sets, *sources) for file in target.corpus.files)
    write_manifest = partial(write_json, out / DATA_MANIFEST, manifest)
    corpora = {target.folder.name: target.corpus for target in sources}
    with Progress(size, "bytes", label="Preparing") as progress:
        work = _Work(tokenizer, process_count(size) if processes is None else processes, before_shard, write_manifest, progress)
        limits = find_limits(corpora)
        work.run(sets, [lambda keys: {SPLITS[1]: np.ones(len(keys), bool)}] * len(sets))
        keys = np.sort(np.concatenate([np.zeros(0, np.uint64), *(read_keys(target.folder) for target in sets)]))
        held = hold_out(corpora, limits, keys)
        for name, corpus in corpora.items():
            check_rest(name, corpus, held)
        work.run(sources, [partial(_choose, limit, held) for limit in limits])
    work.losses.warn()
    digests = [fingerprint(read_journal(target.folder, target.splits).digests) for target in (*sets, *sources)]
    options = [[target.entry["content"][name] for name in OPTIONS] for target in sources]
    manifest["content_fingerprint"] = fingerprint([options, digests])
    manifest["complete"] = True
    exams = look_through({target.folder: target.corpus.clean for target in sources})
    for name, data in {**exams.as_files(), CARD: data_card(manifest, out).encode()}.items():
        write_atomic(out / name, data)
    fault("prepare-complete")
    write_json(out / DATA_MANIFEST, manifest)
    for target in sources:
        (target.folder / SEEN_FILE).unlink(missing_ok=True)


def _choose(limit: HeldOut, held: HeldOut, keys: Keys) -> Choice:
    """Return which documents of a source are learned, and which it holds out."""
    return {SPLITS[0]: ~held.holds(keys), SPLITS[1]: limit.holds(keys)}


@dataclass
class _Work:
    """Tokenises corpora and writes them."""

    tokenizer: Tokenizer
    processes: int
    before_shard: Callable[[int], None]
    write_manifest: Callable[[], None]
    progress: Progress
    losses: Losses = field(default_factory=Losses)
    bytes_done: int = 0
    tokens: int = 0
    began: float = field(default_factory=time.monotonic)

    def run(self, targets: Sequence[Target], chosen_by: Sequence[Callable[[Keys], Choice]]) -> None:
        """Write all parts of these targets that are not written yet, and complete their entries.

        `chosen_by` has for each target the function that says which split a document belongs to.
        """
        writers = [
            CorpusWriter(
                target.folder,
                target.splits,
                choose,
                vocab_size=self.tokenizer.vocab_size,
                clean=None if target.corpus.clean is None else target.corpus.clean.config,
                before_shard=self.before_shard,
            )
            for target, choose in zip(targets, chosen_by, strict=True)
        ]
        self.bytes_done += sum(writer.counts["bytes"] for writer in writers)
        if any(writer.num_parts for writer in writers):
            logger.info(f"Going on with the {sum(writer.counts['documents'] for writer in writers):,} documents in the folder.")
        for target, writer in zip(targets, writers, strict=True):
            if writer.num_parts == len(target.corpus.parts):
                self._close(target, writer)
        tasks = _in_turns(targets, writers)
        with closing(tokenise([target.corpus for target in targets], self.tokenizer, tasks, self.processes)) as results:
            for task, result in results:
                writer, target = writers[task.corpus], targets[task.corpus]
                if not isinstance(result, PartEnd):
                    writer.add(result)
                    self.tokens += len(result.tokens)
                else:
                    num_bytes = target.corpus.parts[task.number].num_bytes
                    writer.end_part(num_bytes, result)
                    self.losses.add(result.losses)
                    self.bytes_done += num_bytes
                    if writer.num_parts == len(target.corpus.parts):
                        self._close(target, writer)
                rate = self.tokens / max(1e-9, time.monotonic() - self.began)
                self.progress.update(self.bytes_done, tokens=self.tokens, **{"tokens/s": round(rate)})

    def _close(self, target: Target, writer: CorpusWriter) -> None:
        """Write the last shards of a corpus as soon as it has no more parts, and describe it in the manifest.

        Raises UserError when it has no documents to use. What is written of this corpus and of others stays.
        """
        found, entry, name = writer.close(), target.entry, target.folder.name
        documents = {split: counts["documents"] for split, counts in found["splits"].items()}
        if documents.get(SPLITS[0]) == 0:
            copies = found["dropped_copies"] + documents.get(SPLITS[1], 0)
            raise nothing_to_learn(name, {EMPTY: found["empty_documents"], HELD_OUT: copies, **found["dropped"]})
        if documents.get(SPLITS[1]) == 0:
            if target.splits == SPLITS[1:]:
                raise UserError(f"The validation set {name.removeprefix(VALIDATION_PREFIX)} has no document that is not empty.")
            same = "those that are left are equal, or nearly" if documents[SPLITS[0]] > 1 else "there is only one document"
            logger.warning(f"Nothing is held out of the source {name}, so it has no held-out loss: {same}.")
        for kind in ("splits", "dropped"):
            entry[kind] = {**entry.get(kind, {}), **found.pop(kind)}
        for kind, count in found.items():
            entry[kind] = entry.get(kind, 0) + count
        self.write_manifest()  # a run that reads along may begin another epoch, or evaluate


def _in_turns(targets: Sequence[Target], writers: Sequence[CorpusWriter]) -> Iterator[Task]:
    """Yield the unfinished parts of targets, so that at any time each target has had its share of the bytes, by weight."""
    orders = [target.corpus.order() for target in targets]
    turns = [(writer.counts["bytes"] / targets[number].weight, number, writer.num_parts) for number, writer in enumerate(writers)]
    heapq.heapify(turns)
    while turns:
        done, number, place = heapq.heappop(turns)
        target = targets[number]
        if place < len(orders[number]):
            part = int(orders[number][place])
            yield Task(number, part, only_keys=writers[number].is_full)
            heapq.heappush(turns, (done + target.corpus.parts[part].num_bytes / target.weight, number, place + 1))
