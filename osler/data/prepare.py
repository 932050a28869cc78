"""From sources to a folder of shards: tokenised once, split into train and validation, complete or absent.

Preparation makes two passes over the documents. The first only hashes: it identifies the content, so that a folder made from the
same content with the same tokenizer is reused, and it decides which documents are held out. Documents that are equal but for case
and spacing go to the same side, so no validation document has a copy in train. The second pass tokenises in batches, appends
``<|endoftext|>`` and writes into a folder beside the target, which is renamed when every file and the manifest are on the disk.
An interrupted preparation therefore starts again from nothing.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import time
import uuid
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osler.data.documents import Corpus, Document, Mixed
from osler.data.prepared import Prepared, open_folder
from osler.data.shards import DATA_MANIFEST, FORMAT_VERSION, SHARD_TOKENS, TOKENIZER, ShardWriter, read_data_manifest
from osler.runtime.errors import UserError
from osler.runtime.faults import fault
from osler.runtime.files import fingerprint, fsync_dir, write_atomic, write_json
from osler.runtime.log import Progress
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.chat import encode_examples
from osler.tokenizer.round_trip import RoundTrip

logger = logging.getLogger(__name__)

BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 2_000_000
LOOK_EVERY = 16  # documents: their start is decoded again, to see what the tokenizer loses
STALE_SECONDS = 24 * 3600  # the age at which what a killed preparation left is removed


@dataclass(frozen=True)
class _Survey:
    """What the first pass found: a digest of the content, and the split key of each document that is not empty."""

    digest: str
    keys: Sequence[int]
    empty: int


@dataclass(frozen=True)
class _Split:
    """One split to write; `held` are the split keys that are not in train."""

    name: str
    documents: Iterable[Document]
    survey: _Survey
    held: frozenset[int]

    def _takes(self, key: int) -> bool:
        return (key in self.held) == (self.name == "validation")

    def __len__(self) -> int:
        return sum(map(self._takes, self.survey.keys))

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents of this split. Raises UserError when the documents differ from those of the first pass."""
        digest = hashlib.sha256()
        keys = iter(self.survey.keys)
        for document in self.documents:
            digest.update(document.exact_digest())
            if not document.is_empty and (key := next(keys, None)) is not None and self._takes(key):
                yield document
        if digest.hexdigest() != self.survey.digest:
            raise UserError("The documents changed while they were being prepared; prepare them again.")


@dataclass(frozen=True)
class _Source:
    """A source to prepare, and what the first pass found in it and in its validation documents."""

    corpus: Corpus
    survey: _Survey
    held_survey: _Survey | None

    @property
    def content(self) -> dict[str, Any]:
        """What its shards depend on besides the tokenizer."""
        held = self.held_survey
        return {
            "documents": self.survey.digest,
            "validation": None if held is None else held.digest,
            "holdout_fraction": self.corpus.holdout_fraction if held is None else 0.0,
            "seed": self.corpus.seed,
        }

    @functools.cached_property
    def held(self) -> frozenset[int]:
        """The split keys of its validation documents."""
        return _held_keys(self.survey, self.corpus) if self.held_survey is None else frozenset(self.held_survey.keys)

    def splits(self, held: frozenset[int]) -> list[_Split]:
        """Return what is learned, without all that is `held` out of any source, and what is held out of this one."""
        train = _Split("train", self.corpus.train, self.survey, held)
        if self.corpus.validation is None or self.held_survey is None:
            return [train, _Split("validation", self.corpus.train, self.survey, self.held)]
        return [train, _Split("validation", self.corpus.validation, self.held_survey, self.held)]


def prepare(
    corpora: Mapping[str, Corpus],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    set_aside: bool = False,
    consent: str = "",
) -> Prepared:
    """Tokenise the corpora of sources into the folder `out`, or reuse it when it was made from the same with this tokenizer.

    Copies of validation documents are dropped from the training data of all sources. Of the distinct documents of a source, at
    least one is held out if there are two and `holdout_fraction` is not 0. Empty documents are skipped and counted. `weights`
    are kept beside the shards for runs that name none. Raises UserError when nothing is left to learn from, or when
    `out` holds other data, unless `set_aside` renames these; the message names `consent`, the setting that allows it.
    """
    out = Path(out)
    sources = {
        name: _Source(corpus, _survey(corpus.train), None if corpus.validation is None else _survey(corpus.validation))
        for name, corpus in corpora.items()
    }
    held = frozenset[int]().union(*(source.held for source in sources.values()))
    for name, source in sources.items():
        _check_source(name if len(sources) > 1 else "", source, held)
    content = [source.content for source in sources.values()]
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "content_fingerprint": fingerprint(content[0] if len(content) == 1 else content),
        "eos_id": tokenizer.eos_id,
        "vocab_size": tokenizer.vocab_size,
        "sources": {
            name: {"weight": weight, "content": source.content}
            for (name, source), weight in zip(sources.items(), weights or [1.0] * len(sources), strict=True)
        },
    }
    if set_aside:
        _set_aside(out, manifest["content_fingerprint"])
    if _can_reuse(out, manifest, consent):
        _keep_weights(out, [entry["weight"] for entry in manifest["sources"].values()])
        return open_folder(out)
    _write_folder(out, manifest, {name: source.splits(held) for name, source in sources.items()}, tokenizer)
    return open_folder(out, reused=False)


def _keep_weights(out: Path, weights: Sequence[float]) -> None:
    """Write other weights into the manifest of shards that are used again."""
    manifest = read_data_manifest(out)
    if [entry["weight"] for entry in manifest["sources"].values()] != weights:
        for entry, weight in zip(manifest["sources"].values(), weights, strict=True):
            entry["weight"] = weight
        write_json(out / DATA_MANIFEST, manifest)


def _check_source(name: str, source: _Source, held: frozenset[int]) -> None:
    """Raise UserError, which names the source, when what is held out of all sources leaves nothing of it to learn from."""
    survey, of_source = source.survey, f" in the source {name}" if name else ""
    if all(key in held for key in survey.keys):
        raise UserError(
            f"There is nothing to learn from{of_source}: of {len(survey.keys) + survey.empty:,} documents {survey.empty:,} are "
            f"empty and {len(survey.keys):,} are copies of validation documents."
        )
    if source.held_survey is None and source.corpus.holdout_fraction > 0 and not source.held:
        reason = (
            f"the {len(survey.keys):,} documents that are not empty are equal but for case and spacing"
            if len(survey.keys) > 1
            else "there is only one document"
        )
        logger.warning(f"Nothing is held out{of_source}, so there is no held-out loss: {reason}.")


def held_out(corpora: Iterable[Corpus]) -> frozenset[int]:
    """Return the split keys of the documents that `prepare` holds out of corpora without validation documents."""
    return frozenset[int]().union(*(_held_keys(_survey(corpus.train), corpus) for corpus in corpora if corpus.validation is None))


def _survey(documents: Iterable[Document]) -> _Survey:
    digest, keys = hashlib.sha256(), array("Q")
    empty = 0
    for document in documents:
        try:
            digest.update(document.exact_digest())
        except UnicodeEncodeError as error:
            where = document.where or "A document"
            raise UserError(f"{where} holds half a character (a lone surrogate) at position {error.start}.") from None
        if document.is_empty:
            empty += 1
            continue
        keys.append(document.split_key())
    return _Survey(digest.hexdigest(), keys, empty)


def _held_keys(survey: _Survey, corpus: Corpus) -> frozenset[int]:
    distinct = set(survey.keys)
    if corpus.holdout_fraction <= 0 or len(distinct) < 2:
        return frozenset()
    count = min(max(1, round(corpus.holdout_fraction * len(distinct))), len(distinct) - 1)
    return frozenset(sorted(distinct, key=lambda key: hashlib.sha256(f"{corpus.seed}:{key}".encode()).digest())[:count])


def _can_reuse(out: Path, manifest: dict[str, Any], consent: str = "") -> bool:
    """Return whether `out` holds exactly these data; raises UserError when it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / DATA_MANIFEST).is_file():
        raise UserError(f"{out} exists but is not a folder of prepared data; give another folder or remove it.")
    found = read_data_manifest(out)
    _check_same("tokenizer", out, found["tokenizer_fingerprint"], manifest["tokenizer_fingerprint"])
    _check_same("content", out, found["content_fingerprint"], manifest["content_fingerprint"], consent)
    return True


def _set_aside(out: Path, content_fingerprint: str) -> None:
    """Rename prepared data of other content after its fingerprint; delete them when data of that name exist already."""
    if not (out / DATA_MANIFEST).is_file():
        return
    found = read_data_manifest(out)["content_fingerprint"]
    if found == content_fingerprint:
        return
    aside = out.with_name(f"{out.name}-{found}")
    if aside.exists():
        shutil.rmtree(out)
    else:
        out.rename(aside)
    new = f"the new data have fingerprint {content_fingerprint}"
    logger.info(f"The data prepared before (fingerprint {found}) are in {aside}; {new}.")


def _check_same(what: str, out: Path, found: str, wanted: str, consent: str = "") -> None:
    if found != wanted:
        allow = f" allow it with {consent}," if consent else ""
        raise UserError(
            f"{out} was prepared with another {what}: its fingerprint is {found}, now it is {wanted}. Put the {what} back to "
            f"go on with what was prepared,{allow} or choose another folder."
        )


def _write_folder(out: Path, manifest: dict[str, Any], sources: Mapping[str, Sequence[_Split]], tokenizer: Tokenizer) -> None:
    """Write everything beside `out` and rename it at the end; leaves nothing behind when it fails."""
    partial = out.parent / f".{out.name}.partial-{uuid.uuid4().hex[:12]}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        partial.mkdir()
        for name, splits in sources.items():
            seed = manifest["sources"][name]["content"]["seed"]
            entries = {split.name: _write_split(partial / name / split.name, split, tokenizer, seed) for split in splits}
            surveys = {id(split.survey): split.survey for split in splits}.values()
            manifest["sources"][name] |= {
                "splits": {split: entry for split, entry in entries.items() if entry["documents"]},
                "empty_documents": sum(survey.empty for survey in surveys),
                "dropped_copies": len(splits[0].survey.keys) - len(splits[0]) - (len(splits[1]) if len(surveys) == 1 else 0),
            }
        write_atomic(partial / TOKENIZER, tokenizer.to_bytes())
        fault("prepare-manifest")
        write_json(partial / DATA_MANIFEST, manifest)
        fault("prepare-rename")
        if not _rename(partial, out) and not _can_reuse(out, manifest):
            raise UserError(f"{out} was emptied by something else while it was being prepared; prepare it again.")
    except OSError as error:
        raise UserError(f"The data could not be written to {out}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rename(partial: Path, out: Path) -> bool:
    """Give the finished folder its name; return False when another process has put one there in the meantime."""
    try:
        if out.is_dir():
            out.rmdir()  # refuses unless it is empty
        os.rename(partial, out)
    except OSError:
        if not (out / DATA_MANIFEST).is_file():
            raise
        return False
    fsync_dir(out.parent)
    return True


def _write_split(folder: Path, split: _Split, tokenizer: Tokenizer, seed: int) -> dict[str, Any]:
    round_trip = RoundTrip(tokenizer)
    writer = ShardWriter(folder, vocab_size=tokenizer.vocab_size, shard_tokens=SHARD_TOKENS)
    with Progress(len(split), "documents", label=f"Tokenising {split.name}") as progress:
        for batch in _batches(Mixed(split, seed)):
            round_trip.look([part for document in batch[::LOOK_EVERY] for part in document.parts])
            for document, (ids, mask) in zip(batch, encode(tokenizer, batch), strict=True):
                writer.add(ids, mask, sum(len(part.encode("utf-8")) for part in document.parts))
            progress.update(writer.num_documents, tokens=writer.num_tokens)
            fault("prepare-batch")
    writer.close()
    round_trip.warn()
    return {"documents": writer.num_documents, "tokens": writer.num_tokens, "fingerprint": writer.fingerprint}


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[tuple[list[int], list[int] | None]]:
    """Return per document its ids with ``<|endoftext|>``, and its loss mask: None for a text, which is all learned."""
    texts = iter(tokenizer.encode_batch([document.text for document in documents if document.turn is None]))
    turns = iter(encode_examples(tokenizer, [document.turn for document in documents if document.turn is not None]))
    eos_id = tokenizer.eos_id
    return [([*next(texts), eos_id], None) if document.turn is None else next(turns) for document in documents]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += sum(map(len, document.parts))
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _remove_stale(out: Path) -> None:
    """Remove what killed preparations of this folder left behind; a running one would have written lately."""
    for folder in out.parent.iterdir():
        if not folder.name.startswith(f".{out.name}.partial-"):
            continue
        newest = max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])
        if time.time() - newest > STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
