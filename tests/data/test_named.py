"""Sources by name: their rows as documents, local files of the same schema, and the hub, which may fail in every way."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub.utils._http as hub_http
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from osler.cli.main import main
from osler.config.schema import decode
from osler.data.config import CleanConfig, ClinicData, FilesData, HubData, MixtureData
from osler.data.named import SOURCES, load_task, open_hub
from osler.data.sources import at_known_commits, check_present, check_sources, open_corpora, prepare_sources
from osler.files.hub import hub_files
from osler.runtime import faults
from osler.runtime.errors import UserError
from osler.tasks.config import HubExam, MedqaTask
from osler.tasks.item import render_question
from tests.data.hub_server import COMMIT, cut, serving, status, times

ITEM = {"question": "Which metal do red cells need?", "options": {"A": "Iron", "B": "Gold"}, "answer": "Iron", "answer_idx": "A"}
ASKED = {"role": "user", "content": "2 + 2?"}
# One row of each schema, and what it becomes: a text, or question, thinking and answer.
ROWS = {
    "fineweb_edu": ({"text": "A page.", "score": 3.1}, "A page."),
    "synth": (
        {"query": "Why?", "synthetic_reasoning": "So.", "synthetic_answer": "Thus.", "query_seed_url": "u", "language": "en"},
        ("Why?", "So.", "Thus."),
    ),
    "pubmed": ({"title": "Gout.", "content": "Urate.", "PMID": 1}, "Gout.\n\nUrate."),
    "pubmed_open": ({"text": "Open.", "metadata": {"license": "CC0"}}, "Open."),
    "guidelines": ({"title": "Asthma", "clean_text": "Inhale.", "source": "who"}, "Asthma\n\nInhale."),
    "openmedtext": ({"text": "Whole."}, "Whole."),
    "wikipedia": ({"title": "Iron", "text": "A metal."}, "Iron\n\nA metal."),
    "wikipedia_2k": ({"text": "Good."}, "Good."),
    "wikitext": ({"text": "Alone."}, "Alone.\n"),
    "c4": ({"text": "Web."}, "Web."),
    "mixture_of_thoughts": (
        {"messages": [ASKED, {"role": "assistant", "content": "<think>\nAdd.\n</think>\nIt is 4."}]},
        ("2 + 2?", "Add.", "It is 4."),
    ),
    "gsm8k": ({"question": "6 x 7?", "answer": "6 x 7 = <<6*7=42>>42\n#### 42"}, ("6 x 7?", "6 x 7 = 42", "42")),
    "medqa": (ITEM, ("Which metal do red cells need? Iron (A) Gold (B)", "Iron (A)")),
    "medmcqa": (
        {
            "id": "1",
            "question": "Metal?",
            "opa": "Iron",
            "opb": "Gold",
            "opc": "Tin",
            "opd": "Lead",
            "cop": 0,
            "exp": "Heme has it in its core.",
        },
        ("Metal? Iron (A) Gold (B) Tin (C) Lead (D)", "Heme has it in its core.", "Iron (A)"),
    ),
    "pubmedqa": (
        {
            "pubid": 1,
            "question": "Iron?",
            "context": {"contexts": ["We gave it."]},
            "long_answer": "It helps.",
            "final_decision": "yes",
        },
        ("We gave it.\nIron? yes (A) no (B) maybe (C)", "It helps.", "yes (A)"),
    ),
    "mmlu": (
        {"question": "Metal?", "subject": "anatomy", "choices": ["Iron", "Salt"], "answer": 0},
        ("Metal? Iron (A) Salt (B)", "Iron (A)"),
    ),
    "humaneval": (
        {
            "task_id": "T/0",
            "prompt": "def f():\n",
            "canonical_solution": "    return 1\n",
            "test": "def check(f):\n    assert f() == 1\n",
            "entry_point": "f",
        },
        "def f():\n    return 1\n",
    ),
    "hellaswag": (
        {"activity_label": "Baking", "ctx_a": "She mixes.", "ctx_b": "then", "endings": ["flies.", "bakes."], "label": "1"},
        "Baking: She mixes. then bakes.",
    ),
    "trivia_qa": ({"question_id": "q", "question": "Metal?", "answer": {"value": "Iron", "aliases": []}}, ("Metal?", "Iron")),
    "medquad": (
        {"question": "What is gout?", "answer": "Urate.", "focus": "Gout", "qtype": "information"},
        ("What is gout?", "Urate."),
    ),
}


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def local(tmp_path: Path, file: str, rows: list[dict], **fields: object) -> list[tuple[str, ...]]:
    data = HubData(**{"name": file, **fields}, path=str(write_rows(tmp_path / f"{file}.jsonl", rows)))
    return [document.texts for document in open_hub(data, "data").documents()]


@pytest.mark.parametrize("name", SOURCES)
def test_a_row_of_each_schema_becomes_a_document(tmp_path, name):
    row, expected = ROWS[name]
    assert local(tmp_path, name, [row]) == [(expected,) if isinstance(expected, str) else expected]


@pytest.mark.parametrize("name", [name for name in SOURCES if SOURCES[name].fields])
def test_a_row_without_its_fields_is_refused_by_file_row_and_field(tmp_path, name):
    with pytest.raises(UserError, match=rf"{name}.jsonl:1.*field '.*other"):
        local(tmp_path, name, [{"other": "text"}])


def test_reasoning_can_be_left_out_and_rows_without_a_known_answer_are_no_examples(tmp_path):
    assert local(tmp_path, "synth", [ROWS["synth"][0]], reasoning=False) == [("Why?", "Thus.")]
    row = ROWS["medmcqa"][0]
    assert len(local(tmp_path, "medmcqa", [row, {**row, "cop": -1}])) == 1
    unlabelled = {key: value for key, value in ROWS["pubmedqa"][0].items() if key != "final_decision"}
    assert local(tmp_path, "pubmedqa", [unlabelled], subset="pqa_unlabeled") == [("Iron?", "It helps.")]


def test_lines_of_wikitext_are_joined_into_articles(tmp_path):
    lines = [" ", " = Iron = ", " ", " A metal . ", " = = Uses = = ", " Many . ", " = Gold = ", " Another . "]
    articles = [" \n = Iron = \n \n A metal . \n = = Uses = = \n Many . \n", " = Gold = \n Another . \n"]
    assert local(tmp_path, "wikitext", [{"text": line} for line in lines]) == [(text,) for text in articles]
    text = tmp_path / "wiki.valid.txt"
    text.write_text("\n".join(lines) + "\n")
    corpus = open_hub(HubData(name="wikitext", path=str(text), split="validation"), "data")
    assert [document.text for document in corpus.documents()] == articles


def test_synth_is_split_by_the_page_that_questions_were_made_from(tmp_path):
    row = ROWS["synth"][0]
    rows = [{**row, "query": f"Why {number}?", "query_seed_url": f"page {number % 3}"} for number in range(9)]
    data = HubData(name="synth", path=str(write_rows(tmp_path / "synth.jsonl", rows)))
    assert len({document.split_key() for document in open_hub(data, "data").documents()}) == 3


def test_a_split_is_found_in_local_files_and_one_that_is_not_there_is_told(tmp_path):
    for split in ("train", "test"):
        write_rows(tmp_path / "medqa" / f"phrases_no_exclude_{split}.jsonl", [{**ITEM, "question": f"{split} question?"}])
    found = open_corpora(
        decode(MixtureData, {"root": str(tmp_path), "sources": [{"type": "hub", "name": "medqa", "split": "test"}]})
    )
    assert [document.texts[0] for document in found["medqa-test"].documents()] == ["test question? Iron (A) Gold (B)"]
    write_rows(tmp_path / "mixture_of_thoughts/all/train-0.parquet", [])
    with pytest.raises(
        UserError,
        match=r"no file of mixture_of_thoughts-math at .* \(math/train-\*.parquet.*but train-0.parquet. If one of them is",
    ):
        open_hub(HubData(name="mixture_of_thoughts", subset="math", root=str(tmp_path)), "data")
    with pytest.raises(UserError, match=r"data.split=dev: medqa has train, test"):
        open_hub(HubData(name="medqa", split="dev", root=str(tmp_path)), "data")
    with pytest.raises(UserError, match=r"data.root.*gsm8k|gsm8k.*data.root"):
        open_hub(HubData(name="gsm8k", root=str(tmp_path)), "data")
    with pytest.raises(UserError, match=r"sources\[0\].name=medqs is no source that Osler knows; did you mean `medqa`"):
        check_sources(decode(MixtureData, {"sources": [{"type": "hub", "name": "medqs"}]}))


def chosen(path: Path, **fields: str) -> list[str]:
    return [Path(file.name).name for file in open_hub(HubData(path=str(path), **fields), "data").files]


@pytest.mark.parametrize("name", [name for name in SOURCES if SOURCES[name].repo])
def test_files_that_lie_as_on_the_hub_are_found_by_subset_and_split(tmp_path, name):
    source, files = SOURCES[name], {}
    for subset, split, pattern in itertools.product(source.subsets, source.splits, source.files):
        file = tmp_path / pattern.format(subset=subset, split=split).replace("*", "00")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        files.setdefault((subset, split), []).append(file)
    for (subset, split), expected in files.items():
        corpus = open_hub(HubData(name=name, path=str(tmp_path), subset=subset, split=split), "data")
        assert [file.path for file in corpus.files] == expected


def test_files_of_another_split_are_never_taken_for_those_that_were_asked_for(tmp_path):
    for name in ("valid.txt", "wiki-test.txt", "notes.txt"):
        (tmp_path / name).write_text("A line.\n")
    assert chosen(tmp_path, name="wikitext") == ["notes.txt"], "what says no split may be of any"
    assert chosen(tmp_path, name="wikitext", split="validation") == ["valid.txt"]
    assert chosen(tmp_path, name="wikitext", split="test") == ["wiki-test.txt"]
    (tmp_path / "notes.txt").unlink()
    with pytest.raises(UserError, match=r"but valid.txt, wiki-test.txt. Set data.split=validation to read that"):
        chosen(tmp_path, name="wikitext")
    with pytest.raises(UserError, match=r"medmcqa-validation-2000.jsonl. Set data.split=validation to read that"):
        local(tmp_path, "medmcqa-validation-2000", [ROWS["medmcqa"][0]], name="medmcqa")
    dev = write_rows(tmp_path / "exams/medqa-dev.jsonl", [ITEM])
    assert chosen(dev, name="medqa") == ["medqa-dev.jsonl"], "a split that the source has not"
    with pytest.raises(UserError, match=r"If one of them is, name it with data.path=FILE"):
        chosen(dev.parent, name="medqa")
    train = write_rows(tmp_path / "root/medqa/phrases_no_exclude_train.jsonl", [ITEM])
    for path in (train, train.parent):
        with pytest.raises(UserError, match=r"Set data.split=train to read that"):
            chosen(path, name="medqa", split="test")
    for where in ({"path": str(train)}, {"root": str(tmp_path / "root")}):
        with pytest.raises(UserError, match=r"To ask another split, give its file: task.type=medqa task.path=FILE\."):
            load_task(HubExam(name="medqa", **where))
    with pytest.raises(UserError, match=r"medquad is on no hub; .* or root=DIR"):
        open_hub(HubData(name="medquad"), "source")


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("medmcqa", {"cop": "b"}, "'cop' must be a whole number"),
        ("medmcqa", {"cop": 5}, "'cop' is 5, which is none of the 4 options"),
        ("hellaswag", {"label": "2"}, "'label' must be the number of one of the 2 'endings'"),
        ("hellaswag", {"endings": ["one"]}, "'endings' has 1 options"),
    ],
)
def test_a_row_of_an_exam_without_a_right_answer_is_refused_in_words(tmp_path, name, change, told):
    with pytest.raises(UserError, match=rf"{name}.jsonl:1: .*{told}"):
        local(tmp_path, name, [{**ROWS[name][0], **change}])


def test_options_that_are_counted_from_one_are_found_before_anything_starts(tmp_path):
    """As in the authors' MedMCQA: read as the hub's, every answer would be the option before the right one."""
    rows = [{**ROWS["medmcqa"][0], "cop": 1 + number % 4} for number in range(8)]
    file = write_rows(tmp_path / "medmcqa.jsonl", rows)
    with pytest.raises(UserError, match=r"medmcqa.jsonl:4: 'cop' is 4, so this file counts its options from 1"):
        check_sources(HubData(name="medmcqa", path=str(file)))


# -- the hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one dataset of two parquet files of several row groups, without waits between tries."""
    folder = tmp_path / "hub"
    for number in range(2):
        texts = [f"Document {number}-{row} " + "word " * 200 for row in range(300)]
        file = folder / "sample/10BT" / f"{number:03}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": texts, "id": texts}), file, row_group_size=50, compression="none", use_dictionary=False)
    (folder / "README.md").write_text("A card.")
    hub_files.cache_clear()
    monkeypatch.setattr(hub_http.time, "sleep", lambda seconds: waits.append(seconds))
    waits: list[float] = []
    with serving({"HuggingFaceFW/fineweb-edu": folder}) as server:
        server.waits = waits
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        yield server


def read_hub() -> list[str]:
    corpus = open_hub(HubData(name="fineweb_edu"), "data")
    assert corpus.options["commit"] == COMMIT
    return [document.text for part in corpus.parts for document in corpus.read(part)]


def test_files_of_the_hub_are_read_by_ranges(hub):
    texts = read_hub()
    assert [text.split()[1] for text in texts] == [f"{number}-{row}" for number in range(2) for row in range(300)]
    assert hub.requests["bytes"] >= 4  # a footer and at least one range of each file


@pytest.mark.parametrize(
    "answer", [cut, status(500), status(503), status(429, Retry_After="7")], ids=["cut", "500", "503", "429"]
)
def test_a_range_that_fails_is_asked_for_again(hub, answer):
    hub.trouble = times(3, answer)
    assert len(read_hub()) == 600
    assert len(hub.waits) == 3
    if answer.__closure__ and any(cell.cell_contents == 429 for cell in answer.__closure__):
        assert min(hub.waits) >= 7


def test_a_hub_that_stays_away_is_an_error_that_names_the_source(hub):
    hub.trouble = times(1000, status(500))
    with pytest.raises(UserError, match=r"fineweb-edu/sample/10BT/00\d.parquet cannot be read.*data.root=DIR"):
        read_hub()


@pytest.mark.parametrize(
    ("code", "said"), [(403, "asks for consent.*HF_TOKEN"), (404, "not on the hub, or is private.*HF_TOKEN")]
)
def test_a_dataset_that_may_not_be_read_says_what_to_do(hub, code, said):
    hub.status_of_facts = code
    with pytest.raises(UserError, match=said):
        read_hub()


def test_a_disk_that_takes_nothing_is_no_network_that_is_away(hub, tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("A text.")
    (tmp_path / "full").write_text("a file, in which no folder can be made")
    hub.repos["ywchoi/OpenMedText"] = tmp_path / "texts"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "full/hub"))
    with pytest.raises(UserError, match=r"OpenMedText cannot be kept on this machine, at .*full.*set HF_HOME to a folder"):
        open_hub(HubData(name="openmedtext"), "data")


def test_the_token_of_the_environment_is_sent_and_offline_says_how_to_fetch(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    read_hub()
    assert "Bearer hf_secret" in hub.tokens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_files.cache_clear()
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.*hf download HuggingFaceFW/fineweb-edu.* task=medqa:FILE"):
        read_hub()


def test_shards_from_the_hub_are_those_of_the_same_local_files(hub, tmp_path, tokenizer):
    of_hub = prepare_sources(HubData(name="fineweb_edu"), tokenizer, tmp_path / "of-hub")
    data = HubData(name="fineweb_edu", path=str(hub.repos["HuggingFaceFW/fineweb-edu"]))
    of_files = prepare_sources(data, tokenizer, tmp_path / "of-files")
    assert of_hub.fingerprint == of_files.fingerprint and of_hub.num_tokens > 0


def test_a_preparation_goes_on_with_the_commit_that_it_began_with(hub, tokenizer, tmp_path):
    folder = hub.repos["HuggingFaceFW/fineweb-edu"]
    (folder / "data").mkdir()
    shutil.copy(folder / "sample/10BT/000.parquet", folder / "data")
    given = {"tokenizer": tokenizer, "out": tmp_path / "out", "validation": (HubData(name="fineweb_edu", subset="data"),)}
    begun = prepare_sources(HubData(name="fineweb_edu"), **given)
    hub.commit = "d" * 40
    hub_files.cache_clear()
    again = prepare_sources(HubData(name="fineweb_edu"), **given)
    assert again.reused and again.fingerprint == begun.fingerprint
    with pytest.raises(UserError, match=f"commit is {COMMIT}, now it is {hub.commit}"):
        prepare_sources(HubData(name="fineweb_edu", revision=hub.commit), **given)


def test_everything_made_of_a_config_is_made_of_one_commit(hub, tokenizer, tmp_path):
    """Mixtures and validation sets too: before a preparation of the newest one, after that of the one it began with."""
    source, local = HubData(name="fineweb_edu"), HubData(name="pubmed", path=str(tmp_path))
    data, sets = at_known_commits(MixtureData(sources=(source, local)), (source,), tmp_path / "out")
    assert isinstance(data, MixtureData)
    assert [of.revision for of in (*data.sources, *sets)] == [COMMIT, "main", COMMIT]
    checked = (ClinicData(name="set", passages=5, examples=0),)
    prepare_sources(source, tokenizer, tmp_path / "out", validation=checked)
    hub.commit = "d" * 40
    hub_files.cache_clear()
    pinned, sets = at_known_commits(source, (source,), tmp_path / "out")
    assert (pinned.revision, sets[0].revision) == (COMMIT, COMMIT)


def test_exams_by_name_are_looked_for_at_one_commit(hub, tokenizer, tmp_path, monkeypatch, capsys):
    """That of the beginning, when an unfinished preparation resumes or what was prepared is compared; the card names it."""
    hub.repos["GBaker/MedQA-USMLE-4-options"] = write_rows(tmp_path / "exam" / "phrases_no_exclude_test.jsonl", [ITEM]).parent
    notes = write_rows(tmp_path / "notes.jsonl", [{"text": f"Note {number} of those that are kept."} for number in range(9)])
    by_name, out = CleanConfig(exams=(HubExam(name="medqa"),)), tmp_path / "out"
    sources = (FilesData(path=str(notes)), FilesData(path=str(notes), name="own", clean=replace(by_name, min_words=2)))
    data = MixtureData(sources=sources, clean=by_name)
    monkeypatch.setenv(faults.VARIABLE, "prepare-complete:enospc")
    with pytest.raises(UserError, match="could not be written"):
        prepare_sources(data, tokenizer, out)
    monkeypatch.delenv(faults.VARIABLE)
    assert [item.question for item in load_task(HubExam(name="medqa"))] == [ITEM["question"]]
    with pytest.raises(UserError, match=r"task\.split=train: an exam by name asks one split, test\. To ask another"):
        load_task(HubExam(name="medqa", split="train"))
    assert f"phrases_no_exclude_test.jsonl, commit {COMMIT}." in capsys.readouterr().err
    hub.commit = "d" * 40
    hub_files.cache_clear()
    prepare_sources(data, tokenizer, out)
    card = (out / "DATA_CARD.md").read_text()
    assert card.count(f"revision: {COMMIT}") == 2 and hub.commit not in card
    hub.status_of_facts = 403  # what `main` is now is not asked again
    check_present(data, (), out, "")
    with pytest.raises(UserError, match="asks for consent"):
        at_known_commits(replace(data, clean=None), (), tmp_path / "other")


def test_sources_are_listed_and_a_row_is_shown(tmp_path, capsys):
    assert main(["data", "sources"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in SOURCES)
    file = write_rows(tmp_path / "train.jsonl", [ITEM])
    assert main(["data", "peek", "medqa", f"data.path={file}"]) == 0
    assert "question: Which metal do red cells need? Iron (A) Gold (B)\nanswer: Iron (A)" in capsys.readouterr().out
    for misspelt, meant in (("pumbed", "pubmed"), ("text-10mni", "text-10min")):
        assert main(["data", "peek", misspelt]) == 2
        assert f"there is no recipe or source `{misspelt}`; did you mean `{meant}`?" in capsys.readouterr().err


def test_training_rows_and_exam_share_no_question_and_miss_none(tmp_path):
    rows = [ITEM | {"question": f"Which metal does enzyme {number} need?"} for number in range(60)]
    rows += [row | {"question": row["question"].upper()} for row in rows]
    file = write_rows(tmp_path / "medqa.jsonl", rows)
    held, learned = (load_task(MedqaTask(path=str(file), fold=fold)) for fold in ("held-out", "train"))
    turns = local(tmp_path, "rows", rows, name="medqa", fold="train")
    assert [question for question, _ in turns] == list(map(render_question, learned))
    assert 12 <= len(held) <= 36 and len(held) + len(learned) == 120
    assert {item.question.lower() for item in held}.isdisjoint(item.question.lower() for item in learned)
    with pytest.raises(UserError, match="humaneval has no folds, which only gsm8k, medqa, medmcqa, pubmedqa, mmlu have"):
        local(tmp_path, "rows", rows, name="humaneval", fold="train")
    with pytest.raises(UserError, match="none of its 1 questions is in the fold held-out"):
        load_task(MedqaTask(path=str(write_rows(tmp_path / "one.jsonl", rows[:1])), fold="held-out"))
