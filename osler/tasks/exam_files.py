"""Exams in files, each in the schema of its dataset on the Hugging Face hub: MedQA, MedMCQA, PubMedQA, GSM8K, and others that
data are checked for but no model is examined with yet.

Fields are checked as they are read. A file in another schema is refused by file, line and field, and never gives a smaller exam.
"""

import hashlib
import logging
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from osler.config.schema import PositiveInt, config
from osler.files.find import ROW_ENDINGS, find_files, shown
from osler.files.rows import Row, read_rows
from osler.runtime.errors import UserError
from osler.tasks.answers import read_number
from osler.tasks.item import LETTERS, ExamItem, plain

logger = logging.getLogger(__name__)

_KINDS = {str: "text", int: "a whole number", dict: "an object", list: "a list"}
_DECISIONS = ("yes", "no", "maybe")  # the options of PubMedQA
_ROWS_THAT_TELL = 32  # about a third of all answers are A: 32 rows without one happen by chance once in 100,000 files
# The opening of an explanation: "Ans. (B) ", "Answer- C. ", "Ans. BSolitary bone cyst" (glued to the first word).
_STUB = re.compile(r"^\W*(?i:ans(?:wer)?s?\b)\W*(?:(?i:is\b)\W*)?(?:(?i:[a-d])\b\W*|[A-D](?=[A-Z][a-z]))?")
_NAMES_A_LETTER = re.compile(r"\b(?:ans(?:wer)?|option|choice)s?\b\W*(?:is\b\W*)?[a-d1-4]\b|\([a-d]\)", re.IGNORECASE)


@config
class ExamFile:
    """An exam in a file of a person's."""

    type: str  # of exam
    path: str  # a .parquet, .jsonl or .ndjson file (also .jsonl.gz and the like), or a folder of them
    split: str = ""  # a name for the file in tables and metrics
    limit: PositiveInt | None = None  # the first so many questions; null: all


@config
class MedqaTask(ExamFile):
    """USMLE questions with four options, in the schema of GBaker/MedQA-USMLE-4-options."""

    type: Literal["medqa"] = "medqa"


@config
class MedmcqaTask(ExamFile):
    """Indian medical entrance questions, in the schema of openlifescienceai/medmcqa."""

    type: Literal["medmcqa"] = "medmcqa"
    first_option: Literal[0, 1] = 0  # the number of option A in the file: 0 in the hub's files, 1 in the authors' original


@config
class PubmedqaTask(ExamFile):
    """Yes, no or maybe from an abstract, in the schema of qiaojin/PubMedQA."""

    type: Literal["pubmedqa"] = "pubmedqa"


@config
class Gsm8kTask(ExamFile):
    """Grade-school arithmetic with a numeric answer, in the schema of openai/gsm8k."""

    type: Literal["gsm8k"] = "gsm8k"


@config
class HumanevalTask(ExamFile):
    """Python functions to complete, in the schema of openai/openai_humaneval."""

    type: Literal["humaneval"] = "humaneval"


@config
class HellaswagTask(ExamFile):
    """Stories to end, in the schema of Rowan/hellaswag."""

    type: Literal["hellaswag"] = "hellaswag"


@config
class TriviaqaTask(ExamFile):
    """Trivia, in the schema of mandarjoshi/trivia_qa."""

    type: Literal["trivia_qa"] = "trivia_qa"


@config
class QuestionsTask(ExamFile):
    """Questions with answers of one's own."""

    type: Literal["questions"] = "questions"
    question_field: str = "question"  # the column with the question
    answer_field: str = "answer"  # the column with the answer


class ExamRow:
    """A row of an exam in a file, whose fields are checked when they are asked for."""

    def __init__(self, row: Row, task: ExamFile) -> None:
        self.where, self.values, self.task = row.where, row.values, task

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.where}: {problem}")

    def field(self, name: str, kind: type) -> Any:
        """Return the value of a field (dots go into objects); raises UserError when it is missing or not a ``kind``."""
        schema = f"Expected the schema of {SCHEMAS[type(self.task)][0]}"
        value: Any = self.values
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                here = ", ".join(sorted(value)) if isinstance(value, Mapping) else f"{reprlib.repr(value):.60}"
                problem = f"the field '{name}' is missing (found: {here}). {schema}"
                raise self.error(f"{problem}; the files of another exam are read with another task.type.")
            value = value[part]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.error(f"the field '{name}' must be {_KINDS[kind]}, not {reprlib.repr(value):.60}. {schema}.")
        return value

    def text(self, name: str) -> str:
        """Return a text field; raises UserError when it is missing or blank."""
        value: str = self.field(name, str)
        if not value.strip():
            raise self.error(f"the field '{name}' is empty. Remove the row or fill it in.")
        return value.strip()


def load_exam_file(task: ExamFile) -> list[ExamItem]:
    """Return the first ``limit`` items in the order of the file, after the whole file was checked."""
    files = find_files(task.path, ROW_ENDINGS, key="task.path")
    return read_exam(task, (row for file in files for row in read_rows(file)))


def read_exam(task: ExamFile, given: Iterable[Row]) -> list[ExamItem]:
    """Return the items in the rows of an exam; ``task.path`` is for messages."""
    rows = [ExamRow(row, task) for row in given]
    if not rows:
        raise UserError(f"{shown(task.path)} has no rows.")
    if isinstance(task, MedmcqaTask):
        rows = _labelled(task, rows)
    read_item = SCHEMAS[type(task)][1]
    return [read_item(row) for row in rows][: task.limit]


def medqa_item(row: ExamRow) -> ExamItem:
    """Read a row of MedQA (Jin et al. 2020, arXiv 2009.13081)."""
    question = row.text("question")
    options = row.field("options", dict)
    letters = [letter for letter in LETTERS if options.get(letter) is not None]  # parquet fills absent letters with None
    if len(letters) < 2 or letters != list(LETTERS[: len(letters)]):
        empty = ", ".join(sorted(letter for letter, value in options.items() if value is None))
        problem = f"'options' must hold the letters A, B, ... without a gap, not {', '.join(letters) or 'none'}"
        raise row.error(f"{problem}{f'; without a text: {empty}' if empty else ''}.")
    texts = tuple(row.text(f"options.{letter}") for letter in letters)
    letter, answer = row.text("answer_idx"), row.text("answer")
    if letter not in letters:
        raise row.error(f"'answer_idx' is {letter!r}, which is none of the options {', '.join(letters)}.")
    index = letters.index(letter)
    if plain(texts[index]) != plain(answer) and plain(answer) in map(plain, texts):
        raise row.error(f"'answer' is the text of another option than 'answer_idx' {letter}; which one is right?")
    return ExamItem(_content_id("medqa", question, *texts), question, texts, index, row.task.split)


def medmcqa_item(row: ExamRow) -> ExamItem:
    """Read a labelled row of MedMCQA (Pal et al. 2022, arXiv 2203.14371)."""
    assert isinstance(row.task, MedmcqaTask)
    subject = row.values.get("subject_name")
    return ExamItem(
        id=f"medmcqa-{row.text('id')}",
        question=row.text("question"),
        options=tuple(row.text(name) for name in ("opa", "opb", "opc", "opd")),
        answer_index=row.values["cop"] - row.task.first_option,
        split=row.task.split,
        thinking=_explanation(row.values.get("exp")),
        group=subject.replace("/", ", ") if isinstance(subject, str) else "",  # groups with a slash are single facts
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


def humaneval_item(row: ExamRow) -> ExamItem:
    """Read a row of HumanEval (Chen et al. 2021, arXiv 2107.03374)."""
    prompt, solution = row.text("prompt"), row.text("canonical_solution")
    return ExamItem(f"humaneval-{row.text('task_id')}", prompt, (), -1, row.task.split, answer=solution)


def hellaswag_item(row: ExamRow) -> ExamItem:
    """Read a row of HellaSwag (Zellers et al. 2019, arXiv 1905.07830)."""
    story = " ".join(filter(None, (row.field(name, str).strip() for name in ("ctx_a", "ctx_b"))))
    label = str(row.values.get("label"))
    endings = tuple(map(str, row.field("endings", list)))
    if not label.isdecimal() or int(label) >= len(endings):
        raise row.error(f"'label' must be the number of one of the {len(endings)} 'endings', not {label!r}.")
    return ExamItem(_content_id("hellaswag", story, *endings), story, endings, int(label), row.task.split)


def triviaqa_item(row: ExamRow) -> ExamItem:
    """Read a row of TriviaQA (Joshi et al. 2017, arXiv 1705.03551)."""
    return ExamItem(
        f"trivia_qa-{row.text('question_id')}", row.text("question"), (), -1, row.task.split, answer=row.text("answer.value")
    )


def questions_item(row: ExamRow) -> ExamItem:
    """Read a question with its answer."""
    assert isinstance(row.task, QuestionsTask)
    question, answer = row.text(row.task.question_field), row.text(row.task.answer_field)
    return ExamItem(_content_id("questions", question, answer), question, (), -1, row.task.split, answer=answer)


SCHEMAS: dict[type[ExamFile], tuple[str, Callable[[ExamRow], ExamItem]]] = {
    MedqaTask: ("GBaker/MedQA-USMLE-4-options: question, options {A..D}, answer, answer_idx", medqa_item),
    MedmcqaTask: ("openlifescienceai/medmcqa: id, question, opa, opb, opc, opd, cop, exp", medmcqa_item),
    PubmedqaTask: ("qiaojin/PubMedQA: pubid, question, context.contexts, long_answer, final_decision", pubmedqa_item),
    Gsm8kTask: ("openai/gsm8k (main): question, answer ('... #### number')", gsm8k_item),
    HumanevalTask: ("openai/openai_humaneval: task_id, prompt, canonical_solution", humaneval_item),
    HellaswagTask: ("Rowan/hellaswag: ctx_a, ctx_b, endings, label", hellaswag_item),
    TriviaqaTask: ("mandarjoshi/trivia_qa: question, question_id, answer.value", triviaqa_item),
    QuestionsTask: ("questions of one's own: question_field, answer_field", questions_item),
}


def _labelled(task: MedmcqaTask, rows: Sequence[ExamRow]) -> list[ExamRow]:
    """Return the rows of MedMCQA that have a label; raises UserError when there is none or its numbering is another.

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
