"""From a corpus to a folder of shards: tokenised once, split into train and validation, complete or absent.

Preparation makes two passes over the documents. The first only hashes: it identifies the content, so that a folder made from the
same content with the same tokenizer is reused, and it decides which documents are held out. Documents that are equal but for case
and spacing go to the same side, so no validation document has a copy in train. The second pass tokenises in batches, appends
``<|endoftext|>`` and writes into a folder beside the target, which is renamed when every file and the manifest are on the disk.
An interrupted preparation therefore starts again from nothing.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
import uuid
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osler.data.documents import Corpus, Document
from osler.data.shards import DATA_MANIFEST, FORMAT_VERSION, SHARD_TOKENS, TOKENIZER, ShardSet, ShardWriter, read_data_manifest
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
class Prepared:
    """An open folder of shards; `validation` is None when nothing is held out, `reused` when it existed already."""

    train: ShardSet
    validation: ShardSet | None
    reused: bool


@dataclass(frozen=True)
class _Survey:
    """What the first pass found: a digest of the content, and the split key of each document that is not empty."""

    digest: str
    keys: Sequence[int]
    empty: int
    has_turns: bool


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


def prepare(corpus: Corpus, tokenizer: Tokenizer, out: str | Path, *, set_aside: bool = False, consent: str = "") -> Prepared:
    """Tokenise a corpus into the folder `out`, or reuse the folder when it was made from the same content and tokenizer.

    Copies of validation documents are dropped from train. Of the distinct documents, at least one is held out if there are two
    and `holdout_fraction` is not 0. Empty documents are skipped and counted. Raises UserError when nothing is left to learn
    from, or when `out` holds other data, unless `set_aside` renames these; the message names `consent`, the setting that
    allows it.
    """
    out = Path(out)
    survey = _survey(corpus.train)
    held_survey = None if corpus.validation is None else _survey(corpus.validation)
    held = _held_keys(survey, corpus) if held_survey is None else frozenset(held_survey.keys)
    if all(key in held for key in survey.keys):
        raise UserError(
            f"There is nothing to learn from: of {len(survey.keys) + survey.empty:,} documents {survey.empty:,} are "
            f"empty and {len(survey.keys):,} are copies of validation documents."
        )
    content = {
        "documents": survey.digest,
        "validation": None if held_survey is None else held_survey.digest,
        "holdout_fraction": corpus.holdout_fraction if held_survey is None else 0.0,
        "seed": corpus.seed,
    }
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "content_fingerprint": fingerprint(content),
        "content": content,
        "eos_id": tokenizer.eos_id,
        "vocab_size": tokenizer.vocab_size,
    }
    if set_aside:
        _set_aside(out, fingerprint(content))
    if held_survey is None and corpus.holdout_fraction > 0 and not held:
        logger.warning(
            f"Nothing is held out, so there is no held-out loss: the {len(survey.keys):,} documents that are not empty are equal "
            "but for case and spacing."
            if len(survey.keys) > 1
            else "Nothing is held out, so there is no held-out loss: there is only one document."
        )
    if _can_reuse(out, manifest, consent):
        return _open(out, reused=True)
    train = _Split("train", corpus.train, survey, held)
    if corpus.validation is None or held_survey is None:
        validation = _Split("validation", corpus.train, survey, held)
    else:
        validation = _Split("validation", corpus.validation, held_survey, held)
    _write_folder(out, manifest, [train, validation], tokenizer)
    return _open(out, reused=False)


def open_prepared(folder: str | Path, tokenizer: Tokenizer, whose: str = "of the run") -> Prepared:
    """Open a folder that `prepare` made; raises UserError when it is missing, torn, or of another tokenizer.

    The message says ``whose`` the given tokenizer is.
    """
    _refuse_other_tokenizer(folder, tokenizer, whose)
    return _open(Path(folder), reused=True)


def tokenizer_of_shards(folder: str | Path, given: str | None = None) -> Tokenizer:
    """Return the tokenizer of a folder of shards, from that folder or from the file ``given``.

    Raises UserError when the folder is missing or has no tokenizer, or when the file holds another one.
    """
    read_data_manifest(folder)
    file = Path(folder) / TOKENIZER if given is None else Path(given)
    if given is None and not file.is_file():
        raise UserError(f"{folder} has no {TOKENIZER}: set tokenizer.path to the file that it was prepared with.")
    tokenizer = Tokenizer.load(file).with_specials()
    _refuse_other_tokenizer(folder, tokenizer, f"in {file}")
    return tokenizer


def _refuse_other_tokenizer(folder: str | Path, tokenizer: Tokenizer, whose: str) -> None:
    wanted = read_data_manifest(folder)["tokenizer_fingerprint"]
    if tokenizer.fingerprint != wanted:
        raise UserError(
            f"The shards in {folder} were made with the tokenizer {wanted}, but the one {whose} is {tokenizer.fingerprint}, for "
            "which their tokens mean something else. Leave tokenizer.path out to use the one in the folder, or prepare the text "
            "again with `osler data prepare --tokenizer FILE`."
        )


def held_out(corpus: Corpus) -> frozenset[int]:
    """Return the split keys of the documents that `prepare` holds out of a corpus without validation documents."""
    return _held_keys(_survey(corpus.train), corpus)


def _survey(documents: Iterable[Document]) -> _Survey:
    digest, keys = hashlib.sha256(), array("Q")
    empty, has_turns = 0, False
    for document in documents:
        try:
            digest.update(document.exact_digest())
        except UnicodeEncodeError as error:
            where = document.where or "A document"
            raise UserError(f"{where} holds half a character (a lone surrogate) at position {error.start}.") from None
        if document.is_empty:
            empty += 1
            continue
        has_turns = has_turns or document.turn is not None
        keys.append(document.split_key())
    return _Survey(digest.hexdigest(), keys, empty, has_turns)


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


def _open(out: Path, *, reused: bool) -> Prepared:
    manifest = read_data_manifest(out)
    train = ShardSet.open(out, "train")
    validation = ShardSet.open(out, "validation") if "validation" in manifest["splits"] else None
    held = f", {validation.num_documents:,} held out" if validation is not None else ""
    verb = "Reusing the data prepared in" if reused else "Prepared"
    empty = f"; skipped {manifest['empty_documents']:,} empty" if manifest["empty_documents"] else ""
    copies = f"; dropped {manifest['dropped_copies']:,} copies of validation" if manifest["dropped_copies"] else ""
    logger.info(f"{verb} {out}: {train.num_documents:,} documents, {train.num_tokens:,} tokens{held}{empty}{copies}")
    return Prepared(train, validation, reused)


def _write_folder(out: Path, manifest: dict[str, Any], splits: Sequence[_Split], tokenizer: Tokenizer) -> None:
    """Write everything beside `out` and rename it at the end; leaves nothing behind when it fails."""
    partial = out.parent / f".{out.name}.partial-{uuid.uuid4().hex[:12]}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        partial.mkdir()
        with_mask = any(split.survey.has_turns for split in splits)
        entries = {split.name: _write_split(partial / split.name, split, tokenizer, with_mask) for split in splits}
        surveys = {id(split.survey): split.survey for split in splits}.values()
        manifest["splits"] = {name: entry for name, entry in entries.items() if entry["documents"]}
        manifest["empty_documents"] = sum(survey.empty for survey in surveys)
        is_given = manifest["content"]["validation"] is not None
        manifest["dropped_copies"] = len(splits[0].survey.keys) - len(splits[0]) if is_given else 0
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


def _write_split(folder: Path, split: _Split, tokenizer: Tokenizer, with_mask: bool) -> dict[str, Any]:
    round_trip = RoundTrip(tokenizer)
    writer = ShardWriter(folder, vocab_size=tokenizer.vocab_size, with_mask=with_mask, shard_tokens=SHARD_TOKENS)
    try:
        with Progress(len(split), "documents", label=f"Tokenising {split.name}") as progress:
            for batch in _batches(split):
                round_trip.look([part for document in batch[::LOOK_EVERY] for part in document.parts])
                for document, (ids, mask) in zip(batch, encode(tokenizer, batch), strict=True):
                    num_bytes = sum(len(part.encode("utf-8")) for part in document.parts)
                    writer.add(ids, mask, num_bytes, document.source)
                progress.update(writer.num_documents, tokens=writer.num_tokens)
                fault("prepare-batch")
        entry = writer.close()
        round_trip.warn()
    finally:
        writer.abort()
    fsync_dir(folder)
    return entry


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
