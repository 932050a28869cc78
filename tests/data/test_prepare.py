"""Preparation: nothing is lost or leaked, what is written is gone on with, and reuse is exact."""

import errno
import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from osler.data.clean import Cleaner
from osler.data.config import FIRST_WINDOW_TOKENS, CleanConfig
from osler.data.documents import Corpus, Document, in_memory
from osler.data.holdout import find_limits, hold_out, keys_of
from osler.data.prepare import prepare as prepare_sources
from osler.data.prepared import held_out_so_far, open_prepared
from osler.data.readers import TextFiles
from osler.data.shard_set import ShardSet
from osler.data.shards import DATA_MANIFEST, read_data_manifest, shard_name
from osler.data.tokenise import Chunk
from osler.data.writing import CorpusWriter
from osler.files.parts import MIN_PARTS, LocalFile, Part, Parts
from osler.runtime import faults
from osler.runtime.errors import UserError
from osler.runtime.files import locked, write_json
from osler.runtime.stop import interruptible
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.chat import Turn, encode_examples

TEXTS = [f"Patient {number} has fever and cough.\nDay {number * 7}: é 🧪" for number in range(40)]
DOCUMENTS = [Document(text=text) for text in TEXTS]


class OneSource(NamedTuple):
    train: ShardSet
    validation: ShardSet | None
    reused: bool


def prepare(corpus: Corpus, tokenizer: Tokenizer, out: Path) -> OneSource:
    prepared = prepare_sources({"notes": corpus}, tokenizer, out)
    [source] = prepared.sources
    return OneSource(source.train, source.validation, prepared.reused)


def decoded(shards: ShardSet | None, tokenizer: Tokenizer) -> list[str]:
    assert shards is not None
    documents = list(shards.documents())
    assert all(ids[-1] == tokenizer.eos_id for ids in documents)
    return [tokenizer.decode(ids[:-1]) for ids in documents]


def folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_every_document_is_there_once_and_counts_are_true(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepared = prepare(in_memory(DOCUMENTS, holdout_fraction=0.1), tokenizer, tmp_path / "out")
    assert prepared.validation is not None and not prepared.reused
    train, held = decoded(prepared.train, tokenizer), decoded(prepared.validation, tokenizer)
    assert sorted(train + held) == sorted(TEXTS) and len(held) == 4
    for shards, found in ((prepared.train, train), (prepared.validation, held)):
        assert shards.num_documents == len(found)
        assert shards.num_tokens == shards.num_loss_tokens == sum(len(ids) for ids in shards.documents())
        assert shards.num_bytes == sum(len(text.encode()) for text in found)
        assert shards.verify() == []
        assert shards.tokenizer_fingerprint == tokenizer.fingerprint
    assert folders(tmp_path) == ["out"]


def test_small_shards_hold_the_same_documents(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    one = prepare(in_memory(DOCUMENTS), tokenizer, tmp_path / "one").train
    monkeypatch.setattr("osler.data.writing.SHARD_TOKENS", 100)
    many = prepare(in_memory(DOCUMENTS), tokenizer, tmp_path / "many").train
    assert many.num_shards > 5
    assert decoded(one, tokenizer) == decoded(many, tokenizer) != sorted(decoded(one, tokenizer)) == sorted(TEXTS)
    ids, mask = many.document(39, 2, 5)
    assert ids.tolist() == one.document(39)[0][2:5].tolist() and mask is None


def test_the_fingerprints_are_these_in_every_version(tmp_path: Path) -> None:
    """A run goes on from what an older version prepared: if these change, it would refuse its own data."""
    tokenizer = Tokenizer.train(["fever and cough. "] * 20, 270)
    documents = [*DOCUMENTS[:9], Document(turn=Turn("Why?", "So.", "Yes (A)")), Document(text="")]
    prepared = prepare(in_memory(documents, holdout_fraction=0.2, seed=3), tokenizer, tmp_path / "out")
    found = (read_data_manifest(tmp_path / "out")["content_fingerprint"], prepared.train.fingerprint)
    assert found == ("2d50648d6d0d8e73", "f2d2f7bbed288a8c")


def test_large_vocabularies_take_four_bytes(make_shards) -> None:  # type: ignore[no-untyped-def]
    large, small = make_shards([70_000, 5]), make_shards([60_000, 5])
    assert (large.document(0)[0].dtype, small.document(0)[0].dtype) == (np.uint32, np.uint16)
    assert large.document(1)[0].tolist() == [70_000, 70_001, 70_002, 70_003, 0]


def test_turns_carry_their_loss_mask(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turn = Turn("Why fever?", "Cough. " * 300, "Pneumonia")
    shards = prepare(in_memory([Document(turn=turn), Document(text="prose")]), tokenizer, tmp_path / "out").train
    [(ids, mask)] = encode_examples(tokenizer, [turn])
    (prose_ids, prose_mask), (stored_ids, stored_mask) = sorted(map(shards.document, range(2)), key=lambda found: len(found[0]))
    assert (stored_ids.tolist(), stored_mask is not None and stored_mask.tolist()) == (ids, mask)
    assert prose_mask is not None and prose_mask.tolist() == [1] * len(prose_ids)
    assert shards.num_loss_tokens == sum(mask) + len(prose_ids)
    assert shards.num_bytes == len("Why fever?" + "Cough. " * 300 + "Pneumoniaprose") and sum(mask) > 255


def test_empty_documents_are_skipped_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [Document(text=""), *DOCUMENTS[:3], Document(text=" \n"), Document(turn=Turn("q", "t", ""))]
    prepared = prepare(in_memory(documents, holdout_fraction=0.01), tokenizer, tmp_path / "out")
    assert read_data_manifest(tmp_path / "out")["sources"]["notes"]["empty_documents"] == 3
    assert prepared.validation is not None
    assert prepared.train.num_documents + prepared.validation.num_documents == 3
    with pytest.raises(UserError, match=r"nothing to learn from in the source notes: all .* left out \(empty: 1\)"):
        prepare(in_memory([Document(text="")]), tokenizer, tmp_path / "none")
    with pytest.raises(UserError, match="it has no documents"):
        prepare(in_memory([]), tokenizer, tmp_path / "none")
    with pytest.raises(UserError, match="The validation set notes has no document that is not empty"):
        prepare(in_memory(DOCUMENTS, in_memory([Document(text=" ")])), tokenizer, tmp_path / "none")
    assert prepare(in_memory(DOCUMENTS), tokenizer, tmp_path / "none").train.num_documents == 40, "other data take its place"


def test_copies_of_held_out_documents_never_reach_train(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [Document(text=text) for text in TEXTS for text in (text, text.upper(), text.replace(" ", "  "), text)]
    prepared = prepare(in_memory(documents, holdout_fraction=0.25), tokenizer, tmp_path / "out")
    train, held = (
        {text.lower().split()[1] for text in decoded(shards, tokenizer)} for shards in (prepared.train, prepared.validation)
    )
    assert len(held) + len(train) == 40 and not train & held
    assert len(decoded(prepared.validation, tokenizer)) == 4 * len(held) > 20


def test_given_validation_documents_win_over_train(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Those of a source, and those of a set of its own, which other sources hold copies of."""
    own, elsewhere = in_memory([*DOCUMENTS[:5], Document(text="new")]), in_memory([*DOCUMENTS[3:8], Document(text="newer")])
    corpora = {"a": in_memory(DOCUMENTS, own), "b": in_memory(DOCUMENTS[::-1])}
    prepared = prepare_sources(corpora, tokenizer, tmp_path / "out", validation={"general": elsewhere})
    for source in prepared.sources:
        assert sorted(decoded(source.train, tokenizer)) == sorted(TEXTS[8:])
        assert read_data_manifest(tmp_path / "out")["sources"][source.name]["dropped_copies"] == 8
    assert sorted(decoded(prepared.sources[0].validation, tokenizer)) == sorted([*TEXTS[:5], "new"])
    assert {*prepared.validation_sets} == {"general"} and prepared.sources[1].validation is None
    assert sorted(decoded(prepared.validation_sets["general"], tokenizer)) == sorted([*TEXTS[3:8], "newer"])
    assert prepare_sources(corpora, tokenizer, tmp_path / "out", validation={"general": elsewhere}).reused
    with pytest.raises(UserError, match="copies of held-out documents: 40"):
        prepare(in_memory(DOCUMENTS, in_memory(DOCUMENTS)), tokenizer, tmp_path / "none")


def test_a_source_of_which_another_holds_everything_out_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    two = in_memory(DOCUMENTS[:2], holdout_fraction=0.5)
    [held] = decoded(prepare(two, tokenizer, tmp_path / "alone").validation, tokenizer)
    with pytest.raises(UserError, match=r"in the source b: all its documents are left out \(copies of held-out documents: 1\)"):
        prepare_sources({"a": two, "b": in_memory([Document(text=held)])}, tokenizer, tmp_path / "out")
    assert folders(tmp_path) == ["alone"]


def test_what_is_held_out_depends_on_the_document_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def held(name: str, corpus: Corpus) -> set[str]:
        return set(decoded(prepare(corpus, tokenizer, tmp_path / name).validation, tokenizer))

    chosen = held("a", in_memory(DOCUMENTS, holdout_fraction=0.2))
    assert chosen == held("b", in_memory(DOCUMENTS[::-1], holdout_fraction=0.2, seed=1))
    assert chosen & set(TEXTS[:20]) == held("c", in_memory(DOCUMENTS[:20], holdout_fraction=0.2))
    assert chosen < held("d", in_memory(DOCUMENTS, holdout_fraction=0.4))


@pytest.mark.parametrize(("name", "is_listed"), [("0.jsonl", True), ("more.jsonl.gz", False)])
def test_compressed_files_count_by_the_text_in_them_when_what_they_hold_out_is_listed(
    notes: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_listed: bool
) -> None:
    monkeypatch.setattr("osler.data.holdout.LISTED_BYTES", 2 * (notes / name).stat().st_size)
    corpora = {"a": rows_corpus(notes / name, 0.5), "b": rows_corpus(notes / "1.jsonl", 0.1)}
    assert bool(len(hold_out(corpora, find_limits(corpora), keys_of([])).keys)) == is_listed


@pytest.mark.parametrize(("count", "fraction", "expected"), [(1, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (3, 0.0, 0)])
def test_holdout_of_few_documents(tmp_path: Path, tokenizer: Tokenizer, count: int, fraction: float, expected: int) -> None:
    prepared = prepare(in_memory(DOCUMENTS[:count], holdout_fraction=fraction), tokenizer, tmp_path / "out")
    assert prepared.train.num_documents == count - expected
    assert (prepared.validation.num_documents if prepared.validation else 0) == expected


def test_same_data_are_reused_and_other_data_refused(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    out, corpus = tmp_path / "out", in_memory(DOCUMENTS, holdout_fraction=0.1)
    first = prepare(corpus, tokenizer, out)
    stamp = (out / "manifest.json").stat().st_mtime_ns
    capsys.readouterr()
    again = prepare(corpus, tokenizer, out)
    assert again.reused and again.train.fingerprint == first.train.fingerprint
    assert (out / "manifest.json").stat().st_mtime_ns == stamp
    assert "Reusing the data prepared in" in capsys.readouterr().err

    others = [in_memory(DOCUMENTS, holdout_fraction=0.2), in_memory(DOCUMENTS, holdout_fraction=0.1, seed=1)]
    for other in [*others, in_memory(DOCUMENTS[:-1], holdout_fraction=0.1)]:
        with pytest.raises(UserError, match=r"prepared with another content: .*(0\.2|seed is 0|bytes, it had)"):
            prepare(other, tokenizer, out)
    other_tokenizer = Tokenizer.train(TEXTS, 300)
    wanted = f"another tokenizer: its fingerprint is {tokenizer.fingerprint}, now it is {other_tokenizer.fingerprint}"
    with pytest.raises(UserError, match=wanted):
        prepare(corpus, other_tokenizer, out)
    with pytest.raises(UserError, match=f"made with the tokenizer {tokenizer.fingerprint}"):
        open_prepared(out, other_tokenizer)
    assert open_prepared(out, tokenizer).fingerprint == f"{first.train.fingerprint}+{FIRST_WINDOW_TOKENS}"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file; give a folder"):
        prepare(corpus, tokenizer, tmp_path / "file")


def test_other_weights_of_finished_shards_are_told_and_written_down(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    halves = {"a": in_memory(DOCUMENTS[:20]), "b": in_memory(DOCUMENTS[20:])}
    for weights, share in (([1.0, 1.0], "50.0%"), ([3.0, 1.0], "75.0%")):
        prepared = prepare_sources(halves, tokenizer, tmp_path / "out", weights=weights)
        assert [source.weight for source in prepared.sources] == weights
        assert share in (tmp_path / "out" / "DATA_CARD.md").read_text()
    assert "are now 3, 1" in capsys.readouterr().err


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="exists but is not a folder of prepared data"):
        prepare(in_memory(DOCUMENTS), tokenizer, tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert prepare(in_memory(DOCUMENTS), tokenizer, tmp_path / "empty").train.num_documents == 40


def test_damage_is_found(tmp_path: Path, tokenizer: Tokenizer) -> None:
    out = tmp_path / "out"
    prepare(in_memory(DOCUMENTS), tokenizer, out)
    shard, manifest = out / "notes" / "train" / "shard-0000000.bin", out / "manifest.json"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert [problem.split(" has")[0] for problem in ShardSet.open(out, "notes", "train").verify()] == [str(shard)]

    def refused(message: str, folder: Path = out) -> None:
        with pytest.raises(UserError, match=message):
            open_prepared(folder, tokenizer)

    shard.write_bytes(whole[:-2])
    refused(r"shard-0000000\.bin has \d+ bytes instead of \d+")
    shard.unlink()
    refused(r"shard-0000000\.bin is missing")
    shard.write_bytes(whole)
    index = out / "notes" / "train" / "index.bin"
    records = index.read_bytes()
    index.write_bytes(records + records[:-3])  # a killed writer's last record is torn, and does not count
    assert ShardSet.open(out, "notes", "train").num_shards == 1
    index.write_bytes(bytes([*records[:16], records[16] ^ 1, *records[17:]]))  # a count, which no shard's hash covers
    assert "index.bin has changed" in ShardSet.open(out, "notes", "train").verify()[0]
    index.write_bytes(records[:-3])
    refused(r"index\.bin is not the one that the manifest describes")
    index.unlink()
    refused(r"index\.bin is missing")
    index.write_bytes(records)
    manifest.write_text(manifest.read_text().replace('"format_version": 3', '"format_version": 99'))
    refused("format 99")
    manifest.write_text("{")
    refused("not valid JSON")
    refused(r"it has no manifest\.json", tmp_path)


@pytest.mark.parametrize("stage", ["prepare-chunk", "write-shard", "write-index", "prepare-journal", "prepare-complete"])
def test_after_a_full_disk_the_same_command_goes_on(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    corpus = in_memory(DOCUMENTS, holdout_fraction=0.1)
    monkeypatch.setenv(faults.VARIABLE, f"{stage}:enospc")
    with pytest.raises(UserError, match=r"could not be written to .*out: No space left.*The same command goes on"):
        prepare(corpus, tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match="are not complete: the command that began to prepare them goes on"):
        open_prepared(tmp_path / "out", tokenizer)
    prepared = prepare(corpus, tokenizer, tmp_path / "out")
    assert sorted(decoded(prepared.train, tokenizer) + decoded(prepared.validation, tokenizer)) == sorted(TEXTS)
    assert folders(tmp_path) == ["out"]


def test_an_interrupt_says_how_to_go_on(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(faults.VARIABLE, "prepare-journal:sigterm")
    with pytest.raises(KeyboardInterrupt), interruptible():
        prepare(in_memory(DOCUMENTS), tokenizer, tmp_path / "out")
    assert f"stays in {tmp_path / 'out'}; the same command goes on" in capsys.readouterr().err
    assert prepare(in_memory(DOCUMENTS[:9]), tokenizer, tmp_path / "out").train.num_documents == 9, "nothing was lost"


def test_half_prepared_data_are_never_lost(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, small_parts: None
) -> None:
    """Other weights and names go on with them; other data are refused, or with consent take another place."""
    out, corpora = tmp_path / "out", {"a": in_memory(DOCUMENTS, holdout_fraction=0.1), "b": in_memory(DOCUMENTS[::-1])}
    prepare_sources(corpora, tokenizer, tmp_path / "whole")
    monkeypatch.setenv(faults.VARIABLE, "prepare-complete:enospc")
    with pytest.raises(UserError, match="could not be written"):
        prepare_sources(corpora, tokenizer, out)
    monkeypatch.delenv(faults.VARIABLE)
    before = files_in(out)
    for name, value, corpus in (
        ("seed", "0, now it is 1", in_memory(DOCUMENTS, holdout_fraction=0.1, seed=1)),
        ("documents has", "1 bytes, it had", in_memory([Document(text="x")], holdout_fraction=0.1)),
    ):
        with pytest.raises(UserError, match=rf"out is half prepared with another content: {name}.*{value}.*or delete it"):
            prepare_sources({**corpora, "a": corpus}, tokenizer, out)
    assert files_in(out) == before
    prepare_sources({"a": corpora["a"]}, tokenizer, out, consent=None)
    assert files_in(tmp_path / "out-unfinished-1") == before
    renamed = dict(zip("xy", corpora.values(), strict=True))
    prepared = prepare_sources(renamed, tokenizer, tmp_path / "out-unfinished-1", weights=[1, 5])
    assert [(source.name, source.weight) for source in prepared.sources] == [("a", 1), ("b", 5)]
    assert prepared.fingerprint == open_prepared(tmp_path / "whole", tokenizer).fingerprint


def test_a_source_that_cleaning_empties_is_found_before_any_is_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    emptied = replace(in_memory(DOCUMENTS), clean=Cleaner(CleanConfig(min_words=99)))
    with pytest.raises(UserError, match=r"in the source b: all its documents are left out \(too short: 40\).*its `clean`"):
        prepare_sources({"a": in_memory(DOCUMENTS), "b": emptied}, tokenizer, tmp_path / "out")
    assert folders(tmp_path) == []


def test_a_source_whose_copies_leave_nothing_ends_with_it_and_the_others_stay(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """All that is not held out of it is nearly what is, which shows in the end alone."""
    prose = " ".join(f"word{number}" for number in range(300))
    most, one = sorted(("a group", "another"), key=lambda group: Document(group=group).split_key())
    twins = [Document(text=f"{prose} {number}", group=most if number else one) for number in range(9)]
    fraction = (twins[1].split_key() + 2**32) / 2**64
    b = replace(in_memory(twins, holdout_fraction=fraction), clean=Cleaner(CleanConfig(duplicates="near")))
    with pytest.raises(UserError, match="in the source b: all its documents are left out"):
        prepare_sources({"a": in_memory(DOCUMENTS), "b": b}, tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "a" / "train" / "index.bin").stat().st_size


def test_two_at_once_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(UserError, match=r"Another process is at work on .*or choose another folder"):
        prepare(in_memory(DOCUMENTS), tokenizer, tmp_path / "out")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("osler.files.parts.PART_BYTES", 500),
        ("osler.data.writing.SHARD_TOKENS", 300),
        ("osler.data.writing.FIRST_SHARD_TOKENS", 100),
        ("osler.data.writing.CUT_BYTES", 2000),
    ):
        monkeypatch.setattr(name, value)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_corpus(path: Path, holdout_fraction: float = 0.1) -> Corpus:
    reader = TextFiles(path)
    return Corpus(Parts(reader.files()), reader.read, {"field": "text"}, None, holdout_fraction)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Tables of several parts and texts: what a person may have."""
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(3):
        rows = "".join(json.dumps({"text": f"{text} {number}"}) + "\n" for text in TEXTS)
        (folder / f"{number}.jsonl").write_text(rows)
    (folder / "book.md").write_text("A book about fever. " * 40)
    (folder / "more.jsonl.gz").write_bytes(gzip.compress(rows.replace("Day", "Week").encode()))
    return folder


def test_the_number_of_processes_changes_nothing(tmp_path: Path, notes: Path, tokenizer: Tokenizer, small_parts: None) -> None:
    corpora = {"a": rows_corpus(notes), "b": rows_corpus(notes / "1.jsonl", 0.0)}
    for count in (0, 1, 3):
        prepare_sources(corpora, tokenizer, tmp_path / str(count), weights=[2, 1], processes=count)
    assert files_in(tmp_path / "0") == files_in(tmp_path / "1") == files_in(tmp_path / "3")
    prepared = open_prepared(tmp_path / "0", tokenizer)
    assert prepared.train[0].num_shards > 5
    assert [train.first_window_tokens for train in prepared.train] == [FIRST_WINDOW_TOKENS * 2 // 3, FIRST_WINDOW_TOKENS // 3]


def test_what_an_older_version_began_is_finished_as_that_version_cut_it(
    tmp_path: Path, notes: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It did not deal out small files, its first window was one shard, and its manifests say nothing of either."""
    corpus, begun = rows_corpus(notes), tmp_path / "out"
    undealt = replace(corpus, parts=Parts(corpus.files, min_parts=1))
    old, new = (prepare(cut, tokenizer, tmp_path / name).train for name, cut in {"old": undealt, "new": corpus}.items())
    assert old.fingerprint != new.fingerprint
    with monkeypatch.context() as torn, pytest.raises(UserError, match="could not be written"):
        torn.setenv(faults.VARIABLE, "prepare-part:ioerror:3")
        prepare(undealt, tokenizer, begun)
    manifest = read_data_manifest(begun)
    del manifest["sources"]["notes"]["min_parts"], manifest["sources"]["notes"]["first_window_tokens"]
    write_json(begun / DATA_MANIFEST, manifest)
    train = prepare(corpus, tokenizer, begun).train
    assert (train.fingerprint, train.first_window_tokens, new.first_window_tokens) == (old.fingerprint, 0, FIRST_WINDOW_TOKENS)
    os.utime(notes / "1.jsonl")
    assert prepare(corpus, tokenizer, begun).reused


def test_of_a_validation_set_as_much_is_kept_as_is_read_and_nothing_of_it_is_learned(
    tmp_path: Path, notes: Path, tokenizer: Tokenizer, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("osler.data.writing.VALIDATION_TOKENS", 700)
    sets, learned = {"notes": rows_corpus(notes)}, in_memory([*DOCUMENTS, *(Document(text=f"{text} 2") for text in TEXTS)])
    for count in (0, 1, 3):
        prepared = prepare_sources({"a": learned}, tokenizer, tmp_path / str(count), validation=sets, processes=count)
    assert files_in(tmp_path / "0") == files_in(tmp_path / "1") == files_in(tmp_path / "3")
    found = prepared.validation_sets["notes"]
    assert 700 <= found.num_tokens < 700 + found.document(found.num_documents - 1)[0].size
    assert sorted(decoded(prepared.sources[0].train, tokenizer)) == sorted(TEXTS)


def test_what_is_enough_of_a_validation_set_is_there_to_be_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A streamed run evaluates on it while much more is prepared."""
    monkeypatch.setattr("osler.data.writing.VALIDATION_TOKENS", 25)
    writer = CorpusWriter(tmp_path, ("validation",), lambda keys: {"validation": keys > 0}, vocab_size=9)
    lengths, tokens = np.full(9, 10), np.zeros(90, np.uint16)
    writer.add(Chunk(np.arange(9, dtype=np.uint64) + 1, lengths.cumsum(), lengths, tokens, None, None, None))
    written = ShardSet(tmp_path / "validation", vocab_size=9, tokenizer_fingerprint="", eos_id=0, growing=True)
    assert written.num_tokens == 30 and written.head_within(25).num_tokens == 30


def test_what_a_process_finds_wrong_is_told_as_if_there_were_none(
    tmp_path: Path, notes: Path, tokenizer: Tokenizer, small_parts: None, capfd: pytest.CaptureFixture[str]
) -> None:
    (notes / "4.jsonl").write_text('{"text": "fine", "body": "content"}\n' + '{"text": "fine"}\n' * 40 + '{"text": 7}\n')
    with pytest.raises(UserError, match=r"4\.jsonl, line at byte \d+: the field 'text' must be text"):
        prepare_sources({"a": rows_corpus(notes)}, tokenizer, tmp_path / "out", processes=2)
    assert capfd.readouterr().err.count("columns not read: body") <= 1
    (notes / "4.jsonl").unlink()
    prepare_sources({"a": rows_corpus(notes)}, tokenizer, tmp_path / "out", processes=2)


def test_a_process_that_is_killed_is_told(
    tmp_path: Path, notes: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first shard of a source, too, the same command goes on from what is written: a validation set."""
    out, sets = tmp_path / "out", {"set": rows_corpus(notes / "1.jsonl", 0.0)}
    monkeypatch.setenv(faults.VARIABLE, f"prepare-part:kill:{MIN_PARTS + 1}")  # the set is a small file
    with pytest.raises(UserError, match="A process that prepares the data was killed, most often for want of memory"):
        prepare_sources({"a": rows_corpus(notes)}, tokenizer, out, validation=sets, processes=1)
    written = (out / "validation.set/validation" / shard_name(0)).stat()
    monkeypatch.delenv(faults.VARIABLE)
    prepared = prepare_sources({"a": rows_corpus(notes)}, tokenizer, out, validation=sets)
    assert prepared.train[0].num_documents > 90
    assert (out / "validation.set/validation" / shard_name(0)).stat().st_mtime_ns == written.st_mtime_ns


def broken(part: Part) -> Iterator[Document]:
    yield from DOCUMENTS[:20]
    raise OSError(errno.EIO, "the disk is broken")


@pytest.mark.parametrize("processes", [0, 1])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, notes: Path, tokenizer: Tokenizer, processes: int) -> None:
    corpus = Corpus([Part(LocalFile.at(notes / "1.jsonl"))], broken)
    with pytest.raises(UserError, match=r"notes/1\.jsonl could not be read: the disk is broken"):
        prepare_sources({"a": corpus}, tokenizer, tmp_path / "out", processes=processes)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that a preparation starts; no more than two can be."""
    processes: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*given: Any, **named: Any) -> subprocess.Popen[bytes]:
        if len(processes) == 2:
            raise OSError(errno.EAGAIN, "no more processes")
        processes.append(popen(*given, **named))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    return processes


@pytest.mark.parametrize(
    ("replaced", "count", "expected", "said"),
    [
        ("no_such_class", 2, AttributeError, "no_such_class"),
        ("", 3, UserError, "could not be started: no more processes.*--workers"),
    ],
    ids=["what they send cannot be read", "a third one cannot be started"],
)
def test_after_an_error_no_process_is_left(
    tmp_path: Path,
    notes: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    started: list[subprocess.Popen[bytes]],
    replaced: str,
    count: int,
    expected: type[Exception],
    said: str,
) -> None:
    if replaced:
        monkeypatch.setattr("osler.data.workers.pickle.load", lambda pipe: getattr(pipe, replaced))
    with pytest.raises(expected, match=said):
        prepare_sources({"a": rows_corpus(notes)}, tokenizer, tmp_path / "out", processes=count)
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2


def test_a_process_whose_parent_is_gone_says_nothing() -> None:
    for sent in (b"", pickle.dumps("torn")[:-3]):
        done = subprocess.run([sys.executable, "-m", "osler.data.workers"], input=sent, capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_touched_files_are_compared_and_changed_ones_refused(
    tmp_path: Path, notes: Path, tokenizer: Tokenizer, small_parts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out, path = tmp_path / "out", notes / "1.jsonl"

    def again() -> bool:
        return prepare(rows_corpus(notes), tokenizer, out).reused

    assert not again() and again()
    assert "comparing" not in capsys.readouterr().err
    os.utime(path, ns=(1, 1))
    assert again() and "comparing their content" in capsys.readouterr().err
    assert again() and "comparing" not in capsys.readouterr().err, "the new time is kept"
    path.write_text(path.read_text().replace("Patient 7 has", "Patient 7 had"))
    with pytest.raises(UserError, match=r"another content: .*1\.jsonl has changed"):
        again()
    path.write_text("{}")
    with pytest.raises(UserError, match=r"another content: .*1\.jsonl has 2 bytes, it had"):
        again()
    prepare_sources({"a": rows_corpus(notes / "0.jsonl")}, tokenizer, out, consent=None)
    [aside] = tmp_path.glob("out-*")
    assert len(open_prepared(aside, tokenizer).sources) == 1


def test_a_source_that_changes_while_it_is_prepared_is_named(tmp_path: Path, notes: Path, tokenizer: Tokenizer) -> None:
    corpus = rows_corpus(notes)
    with open(notes / "1.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"1\.jsonl changed while it was being read"):
        prepare(corpus, tokenizer, tmp_path / "out")


@pytest.mark.slow
def test_after_a_kill_anywhere_the_bytes_are_the_same_and_no_shard_is_written_twice(run_cases, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert run_cases("data/killed_preparations.py", tmp_path) > 20


def test_it_is_said_when_nothing_is_held_out(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    twins = in_memory([Document(text="Fever."), Document(text="fever. ")], holdout_fraction=0.5)
    prepared = prepare(twins, tokenizer, tmp_path / "a")
    assert prepared.validation is None and "Nothing is held out of the source notes" in capsys.readouterr().err
    assert read_data_manifest(tmp_path / "a")["sources"]["notes"]["splits"]["validation"]["documents"] == 0, "nobody waits for it"
    assert held_out_so_far(tmp_path / "a") == {}
    prepare(in_memory(DOCUMENTS, holdout_fraction=0.1), tokenizer, tmp_path / "b")
    assert "Nothing is held out" not in capsys.readouterr().err
