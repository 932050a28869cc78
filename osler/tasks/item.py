"""One exam item, how it is written into a prompt, and how an answer is read back.

Options are written as ``text (A)``: the text comes before its letter, so a model first says what it means and then only
has to find the letter beside it. The order of the options is never part of the item's meaning: ``permute`` gives a new
order on every visit, because the cheapest gain of reinforcement learning on a fixed order is "always say C". Reading is
strict about ambiguity: an answer that names two options names none. Everything here is a pure function; there is no
state to resume.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_ANSWER_CHARS = 1000  # a longer answer is not an answer; it also bounds the time any pattern can take

_TAIL = re.compile(r"\(([A-Za-z])\)$")  # amoxicillin (B)
_LONE = re.compile(r"^([A-Za-z])[):]?$")  # B   B)   B:
_STATED = re.compile(r"\b[Aa]nswer(?: is|:)? \(?([A-Z])\)?$")  # The answer is B.
_LEAD = re.compile(r"^(?:\(([A-Z])\)|([A-Z])[.:)])\s+\S")  # B. amoxicillin
_INSIDE = re.compile(r"\(([A-Z])\)")  # amoxicillin (B), because
_NUMBER = re.compile(r"(?<![\w.,])[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\d/]|[.,]\d)")


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
    """The same item with its options in an order drawn from (seed, item id, visit): all orders equally likely."""

    def draw(index: int) -> bytes:
        return hashlib.sha256(f"{seed}:{visit}:{index}:{item.id}".encode()).digest()

    return reorder(item, sorted(range(len(item.options)), key=draw))


def plain(text: str) -> str:
    """Text as it is compared: case, spacing, outer quotes and a final full stop do not matter."""
    return " ".join(text.split()).strip("\"'“”‘’ ").rstrip(".").strip().casefold()


def extract_letter(answer_text: str, num_options: int, options: Sequence[str] = ()) -> int | None:
    """The index of the option that an answer names, or None when it names none or more than one.

    Reads ``amoxicillin (B)``, ``(B)``, ``B``, ``B.``, ``B. amoxicillin`` and ``The answer is B``; with ``options`` also
    the exact text of one option without a letter, and then an answer whose text is one option and whose letter is
    another is ambiguous.
    """
    if len(answer_text) > MAX_ANSWER_CHARS:
        return None
    text = answer_text.strip().rstrip(".! ")
    whole = _matching(text, options)
    tail = _TAIL.search(text)
    if tail and (letter := _index(tail[1], num_options)) is not None:
        before = text[: tail.start()]
        beside = _matching(before, options)
        others = _named_inside(before, num_options) - {letter}
        if (whole and letter not in whole) or (beside and letter not in beside) or (others and not beside):
            return None
        return letter
    for strong in (_LONE.match(text), _STATED.search(text)):
        if strong and (letter := _index(strong[1], num_options)) is not None:
            return letter if not whole or letter in whole else None
    if whole:  # before the weak forms: "E. coli" and "Vitamin (A) deficiency" are option texts
        return whole[0] if len(whole) == 1 else None
    inside = _named_inside(text, num_options)
    if lead := _LEAD.match(text):
        letter = _index(lead[1] or lead[2], num_options)
        beside = _matching(text[lead.end() - 1 :], options)
        if letter is None or (options and letter not in beside) or (inside - {letter} and not beside):
            return None
        return letter
    return inside.pop() if len(inside) == 1 else None


def _named_inside(text: str, num_options: int) -> set[int]:
    return {index for name in _INSIDE.findall(text) if (index := _index(name, num_options)) is not None}


def _index(letter: str, num_options: int) -> int | None:
    index = LETTERS.find(letter.upper())
    return index if 0 <= index < num_options else None


def _matching(text: str, options: Sequence[str]) -> list[int]:
    wanted = plain(text)
    return [index for index, option in enumerate(options) if wanted and plain(option) == wanted]


def extract_number(answer_text: str) -> Decimal | None:
    """The number that an answer gives: after ``####`` or the last ``=``, else the only number there; otherwise None.

    Thousands commas, a dollar sign and units are ignored; fractions and two different numbers are ambiguous.
    """
    if len(answer_text) > MAX_ANSWER_CHARS:
        return None
    for mark in ("####", "="):
        answer_text = answer_text.rpartition(mark)[2]
    if "/" in answer_text and re.search(r"\d\s*/\s*\d", answer_text):
        return None
    numbers = {Decimal(re.sub(r"[$,]", "", found)) for found in _NUMBER.findall(answer_text)}
    return numbers.pop() if len(numbers) == 1 else None
