"""One exam item and how it is written into a prompt; ``osler.tasks.answers`` reads the answer.

Options are written as ``text (A)``: the text comes before its letter, so a model first says what it means and then only
has to find the letter beside it. ``permute`` gives them a new order on every visit, because the cheapest gain of
reinforcement learning on a fixed order is "always say C". Only items whose options point at each other ("All of the
above", "A and C") keep theirs, since another order would change what these say. Everything here is a pure function;
there is no state to resume.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# "none of the above", "all of these", "Both option 2 and 3", anywhere in an option.
_POINTER = re.compile(
    r"\b(?:of|all|none|any|both) (?:the )?above\b"
    r"|\b(?:all|none|any|both|either|neither) of (?:the )?(?:these|those|them|following)\b"
    r"|\b(?:options?|choices?) \(?(?-i:[A-F1-6])\b",
    re.IGNORECASE,
)
# An option of nothing but such words: "Both", "All are correct", "A and C", "Both 1 and 2", "a, b are true & c is false".
_POINTING_WORD = re.compile(
    "all|none|any|both|either|neither|of|the|these|those|them|above|below|following|mentioned|listed|others?|options?|choices?|"
    "answers?|statements?|and|or|nor|but|not|only|alone|except|is|are|correct|incorrect|true|false|right|wrong|[a-f]{2,4}"
)
_QUANTIFIER = re.compile("all|none|any|both|either|neither")
_LABEL = re.compile("[a-f]|[1-6]|i{1,3}|iv|vi?")


@dataclass(frozen=True)
class ExamItem:
    """A question with its options and the right one, or (``options == ()``) with a free ``answer`` such as a number."""

    id: str
    question: str
    options: tuple[str, ...]
    answer_index: int  # -1 when there are no options
    split: str = ""
    thinking: str | None = None  # the reasoning to learn from; never names a letter, because options are permuted
    context: str = ""  # a passage that is shown before the question
    group: str = ""  # what items have in common, coarse to fine: "subject" or "relation/condition"
    answer: str = ""  # the answer's text when there are no options

    def __post_init__(self) -> None:
        if self.options and not 0 <= self.answer_index < len(self.options) <= len(LETTERS):
            raise ValueError(
                f"item {self.id}: answer_index {self.answer_index} outside its {len(self.options)} options"
            )

    @property
    def answer_letter(self) -> str:
        """The right option's letter, or "" for an item without options."""
        return LETTERS[self.answer_index] if self.options else ""

    @property
    def keeps_order(self) -> bool:
        """Whether an option points at others, so that another order would change its meaning."""
        return any(map(points_at_options, self.options))

    @property
    def repeats_an_option(self) -> bool:
        """Whether two options have the same text."""
        return len(set(map(wording, self.options))) < len(self.options)

    def is_right(self, index: int) -> bool:
        """Whether the option at ``index`` is the right one or says the same: some exams print an option twice."""
        return wording(self.options[index]) == wording(self.options[self.answer_index])


def content_id(task: str, *parts: str) -> str:
    """A stable id for an item whose file gives none: the same content has the same id in every file and order."""
    return f"{task}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:12]}"


def render_question(item: ExamItem, order: Sequence[int] | None = None) -> str:
    """The text of a prompt: context, question, then the options as ``text (A)``.

    ``order[k]`` is the index of the option shown at position k (default: as they are); the letters follow the position.
    """
    order = range(len(item.options)) if order is None else order
    if sorted(order) != list(range(len(item.options))):
        raise ValueError(f"order {list(order)} is not a permutation of {len(item.options)} options")
    shown = [f"{item.options[index]} ({LETTERS[position]})" for position, index in enumerate(order)]
    question = " ".join([item.question.strip(), *shown])
    return f"{item.context.strip()}\n{question}" if item.context.strip() else question


def render_answer(item: ExamItem) -> str:
    """The answer a model is taught to write: ``text (B)``, or the bare answer of an item without options."""
    return f"{item.options[item.answer_index]} ({item.answer_letter})" if item.options else item.answer


def reorder(item: ExamItem, order: Sequence[int]) -> ExamItem:
    """The same item with option ``order[k]`` at position k."""
    order = list(order)
    if sorted(order) != list(range(len(item.options))):
        raise ValueError(f"order {order} is not a permutation of {len(item.options)} options")
    if not order:
        return item
    options = tuple(item.options[index] for index in order)
    return replace(item, options=options, answer_index=order.index(item.answer_index))


def permute(item: ExamItem, seed: int, visit: int) -> ExamItem:
    """The same item with its options in an order drawn from (seed, item id, visit): all orders equally likely.

    An item whose options point at each other stays as it is.
    """
    if item.keeps_order:
        return item

    def draw(index: int) -> bytes:
        return hashlib.sha256(f"{seed}:{visit}:{index}:{item.id}".encode()).digest()

    return reorder(item, sorted(range(len(item.options)), key=draw))


def points_at_options(text: str) -> bool:
    """Whether an option's text speaks of other options, by "above", by their letters or numbers, or by "all" and "none".

    Letters and numbers may also stand for statements in the question; keeping the order is right for those too.
    """
    if _POINTER.search(text):
        return True
    words = re.findall(r"[^\W_]+", text.casefold())
    labels = sum(_LABEL.fullmatch(word) is not None for word in words)
    if len(words) < 1 + (labels > 0) or not all(_LABEL.fullmatch(word) or _POINTING_WORD.fullmatch(word) for word in words):
        return False
    is_number = re.search(r"\d[./:–-]\d", text) is not None  # 1.5, 1/2, 2-3
    return any(map(_QUANTIFIER.fullmatch, words)) or (labels > 0 and not is_number)


def plain(text: str) -> str:
    """Text as it is compared: case, spacing, Unicode form, outer quotes and a final full stop do not matter."""
    return wording(" ".join(text.split()).strip("\"'“”‘’ ")).casefold()


def wording(text: str) -> str:
    """Text as it is compared where case may be all that tells two options apart, as with "Aa" and "aa"."""
    return " ".join(unicodedata.normalize("NFC", text).split()).rstrip(". ")
