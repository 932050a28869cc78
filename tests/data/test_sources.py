"""From a config to prepared data: the clinic, files of one's own, and questions of one's own."""

import hashlib
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from osler.config.schema import decode
from osler.data.config import CleanConfig, ClinicData, FilesData, HubData, MixtureData, TextData, TurnsData, sources_of
from osler.data.documents import Corpus
from osler.data.from_recipe import Sections
from osler.data.prepared import PreparedSource
from osler.data.readers import TextFiles
from osler.data.sources import SAMPLE_CHARS, _sample, check_sources, open_corpora, prepare_sources, train_tokenizer
from osler.runtime.errors import UserError
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.config import BPEConfig
from osler.tokenizer.train import train
from osler.train.config import TrainConfig

CLINIC = ClinicData(passages=150, examples=120, cards=7, drills=3, validation_passages=10, validation_examples=20)
MANY = 1_000_000_000  # bytes: all of the text


def open_corpus(data: TextData) -> Corpus:
    [corpus] = open_corpora(data).values()
    return corpus


def prepare_source(data: TextData, tokenizer: Tokenizer, out: Path) -> PreparedSource:
    [source] = prepare_sources(data, tokenizer, out).sources
    return source


def test_clinic_documents_are_prose_exam_turns_and_drills() -> None:
    source = open_corpus(CLINIC)
    documents = list(source.documents())
    assert sum(document.turn is None for document in documents) == 157 and len(documents) == 280
    assert any(document.turn is None for document in documents[:9]) and any(document.turn for document in documents[:9]), "mixed"
    turn = next(document.turn for document in documents if document.turn is not None and document.turn.thinking)
    assert all(f"({letter})" in turn.question for letter in "ABCD")
    assert turn.answer in turn.question and turn.answer[-3:] in ("(A)", "(B)", "(C)", "(D)")
    assert source.validation is not None and len(list(source.validation.documents())) == 30
    assert list(open_corpus(CLINIC).documents()) == documents
    assert list(open_corpus(ClinicData(seed=1, passages=150, examples=120, cards=7, drills=3)).documents()) != documents


def test_clinic_is_prepared_and_reused(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(CLINIC, BPEConfig(vocab_size=512, max_bytes=MANY))
    prepared = prepare_source(CLINIC, tokenizer, tmp_path / "out")
    assert prepared.validation is not None
    assert (prepared.train.num_documents, prepared.validation.num_documents) == (280, 30)
    assert 0 < prepared.train.num_loss_tokens < prepared.train.num_tokens
    assert prepare_sources(CLINIC, tokenizer, tmp_path / "out").reused
    none = ClinicData(passages=5, examples=5, cards=0, drills=0, validation_passages=0, validation_examples=0)
    assert prepare_source(none, tokenizer, tmp_path / "none").validation is None


def test_files_and_turns_hold_out_documents(tmp_path: Path) -> None:
    rows = [{"question": f"What is {n}?", "why": f"Since {n}.", "answer": f"{n}", "text": f"Text {n}"} for n in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs = [FilesData(path=str(path)), TurnsData(path=str(path), thinking_field="why", holdout_fraction=0.1)]
    for name, data in enumerate(configs):
        tokenizer = train_tokenizer(data, BPEConfig(vocab_size=300, max_bytes=MANY))
        prepared = prepare_source(data, tokenizer, tmp_path / str(name))
        assert prepared.validation is not None
        assert prepared.train.num_documents == 40 - prepared.validation.num_documents < 40


def test_tokenizer_sample_is_deterministic_and_smaller(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": hashlib.md5(str(n).encode()).hexdigest() * 2}) + "\n" for n in range(200)), encoding="utf-8"
    )
    data = FilesData(path=str(tmp_path))
    first, second = (train_tokenizer(data, BPEConfig(vocab_size=2000, max_bytes=8_000)) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size < train_tokenizer(data, BPEConfig(vocab_size=2000, max_bytes=MANY)).vocab_size
    least = BPEConfig(vocab_size=2000, max_bytes=1)  # one piece: the first, as files are not dealt out here
    assert train_tokenizer(data, least).fingerprint == train([next(iter(TextFiles(tmp_path))).text], least).fingerprint
    (tmp_path / "texts.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=f"nothing to learn from: no text in any of 1 documents in data .{tmp_path}"):
        train_tokenizer(data, BPEConfig(vocab_size=2000, max_bytes=MANY))


@pytest.mark.parametrize("words", [3_000, 300_000])
def test_one_large_file_is_sampled_in_pieces(tmp_path: Path, words: int) -> None:
    """A document is not taken or left as a whole: whatever the draw, there is text, and about `max_bytes` of it."""
    (tmp_path / "book.txt").write_text(" ".join(f"w{n % 997}" for n in range(words)))
    size = (tmp_path / "book.txt").stat().st_size
    pieces = list(_sample(open_corpus(FilesData(path=str(tmp_path))).documents(), 0.3))
    taken = sum(map(len, pieces))
    assert 0 < taken <= max(0.6 * size, SAMPLE_CHARS)
    assert list(_sample(open_corpus(FilesData(path=str(tmp_path))).documents(), 0.3)) == pieces


def test_a_tokenizer_has_not_seen_what_is_held_out(tmp_path: Path) -> None:
    letters = str.maketrans("0123456789", "ghijklmnop")
    words = [" " + hashlib.md5(str(n).encode()).hexdigest().translate(letters) for n in range(10)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": word * 50}) + "\n" for word in words))
    data = FilesData(path=str(tmp_path), holdout_fraction=0.5)
    tokenizer = train_tokenizer(data, BPEConfig(vocab_size=1000, max_bytes=MANY))
    prepared = prepare_source(data, tokenizer, tmp_path / "out")
    assert prepared.validation is not None
    known = [len(tokenizer.encode(word)) for word in words]
    learned = prepared.train.num_documents
    assert sorted(known)[:learned] == [1] * learned and min(sorted(known)[learned:]) > 4, "learned whole, or never seen"
    (tmp_path / "set.jsonl").write_text(json.dumps({"text": words[0].upper() * 50}))
    sets = (FilesData(path=str(tmp_path / "set.jsonl")),)
    data = FilesData(path=str(tmp_path / "texts.jsonl"), holdout_fraction=0.5)
    tokenizer = train_tokenizer(data, BPEConfig(vocab_size=1000, max_bytes=MANY), sets)
    assert [len(tokenizer.encode(word)) > 4 for word in words] == [True] + [False] * 9, "nothing else is held out then"


def test_a_mixture_is_known_by_its_sources() -> None:
    files = [{"type": "files", "path": "books/a.txt", "weight": 3}, {"type": "turns", "path": "b c.jsonl", "name": "asked"}]
    data = decode(Sections, {"data": {"type": "mixture", "sources": files}}).data
    assert isinstance(data, MixtureData) and [source.title for source in data.sources] == ["a", "asked"]
    for wrong, message in (
        ([], "sources is empty"),
        ([files[0], {**files[0], "path": "other/a.parquet"}], "two sources are named a"),
        ([files[0], {**files[1], "weight": 1e-4}], "the weight of asked, 0.0001, is less than 1/1000"),
        ([{**files[0], "weight": 0}], "weight: must be above 0"),
    ):
        with pytest.raises(UserError, match=message):
            decode(Sections, {"data": {"type": "mixture", "sources": wrong}})


def test_no_source_has_what_another_holds_out(tmp_path: Path) -> None:
    texts = [f"Text {number} of many, with words." for number in range(60)]
    for name, part in (("a", texts[:40]), ("b", texts[20:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    sources = [FilesData(path=str(tmp_path / f"{name}.jsonl"), holdout_fraction=0.2) for name in "ab"]
    data = MixtureData(sources=tuple(sources))
    tokenizer = train_tokenizer(data, BPEConfig(vocab_size=300, max_bytes=MANY))
    prepared = prepare_sources(data, tokenizer, tmp_path / "out")
    splits = (prepared.train, prepared.validation)
    train, held = ({tokenizer.decode(ids[:-1]) for part in split for ids in part.documents()} for split in splits)
    assert train | held == set(texts) and not train & held and len(held) > 10
    assert [source.name for source in prepared.sources] == ["a", "b"]


@pytest.mark.parametrize(("name", "title"), [("..", "data"), ("tokenizer.json", "tokenizer-json"), ("a/b", "a-b")])
def test_a_name_stays_in_its_folder(name: str, title: str) -> None:
    with pytest.raises(UserError, match=rf"data: the name '{name}' has other characters than .*; {title} would do"):
        decode(Sections, {"data": {"type": "files", "path": "x", "name": name}})
    assert FilesData(path="x/my notes.v1.txt").title == "my-notes"


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ([{"path": "b", "holdout_fraction": 0.1}], "the validation set b has no holdout_fraction: leave it out"),
        ([{"path": "b", "licence": "MIT"}], "the validation set b has no licence: leave it out"),
        ([{"path": "b", "weight": 2, "clean": {}}], "the validation set b has no weight or clean: leave it out"),
        ([{"path": "b"}, {"path": "c", "name": "b"}], "two validation sets are named b; give one of them another `name`"),
        ([{"path": "a/x.txt", "name": "x"}], "the validation set x is the source a, of which nothing would be left to learn"),
        ([{"type": "hub", "name": "medqa"}], "the validation set medqa is the source medqa"),
        ([{"type": "hub", "name": "c4"}] * 2, "two validation sets are named c4; give one of them another subset or split"),
    ],
)
def test_validation_sets_are_checked(sets: list[dict[str, Any]], said: str) -> None:
    sources = [{"type": "files", "path": "a/x.txt", "name": "a"}, {"type": "hub", "name": "medqa"}]
    given = {"data": {"type": "mixture", "sources": sources, "root": "r"}, "tokenizer": {"vocab_size": 300}}
    for cls in (Sections, TrainConfig):
        with pytest.raises(UserError, match=said):
            decode(cls, {**given, "validation": [{"type": "files", **one} for one in sets]})
        decode(cls, {**given, "validation": [{"type": "hub", "name": "medqa", "split": "test"}, {"type": "clinic"}]})


def test_sources_take_over_what_their_mixture_says() -> None:
    """But for what they say themselves."""
    own, shared = CleanConfig(min_words=9), CleanConfig()
    sources = (HubData(name="c4", root="own"), HubData(name="synth", clean=own), FilesData(path="a"))
    data = MixtureData(sources=sources, root="r", clean=shared, no_benchmark_contamination=True)
    found = sources_of(data)
    assert [(source.clean, source.no_benchmark_contamination) for source in found.values()] == [
        (shared, True), (own, True), (shared, True)
    ]  # fmt: skip
    assert [source.place for source in found.values()] == ["own/c4", "r/synth", "a"]


@pytest.mark.parametrize(
    ("clean", "said"),
    [
        ({"languages": ["en", "English"]}, r"data.clean.languages: `English` is not the ISO 639-1 code .*; known: .*, en, .*"),
        ({"exams": [{"type": "medqa", "path": "nowhere.jsonl"}]}, r"no file or folder .*set data.clean.exams\[0\].path"),
    ],
)
def test_cleaning_that_cannot_be_done_is_told_before_anything_is_read(tmp_path: Path, clean: dict[str, Any], said: str) -> None:
    sources = [{"type": "files", "path": str(tmp_path / "a.txt")}]
    with pytest.raises(UserError, match=said):
        check_sources(decode(Sections, {"data": {"type": "mixture", "sources": sources, "clean": clean}}).data)


@pytest.mark.parametrize(("package", "clean"), [("rensa", {"duplicates": "near"}), ("py3langid", {"languages": ["en"]})])
def test_a_missing_package_is_told_before_anything_is_read(
    package: str, clean: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}: pip install -e '\.\[clean\]'"):
        check_sources(decode(Sections, {"data": {"type": "files", "path": "nowhere", "clean": clean}}).data)


def test_the_first_documents_are_looked_at_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xff")
    for words, is_enough in ((100, False), (20_000, True)):
        (tmp_path / "a.txt").write_text("word " * words)
        with nullcontext() if is_enough else pytest.raises(UserError, match=r"b\.txt:1 is not UTF-8"):
            check_sources(FilesData(path=str(tmp_path)))


def test_a_real_textbook_survives_the_way_to_tokens(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    data = FilesData(path=str(shared_data("text/openstax-microbiology.parquet")))
    tokenizer = train_tokenizer(data, BPEConfig(vocab_size=2048, max_bytes=1_000_000))
    prepared = prepare_source(data, tokenizer, tmp_path / "out")
    texts = [document.text for document in open_corpus(data).documents()]
    train = [prepared.train.document(index)[0][:-1].tolist() for index in range(prepared.train.num_documents)]
    assert prepared.validation is not None and 0 < prepared.validation.num_documents < 0.1 * len(texts)
    assert {tokenizer.decode(ids) for ids in train} < set(texts)
    assert prepared.train.num_bytes + prepared.validation.num_bytes == sum(len(text.encode()) for text in texts)
    assert 2.5 < prepared.train.num_bytes / prepared.train.num_tokens < 5
