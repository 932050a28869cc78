"""Documents to a folder of shards: tokenised once, split into train and validation, whole or not there at all.

The idea: two passes over the documents. The first only hashes: it names the content (an existing folder made from the
same content with the same tokenizer is reused without tokenising anything) and decides by document what is held out.
Documents that are equal but for case and spacing go to the same side, so no validation document has a copy in train.
The second pass tokenises in batches, appends ``<|endoftext|>`` and writes into a folder beside the target, which takes
the target's name only when every file and then the manifest are on the disk. An interrupted preparation therefore
starts again from nothing; there is no half state to resume.
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

from osler.data.documents import Document
from osler.data.shards import DATA_MANIFEST, FORMAT_VERSION, SHARD_TOKENS, TOKENIZER, ShardSet, ShardWriter, read_data_manifest
from osler.errors import UserError
from osler.runtime.faults import fault
from osler.runtime.files import fingerprint, fsync_dir, write_atomic, write_json
from osler.runtime.log import Progress
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.chat import encode_examples

logger = logging.getLogger(__name__)

BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 2_000_000
STALE_SECONDS = 24 * 3600  # what a killed preparation left behind is removed after a day


@dataclass(frozen=True)
class Prepared:
    """An open folder of shards; `validation` is None when nothing is held out, `reused` when it was there already."""

    train: ShardSet
    validation: ShardSet | None
    reused: bool
    manifest: dict[str, Any]


@dataclass(frozen=True)
class _Survey:
    """What the first pass found: a name for the content, and per document that is not empty its split key."""

    digest: str
    keys: Sequence[int]
    empty: int
    has_turns: bool


def prepare(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    validation: Iterable[Document] | None = None,
    holdout_fraction: float = 0.0,
    seed: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    set_aside: bool = False,
    consent: str = "",
) -> Prepared:
    """Tokenise `documents` into the folder `out`, or reuse it when it was made from the same content and tokenizer.

    `documents` is iterated twice and must give the same each time (an iterator is read into a list first). Validation
    data are the documents of `validation`, whose copies in train are dropped, or a share of the documents:
    `holdout_fraction` of the distinct ones chosen by `seed`, at least one if there are two. Empty documents are
    skipped and counted. Raises UserError when nothing is left to learn from, or when `out` holds other data, which
    ``set_aside`` gives another name instead; ``consent`` is what a person gives to have that, for the message.
    """
    out = Path(out)
    documents = list(documents) if isinstance(documents, Iterator) else documents
    validation = list(validation) if isinstance(validation, Iterator) else validation
    survey = _survey(documents)
    held_survey = _survey(validation) if validation is not None else None
    held = _held_keys(survey, held_survey, holdout_fraction, seed)
    if not any(key not in held for key in survey.keys):
        raise UserError(
            f"There is nothing to learn from: of {len(survey.keys) + survey.empty:,} documents {survey.empty:,} are "
            f"empty and {len(survey.keys):,} are copies of validation documents."
        )
    content = {
        "documents": survey.digest,
        "validation": None if held_survey is None else held_survey.digest,
        "holdout_fraction": 0.0 if held_survey is not None else holdout_fraction,
        "seed": seed,
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
    if _can_reuse(out, manifest, consent):
        return _open(out, reused=True)
    passes = [_Pass(documents, survey, held, is_train=True)]
    if held_survey is None:
        passes.append(_Pass(documents, survey, held, is_train=False))
    elif validation is not None:
        passes.append(_Pass(validation, held_survey, held, is_train=False))
    _write_folder(out, manifest, passes, tokenizer, shard_tokens)
    return _open(out, reused=False)


def open_prepared(out: str | Path, tokenizer: Tokenizer) -> Prepared:
    """Open a folder that `prepare` made; UserError when it is missing, torn, or made with another tokenizer."""
    manifest = read_data_manifest(out)
    _check_same("tokenizer", Path(out), manifest["tokenizer_fingerprint"], tokenizer.fingerprint)
    return _open(Path(out), reused=True)


def tokenizer_of_shards(folder: str | Path, given: str | None = None) -> Tokenizer:
    """The tokenizer that a folder of shards was cut with, which lies in it, or the ``given`` file.

    Raises UserError when the folder is none, has no tokenizer, or was cut with another than that.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"There is no folder {folder}; set data.path to one that `osler data prepare` wrote.")
    wanted = read_data_manifest(path)["tokenizer_fingerprint"]
    file = path / TOKENIZER if given is None else Path(given)
    if given is None and not file.is_file():
        raise UserError(f"{folder} has no {TOKENIZER}: set tokenizer.path to the file that it was prepared with.")
    tokenizer = Tokenizer.load(file).with_specials()
    refuse_other_tokenizer(path, wanted, tokenizer, f"in {file}")
    return tokenizer


def refuse_other_tokenizer(folder: Path, wanted: str, tokenizer: Tokenizer, whose: str) -> None:
    """Raise UserError when shards were cut with another tokenizer than that of ``whose``."""
    if tokenizer.fingerprint != wanted:
        raise UserError(
            f"The shards in {folder} were cut with the tokenizer {wanted}, and the one {whose} is {tokenizer.fingerprint}: their "
            f"tokens mean something else to it. Leave tokenizer.path out to use the one in the folder, or prepare the text again "
            "with `osler data prepare --tokenizer FILE`."
        )


@dataclass(frozen=True)
class _Pass:
    """One split to write: which of the documents, by their split keys, belong to it."""

    documents: Iterable[Document]
    survey: _Survey
    held: frozenset[int]
    is_train: bool

    @property
    def split(self) -> str:
        return "train" if self.is_train else "validation"

    def chosen(self) -> Iterator[Document]:
        """The documents of this split. Raises UserError when they are no longer those of the first pass."""
        digest = hashlib.sha256()
        index = 0
        for document in self.documents:
            digest.update(document.exact_digest())
            if document.is_empty:
                continue
            if index < len(self.survey.keys) and (self.survey.keys[index] in self.held) != self.is_train:
                yield document
            index += 1
        if digest.hexdigest() != self.survey.digest:
            raise UserError("The documents changed while they were being prepared; prepare them again.")


def _survey(documents: Iterable[Document]) -> _Survey:
    digest, keys = hashlib.sha256(), array("Q")
    empty, has_turns = 0, False
    for document in documents:
        try:
            digest.update(document.exact_digest())
        except UnicodeEncodeError as error:
            where = document.source or "A document"
            raise UserError(f"{where} holds half a character (a lone surrogate) at position {error.start}.") from None
        if document.is_empty:
            empty += 1
            continue
        has_turns = has_turns or document.turn is not None
        keys.append(document.split_key())
    return _Survey(digest.hexdigest(), keys, empty, has_turns)


def held_out(documents: Iterable[Document], fraction: float, seed: int) -> frozenset[int]:
    """The split keys of the documents that :func:`prepare` holds out when no validation documents are given."""
    return _held_keys(_survey(documents), None, fraction, seed)


def _held_keys(survey: _Survey, held_survey: _Survey | None, fraction: float, seed: int) -> frozenset[int]:
    """The split keys that may not be in train."""
    if held_survey is not None:
        return frozenset(held_survey.keys)
    distinct = set(survey.keys)
    if fraction <= 0 or len(distinct) < 2:
        return frozenset()
    count = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    return frozenset(sorted(distinct, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())[:count])


def _can_reuse(out: Path, manifest: dict[str, Any], consent: str = "") -> bool:
    """Whether `out` holds exactly these data; UserError when it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / DATA_MANIFEST).is_file():
        raise UserError(f"{out} exists but is not a folder of prepared data; give another folder or remove it.")
    found = read_data_manifest(out)
    _check_same("tokenizer", out, found["tokenizer_fingerprint"], manifest["tokenizer_fingerprint"])
    _check_same("content", out, found["content_fingerprint"], manifest["content_fingerprint"], consent)
    return True


def _set_aside(out: Path, content_fingerprint: str) -> None:
    """Rename prepared data of another content after it; of the same content once more, as after going back and forth, drop it."""
    if not (out / DATA_MANIFEST).is_file():
        return
    found = read_data_manifest(out)["content_fingerprint"]
    aside = out.with_name(f"{out.name}-{found}")
    if found == content_fingerprint:
        return
    if aside.exists():
        shutil.rmtree(out)
    else:
        out.rename(aside)
    logger.info(
        f"The data prepared before, of fingerprint {found}, are now in {aside}; those given now have {content_fingerprint}."
    )


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
    return Prepared(train, validation, reused, manifest)


def _write_folder(
    out: Path, manifest: dict[str, Any], passes: Sequence[_Pass], tokenizer: Tokenizer, shard_tokens: int
) -> None:
    """Write everything beside `out` and give it its name at the end; leaves nothing behind when it fails."""
    partial = out.parent / f".{out.name}.partial-{uuid.uuid4().hex[:12]}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        partial.mkdir()
        splits: dict[str, Any] = {}
        has_turns = any(one.survey.has_turns for one in passes)
        for one in passes:
            written = _write_split(partial / one.split, one, tokenizer, has_turns, shard_tokens)
            if written["documents"]:
                splits[one.split] = written
        held_is_given = manifest["content"]["validation"] is not None
        surveys = {id(one.survey): one.survey for one in passes}.values()
        train = passes[0]
        manifest["splits"] = splits
        manifest["empty_documents"] = sum(survey.empty for survey in surveys)
        manifest["dropped_copies"] = len(train.survey.keys) - splits["train"]["documents"] if held_is_given else 0
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
    """Give the finished folder its name; False when another process has put one there in the meantime."""
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


def _write_split(folder: Path, one: _Pass, tokenizer: Tokenizer, with_mask: bool, shard_tokens: int) -> dict[str, Any]:
    writer = ShardWriter(folder, vocab_size=tokenizer.vocab_size, with_mask=with_mask, shard_tokens=shard_tokens)
    total = sum((key in one.held) != one.is_train for key in one.survey.keys)
    try:
        with Progress(total, "documents", label=f"Tokenising {one.split}") as progress:
            for batch in _batches(one.chosen()):
                for document, (ids, mask) in zip(batch, encode(tokenizer, batch), strict=True):
                    num_bytes = sum(len(part.encode("utf-8")) for part in document.parts)
                    writer.add(ids, mask, num_bytes, document.collection)
                progress.update(writer.num_documents, tokens=writer.num_tokens)
                fault("prepare-batch")
        entry = writer.close()
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
    """Remove what preparations of this folder left behind when they were killed; a running one writes all the time."""
    for folder in out.parent.iterdir():
        if not folder.name.startswith(f".{out.name}.partial-"):
            continue
        newest = max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])
        if time.time() - newest > STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
