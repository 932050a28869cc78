"""An exam item, its text in a prompt, and whether it is the same question as another; ``answers.py`` reads the answer.

Options are written as ``text (A)``: a model first says what it means and then only has to copy the letter next to it. ``permute``
gives the options a new order on every visit, because with a fixed order a policy first learns to always answer the same letter.
Items whose options refer to each other ("All of the above", "A and C") keep their order, which is part of their meaning.
"""

import hashlib
import re
import string
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from osler.tasks.config import HELD_OUT_SHARE, Fold

Form = Literal["answer", "letters", "cloze"]  # "text (B)", as answers are taught; the letter alone; the option's text alone
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NO_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation + "‘’´`"), " ")

# "none of the above", "all of these", "Both option 2 and 3", anywhere in an option.
_POINTER = re.compile(
    r"\b(?:of|all|none|any|both) (?:the )?above\b"
    r"|\b(?:all|none|any|both|either|neither) of (?:the )?(?:these|those|them|following)\b"
    r"|\b(?:options?|choices?) \(?(?-i:[A-F1-6])\b",
    re.IGNORECASE,
)
# An option that has only such words: "Both", "All are correct", "A and C", "Both 1 and 2", "a, b are true & c is false".
_POINTING_WORD = re.compile(
    "all|none|any|both|either|neither|of|the|these|those|them|above|below|following|mentioned|listed|others?|options?|choices?|"
    "answers?|statements?|and|or|nor|but|not|only|alone|except|is|are|correct|incorrect|true|false|right|wrong|[a-f]{2,4}"
)
_QUANTIFIER = re.compile("all|none|any|both|either|neither")
_LABEL = re.compile("[a-f]|[1-6]|i{1,3}|iv|vi?")

_HEADED = "medmcqa-"  # ids of the exam whose published prompt has a line "Choices:" before the options
TELLING_WORDS = 4  # a question with fewer telling words is identified by its options too
# Words that occur in questions of every subject.
_COMMON = re.compile(
    "an?|the|of|in|on|to|for|with|by|at|from|and|or|is|are|was|were|be|been|do|does|did|has|have|this|that|these|those|its?|what|"
    "which|who|when|where|why|how|following|ones?|all|each|any|none|not|no|except|true|false|correct|incorrect|right|wrong|best|"
    "most|least|likely|common|commonly|appropriate|statements?|answers?|options?|choices?|about|regarding|concerning|given|above|"
    "below|next|step|patients?|management|treatment|diagnosis|cause"
)


@dataclass(frozen=True)
class ExamItem:
    """A question with options of which one is right, or (``options == ()``) with a free ``answer`` such as a number."""

    id: str
    question: str
    options: tuple[str, ...]
    answer_index: int  # -1 when there are no options
    split: str = ""
    thinking: str | None = None  # the reasoning to learn from; never names a letter, because options are permuted
    context: str = ""  # a passage that is shown before the question
    group: str = ""  # a part of the exam that is also scored by itself, such as a subject
    cluster: str = ""  # items of one cluster depend on each other, such as those that ask for one fact; "": no other item
    answer: str = ""  # the text of the answer when there are no options
    aliases: tuple[str, ...] = ()  # all right texts, where there are several; compared as in TriviaQA
    tests: str = ""  # when the answer is a program, the code that tells whether it is right
    is_story: bool = False  # whether the options continue the text of the question
    shots: tuple["ExamItem", ...] = ()  # solved examples, which are shown before the question

    def __post_init__(self) -> None:
        if self.options and not 0 <= self.answer_index < len(self.options) <= len(LETTERS):
            raise ValueError(f"item {self.id}: answer_index {self.answer_index} outside its {len(self.options)} options")

    @property
    def keeps_order(self) -> bool:
        """Return whether an option points at others, so that another order would change its meaning."""
        return any(map(points_at_options, self.options))

    def is_right(self, index: int) -> bool:
        """Return whether the option at ``index`` is right or has the right text; some exams print an option twice."""
        return wording(self.options[index]) == wording(self.options[self.answer_index])


def render_question(item: ExamItem) -> str:
    """Return the text of a prompt: solved examples, context, question, then the options as ``text (A)``."""
    question = " ".join([item.question.strip(), *map(render_option, item.options, LETTERS)])
    if item.context.strip():
        question = f"{item.context.strip()}{': ' if item.is_story else chr(10)}{question}"
    return "\n\n".join([*(f"{render_question(shot)}\nAnswer: {render_answer(shot)}" for shot in item.shots), question])


def render_plain(item: ExamItem, form: Form) -> str:
    """Return the text of a prompt without the template, as lm-evaluation-harness writes it: solved examples, then the item.

    An item is "Question: ... Answer:", with a list of the options in the form "letters". A program, or a story, stands as it is.
    """

    def alone(item: ExamItem) -> str:
        abstract = [f"Abstract: {item.context.strip()}"] if item.context.strip() and not item.is_story else []
        text = render_question(replace(bare(item), shots=(), context="" if abstract else item.context))
        if item.tests or (item.is_story and form != "letters"):
            return text
        listed = item.options if form == "letters" else ()
        heading = ["Choices:"] if listed and item.id.startswith(_HEADED) else []
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, listed, strict=False)]
        return "\n".join([*abstract, f"Question: {text}", *heading, *lines, "Answer:"])

    def answer(shot: ExamItem) -> str:
        is_worked = shot.thinking and not shot.options
        return f"{shot.thinking}\n#### {shot.answer}" if is_worked else answer_texts(shot, form)[shot.answer_index]

    return "\n\n".join([*(f"{alone(shot)} {answer(shot)}" for shot in item.shots), alone(item)])


def bare(item: ExamItem) -> ExamItem:
    """Return the item and its examples without their lists of options; the answer is the text of the right option."""
    answer = item.options[item.answer_index] if item.options else item.answer
    return replace(item, options=(), answer_index=-1, answer=answer, shots=tuple(map(bare, item.shots)))


def answer_texts(item: ExamItem, form: Form) -> list[str]:
    """Return the text of each answer in a form; an item without options has one."""
    if not item.options:
        return [item.answer]
    if form == "answer":
        return [render_answer(replace(item, answer_index=index)) for index in range(len(item.options))]
    return list(LETTERS[: len(item.options)] if form == "letters" else item.options)


def render_answer(item: ExamItem) -> str:
    """Return the answer that a model is taught to write: ``text (B)``, or the bare answer of an item without options."""
    return render_option(item.options[item.answer_index], LETTERS[item.answer_index]) if item.options else item.answer


def render_option(text: str, letter: str) -> str:
    """Return an option as questions show it and answers name it: ``text (B)``."""
    return f"{text} ({letter})"


def reorder(item: ExamItem, order: Sequence[int]) -> ExamItem:
    """Return the item with option ``order[k]`` at position k; ``order`` is a permutation of its options."""
    options = tuple(item.options[index] for index in order)
    return replace(item, options=options, answer_index=order.index(item.answer_index)) if options else item


def permute(item: ExamItem, seed: int, visit: int) -> ExamItem:
    """Return the item with its options in an order drawn from (seed, item id, visit), unless they point at each other."""
    if item.keeps_order:
        return item

    def draw(index: int) -> bytes:
        return hashlib.sha256(f"{seed}:{visit}:{index}:{item.id}".encode()).digest()

    return reorder(item, sorted(range(len(item.options)), key=draw))


def points_at_options(text: str) -> bool:
    """Return whether an option speaks of other options: by "above", by letters or numbers, or by "all" and "none".

    Letters and numbers may also mean statements in the question; keeping the order is right for those too.
    """
    if _POINTER.search(text):
        return True
    words = re.findall(r"[^\W_]+", text.casefold())
    labels = sum(_LABEL.fullmatch(word) is not None for word in words)
    least_words = 2 if labels else 1
    if len(words) < least_words or not all(_LABEL.fullmatch(word) or _POINTING_WORD.fullmatch(word) for word in words):
        return False
    is_number = re.search(r"\d[./:–-]\d", text) is not None  # 1.5, 1/2, 2-3
    return any(map(_QUANTIFIER.fullmatch, words)) or (labels > 0 and not is_number)


def plain(text: str) -> str:
    """Return the text to compare where case, spacing, Unicode form, outer quotes and a final full stop do not matter."""
    return wording(" ".join(text.split()).strip("\"'“”‘’ ")).casefold()


def wording(text: str) -> str:
    """Return the text to compare where case matters, since two options may differ in nothing else ("Aa" and "aa")."""
    return " ".join(unicodedata.normalize("NFC", text).split()).rstrip(". ")


def spelling(text: str) -> str:
    """Return the text to compare where articles and punctuation do not matter either, as TriviaQA's authors compare it."""
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text).split())


def shared_questions(items: Sequence[ExamItem], others: Iterable[ExamItem]) -> list[tuple[ExamItem, ExamItem]]:
    """Return the items that are also among ``others``, each with the one that it equals, however the two are written.

    Context and question identify an item: its options may be fewer, more, reworded or in another order, and case, white space,
    punctuation and Unicode form do not matter. A question that says little by itself ("Which of the following is true?",
    "6 x 7?") is the same only when at least half of the options agree too, or the answers when there are no options.
    """
    known: dict[str, list[ExamItem]] = {}
    for other in others:
        known.setdefault(_content_words(f"{other.context} {other.question}"), []).append(other)
    pairs = []
    for item in items:
        words = _content_words(f"{item.context} {item.question}")
        telling = sum(not _COMMON.fullmatch(word) for word in words.split()) >= TELLING_WORDS
        same = next((other for other in known.get(words, ()) if telling or _options_agree(item, other)), None)
        if same is not None:
            pairs.append((item, same))
    return pairs


def is_in_fold(item: ExamItem, fold: Fold) -> bool:
    """Return whether an item is in a fold of its exam, by a hash of its question.

    Questions that are the same, however they are written, are in the same fold.
    """
    digest = hashlib.sha256(_content_words(f"{item.context} {item.question}").encode()).digest()
    is_held_out = int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64
    return fold == "all" or is_held_out == (fold == "held-out")


def _options_agree(item: ExamItem, other: ExamItem) -> bool:
    mine, theirs = _own_options(item), _own_options(other)
    return 2 * len(mine & theirs) >= min(len(mine), len(theirs))


def _own_options(item: ExamItem) -> set[str]:
    options = item.options or (item.answer,)
    own = [option for option in options if not points_at_options(option)]  # "All of the above" says nothing about the question
    return {_content_words(option) for option in own or options}


def _content_words(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"[^\W_]+", text)) or " ".join(text.split())
