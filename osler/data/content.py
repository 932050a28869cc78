"""What a folder of shards is made of: its manifest, and whether the sources are still the same."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from osler.data.config import FIRST_WINDOW_TOKENS
from osler.data.documents import Corpus
from osler.data.shards import FORMAT_VERSION, SPLITS, TOKENIZER, VALIDATION_PREFIX, order_of, read_data_manifest
from osler.data.tokenise import PartEnd, Task
from osler.data.workers import process_count, tokenise
from osler.data.writing import read_journal
from osler.files.parts import PART_BYTES, Parts
from osler.runtime.errors import UserError
from osler.tokenizer.bpe import Tokenizer

logger = logging.getLogger(__name__)

OPTIONS = ("holdout_fraction", "seed", "options", "part_bytes")  # what the shards of a corpus depend on besides its files


@dataclass(frozen=True)
class Target:
    """A corpus and where it is written; `entry` is its place in the manifest."""

    corpus: Corpus
    folder: Path
    splits: Sequence[str]
    entry: dict[str, Any]
    weight: float = 1.0


def manifest_of(
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
            name: {"weight": weight, **_entry(corpus, weight / sum(weights))}
            for (name, corpus), weight in zip(corpora.items(), weights, strict=True)
        },
        "validation": {name: _entry(corpus) for name, corpus in validation.items()},
    }


def _entry(corpus: Corpus, share: float = 0.0) -> dict[str, Any]:
    """Return what the manifest says of a corpus that is to be prepared; a source has a share of the weights."""
    min_parts = corpus.parts.min_parts if isinstance(corpus.parts, Parts) else 1
    order = {"min_parts": min_parts, "first_window_tokens": int(share * FIRST_WINDOW_TOKENS)}
    return {"content": _content(corpus), "splits": {}, "about": dict(corpus.about), **order}


def _content(corpus: Corpus) -> dict[str, Any]:
    """Return what the shards of a corpus depend on besides the tokenizer."""
    return {
        "files": [[file.name, file.size, file.stamp] for file in corpus.files],
        "options": {**corpus.options, **({} if corpus.clean is None else {"clean": corpus.clean.options})},
        "validation": None if corpus.validation is None else _content(corpus.validation),
        "holdout_fraction": corpus.holdout_fraction if corpus.validation is None else 0.0,
        "seed": corpus.seed,
        "part_bytes": PART_BYTES,
    }


def targets_of(
    out: Path, manifest: dict[str, Any], corpora: Iterable[Corpus | None], validation: Iterable[Corpus | None]
) -> tuple[list[Target], list[Target]]:
    """Return targets for validation corpora, those of sources included, and for sources.

    None stands for a corpus whose files are gone; it gets no target.
    """
    named = zip(validation, manifest["validation"].items(), strict=True)
    sets = [
        Target(_as_cut(corpus, entry), out / f"{VALIDATION_PREFIX}{name}", SPLITS[1:], entry)
        for corpus, (name, entry) in named
        if corpus
    ]
    sources = []
    for corpus, (name, entry) in zip(corpora, manifest["sources"].items(), strict=True):
        if corpus is not None:
            corpus = _as_cut(corpus, entry)
            if corpus.validation is not None:
                sets.append(Target(corpus.validation, out / name, SPLITS[1:], entry))
            splits = SPLITS if corpus.validation is None and corpus.holdout_fraction > 0 else SPLITS[:1]
            sources.append(Target(corpus, out / name, splits, entry, entry["weight"]))
    return sets, sources


def _as_cut(corpus: Corpus, entry: Mapping[str, Any]) -> Corpus:
    """Return the corpus with its parts cut as in the folder."""
    if corpus.validation is not None:
        corpus = replace(corpus, validation=_as_cut(corpus.validation, entry))
    return corpus.cut(order_of(entry)["min_parts"])


def difference_of(
    out: Path, corpora: Sequence[Corpus | None], validation: Sequence[Corpus | None], tokenizer: Tokenizer | None = None
) -> tuple[str, str]:
    """Return what differs between a folder and what is wanted, and how; both are "" when nothing does.

    Weights, names and times of change do not count. A corpus is None if its files are gone, the tokenizer if any will do.
    """
    manifest = read_data_manifest(out)
    for kind, title, given in (("sources", "source", corpora), ("validation", "validation set", validation)):
        entries = manifest[kind]
        if len(entries) != len(given):
            return "content", f"it has {len(entries)} {title}s, now there are {len(given)}"
        for entry, corpus in zip(entries.values(), given, strict=True):
            if corpus is not None and (difference := _other_content(entry["content"], _content(corpus))):
                return "content", difference
    if tokenizer is not None and tokenizer.fingerprint != manifest["tokenizer_fingerprint"]:
        return "tokenizer", f"its fingerprint is {manifest['tokenizer_fingerprint']}, now it is {tokenizer.fingerprint}"
    sets, sources = targets_of(out, manifest, corpora, validation)
    difference = _first_change([*sets, *sources])
    return ("content", difference) if difference else ("", "")


def other_data(out: Path, what: str, difference: str, consent: str | None, *, is_finished: bool = True) -> UserError:
    """Return the error that says how a folder differs from what is wanted; `consent` is the setting that allows it."""
    allow = f" allow it with {consent}," if consent else ""
    state, remove = ("was prepared", "") if is_finished else ("is half prepared", ", or delete it")
    if what == "tokenizer":
        allow = f" give its own with tokenizer.path={out / TOKENIZER} (a new one depends on sources and weights),{allow}"
    return UserError(
        f"{out} {state} with another {what}: {difference}. Put the {what} back to go on with what was prepared,{allow} "
        f"or choose another folder{remove}."
    )


def _other_content(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> str:
    if old is None or new is None:
        return "" if old is new else "one has validation documents, the other has none"
    before, now = ({**content["options"], **content} for content in (old, new))
    for name in dict.fromkeys([*before["options"], *now["options"], *OPTIONS]):
        if before.get(name) != now.get(name):
            return _change(name, before.get(name), now.get(name))
    if len(old["files"]) != len(new["files"]):
        return f"it has {len(old['files']):,} files, now there are {len(new['files']):,}"
    for (_, size, _), (name, new_size, _) in zip(old["files"], new["files"], strict=True):
        if size != new_size:
            return f"{name} has {new_size:,} bytes, it had {size:,}"
    return _other_content(old["validation"], new["validation"])


def _change(name: str, old: object, new: object) -> str:
    """Say how an option differs, or the first field that differs in a section."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        field = next(key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key))
        return _change(f"{name}.{field}", old.get(field), new.get(field))
    return f"{name} is {old}, now it is {new}"


def _first_change(targets: Sequence[Target]) -> str:
    """Return which file has changed since a folder was made of it; "" if none has.

    Reads only files with another time of change, and only those parts of them that the journals name.
    """
    touched = []
    for target in targets:
        content = target.entry["content"]
        old = content["files"] if target.splits != SPLITS[1:] or content["validation"] is None else content["validation"]["files"]
        touched.append({file for file, (_, _, stamp) in zip(target.corpus.files, old, strict=True) if file.stamp != stamp})
    if not any(touched):
        return ""
    logger.info("Files have another time of change than when they were prepared; comparing their content.")
    known = deque[str]()

    def tasks() -> Iterator[Task]:
        for number, target in enumerate(targets):
            lines = read_journal(target.folder, target.splits).digests if touched[number] else ()
            for place, digest in zip(target.corpus.order().tolist(), lines, strict=False):
                part = target.corpus.parts[place]
                if part.file in touched[number]:
                    known.append(digest)
                    yield Task(number, place)

    processes = process_count(sum(file.size for files in touched for file in files))
    corpora = [replace(target.corpus, clean=None) for target in targets]
    for task, end in tokenise(corpora, None, tasks(), processes):
        if isinstance(end, PartEnd) and end.digest != known.popleft():
            return f"{targets[task.corpus].corpus.parts[task.number].file.name} has changed"
    return ""
