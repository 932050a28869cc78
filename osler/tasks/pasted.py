"""Read a question with options that a person pasted, in the forms in which exams are printed.

    (A) x (B) y      [A] x      A. x      A) x      A: x      a) x      and Osler's own x (A) y (B)

Letters must run from A on without a gap. White space is evened out. A line "Answer: ..." is left out, with all that follows,
because it would tell the model.
"""

import re
from collections.abc import Iterable, Sequence

from osler.runtime.errors import UserError
from osler.tasks.item import LETTERS, wording

_KEY = re.compile(r"^[ \t]*(?:the |correct |right )*answer\b.*", re.IGNORECASE | re.MULTILINE | re.DOTALL)
_LINE = re.compile(r"^[ \t]*(?:[(\[]([A-Za-z])[)\]][.:]?|([A-Za-z])[.):])[ \t]+(?=\S)", re.MULTILINE)  # not the sign of Kelvin
_BRACKET = re.compile(r"\(([A-Z])\)")
_BARE = re.compile(r"(?<!\S)([A-Z])[.)]\s")
_FORMS = (_LINE, _BRACKET, _BARE)
_BORDERS = ("?", ":", ". ")  # what ends the question before the first of the options that stand before their letters


def read_pasted(text: str) -> tuple[str, tuple[str, ...]]:
    """Return the question and its options. Raises UserError where no options are found, or an option is empty or there twice."""
    text = _KEY.sub("", text.strip())
    pattern, marks = max(((form, _run(form.finditer(text))) for form in _FORMS), key=lambda found: len(found[1]))
    if len(marks) < 2:
        raise UserError(
            "The question has no options: write at least two, as (A) ... (B) ..., or A. ... and B. ... in lines of their own."
        )
    before_letters = pattern is _BRACKET and not text[marks[-1].end() :].strip(" .;\n")
    question, *options = _before(text, marks) if before_letters else _after(text, marks)
    options = [" ".join(option.split()).rstrip(";,") for option in options]
    for number, option in enumerate(options):
        if not option:
            raise UserError(f"Option {LETTERS[number]} of the question is empty: write its text after its letter.")
        if wording(option) in map(wording, options[:number]):
            raise UserError(f"Two options of the question are `{option}`: write what tells them apart, or leave one out.")
    return question.strip(), tuple(options)


def _run(marks: Iterable[re.Match[str]]) -> list[re.Match[str]]:
    """Return the longest run of marks A, B, C ... in the order of the text; of several, the one whose marks are the latest."""
    runs: dict[str, list[re.Match[str]]] = {}  # keys: the last letter
    for mark in marks:
        place = LETTERS.index(next(filter(None, mark.groups())).upper())
        if place == 0 or LETTERS[place - 1] in runs:
            runs[LETTERS[place]] = [*(runs[LETTERS[place - 1]] if place else []), mark]
    return max(runs.values(), key=len, default=[])


def _after(text: str, marks: Sequence[re.Match[str]]) -> list[str]:
    """Return the question and the texts after the marks; the last ends at an empty line."""
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    parts = [text[mark.end() : end] for mark, end in zip(marks, ends, strict=True)]
    return [text[: marks[0].start()], *parts[:-1], re.split(r"\n\s*\n", parts[-1].lstrip())[0]]


def _before(text: str, marks: Sequence[re.Match[str]]) -> list[str]:
    """Return the question and the texts before the marks. Raises UserError where the question does not end before option A."""
    ends = [mark.end() for mark in marks]
    parts = [text[end : mark.start()] for end, mark in zip(ends, marks[1:], strict=False)]
    head = text[: marks[0].start()]
    for border in ("\n",) if "\n" in parts[0] else _BORDERS:
        if border in head.rstrip():
            at = head.rstrip().rindex(border) + len(border)
            return [head[:at], head[at:], *parts]
    raise UserError(
        "The question does not end before option A: end it with a question mark, or write each option in its own line."
    )
