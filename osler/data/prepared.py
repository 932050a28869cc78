"""Open a folder of shards that `prepare` wrote: its sources, what is held out of them, and their tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osler.data.shard_set import ShardSet, fingerprint_of
from osler.data.shards import SPLITS, TOKENIZER, VALIDATION_PREFIX, read_data_manifest
from osler.runtime.errors import UserError
from osler.tokenizer.bpe import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedSource:
    """The shards of a source; `validation` is None when nothing is held out of it."""

    name: str
    weight: float  # relative to the other sources
    train: ShardSet
    validation: ShardSet | None


@dataclass(frozen=True)
class Prepared:
    """An open folder of shards; `fingerprint` is that of all training data, `reused` tells whether the folder existed already."""

    folder: Path
    sources: Sequence[PreparedSource]
    named_validation: Mapping[str, ShardSet]  # explicit validation sets
    fingerprint: str
    reused: bool

    @property
    def num_tokens(self) -> int:
        """Return the tokens of the training data of all sources."""
        return sum(shards.num_tokens for shards in self.train)

    @property
    def is_complete(self) -> bool:
        """Whether nothing more is being prepared, as far as this process knows."""
        return all(shards.is_complete for shards in (*self.train, *self.validation))

    @property
    def size(self) -> str:
        """Return how much training data there is, in words."""
        return f"{self.num_tokens:,} tokens of data" + ("" if self.is_complete else " so far")

    @property
    def train(self) -> list[ShardSet]:
        """Return the training data of each source."""
        return [source.train for source in self.sources]

    @property
    def validation(self) -> list[ShardSet]:
        """Return the validation sets without their names."""
        return list(self.validation_sets.values())

    @property
    def validation_sets(self) -> Mapping[str, ShardSet]:
        """Return the validation sets by name: the explicit ones, or else what is held out of each source."""
        held_out = {source.name: source.validation for source in self.sources if source.validation is not None}
        return self.named_validation or held_out


def open_folder(out: Path, *, growing: bool = False, reused: bool = True) -> Prepared:
    """Open a folder of shards; if `growing`, it may be one that is still being prepared.

    Raises UserError when something is missing or torn.
    """
    manifest = read_data_manifest(out)
    is_whole = manifest["complete"]
    if not is_whole and not growing:
        raise UserError(f"The data in {out} are not complete: the command that began to prepare them goes on with it.")

    def holds_out(entry: Mapping[str, Any]) -> bool:
        """Return whether documents of a source are held out, or may be while it is being prepared."""
        if is_whole or SPLITS[1] in entry["splits"]:
            return bool(entry["splits"].get(SPLITS[1], {}).get("documents"))
        return entry["content"]["validation"] is not None or entry["content"]["holdout_fraction"] > 0

    sources = []
    for name, entry in manifest["sources"].items():
        train = ShardSet.open(out, name, SPLITS[0], growing=growing)
        validation = ShardSet.open(out, name, SPLITS[1], growing=growing) if holds_out(entry) else None
        sources.append(PreparedSource(name, entry["weight"], train, validation))
    sets = {name: ShardSet.open(out, f"{VALIDATION_PREFIX}{name}", SPLITS[1], growing=growing) for name in manifest["validation"]}
    if not is_whole:
        reused = any(source.train.num_shards for source in sources)
    return Prepared(out, sources, sets, fingerprint_of([source.train for source in sources]), reused)


def tell(prepared: Prepared) -> Prepared:
    """Return the folder, and log what is in it if it is finished."""
    manifest, out = read_data_manifest(prepared.folder), prepared.folder
    if not manifest["complete"]:
        return prepared
    for source in prepared.sources:
        entry = manifest["sources"][source.name]
        place = f"{'Reusing the data prepared in' if prepared.reused else 'Prepared'} {out / source.name}"
        held = f", {source.validation.num_documents:,} held out" if source.validation is not None else ""
        empty = f"; skipped {entry['empty_documents']:,} empty" if entry["empty_documents"] else ""
        copies = f"; dropped {entry['dropped_copies']:,} copies of validation" if entry["dropped_copies"] else ""
        counts = f"{source.train.num_documents:,} documents, {source.train.num_tokens:,} tokens"
        logger.info(f"{place}: {counts}{held}{empty}{copies}")
    for name, shards in prepared.named_validation.items():
        logger.info(f"Validation set {name}: {shards.num_documents:,} documents, {shards.num_tokens:,} tokens")
    return prepared


def held_out_so_far(folder: str | Path) -> dict[str, ShardSet]:
    """Return the validation sets of a folder by name, as far as they are prepared."""
    sets = open_folder(Path(folder), growing=True).validation_sets
    return {name: shards.head(shards.num_shards) for name, shards in sets.items() if shards.num_shards}


def open_prepared(folder: str | Path, tokenizer: Tokenizer, whose: str = "of the run", *, growing: bool = False) -> Prepared:
    """Open a folder that `prepare` made; raises UserError when it is missing, torn, or made with another tokenizer.

    The message says ``whose`` the given tokenizer is. If ``growing``, the folder may be one that is still being prepared.
    """
    _refuse_other_tokenizer(folder, tokenizer, whose)
    return tell(open_folder(Path(folder), growing=growing))


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
            "again with `osler data prepare tokenizer.path=FILE`."
        )
