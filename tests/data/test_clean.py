"""What is left out of data: by quality, language, as copies of earlier documents, and as questions of exams."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from osler.config.schema import decode
from osler.data.clean import EXAM, Cleaner
from osler.data.config import CleanConfig, FilesData, MixtureData, sources_of
from osler.data.documents import Document, in_memory
from osler.data.duplicates import EXACT, NEAR, Rows, Seen, rows_of, signatures
from osler.data.exams import ExamsInData, read_exams_in_data, refuse_unchecked
from osler.data.from_recipe import read_sections
from osler.data.languages import languages_of
from osler.data.named import EXAMS, exam_by_name, load_task
from osler.data.ngrams import Words
from osler.data.prepare import prepare
from osler.data.shards import read_data_manifest
from osler.data.sources import check_sources, open_corpora, prepare_sources
from osler.runtime.errors import UserError
from osler.tasks.config import HubExam, MedqaTask, QuestionsTask
from osler.tokenizer.bpe import Tokenizer
from tests.data.prose import prose
from tests.data.test_named import ROWS

# -- quality -----------------------------------------------------------------------------------------------------------

SENTENCE = "The patient has had a fever for three days and coughs at night"
GERMAN = "Der Patient hat seit drei Tagen Fieber und hustet in der Nacht, die Lunge war bei jeder Untersuchung ohne Befund."


@pytest.mark.parametrize(
    ("config", "text", "reason"),
    [
        (CleanConfig(), SENTENCE, ""),
        (CleanConfig(min_words=14), SENTENCE, "too short"),
        (CleanConfig(max_words=12), SENTENCE, "too long"),
        (CleanConfig(), "a b c d e " + "-" * 20, "too many symbols"),
        (CleanConfig(max_symbols=1.0), "a b c d e " + "-" * 20, ""),
        (CleanConfig(), f"{SENTENCE}. " * 9, "repetitive"),
        (CleanConfig(max_repetition=1.0), f"{SENTENCE}. " * 9, ""),
        (CleanConfig(languages=("en",)), f"{SENTENCE}, though there was nothing wrong with the lungs.", ""),
        (CleanConfig(languages=("en",)), GERMAN, "language de"),
        (CleanConfig(languages=("de", "en")), GERMAN, ""),
        (CleanConfig(languages=("en",)), " ".join(GERMAN.split()[:19]), ""),  # too few words to tell
    ],
)
def test_quality_and_language(config: CleanConfig, text: str, reason: str) -> None:
    assert [look.reason for look in Cleaner(config).looks([(text,), ("2 + 2?", "4")])] == [reason, ""], "questions may be short"


def test_languages_are_those_that_the_library_tells() -> None:
    py3langid = pytest.importorskip("py3langid")
    others = ["", "12345 67", "中文字", "Le patient a de la fièvre et tousse la nuit.", "Пациент кашляет", "\ud800"]
    texts = [SENTENCE, GERMAN, GERMAN.upper(), *others, *(" ".join(prose(seed, 40)) for seed in range(50))]
    assert languages_of(texts) == [py3langid.classify(text)[0] for text in texts]
    assert languages_of([]) == []


def seen(path: Path, *, near: bool = True, memory_bytes: int = 1 << 20) -> Seen:
    return Seen(path / "seen.bin", near=near, similarity=0.8, memory_bytes=memory_bytes)


def near_rows(keys: Iterable[int], *texts: list[str]) -> Rows:
    words = Words([" ".join(text) for text in texts])
    return rows_of(list(keys), [*signatures([words.sequences_of(number, 5) for number in range(len(texts))])])


def test_near_copies_are_found_and_others_are_not(tmp_path: Path) -> None:
    text, other = prose(1, 400), prose(2, 400)
    edited, half = [*text[:200], "new", *text[201:]], [*text[:200], *other[200:]]
    given = [text, other, edited, half, text]
    reasons = list(seen(tmp_path).add(near_rows([1, 2, 3, 4, 1], *given)))
    assert reasons == ["", "", NEAR, "", EXACT]


def test_memory_is_bounded_and_the_latest_documents_are_known(tmp_path: Path) -> None:
    small = seen(tmp_path, near=False, memory_bytes=16 * 100)
    rows = rows_of(range(1, 1001), [None] * 1000)
    assert not any(small.add(rows))
    assert all(small.add(rows[-100:]))
    assert not any(small.add(rows[:100]))
    assert small._rows.nbytes + small._latest.nbytes + small._previous.nbytes <= 16 * 100


def test_what_was_seen_is_restored(tmp_path: Path) -> None:
    rows = near_rows(range(300), *(prose(number, 50) for number in range(300)))
    first = seen(tmp_path, memory_bytes=272 * 100)
    list(first.add(rows[:200]))
    first.write()
    list(first.add(rows[200:]))
    first.write()
    again = seen(tmp_path, memory_bytes=272 * 100)
    again.restore(200)
    assert again.num_written == again.count == 200
    fresh = seen(tmp_path / "none", memory_bytes=272 * 100)
    list(fresh.add(rows[:200]))
    probe = np.random.default_rng(0).permutation(300)
    assert list(again.add(rows[probe])) == list(fresh.add(rows[probe]))


# -- prepared data -----------------------------------------------------------------------------------------------------


@pytest.fixture
def exam(tmp_path: Path) -> MedqaTask:
    file = tmp_path / "exam.jsonl"
    rows = [
        {"question": " ".join(prose(number, 40)), "options": {"A": "x", "B": "y"}, "answer": "x", "answer_idx": "A"}
        for number in range(5)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return MedqaTask(path=str(file), split="test")


@pytest.fixture
def data(tmp_path: Path, exam: MedqaTask) -> FilesData:
    texts = [" ".join(prose(1000 + number, 60)) for number in range(200)]
    texts[50], texts[51], texts[52] = texts[40], " ".join([*texts[40].split()[:-1], "end"]), "No."
    texts[60] = f"{texts[60]} {' '.join(prose(3, 40)).upper()}"
    file = tmp_path / "notes.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    clean = CleanConfig(duplicates="near", exams=(exam,))
    return FilesData(path=str(file), clean=clean, licence="CC BY 4.0", no_benchmark_contamination=True)


def test_drops_are_counted_and_shown_in_the_card(data: FilesData, exam: MedqaTask, tmp_path: Path, tokenizer: Tokenizer) -> None:
    out = tmp_path / "out"
    prepare_sources(data, tokenizer, out)
    source = read_data_manifest(out)["sources"]["notes"]
    assert source["dropped"] == {EXACT: 1, EXAM: 1, NEAR: 1, "too short": 1}
    assert sum(split["documents"] for split in source["splits"].values()) == 196
    found_item = load_task(exam)[3].id
    exams = read_exams_in_data(out)
    assert exams.found == {found_item}
    assert exams.checked == {item.id for item in load_task(exam)}
    card = (out / "DATA_CARD.md").read_text()
    for part in (
        "CC BY 4.0",
        "notes, too short: No. …",
        "medqa test |",
        f"`{found_item}`",
        "| near copy | 1 | 0.500% |",
        "duplicates: near",
    ):
        assert part in card
    assert prose(3, 1)[0].upper() not in card  # the text of exam questions is not spread
    assert str(tmp_path) not in card and not list(out.rglob("seen.bin"))
    assert prepare_sources(data, tokenizer, out).reused


QUESTION = " ".join(prose(3, 40))
ASKED = {"humaneval": "prompt", "hellaswag": "ctx_a"}  # the fields of questions with other names


@pytest.mark.parametrize("name", EXAMS)
@pytest.mark.parametrize("by_name", [False, True])
def test_every_exam_can_be_named(data: FilesData, tmp_path: Path, name: str, by_name: bool) -> None:
    """By its file, or by its name alone, which takes the split that models are examined with from the folder of the data."""
    file = tmp_path / "root" / name / f"{exam_by_name(name)[2]}.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({**ROWS[name][0], ASKED.get(name, "question"): QUESTION}) + "\n")
    entry = {"type": "hub", "name": name} if by_name else {"type": name, "path": str(file)}
    clean = decode(CleanConfig, {"exams": [entry]})
    mixture = MixtureData(sources=(replace(data, clean=None),), root=str(tmp_path / "root"), clean=clean)
    check_sources(mixture)
    cleaner = open_corpora(mixture)["notes"].clean
    assert cleaner is not None
    [look] = cleaner.looks([(f"Before. {QUESTION} after.",)])
    assert look.reason == EXAM and look.exam_items[0].startswith(name)


def test_exams_of_ones_own_and_strange_names(data: FilesData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"q": QUESTION, "a": "It is."}) + "\n")
    own = QuestionsTask(path=str(file), question_field="q", answer_field="a")
    cleaner = open_corpora(replace(data, clean=CleanConfig(exams=(own,))))["notes"].clean
    assert cleaner is not None and cleaner.looks([(QUESTION,)])[0].reason == EXAM
    with pytest.raises(UserError, match=r"data.clean.exams\[1\]: medqas is no exam .*medqa"):
        check_sources(replace(data, clean=CleanConfig(exams=(own, HubExam(name="medqas")))))
    dev = Path(shutil.copy(tmp_path / "exam.jsonl", tmp_path / "medqa-dev.jsonl"))
    for split in ("test", "dev", "validation", "", "test"):
        open_corpora(replace(data, clean=CleanConfig(exams=(MedqaTask(path=str(dev), split=split),))))
    told = capsys.readouterr().err
    assert "exams[0].split is test, but the name of" in told and told.count("but the name of") == 1


def test_other_cleaning_is_other_data(
    data: FilesData, exam: MedqaTask, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other rules, or another exam in the same file."""
    prepare_sources(data, tokenizer, tmp_path / "out")
    with monkeypatch.context() as changed, pytest.raises(UserError, match=r"clean\.rules is 2, now it is 99"):
        changed.setattr("osler.data.clean.RULES", 99)
        prepare_sources(data, tokenizer, tmp_path / "out")
    Path(exam.path).write_text(Path(exam.path).read_text().replace('"x"', '"z"'))
    with pytest.raises(UserError, match=r"clean\.exams is .*, now it is"):
        prepare_sources(data, tokenizer, tmp_path / "out")


def test_an_exam_is_written_down_as_in_every_version(data: FilesData) -> None:
    """A field that exams get later must not make other data of the shards that there are."""
    cleaner = open_corpora(data)["notes"].clean
    assert cleaner is not None
    assert {*cleaner.options["exams"][0]} == {"type", "path", "split", "limit", "seed", "shots", "shots_path"}


def test_documents_with_exam_questions_can_be_kept(data: FilesData, tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert data.clean is not None
    kept = replace(data, clean=replace(data.clean, exam_questions="keep"), no_benchmark_contamination=False)
    prepare_sources(kept, tokenizer, tmp_path / "out")
    assert EXAM not in read_data_manifest(tmp_path / "out")["sources"]["notes"]["dropped"]
    assert len(read_exams_in_data(tmp_path / "out").found) == 1


def test_items_are_checked_where_all_sources_are(data: FilesData) -> None:
    one, other = ExamsInData(frozenset("abc"), frozenset("a")), ExamsInData(frozenset("bcd"), frozenset("d"))
    assert one.with_data(other) == ExamsInData(frozenset("bc"), frozenset("ad"))
    assert ExamsInData.from_files(one.as_files()) == one
    with pytest.raises(UserError, match="damaged"):
        ExamsInData.from_files({"exams.json": b"{}"})


@pytest.mark.parametrize("is_mixture", [False, True])
def test_the_recipe_in_the_card_gives_the_same_data(
    data: FilesData, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, is_mixture: bool
) -> None:
    """In a folder with the files, the exam and the tokenizer; the claim and the validation set are in it."""
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": " ".join(prose(5000 + number, 60))}) + "\n" for number in range(9)))
    sets = (FilesData(path=str(other), name="outside"),)
    mixture = MixtureData(
        sources=(data, replace(data, name="again", weight=3)), clean=data.clean, no_benchmark_contamination=True
    )
    prepare_sources(mixture if is_mixture else data, tokenizer, tmp_path / "out", validation=sets)
    recipe = (tmp_path / "out/DATA_CARD.md").read_text().split("```yaml\n")[1].split("```")[0]
    there = tmp_path / "there"
    there.mkdir()
    (there / "recipe.yaml").write_text(recipe)
    for file in ("notes.jsonl", "exam.jsonl", "other.jsonl", "out/tokenizer.json"):
        shutil.copy(tmp_path / file, there)
    monkeypatch.chdir(there)
    sections = read_sections("recipe.yaml", [])
    assert all(source.no_benchmark_contamination for source in sources_of(sections.data).values())
    prepare_sources(sections.data, Tokenizer.load("tokenizer.json"), "again", validation=sections.validation)
    assert files(there / "again", "*.bin") == files(tmp_path / "out", "*.bin")


def test_a_larger_share_of_one_source_costs_another_only_copies(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [Document(text=" ".join(prose(number, 20))) for number in range(400)]
    corpora = {"much": in_memory(texts[:200], holdout_fraction=0.3), "little": in_memory(texts[150:], holdout_fraction=0.01)}
    much = prepare(corpora, tokenizer, tmp_path / "out").sources[0]
    entry = read_data_manifest(tmp_path / "out")["sources"]["little"]
    assert much.validation is not None and 30 < much.validation.num_documents < 90
    assert 5 < entry["dropped_copies"] < 30  # of the 50 documents that both have
    assert "Sources hold out different shares" in (tmp_path / "out/DATA_CARD.md").read_text()


def test_a_claim_that_nothing_supports_is_refused(data: FilesData, exam: MedqaTask) -> None:
    unchecked = replace(data, name="other", clean=None, no_benchmark_contamination=False)
    mixture = MixtureData(sources=(data, unchecked), no_benchmark_contamination=True)
    with pytest.raises(UserError, match=r"data\.sources\[1\] \(other\) does not drop the questions"):
        check_sources(mixture)
    check_sources(replace(mixture, clean=CleanConfig(exams=(exam,))))
    with pytest.raises(UserError, match="does not drop the questions"):
        check_sources(replace(mixture, clean=CleanConfig(exams=(exam,), exam_questions="keep")))
    with pytest.raises(UserError, match="There is no file or folder"):
        check_sources(replace(data, clean=CleanConfig(exams=(replace(exam, path="nowhere.jsonl"),))))


def test_cleaning_that_leaves_nothing_says_so(data: FilesData, tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="too short: 200"):
        short = replace(data, clean=CleanConfig(min_words=500), no_benchmark_contamination=False)
        prepare_sources(short, tokenizer, tmp_path / "out")


def files(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob(pattern)) if path.is_file()}


def interrupt_after(shards: int) -> Callable[[], None]:
    """Return what raises KeyboardInterrupt before so many shards and one more are written."""
    left = iter(range(shards))

    def before_shard(num_bytes: int) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return before_shard


def test_processes_and_stops_change_nothing(
    data: FilesData, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after any part, a preparation goes on to the same bytes, those of copies among them."""
    for name, value in (("FIRST_SHARD_TOKENS", 1024), ("SHARD_TOKENS", 2048), ("CUT_BYTES", 8192)):
        monkeypatch.setattr(f"osler.data.writing.{name}", value)
    monkeypatch.setattr("osler.files.parts.PART_BYTES", 4096)

    corpora = open_corpora(data)
    prepare(corpora, tokenizer, tmp_path / "whole", processes=0)
    prepare(corpora, tokenizer, tmp_path / "two", processes=2)
    assert files(tmp_path / "two") == files(tmp_path / "whole")

    stops, is_done = 0, False
    while not is_done:
        try:
            prepare(corpora, tokenizer, tmp_path / "stopped", processes=0, before_shard=interrupt_after(4))
            is_done = True
        except KeyboardInterrupt:
            stops += 1
    assert stops > 5
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_shards_are_refused_where_exams_were_not_looked_for(data: FilesData, tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepare_sources(data, tokenizer, tmp_path / "checked")
    refuse_unchecked(tmp_path / "checked")
    prepare_sources(replace(data, clean=None, no_benchmark_contamination=False), tokenizer, tmp_path / "unchecked")
    with pytest.raises(UserError, match=r"the source notes in .* was prepared without dropping"):
        refuse_unchecked(tmp_path / "unchecked")


def test_documents_that_are_held_out_together_are_no_copies(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [Document(text=" ".join(prose(number, 20)), group=f"page {number // 5}") for number in range(20)]
    corpus = replace(in_memory([*documents, documents[7]], holdout_fraction=0.3), clean=Cleaner(CleanConfig()))
    source = prepare({"notes": corpus}, tokenizer, tmp_path / "out").sources[0]
    assert source.validation is not None
    assert source.train.num_documents + source.validation.num_documents == 20
