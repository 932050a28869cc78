"""The sources that Osler knows by name: where each lies on the hub, its licence, and how a row becomes a document.

Any of them can also be read from local files of the same schema. The facts about datasets come from their cards on the hub;
sizes are approximate. A row that lacks a field is refused by file, row and field, so no source is silently empty.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from osler.config.schema import nearest
from osler.data.clean import Exam
from osler.data.config import HUB, HubData, Source
from osler.data.documents import Corpus, Document
from osler.data.readers import read_text_file, text_of, value_of
from osler.files.find import NAMED_ONLY_ENDING, ROW_ENDINGS, TEXT_ENDINGS, ending, find_files, log_once, shown
from osler.files.hub import hub_files, snapshot
from osler.files.parts import File, LocalFile, Part, Parts, find_local
from osler.files.rows import Row, read_rows
from osler.runtime.errors import UserError
from osler.tasks.config import MEDICAL_SUBJECTS, ExamFile, Fold, HubExam
from osler.tasks.exam_files import SCHEMAS, ExamRow, ending_number, with_shots
from osler.tasks.item import ExamItem, is_in_fold, render_answer, render_question
from osler.tasks.needle import Context, load_needle
from osler.tasks.registry import ClinicTask, NeedleTask, load_clinic
from osler.tokenizer.chat import Turn

logger = logging.getLogger(__name__)

ToDocuments = Callable[[Iterable[Row], HubData], Iterable[Document]]

_THOUGHT = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)
_TITLE = re.compile(r"\A = (?!=)[^\n]* = \s*\Z")  # the title of a WikiText article; its sections have more equals signs
# Words in the names of files, and the splits that they mean.
_SPLITS = {"train": "train", **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"), "test": "test"}


@dataclass(frozen=True)
class NamedSource:
    """A dataset; `files` are patterns of its files on the hub, in which {subset} and {split} stand for the chosen ones.

    `fields` are the columns that `documents` reads, and `tokens` is roughly how many millions of tokens the first subset has. If
    `has_small_files`, the files are fetched together before they are read. If `reads_whole_files`, a file is never cut into
    parts, because a document takes many of its rows. None is dealt out among parts: it would be fetched again for each.
    """

    repo: str
    files: tuple[str, ...]
    fields: tuple[str, ...]
    documents: ToDocuments
    licence: str
    tokens: int
    splits: tuple[str, ...] = ("train",)
    subsets: tuple[str, ...] = ("",)
    has_small_files: bool = False
    reads_whole_files: bool = False


def _text(row: Row, field: str) -> str:
    return text_of(row, field) or ""


def texts(rows: Iterable[Row], data: HubData, *, field: str = "text", title: str = "") -> Iterator[Document]:
    """Yield a text for each row, under its title if there is one."""
    for row in rows:
        heading, text = _text(row, title).strip() if title else "", _text(row, field)
        yield Document(text=f"{heading}\n\n{text}" if heading and text.strip() else text, where=row.where)


def articles(rows: Iterable[Row], data: HubData) -> Iterator[Document]:
    """Yield the articles whose lines are the rows of WikiText."""
    lines: list[str] = []
    where = ""
    for row in rows:
        line = _text(row, "text")
        if _TITLE.match(line) and any(map(str.strip, lines)):
            yield Document(text="".join(lines), where=where)
            lines = []
        where = where if lines else row.where
        lines.append(line if line.endswith("\n") else line + "\n")
    if any(map(str.strip, lines)):
        yield Document(text="".join(lines), where=where)


def synth(rows: Iterable[Row], data: HubData) -> Iterator[Document]:
    """Yield SYNTH's questions with reasoning and answer; questions made from one page are learned or held out together."""
    for row in rows:
        thinking = _text(row, "synthetic_reasoning") or None
        turn = Turn(_text(row, "query"), thinking if data.reasoning else None, _text(row, "synthetic_answer"))
        yield Document(turn=turn, where=row.where, group=_text(row, "query_seed_url"))


def questions(rows: Iterable[Row], data: HubData, *, answer: str = "answer") -> Iterator[Document]:
    """Yield questions with answers."""
    return (Document(turn=Turn(_text(row, "question"), None, _text(row, answer)), where=row.where) for row in rows)


def conversations(rows: Iterable[Row], data: HubData) -> Iterator[Document]:
    """Yield each message of a user with the assistant's answer; <think> ... </think> before the answer is its reasoning."""
    for row in rows:
        messages = value_of(row, "messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise UserError(f"{row.where}: the field 'messages' must be a list of objects with role and content.")
        said = [(message.get("role"), message.get("content") or "") for message in messages]
        pairs = [(one[1], two[1]) for one, two in pairwise(said) if (one[0], two[0]) == ("user", "assistant")]
        if not pairs:
            raise UserError(f"{row.where}: no message of 'user' is followed by one of 'assistant'.")
        for asked, told in pairs:
            thought = _THOUGHT.match(told)
            thinking = thought[1].strip() if thought and data.reasoning else None
            yield Document(turn=Turn(asked, thinking, told[thought.end() :] if thought else told), where=row.where)


def exam(rows: Iterable[Row], data: HubData) -> Iterator[Document]:
    """Yield the items of an exam that are in `data.fold`, written as in the exam; rows of MedMCQA without a label are left out.

    PubMedQA's pqa_unlabeled has no labels, and so no items and no folds: its questions come with their long answers.
    """
    if data.subset == "pqa_unlabeled":
        yield from questions(rows, data, answer="long_answer")
        return
    for row, item in _items_with_rows(rows, data):
        turn = Turn(render_question(item), item.thinking if data.reasoning else None, render_answer(item))
        yield Document(turn=turn, where=row.where)


def _items_with_rows(rows: Iterable[Row], data: HubData) -> Iterator[tuple[Row, ExamItem]]:
    kind = exam_by_name(data.name)[0]
    config, read_item = kind(type=data.name, path=data.path or data.name), SCHEMAS[kind].read
    for row in rows:
        if data.name == "medmcqa" and row.values.get("cop", "") in (None, -1):
            continue
        item = read_item(ExamRow(row, config))
        if is_in_fold(item, data.fold):
            yield row, item


def learned_items(source: Source, key: str) -> list[ExamItem]:
    """Return the exam items that a source by name teaches, read from its local files; none for any other source."""
    if not isinstance(source, HubData) or source.name not in EXAMS or source.place == HUB or source.subset == "pqa_unlabeled":
        return []
    rows = (row for file in named_files(source, key)[1] for row in read_rows(Part(file)))
    return [item for _, item in _items_with_rows(rows, source)]


def programs(rows: Iterable[Row], data: HubData) -> Iterator[Document]:
    """Yield HumanEval's functions with their bodies."""
    return (Document(text=_text(row, "prompt") + _text(row, "canonical_solution"), where=row.where) for row in rows)


def endings(rows: Iterable[Row], data: HubData) -> Iterator[Document]:
    """Yield HellaSwag's stories with their right endings."""
    config = exam_by_name(data.name)[0](type=data.name, path=data.path or data.name)
    for row in rows:
        asked = ExamRow(row, config)
        choices = asked.options("endings")
        story = " ".join(filter(None, (_text(row, "ctx_a"), _text(row, "ctx_b"), choices[ending_number(asked, choices)])))
        yield Document(text=f"{_text(row, 'activity_label')}: {story}", where=row.where)


# Repository, files, fields, how rows become documents, licence, millions of tokens of the first subset.
SOURCES: dict[str, NamedSource] = {
    "fineweb_edu": NamedSource(
        "HuggingFaceFW/fineweb-edu", ("{subset}/*.parquet",), ("text",), texts, "ODC-By 1.0", 10_000,
        subsets=("sample/10BT", "sample/100BT", "sample/350BT", "data"),
    ),
    "synth": NamedSource(
        "PleIAs/SYNTH", ("*.parquet",), ("query", "synthetic_reasoning", "synthetic_answer", "query_seed_url"), synth,
        "see the dataset's card", 75_000,
    ),
    "pubmed": NamedSource(
        "MedRAG/pubmed", ("chunk/*.jsonl",), ("title", "content"), partial(texts, field="content", title="title"),
        "terms of the US National Library of Medicine", 4_000,
    ),
    "pubmed_open": NamedSource(
        "common-pile/pubmed_filtered", ("*.json.gz", "*.jsonl.gz"), ("text",), texts, "open, by document", 40_000
    ),
    "guidelines": NamedSource(
        "epfl-llm/guidelines", ("*.jsonl",), ("title", "clean_text"), partial(texts, field="clean_text", title="title"),
        "mixed, by document; nine rows of ten are of WikiDoc", 500,
    ),
    "openmedtext": NamedSource("ywchoi/OpenMedText", ("*.txt",), (), texts, "mixed", 2_500, has_small_files=True),
    "wikipedia": NamedSource(
        "wikimedia/wikipedia", ("{subset}/*.parquet",), ("title", "text"), partial(texts, title="title"), "CC BY-SA 4.0", 4_500,
        subsets=("20231101.en",),
    ),
    "wikipedia_2k": NamedSource(
        "Yxanul/wikipedia-2k-high-quality", ("*.parquet",), ("text",), texts, "CC BY-SA 4.0; private", 960
    ),
    "wikitext": NamedSource(
        "Salesforce/wikitext", ("{subset}/{split}-*.parquet",), ("text",), articles, "CC BY-SA 3.0", 120,
        splits=("train", "validation", "test"), subsets=("wikitext-103-raw-v1", "wikitext-2-raw-v1"), reads_whole_files=True,
    ),
    "c4": NamedSource(
        "allenai/c4", ("{subset}/c4-{split}.*.json.gz",), ("text",), texts, "ODC-By 1.0", 160_000,
        splits=("train", "validation"), subsets=("en",),
    ),
    "mixture_of_thoughts": NamedSource(
        "open-r1/Mixture-of-Thoughts", ("{subset}/{split}-*.parquet",), ("messages",), conversations, "Apache 2.0", 3_500,
        subsets=("all", "math", "code", "science"),
    ),
    "gsm8k": NamedSource(
        "openai/gsm8k", ("{subset}/{split}-*.parquet",), ("question", "answer"), exam, "MIT", 2,
        splits=("train", "test"), subsets=("main",),
    ),
    "medqa": NamedSource(
        "GBaker/MedQA-USMLE-4-options", ("*_{split}.jsonl",), ("question", "options", "answer", "answer_idx"),
        exam, "MIT; questions CC BY 4.0", 2, splits=("train", "test"),
    ),
    "medmcqa": NamedSource(
        "openlifescienceai/medmcqa", ("data/{split}-*.parquet",),
        ("id", "question", "opa", "opb", "opc", "opd", "cop", "exp", "subject_name"), exam,
        "Apache 2.0", 25, splits=("train", "validation"),
    ),
    "pubmedqa": NamedSource(
        "qiaojin/PubMedQA", ("{subset}/{split}-*.parquet",),
        ("pubid", "question", "context", "long_answer", "final_decision"), exam,
        "MIT; half of pqa_labeled is the official test", 150, subsets=("pqa_artificial", "pqa_labeled", "pqa_unlabeled"),
    ),
    "mmlu": NamedSource(
        "cais/mmlu", ("{subset}/{split}-*.parquet",), ("question", "subject", "choices", "answer"), exam,
        "MIT", 1, splits=("validation", "test"), subsets=("all", *MEDICAL_SUBJECTS),
    ),
    "humaneval": NamedSource(
        "openai/openai_humaneval", ("openai_humaneval/{split}-*.parquet",), ("prompt", "canonical_solution"), programs, "MIT", 1,
        splits=("test",),
    ),
    "hellaswag": NamedSource(
        "Rowan/hellaswag", ("data/{split}-*.parquet",), ("activity_label", "ctx_a", "ctx_b", "endings", "label"), endings,
        "MIT", 5, splits=("train", "validation"),
    ),
    "trivia_qa": NamedSource(
        "mandarjoshi/trivia_qa", ("{subset}/{split}-*.parquet",), ("question", "answer"),
        partial(questions, answer="answer.value"), "not stated", 3, splits=("train", "validation"), subsets=("rc.nocontext",),
    ),
    "medquad": NamedSource("", (), ("question", "answer"), questions, "CC BY 4.0", 6),
}  # fmt: skip


def read_named(data: HubData, part: Part) -> Iterator[Document]:
    """Yield the documents in a part of a file of a source by name."""
    source, name = SOURCES[data.name], part.file.name
    if ending(name) not in TEXT_ENDINGS:
        yield from source.documents(read_rows(part, source.fields), data)
    elif source.reads_whole_files:  # each line of the text is a row
        lines = (line for document in read_text_file(part) for line in document.text.splitlines(keepends=True))
        yield from source.documents((Row(name, {"text": line}, ("text",)) for line in lines), data)
    else:
        yield from read_text_file(part)


def open_hub(data: HubData, key: str) -> Corpus:
    """Open a source by name: local files if the config names some, else those of the hub."""
    commit, files = named_files(data, key)
    source = SOURCES[data.name]
    subset, split = data.subset or source.subsets[0], data.split or source.splits[0]
    parts: Parts | list[Part] = [Part(file) for file in files] if source.reads_whole_files else Parts(files, min_parts=1)
    options = {"name": data.name, "subset": subset, "split": split, "reasoning": data.reasoning, "commit": commit}
    if data.fold != "all":
        if source.documents is not exam or subset == "pqa_unlabeled":
            folded = ", ".join(name for name, source in SOURCES.items() if source.documents is exam)
            raise UserError(f"{key}.fold={data.fold}: {data.title} has no folds, which only {folded} have; leave it out.")
        options["fold"] = data.fold
    about = {"licence": source.licence, "revision": commit or "local files", "home": source.repo or data.place}
    return Corpus(parts, partial(read_named, data), options, None, data.holdout_fraction, data.seed, about=about)


EXAMS = {task.type: task for task in SCHEMAS if task.type in SOURCES}  # exams that are known by name


def exam_by_name(name: str) -> tuple[type[ExamFile], str, str]:
    """Return the class of an exam's config, and the subset and split of its dataset that models are examined with.

    Of PubMedQA this is all of pqa_labeled; no split of the dataset is the official test, which is half of it.
    """
    kind, source = EXAMS[name], SOURCES[name]
    split = SCHEMAS[kind].split
    subset = "pqa_labeled" if name == "pubmedqa" else source.subsets[0]
    return kind, subset, split if split in source.splits else source.splits[0]


def load_task(task: Any, key: str = "task", root: str = "", context: Context | None = None) -> list[ExamItem]:
    """Return the items of an exam (one of ``TaskConfig``), with their solved examples; see `open_exam` for `root` and `key`.

    `context` is that of the model which is asked. A needle test depends on it, and has no items without it.
    """
    if isinstance(task, ClinicTask):
        return load_clinic(split=task.split, limit=task.limit, seed=task.seed)
    if isinstance(task, NeedleTask):
        return load_needle(task, context, key) if context is not None else []
    found = open_exam(task, root, key)
    if isinstance(task, HubExam):
        commit = f", commit {found.commit}" if found.commit else ""
        logger.info(f"{task.name}: {', '.join(file.name for file in found.files)}{commit}.")
    if not task.shots:
        return found.items
    fold: Fold = "train" if task.fold == "held-out" else "all"  # the examples may come from the exam's own file
    solved = replace(found.task, path=task.shots_path, split="", fold=fold, limit=task.shots, seed=None)
    return with_shots(found.items, Exam(solved, _shot_files(task, key)).items, task)


def check_task(task: Any, key: str, root: str = "") -> None:
    """Raise UserError when the files of an exam, or of its solved examples, do not exist; see `open_exam`."""
    if isinstance(task, ExamFile):
        open_exam(task, root, key)
        _shot_files(task, key)


def _shot_files(task: ExamFile, key: str) -> tuple[File, ...]:
    return tuple(find_local(task.shots_path, ROW_ENDINGS, key=f"{key}.shots_path")) if task.shots else ()


def open_exam(task: ExamFile, root: str, key: str) -> Exam:
    """Find the files of an exam; raises UserError when there are none. `key` is its place in the config, for messages.

    `root` has a folder for each exam by name; empty, they are read from the hub. A path or root of the exam itself comes first.
    """
    if not isinstance(task, HubExam):
        said = _splits_in(Path(task.path).name)
        if task.split and said and _SPLITS.get(task.split, task.split) not in said:
            log_once(f"{key}.split is {task.split}, but the name of {task.path} says {' or '.join(sorted(said))}.", warn=True)
        return Exam(task, tuple(find_local(task.path, ROW_ENDINGS, key=f"{key}.path")))
    if task.name not in EXAMS:
        known = [*EXAMS, ClinicTask.type, NeedleTask.type, "questions:FILE"]
        raise UserError(f"{key}: {task.name} is no exam that Osler knows{nearest(task.name, known)}")
    kind, subset, split = exam_by_name(task.name)
    remedy = f"To ask another split, give its file: {key}.type={task.name} {key}.path=FILE."
    if task.split not in ("", split, SCHEMAS[kind].split):
        raise UserError(f"{key}.split={task.split}: an exam by name asks one split, {split}. {remedy}")
    data = HubData(name=task.name, subset=subset, split=split, revision=task.revision, path=task.path, root=task.root or root)
    commit, files = named_files(data, key, remedy)
    found = kind(type=task.name, path=f"the exam {task.name}", split=split)
    return Exam(replace(found, fold=task.fold, limit=task.limit, seed=task.seed), tuple(files), commit)


def named_files(data: HubData, key: str, remedy: str = "") -> tuple[str, list[File]]:
    """Return the commit ("" for local files) and the files of a source by name; `key` is its place in the config.

    Raises UserError when the name, subset or split is unknown, or no file is found. If all local files are of other splits, the
    error ends with `remedy`, or if that is empty with the setting that reads them.
    """
    source = SOURCES.get(data.name)
    if source is None:
        raise UserError(f"{key}.name={data.name} is no source that Osler knows{nearest(data.name, list(SOURCES))}")
    for field, chosen, known in (("subset", data.subset, source.subsets), ("split", data.split, source.splits)):
        if chosen and chosen not in known:
            raise UserError(f"{key}.{field}={chosen}: {data.name} has {', '.join(filter(None, known)) or 'none'}.")
    subset, split = data.subset or source.subsets[0], data.split or source.splits[0]
    patterns = tuple(pattern.format(subset=subset, split=split) for pattern in source.files)
    root_key = "root" if key.startswith(("task", "eval_task", "source")) else "data.root"
    if data.place != HUB:
        return "", _local_files(data, subset, split, key, root_key, remedy)
    if not source.repo:
        raise UserError(f"{key}: {data.name} is on no hub; name its files with {key}.path=DIR or {root_key}=DIR.")
    return (snapshot if source.has_small_files else hub_files)(source.repo, patterns, data.revision)


def _splits_in(name: str) -> set[str]:
    return {_SPLITS[word] for word in re.findall("[a-z]+", name.lower()) if word in _SPLITS}


def _local_files(data: HubData, subset: str, split: str, key: str, root_key: str, remedy: str) -> list[File]:
    """Return the local files of a split: those named as on the hub, else those named after the split, else those after none.

    A file that is named as on the hub for another subset or split is never returned. A file that the config itself names may
    say a split that the source does not have.
    """
    source, where = SOURCES[data.name], Path(data.place)
    field = f"{key}.path" if data.path else root_key
    found = find_files(where, (*ROW_ENDINGS, *TEXT_ENDINGS, NAMED_ONLY_ENDING), key=field)
    names = {file: file.relative_to(where).as_posix() if where.is_dir() else file.name for file in found}
    combinations = product(source.files, source.subsets, source.splits)
    of_any = [pattern.format(subset=its_subset, split=its_split) for pattern, its_subset, its_split in combinations]
    said = {file: _splits_in(name) for file, name in names.items() if not any(fnmatchcase(name, pattern) for pattern in of_any)}
    known = set(_SPLITS.values() if where.is_dir() else source.splits)

    def patterns(split: str) -> list[str]:
        return [pattern.format(subset=subset, split=split) for pattern in source.files]

    def files_of(split: str) -> list[Path]:
        return (
            [file for file, name in names.items() if any(fnmatchcase(name, pattern) for pattern in patterns(split))]
            or [file for file, splits in said.items() if split in splits]
            or [file for file, splits in said.items() if not known & splits]
        )

    if not (chosen := files_of(split)):
        others = (f"Set {key}.split={other} to read that." for other in source.splits if files_of(other))
        remedy = remedy or next(others, f"If one of them is, name it with {key}.path=FILE.")
        wanted = " or ".join([*patterns(split), f"another whose name says {split}"])
        there = ", ".join(shown(file.name) for file in found[:5])
        raise UserError(f"There is no file of {data.title} at {where} ({wanted}), but {there}. {remedy}")
    return [LocalFile.at(file) for file in chosen]
