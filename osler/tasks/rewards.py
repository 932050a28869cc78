"""Rewards of reinforcement learning: pure functions of (item, completion), between 0 and 1.

Answers are read as the exam reads them (``osler.tasks.answers``), in bounded time. A reward for format alone destroys accuracy
(a published run fell from 0.228 to 0.025), so ``format`` is for logging and ``gated_format`` pays for form only when the answer
is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from osler.tasks.answers import MAX_ANSWER_CHARS, read_answer
from osler.tasks.item import LETTERS, ExamItem, render_option

if TYPE_CHECKING:
    from osler.tokenizer.chat import Completion

MAX_THINKING_CHARS = 2000  # about 400 words, for ``brief_correct``


def correct(item: ExamItem, completion: Completion) -> float:
    """Return 1 when the answer is right."""
    return float(read_answer(item, completion).right)


def format_ok(item: ExamItem, completion: Completion) -> float:
    """Return 1 when the completion follows the template, has some thinking, and answers in the form that is taught.

    That form is ``option text (letter)``, a number, or any text for an item whose answer is a text.
    """
    answer = (completion.answer or "").strip()
    if not completion.well_formed or not completion.thinking.strip() or len(answer) > MAX_ANSWER_CHARS:
        return 0.0
    if item.options:
        return float(answer in map(render_option, item.options, LETTERS))
    return float(read_answer(item, completion).readable)


def gated_format(item: ExamItem, completion: Completion) -> float:
    """Return 1 for the right answer in the form that is taught."""
    return correct(item, completion) * format_ok(item, completion)


def brief_correct(item: ExamItem, completion: Completion) -> float:
    """Return 1 for the right answer after at most ``MAX_THINKING_CHARS`` characters of thinking."""
    return correct(item, completion) if len(completion.thinking) <= MAX_THINKING_CHARS else 0.0


REWARDS: dict[str, Callable[[ExamItem, Completion], float]] = {
    "correct": correct,
    "format": format_ok,
    "gated_format": gated_format,
    "brief_correct": brief_correct,
}
