"""An exam item and its text in a prompt; ``osler.tasks.answers`` reads the answer.

Options are written as ``text (A)``: a model first says what it means and then only has to find the letter beside it. ``permute``
gives the options a new order on every visit, because with a fixed order reinforcement learning finds "always say C" first. Items
whose options point at each other ("All of the above", "A and C") keep their order, which is part of their meaning.
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
    """A question with options of which one is right, or (``options == ()``) with a free ``answer`` such as a number."""

    id: str
    question: str
    options: tuple[str, ...]
    answer_index: int  # -1 when there are no options
    split: str = ""
    thinking: str | None = None  # the reasoning to learn from; never names a letter, because options are permuted
    context: str = ""  # a passage that is shown before the question
    group: str = ""  # "subject" or "relation/condition", coarse to fine; items of a group are alike
    answer: str = ""  # the text of the answer when there are no options

    def __post_init__(self) -> None:
        if self.options and not 0 <= self.answer_index < len(self.options) <= len(LETTERS):
            raise ValueError(f"item {self.id}: answer_index {self.answer_index} outside its {len(self.options)} options")

    @property
    def answer_letter(self) -> str:
        """Return the letter of the right option, or "" for an item without options."""
        return LETTERS[self.answer_index] if self.options else ""

    @property
    def keeps_order(self) -> bool:
        """Return whether an option points at others, so that another order would change its meaning."""
        return any(map(points_at_options, self.options))

    @property
    def repeats_an_option(self) -> bool:
        """Return whether two options have the same text."""
        return len(set(map(wording, self.options))) < len(self.options)

    def is_right(self, index: int) -> bool:
        """Return whether the option at ``index`` is right or has the right text; some exams print an option twice."""
        return wording(self.options[index]) == wording(self.options[self.answer_index])


def content_id(task: str, *parts: str) -> str:
    """Return an id made of the content, for items whose file gives none; it is the same in every file."""
    return f"{task}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:12]}"


def render_question(item: ExamItem) -> str:
    """Return the text of a prompt: context, question, then the options as ``text (A)``."""
    question = " ".join([item.question.strip(), *map(render_option, item.options, LETTERS)])
    return f"{item.context.strip()}\n{question}" if item.context.strip() else question


def render_answer(item: ExamItem) -> str:
    """Return the answer that a model is taught to write: ``text (B)``, or the bare answer of an item without options."""
    return render_option(item.options[item.answer_index], item.answer_letter) if item.options else item.answer


def render_option(text: str, letter: str) -> str:
    """Return an option as questions show it and answers name it: ``text (B)``."""
    return f"{text} ({letter})"


def reorder(item: ExamItem, order: Sequence[int]) -> ExamItem:
    """Return the item with option ``order[k]`` at position k."""
    order = list(order)
    if sorted(order) != list(range(len(item.options))):
        raise ValueError(f"order {order} is not a permutation of {len(item.options)} options")
    if not order:
        return item
    options = tuple(item.options[index] for index in order)
    return replace(item, options=options, answer_index=order.index(item.answer_index))


def permute(item: ExamItem, seed: int, visit: int) -> ExamItem:
    """Return the item with its options in an order drawn from (seed, item id, visit); all orders are equally likely.

    An item whose options point at each other is returned as it is.
    """
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
    if len(words) < 1 + (labels > 0) or not all(_LABEL.fullmatch(word) or _POINTING_WORD.fullmatch(word) for word in words):
        return False
    is_number = re.search(r"\d[./:–-]\d", text) is not None  # 1.5, 1/2, 2-3
    return any(map(_QUANTIFIER.fullmatch, words)) or (labels > 0 and not is_number)


def plain(text: str) -> str:
    """Return the text to compare where case, spacing, Unicode form, outer quotes and a final full stop do not matter."""
    return wording(" ".join(text.split()).strip("\"'“”‘’ ")).casefold()


def wording(text: str) -> str:
    """Return the text to compare where case matters, since two options may differ in nothing else ("Aa" and "aa")."""
    return " ".join(unicodedata.normalize("NFC", text).split()).rstrip(". ")
