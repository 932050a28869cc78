"""Preparation: nothing is lost or leaked, a folder is whole or absent, and reuse is exact."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from osler.data.documents import Corpus, Document
from osler.data.prepare import STALE_SECONDS
from osler.data.prepare import prepare as prepare_sources
from osler.data.prepared import open_prepared
from osler.data.shard_set import ShardSet
from osler.data.shards import read_data_manifest
from osler.runtime import faults
from osler.runtime.errors import UserError
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
    prepared = prepare(Corpus(DOCUMENTS, holdout_fraction=0.1), tokenizer, tmp_path / "out")
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
    one = prepare(Corpus(DOCUMENTS), tokenizer, tmp_path / "one").train
    monkeypatch.setattr("osler.data.prepare.SHARD_TOKENS", 100)
    many = prepare(Corpus(DOCUMENTS), tokenizer, tmp_path / "many").train
    assert many.num_shards > 5
    assert decoded(one, tokenizer) == decoded(many, tokenizer) != sorted(decoded(one, tokenizer)) == sorted(TEXTS)
    ids, mask = many.document(39, 2, 5)
    assert ids.tolist() == one.document(39)[0][2:5].tolist() and mask is None


def test_the_fingerprints_are_these_in_every_version(tmp_path: Path) -> None:
    """A run goes on from what an older version prepared: if these change, it would refuse its own data."""
    tokenizer = Tokenizer.train(["fever and cough. "] * 20, 270)
    documents = [*DOCUMENTS[:9], Document(turn=Turn("Why?", "So.", "Yes (A)")), Document(text="")]
    prepared = prepare(Corpus(documents, holdout_fraction=0.2, seed=3), tokenizer, tmp_path / "out")
    found = (read_data_manifest(tmp_path / "out")["content_fingerprint"], prepared.train.fingerprint)
    assert found == ("2ef0924d58f30df4", "df43f476c03d9f8e")


def test_large_vocabularies_take_four_bytes(make_shards) -> None:  # type: ignore[no-untyped-def]
    large, small = make_shards([70_000, 5]), make_shards([60_000, 5])
    assert (large.document(0)[0].dtype, small.document(0)[0].dtype) == (np.uint32, np.uint16)
    assert large.document(1)[0].tolist() == [70_000, 70_001, 70_002, 70_003, 0]


def test_turns_carry_their_loss_mask(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turn = Turn("Why fever?", "Cough.", "Pneumonia")
    shards = prepare(Corpus([Document(turn=turn), Document(text="prose")]), tokenizer, tmp_path / "out").train
    [(ids, mask)] = encode_examples(tokenizer, [turn])
    stored_ids, stored_mask = shards.document(0)
    assert (stored_ids.tolist(), stored_mask is not None and stored_mask.tolist()) == (ids, mask)
    prose_ids, prose_mask = shards.document(1)
    assert prose_mask is not None and prose_mask.tolist() == [1] * len(prose_ids)
    assert shards.num_loss_tokens == sum(mask) + len(prose_ids)
    assert shards.num_bytes == len("Why fever?Cough.Pneumoniaprose")


def test_empty_documents_are_skipped_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [Document(text=""), *DOCUMENTS[:3], Document(text=" \n"), Document(turn=Turn("q", "t", ""))]
    prepared = prepare(Corpus(documents, holdout_fraction=0.01), tokenizer, tmp_path / "out")
    assert read_data_manifest(tmp_path / "out")["sources"]["notes"]["empty_documents"] == 3
    assert prepared.validation is not None
    assert prepared.train.num_documents + prepared.validation.num_documents == 3
    with pytest.raises(UserError, match="nothing to learn from: of 1 documents 1 are empty"):
        prepare(Corpus([Document(text="")]), tokenizer, tmp_path / "none")
    with pytest.raises(UserError, match="nothing to learn from"):
        prepare(Corpus([]), tokenizer, tmp_path / "none")
    assert folders(tmp_path) == ["out"]


@pytest.mark.parametrize("seed", range(5))
def test_copies_of_held_out_documents_never_reach_train(tmp_path: Path, tokenizer: Tokenizer, seed: int) -> None:
    documents = [Document(text=text) for text in TEXTS for text in (text, text.upper(), text.replace(" ", "  "), text)]
    prepared = prepare(Corpus(documents, holdout_fraction=0.25, seed=seed), tokenizer, tmp_path / "out")
    train, held = (
        {text.lower().split()[1] for text in decoded(shards, tokenizer)} for shards in (prepared.train, prepared.validation)
    )
    assert len(held) == 10 and len(train) == 30 and not train & held
    assert len(decoded(prepared.validation, tokenizer)) == 40


def test_given_validation_documents_win_over_train(tmp_path: Path, tokenizer: Tokenizer) -> None:
    validation = [*DOCUMENTS[:5], Document(text="new")]
    prepared = prepare(Corpus(DOCUMENTS, validation), tokenizer, tmp_path / "out")
    assert sorted(decoded(prepared.train, tokenizer)) == sorted(TEXTS[5:])
    assert sorted(decoded(prepared.validation, tokenizer)) == sorted([*TEXTS[:5], "new"])
    assert read_data_manifest(tmp_path / "out")["sources"]["notes"]["dropped_copies"] == 5
    with pytest.raises(UserError, match="40 are copies of validation"):
        prepare(Corpus(DOCUMENTS, DOCUMENTS), tokenizer, tmp_path / "none")


def test_a_source_of_which_another_holds_everything_out_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    two = Corpus(DOCUMENTS[:2], holdout_fraction=0.5)
    [held] = decoded(prepare(two, tokenizer, tmp_path / "alone").validation, tokenizer)
    with pytest.raises(UserError, match="nothing to learn from in the source b: of 1 documents 0 are empty and 1 are copies"):
        prepare_sources({"a": two, "b": Corpus([Document(text=held)])}, tokenizer, tmp_path / "out")
    assert folders(tmp_path) == ["alone"]


def test_holdout_depends_on_seed_and_content_not_on_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def held(name: str, documents: list[Document], seed: int) -> set[str]:
        prepared = prepare(Corpus(documents, holdout_fraction=0.2, seed=seed), tokenizer, tmp_path / name)
        return set(decoded(prepared.validation, tokenizer))

    assert held("a", DOCUMENTS, 0) == held("b", DOCUMENTS[::-1], 0) != held("c", DOCUMENTS, 1)


@pytest.mark.parametrize(("count", "fraction", "expected"), [(1, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (3, 0.0, 0)])
def test_holdout_of_few_documents(tmp_path: Path, tokenizer: Tokenizer, count: int, fraction: float, expected: int) -> None:
    prepared = prepare(Corpus(DOCUMENTS[:count], holdout_fraction=fraction), tokenizer, tmp_path / "out")
    assert prepared.train.num_documents == count - expected
    assert (prepared.validation.num_documents if prepared.validation else 0) == expected


def test_same_data_are_reused_and_other_data_refused(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    out, corpus = tmp_path / "out", Corpus(DOCUMENTS, holdout_fraction=0.1)
    first = prepare(corpus, tokenizer, out)
    stamp = (out / "manifest.json").stat().st_mtime_ns
    capsys.readouterr()
    again = prepare(corpus, tokenizer, out)
    assert again.reused and again.train.fingerprint == first.train.fingerprint
    assert (out / "manifest.json").stat().st_mtime_ns == stamp
    assert "Reusing the data prepared in" in capsys.readouterr().err

    others = [Corpus(DOCUMENTS, holdout_fraction=0.2), Corpus(DOCUMENTS, holdout_fraction=0.1, seed=1)]
    for other in [*others, Corpus(DOCUMENTS[:-1], holdout_fraction=0.1)]:
        with pytest.raises(UserError, match=r"another content: its fingerprint is [0-9a-f]{16}, now it is [0-9a-f]{16}"):
            prepare(other, tokenizer, out)
    other_tokenizer = Tokenizer.train(TEXTS, 300)
    wanted = f"another tokenizer: its fingerprint is {tokenizer.fingerprint}, now it is {other_tokenizer.fingerprint}"
    with pytest.raises(UserError, match=wanted):
        prepare(corpus, other_tokenizer, out)
    with pytest.raises(UserError, match=f"made with the tokenizer {tokenizer.fingerprint}"):
        open_prepared(out, other_tokenizer)
    assert open_prepared(out, tokenizer).fingerprint == first.train.fingerprint


def test_fingerprint_follows_the_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prints = [
        prepare(Corpus(documents), tokenizer, tmp_path / str(number)).train.fingerprint
        for number, documents in enumerate([DOCUMENTS, DOCUMENTS, DOCUMENTS[::-1], DOCUMENTS[1:]])
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="exists but is not a folder of prepared data"):
        prepare(Corpus(DOCUMENTS), tokenizer, tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert prepare(Corpus(DOCUMENTS), tokenizer, tmp_path / "empty").train.num_documents == 40


def test_damage_is_found(tmp_path: Path, tokenizer: Tokenizer) -> None:
    out = tmp_path / "out"
    prepare(Corpus(DOCUMENTS), tokenizer, out)
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
    manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 99'))
    refused("format 99")
    manifest.write_text("{")
    refused("not valid JSON")
    refused(r"it has no manifest\.json", tmp_path)


@pytest.mark.parametrize("stage", ["prepare-batch", "prepare-manifest", "write-atomic", "prepare-rename"])
def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    faults.visits.clear()
    monkeypatch.setenv(faults.VARIABLE, f"{stage}:enospc")
    with pytest.raises(UserError, match=r"could not be written to .*out: No space left"):
        prepare(Corpus(DOCUMENTS), tokenizer, tmp_path / "out")
    assert folders(tmp_path) == []
    assert prepare(Corpus(DOCUMENTS), tokenizer, tmp_path / "out").train.num_documents == 40


class Changing:
    """Documents whose second iteration is another: the first is lost, or the user interrupts."""

    def __init__(self, is_interrupted: bool) -> None:
        self.visits, self.is_interrupted = 0, is_interrupted

    def __iter__(self) -> Iterator[Document]:
        self.visits += 1
        yield from DOCUMENTS[self.visits :]
        if self.is_interrupted and self.visits == 2:
            raise KeyboardInterrupt


def test_an_interrupt_or_documents_that_change_between_the_passes_leave_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(Corpus(Changing(is_interrupted=True)), tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match="changed while they were being prepared"):
        prepare(Corpus(Changing(is_interrupted=False)), tokenizer, tmp_path / "out")
    assert folders(tmp_path) == []


@pytest.mark.parametrize("stage", ["prepare-batch", "prepare-rename"])
def test_a_kill_leaves_nothing_that_counts(tmp_path: Path, tokenizer: Tokenizer, stage: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.to_bytes())
    out, corpus = tmp_path / "data" / "out", Corpus([Document(text="fever")] * 3)
    program = (
        "import sys; from osler.data.documents import Corpus, Document; from osler.data.prepare import prepare;"
        "from osler.tokenizer.bpe import Tokenizer;"
        "prepare({'notes': Corpus([Document(text='fever')] * 3)}, Tokenizer.load(sys.argv[1]), sys.argv[2])"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "tokenizer.json"), str(out)]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, faults.VARIABLE: f"{stage}:kill", "PYTHONPATH": root}
    assert subprocess.run(command, env=environment, capture_output=True).returncode != 0
    (left,) = folders(tmp_path / "data")
    assert left.startswith(".out.partial-")
    assert prepare(corpus, tokenizer, out).train.num_documents == 3
    assert folders(tmp_path / "data") == [left, "out"], "a folder that another process may be writing is left alone"

    for path in [tmp_path / "data" / left, *(tmp_path / "data" / left).rglob("*")]:
        os.utime(path, (0, path.stat().st_mtime - STALE_SECONDS - 60))
    (tmp_path / "data" / "out").rename(tmp_path / "moved")
    prepare(corpus, tokenizer, out)
    assert folders(tmp_path / "data") == ["out"]


def test_half_a_character_names_its_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"notes:3 holds half a character \(a lone surrogate\) at position 1"):
        prepare(Corpus([Document(text="a\ud800", where="notes:3")]), tokenizer, tmp_path / "out")


def test_it_is_said_when_nothing_is_held_out(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    twins = Corpus([Document(text="Fever."), Document(text="fever. ")], holdout_fraction=0.5)
    prepared = prepare(twins, tokenizer, tmp_path / "a")
    assert prepared.validation is None and "Nothing is held out" in capsys.readouterr().err
    prepare(Corpus(DOCUMENTS, holdout_fraction=0.1), tokenizer, tmp_path / "b")
    assert "Nothing is held out" not in capsys.readouterr().err
