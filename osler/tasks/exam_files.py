"""Exams in files, each in the schema of its dataset on the Hugging Face hub, and questions of one's own.

``SCHEMAS`` lists them. Fields are checked as they are read. A file in another schema is refused, with its name, line and
field, so it never gives a smaller exam.
"""

import hashlib
import logging
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from osler.files.find import log_once, shown
from osler.files.rows import Row
from osler.runtime.errors import UserError
from osler.runtime.files import read_json
from osler.tasks.answers import read_number
from osler.tasks.config import (
    ExamFile,
    Gsm8kTask,
    HellaswagTask,
    HumanevalTask,
    MedmcqaTask,
    MedqaTask,
    MmluTask,
    PubmedqaTask,
    QuestionsTask,
    TriviaqaTask,
)
from osler.tasks.item import LETTERS, ExamItem, is_in_fold, plain, shared_questions, wording

logger = logging.getLogger(__name__)

_KINDS = {str: "text", int: "a whole number", float: "a number", dict: "an object", list: "a list"}
_DECISIONS = ("yes", "no", "maybe")  # the options of PubMedQA
# Where this many rows have no ``cop`` of 0, it counts from 1: a third of all answers are A, so chance would avoid 0 in 1 of
# 100,000 files.
_ROWS_THAT_TELL = 32
# The opening of an explanation: "Ans. (B) ", "Answer- C. ", "Ans. BSolitary bone cyst" (glued to the first word).
_STUB = re.compile(r"^\W*(?i:ans(?:wer)?s?\b)\W*(?:(?i:is\b)\W*)?(?:(?i:[a-d])\b\W*|[A-D](?=[A-Z][a-z]))?")
_NAMES_A_LETTER = re.compile(r"\b(?:ans(?:wer)?|option|choice)s?\b\W*(?:is\b\W*)?[a-d1-4]\b|\([a-d]\)", re.IGNORECASE)


class ExamRow:
    """A row of an exam in a file, whose fields are checked when they are asked for."""

    def __init__(self, row: Row, task: ExamFile) -> None:
        self.where, self.values, self.task = row.where, row.values, task

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.where}: {problem}")

    def field(self, name: str, *kinds: type) -> Any:
        """Return the value of a field (dots go into objects); raises UserError when it is missing or of another kind."""
        schema = f"Expected the schema of {SCHEMAS[type(self.task)].fields}"
        value: Any = self.values
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                here = ", ".join(sorted(value)) if isinstance(value, Mapping) else f"{reprlib.repr(value):.60}"
                problem = f"the field '{name}' is missing (found: {here}). {schema}"
                raise self.error(f"{problem}; the files of another exam are read with another `type`.")
            value = value[part]
        if not isinstance(value, kinds) or isinstance(value, bool):
            wanted = " or ".join(_KINDS[kind] for kind in kinds)
            raise self.error(f"the field '{name}' must be {wanted}, not {reprlib.repr(value):.60}. {schema}.")
        return value

    def text(self, name: str) -> str:
        """Return a text field; raises UserError when it is missing or blank."""
        value: str = self.field(name, str)
        if not value.strip():
            raise self.error(f"the field '{name}' is empty. Remove the row or fill it in.")
        return value.strip()

    def options(self, name: str) -> tuple[str, ...]:
        """Return the texts of the options in a field: a list of texts or of {key, value}, or an object of texts by letter."""
        given = self.field(name, dict, list)
        if isinstance(given, list):
            keyed = all(isinstance(one, Mapping) and one.keys() >= {"key", "value"} for one in given)
            pairs = [(str(one["key"]), one["value"]) for one in given] if keyed else list(enumerate(given))
            given = dict(pairs)
            if len(given) < len(pairs):
                raise self.error(f"'{name}' has two options with one letter among {', '.join(str(key) for key, _ in pairs)}.")
        texts = {letter: text for letter, text in given.items() if text is not None}  # parquet fills absent letters with None
        if not 2 <= len(texts) <= len(LETTERS):
            raise self.error(f"'{name}' has {len(texts)} options; it needs 2 to {len(LETTERS)}, each with a letter of its own.")
        letters = LETTERS[: len(texts)]
        if sorted(texts, key=str) != list(letters) and list(texts) != list(range(len(texts))):
            empty = ", ".join(sorted(str(letter) for letter, text in given.items() if text is None))
            problem = f"'{name}' must hold the letters A, B, ... without a gap, not {', '.join(map(str, texts))}"
            raise self.error(f"{problem}{f'; without a text: {empty}' if empty else ''}.")
        for letter, text in texts.items():
            if not isinstance(text, str) or not text.strip():
                raise self.error(f"option {letter} in '{name}' must be a text that is not empty, not {reprlib.repr(text):.60}.")
        return tuple(texts[key].strip() for key in sorted(texts))

    def option_number(self, name: str, options: Sequence[str], *, first: int = 0) -> int:
        """Return the position of the option whose number, counted from ``first``, is in a field."""
        number: int = self.field(name, int)
        if not first <= number < first + len(options):
            raise self.error(f"'{name}' is {number}, which is none of the {len(options)} options, counted from {first}.")
        return number - first

    def option_named(self, name: str, options: Sequence[str], *, first: int) -> int:
        """Return the position of the option that a field names by its text, its letter or its number."""
        value = self.field(name, str, int)
        said = str(value).strip()
        named = {index for index, option in enumerate(options) if wording(option) == wording(said)}
        if isinstance(value, int) and first <= value < first + len(options):
            named.add(value - first)
        elif len(said) == 1 and said in LETTERS[: len(options)]:
            named.add(LETTERS.index(said))
        if len(named) != 1:
            many = "more than one" if named else "none"
            known = f"give the text of one, a letter from A to {LETTERS[len(options) - 1]}, or a number counted from {first}"
            raise self.error(f"'{name}' is {value!r}, which names {many} of the {len(options)} options; {known}.")
        return named.pop()


def with_shots(items: Sequence[ExamItem], shots: Sequence[ExamItem], task: ExamFile) -> list[ExamItem]:
    """Return the items of an exam with the solved examples that ``task`` asks for.

    Raises UserError if they are too few, or if one of them is also an item.
    """
    if len(shots) < task.shots:
        raise UserError(f"{shown(task.shots_path)} has {len(shots)} questions, fewer than shots={task.shots}.")
    if shared := shared_questions(shots, items):
        problem = f"the example {shared[0][0].id} is also a question of {shown(task.path)}"
        raise UserError(f"{shown(task.shots_path)}: {problem}: take examples from another split.")
    return [replace(item, shots=tuple(shots)) for item in items]


def read_exam(task: ExamFile, given: Iterable[Row]) -> list[ExamItem]:
    """Return the items in the rows of an exam that ``task`` asks for; its path is only named in messages.

    Raises UserError for a row that cannot be read, and when no item is left.
    """
    rows = [ExamRow(row, task) for row in given]
    schema = SCHEMAS[type(task)]
    if not rows:
        raise UserError(f"{shown(task.path)} has no rows.")
    if isinstance(task, MedmcqaTask):
        rows = _labelled(task, rows)
    elif isinstance(task, MmluTask):
        rows = _chosen(task, rows, "subject", task.subjects, all_needed=task.subjects != MmluTask.subjects)
    elif isinstance(task, PubmedqaTask) and task.ids:
        rows = _chosen(task, rows, "pubid", list(map(str, read_json(task.ids))), all_needed=True)
    items = list(map(schema.read, rows))
    if schema.size and task.split == schema.split and len(items) != schema.size:
        whole = f"the {schema.split} split that models are examined with has {schema.size:,}"
        log_once(f"{shown(task.path)} has {len(items):,} questions of {task.type}; {whole}.")
    twice = [row.where for row, item in zip(rows, items, strict=True) if len(set(map(wording, item.options))) < len(item.options)]
    if twice and isinstance(task, QuestionsTask):
        raise UserError(f"{twice[0]}: two options in '{task.options_field}' have the same text; change or remove one of them.")
    if twice:
        log_once(f"{shown(task.path)}: {len(twice):,} questions print an option twice, first {twice[0]}; if right, both count.")
    items = [item for item in items if is_in_fold(item, task.fold)]
    if not items:
        raise UserError(f"{shown(task.path)}: none of its {len(rows):,} questions is in the fold {task.fold}.")
    if task.limit is None or task.seed is None:
        return items[: task.limit]
    drawn = sorted(range(len(items)), key=lambda number: hashlib.sha256(f"{task.seed}:{items[number].id}".encode()).digest())
    return [items[number] for number in sorted(drawn[: task.limit])]


def medqa_item(row: ExamRow) -> ExamItem:
    """Read a row of MedQA (Jin et al. 2020, arXiv 2009.13081)."""
    question, texts = row.text("question"), row.options("options")
    letter, answer = row.text("answer_idx"), row.text("answer")
    if letter not in list(LETTERS[: len(texts)]):
        raise row.error(f"'answer_idx' is {letter!r}, which is none of the options A to {LETTERS[len(texts) - 1]}.")
    index = LETTERS.index(letter)
    if plain(texts[index]) != plain(answer) and plain(answer) in map(plain, texts):
        raise row.error(f"'answer' is the text of another option than 'answer_idx' {letter}; which one is right?")
    return ExamItem(_content_id("medqa", question, *texts), question, texts, index, row.task.split)


def medmcqa_item(row: ExamRow) -> ExamItem:
    """Read a labelled row of MedMCQA (Pal et al. 2022, arXiv 2203.14371)."""
    assert isinstance(row.task, MedmcqaTask)
    subject = row.values.get("subject_name")
    options = tuple(row.text(name) for name in ("opa", "opb", "opc", "opd"))
    if row.values.get("cop") == 4 and row.task.first_option == 0:
        hub = "and the hub's files count from 0: give an exam first_option=1; in data to learn from, write every 'cop' one less"
        raise row.error(f"'cop' is 4, so this file counts its options from 1, as the authors' original does, {hub}.")
    return ExamItem(
        id=f"medmcqa-{row.text('id')}",
        question=row.text("question"),
        options=options,
        answer_index=row.option_number("cop", options, first=row.task.first_option),
        split=row.task.split,
        thinking=_explanation(row.values.get("exp")),
        group=subject if isinstance(subject, str) else "",
    )


def pubmedqa_item(row: ExamRow) -> ExamItem:
    """Read a row of PubMedQA (Jin et al. 2019, arXiv 1909.06146); the abstract's conclusion is the reasoning to learn from."""
    contexts = row.field("context.contexts", list)
    if not contexts or not all(isinstance(part, str) for part in contexts):
        raise row.error("'context.contexts' must be a list of texts.")
    decision = row.text("final_decision")
    if decision not in _DECISIONS:
        raise row.error(f"'final_decision' is {decision!r}; expected yes, no or maybe.")
    return ExamItem(
        id=f"pubmedqa-{row.field('pubid', int)}",
        question=row.text("question"),
        options=_DECISIONS,
        answer_index=_DECISIONS.index(decision),
        split=row.task.split,
        thinking=row.text("long_answer"),
        context="\n".join(part.strip() for part in contexts),
    )


def gsm8k_item(row: ExamRow) -> ExamItem:
    """Read a row of GSM8K (Cobbe et al. 2021, arXiv 2110.14168): a worked solution, ``####``, the number.

    Calculator annotations such as ``<<48/2=24>>`` are removed: they are a tool call, not text that a person would write.
    """
    question, solution = row.text("question"), row.text("answer")
    work, mark, final = solution.rpartition("####")
    number = read_number(final)
    if not mark or number is None:
        raise row.error(f"'answer' must end in '#### ' and a number, not in {solution[-40:]!r}.")
    thinking = re.sub(r"<<[^<>]*>>", "", work).strip()
    return ExamItem(_content_id("gsm8k", question), question, (), -1, row.task.split, thinking, answer=f"{number:f}")


def mmlu_item(row: ExamRow) -> ExamItem:
    """Read a row of MMLU (Hendrycks et al. 2020, arXiv 2009.03300)."""
    question, texts, subject = row.text("question"), row.options("choices"), row.text("subject")
    name = _content_id("mmlu", subject, question, *texts)
    return ExamItem(name, question, texts, row.option_number("answer", texts), row.task.split, group=subject)


def humaneval_item(row: ExamRow) -> ExamItem:
    """Read a row of HumanEval (Chen et al. 2021, arXiv 2107.03374); its tests judge the program that a model writes."""
    prompt, solution = row.text("prompt"), row.text("canonical_solution")
    tests = f"{row.text('test')}\n\ncheck({row.text('entry_point')})\n"
    return ExamItem(f"humaneval-{row.text('task_id')}", prompt, (), -1, row.task.split, answer=solution, tests=tests)


def hellaswag_item(row: ExamRow) -> ExamItem:
    """Read a row of HellaSwag (Zellers et al. 2019, arXiv 1905.07830), with its text as lm-evaluation-harness cleans it."""
    endings = tuple(map(_clean_wikihow, row.options("endings")))
    whole = _clean_wikihow(f"{row.text('activity_label')}: {row.field('ctx_a', str)} {row.field('ctx_b', str).capitalize()}")
    activity, colon, story = whole.partition(": ")
    if not colon:
        raise row.error("'ctx_a' and 'ctx_b' have no text.")
    name = _content_id("hellaswag", story, *endings)
    return ExamItem(name, story, endings, ending_number(row, endings), row.task.split, context=activity, is_story=True)


def ending_number(row: ExamRow, endings: Sequence[str]) -> int:
    """Return the position of the right ending of a row of HellaSwag."""
    label = row.field("label", str, int)  # the hub has text, empty in the unlabelled test split
    if not str(label).isdecimal() or int(label) >= len(endings):
        raise row.error(f"'label' must be the number of one of the {len(endings)} 'endings', not {label!r}.")
    return int(label)


def _clean_wikihow(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def triviaqa_item(row: ExamRow) -> ExamItem:
    """Read a row of TriviaQA (Joshi et al. 2017, arXiv 1705.03551)."""
    value, others = row.text("answer.value"), row.field("answer.aliases", list)
    spellings = tuple(dict.fromkeys([value, *map(str, others)]))
    name = f"trivia_qa-{row.text('question_id')}"
    return ExamItem(name, row.text("question"), (), -1, row.task.split, answer=value, aliases=spellings)


def questions_item(row: ExamRow) -> ExamItem:
    """Read a question of one's own, with options or with a free answer; a list gives all spellings of the answer."""
    task = row.task
    assert isinstance(task, QuestionsTask)
    question, split = row.text(task.question_field), task.split
    may_lack = task.options_field in row.values or task.options_field == QuestionsTask.options_field
    if not (may_lack and row.values.get(task.options_field) is None):
        options = row.options(task.options_field)
        index = row.option_named(task.answer_field, options, first=task.first_option)
        return ExamItem(_content_id("questions", question, *options), question, options, index, split)
    given = row.field(task.answer_field, str, int, float, list)
    texts = [str(one).strip() for one in (given if isinstance(given, list) else [given])]
    if not texts or not all(texts):
        raise row.error(f"the field '{task.answer_field}' is empty. Remove the row or fill it in.")
    lists = [name for name, value in row.values.items() if isinstance(value, (list, dict)) and name != task.answer_field]
    if lists and texts[0] in list(LETTERS):
        raise row.error(f"the answer is {texts[0]}, and there is no '{task.options_field}'; set options_field={lists[0]}?")
    aliases = tuple(texts) if isinstance(given, list) else ()
    return ExamItem(_content_id("questions", question, *texts), question, (), -1, split, answer=texts[0], aliases=aliases)


class Schema(NamedTuple):
    """The fields of an exam's rows, the function that reads a row, and the split that models are examined with and its size."""

    fields: str
    read: Callable[[ExamRow], ExamItem]
    split: str = ""
    size: int = 0


SCHEMAS: dict[type[ExamFile], Schema] = {
    MedqaTask: Schema(
        "GBaker/MedQA-USMLE-4-options: question, options {A..D} or {A..E}, answer, answer_idx", medqa_item, "test", 1273
    ),
    MedmcqaTask: Schema(
        "openlifescienceai/medmcqa: id, question, opa, opb, opc, opd, cop, exp", medmcqa_item, "validation", 4183
    ),
    PubmedqaTask: Schema(
        "qiaojin/PubMedQA: pubid, question, context.contexts, long_answer, final_decision", pubmedqa_item, "test", 500
    ),
    MmluTask: Schema("cais/mmlu: question, subject, choices, answer", mmlu_item, "test", 1089),
    Gsm8kTask: Schema("openai/gsm8k (main): question, answer ('... #### number')", gsm8k_item, "test", 1319),
    HumanevalTask: Schema(
        "openai/openai_humaneval: task_id, prompt, canonical_solution, test, entry_point", humaneval_item, "test", 164
    ),
    HellaswagTask: Schema(
        "Rowan/hellaswag: activity_label, ctx_a, ctx_b, endings, label", hellaswag_item, "validation", 10_042
    ),
    TriviaqaTask: Schema(
        "mandarjoshi/trivia_qa (rc.nocontext): question, question_id, answer.value, answer.aliases", triviaqa_item,
        "validation", 17_944,
    ),
    QuestionsTask: Schema(
        "questions of one's own: a question, options or none, an answer; question_field=NAME and the like name others",
        questions_item,
    ),
}  # fmt: skip


def _chosen(task: ExamFile, rows: Sequence[ExamRow], field: str, wanted: Collection[str], *, all_needed: bool) -> list[ExamRow]:
    """Return the rows in which a field has a wanted value; raises UserError when no row has, or a needed value is missing."""
    chosen = [row for row in rows if str(row.field(field, str, int)) in wanted]
    missing = sorted(set(wanted).difference(str(row.values[field]) for row in chosen))
    if (missing and all_needed) or not chosen:
        found = ", ".join(sorted({str(row.values[field]) for row in rows})[:8])
        lacks = missing[0] if missing else "one of those that are asked for"
        raise UserError(f"{shown(task.path)} has no row whose '{field}' is {lacks}; it has {found}.")
    if len(chosen) < len(rows):
        log_once(f"{shown(task.path)}: {len(rows) - len(chosen):,} of {len(rows):,} rows have another {field} and are left out.")
    return chosen


def _labelled(task: MedmcqaTask, rows: Sequence[ExamRow]) -> list[ExamRow]:
    """Return the rows of MedMCQA that have a label; raises UserError when no row has one or the numbering is not the task's.

    ``cop`` is the right option, counted from 0 on the hub (-1 in the unlabelled test split) and from 1 in the authors' files,
    whose other fields have the same names. Mistaking one for the other would shift every answer.
    """
    labelled = [row for row in rows if row.values.get("cop", "") is not None and row.field("cop", int) != -1]
    for row in labelled:
        if not 0 <= row.values["cop"] <= 4:
            raise row.error(f"'cop' is {row.values['cop']}; it must be the number of one of four options.")
    known = {row.values["cop"] for row in labelled}
    counts_from_one = 4 in known or (0 not in known and len(labelled) >= _ROWS_THAT_TELL)
    problem = ""
    if not known:
        problem = (
            "no row has a label (cop is -1 everywhere): this is the test split, whose answers are not public. Give the file of "
            "the validation split."
        )
    elif task.first_option == 1 and 0 in known:
        problem = "first_option=1 was given, but 'cop' is 0 in some rows: this file counts from 0, like the hub's."
    elif task.first_option == 0 and {0, 4} <= known:
        problem = "'cop' takes the values 0 and 4: two numberings are mixed. Load each file by itself."
    elif task.first_option == 0 and counts_from_one:
        problem = (
            f"'cop' runs from {min(known)} to {max(known)}: this file counts its options from 1, as the authors' original does, "
            "and the hub's files count from 0. Set first_option=1 beside its path."
        )
    if problem:
        raise UserError(f"{task.path}: {problem}")
    if len(labelled) < len(rows):
        logger.warning(f"{task.path}: {len(rows) - len(labelled)} of {len(rows)} rows have no label and are left out")
    return labelled


def _explanation(text: object) -> str | None:
    """Return an explanation without its "Ans. B" opening; None when it is absent, trivial, or names a letter (options move)."""
    if not isinstance(text, str):
        return None
    text = _STUB.sub("", text.replace("\xa0", " "), count=1).strip()
    return None if len(text.split()) < 5 or _NAMES_A_LETTER.search(text) else text


def _content_id(task: str, *parts: str) -> str:
    """Return an id made of the content, for items whose file gives none; it is the same in every file."""
    return f"{task}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:12]}"
