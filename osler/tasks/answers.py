"""Read an answer: which option, number or text a model gave, if that is certain.

The exam and the rewards share ``read_answer``, so a score and a reward never disagree. It reads the form that models are taught
(``amoxicillin (B)``) and forms with one meaning: ``B``, ``B) amoxicillin``, ``The answer is B``, the exact text of one option.
What could mean something else counts as wrong, because guessing would reward tricks: text and letter that contradict each other,
a negation, alternative or doubt ("not (A)", "A or (B)"), a second letter or number, or a word that the length limit cut.

A number is one word of digits, such as ``-5``, ``$1,080`` or ``72 apples``; units are ignored, because the answers of GSM8K have
none. A number is not read if something is glued to it (``5k``, ``1e3``, ``1/2``), if it has other separators, or beside words
that change its value. Markdown, LaTeX's ``\\boxed{}``, full-width characters and the digits of any one script are understood.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from osler.tasks.item import LETTERS, ExamItem, plain, render_option, spelling, wording
from osler.tasks.programs import NO_CODE, PASSED, complete, run_tests

if TYPE_CHECKING:
    from osler.tokenizer.chat import Completion

MAX_ANSWER_CHARS = 1000  # beside those of the longest option; a longer answer is unread, which bounds the time of a pattern

# The ASCII form of full-width characters, the minus sign and Arabic separators.
_ASCII = {0xFF01 + k: 0x21 + k for k in range(94)} | {0x2212: "-", 0x066B: ".", 0x066C: ",", 0x066A: "%"}
_BOXED = re.compile(r"\\f?boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_LATEX = re.compile(r"\\(?:f?boxed|text(?:bf|rm)?|math(?:bf|rm))\{([^{}]*)\}")
_EMPHASIS = re.compile(r"(?<!\w)(\*\*|__|\*|_|`|\$)(\S(?:.*?\S)?)\1(?!\w)")

_INTRODUCTION = re.compile(  # The answer is B, Final answer: B, Option B
    r"(?:(?:so|thus|hence|therefore),? )?(?:(?:the|my) )?(?:(?:final|correct|best|right) )?"
    r"(?:answer|option|choice)(?: is)?(?: ?[:=] ?| )(?:(?:option|choice) )?",
    re.IGNORECASE,
)
_VERDICT = re.compile(  # B is correct, (B) is the right answer.
    r"(\([A-Za-z]\)|[A-Z]) is (?:the )?(?:correct|right|best)(?: (?:answer|option|choice|one))?[.!]?"
)
_QUOTES = re.compile("[\"“”]")
_LONE = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])\)?)[.:!]?")  # (B)   B   B)   B.
_TAIL = re.compile(r"(.*)\(([A-Za-z])\)[.!,;:]*")  # amoxicillin (B)
_HEAD = re.compile(r"(?:\(([A-Za-z])\)[.:]?|([A-Za-z])[.:)]) (.+)")  # B. amoxicillin
_BARE_HEAD = re.compile(r"([A-Za-z]) (.+)")  # B amoxicillin, as from a letter on a line of its own
_EXPLAINED = re.compile(r"(.*?)\(([A-Za-z])\)[.,;:] ?(.+)")  # amoxicillin (B), because it is oral
# A letter that is a word by itself; "A" before a lower-case letter is the article.
_LETTER = re.compile(r"\(([A-Za-z])\)|(?<![\w'’-])([B-Z]|A(?! [a-z]))(?![\w'’-])")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_DOUBT = re.compile(  # a negation, an alternative, a doubt, a rejection, or a change of mind
    "not|no|nor|neither|never|none|cannot|.+n['’]t|(?:do|does|did|is|was|are|were|ca|wo|would|should)nt|"
    "except|excepting|exception|without|besides|aside|apart|lacks?|lacking|unless|if|whether|"
    "but|or|either|both|versus|vs|instead|rather|than|unlike|other|another|else|opposite|"
    "wrong|false|untrue|incorrect|incorrectly|mistaken|mistake|error|contraindicat.+|inappropriate|unsuitable|inadequate|"
    "insufficient|ineffective|unnecessary|unacceptable|inadvisable|harmful|"
    "exclud.+|eliminat.+|avoid.*|rule|rules|ruled|ruling|reject.*|dismiss.*|discard.*|omit.*|ignor(?:e|ed|ing)|"
    "disagree.*|den(?:y|ied|ies)|"
    "unlikely|improbable|impossible|implausible|least|less|hardly|barely|scarcely|rarely|seldom|"
    "unsure|uncertain|unclear|doubt.*|questionable|guess.*|maybe|perhaps|possibly|probably|might|may|could|"
    "mean|means|meant|actually|wait|sorry|oops|correction|scratch|reconsider.*"
)

_NUMBER = re.compile(  # a sign, a currency, digits with thousands commas, a fraction, a percent or currency sign, a stop
    r"(?:[-+]?[$€£¥₹]?|[$€£¥₹][-+])((?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)[%$€£¥₹]?[.,;:!]*", re.ASCII
)
_OTHER_NUMBER = re.compile(  # words beside a number that change it
    "minus|negative|about|approximately|approx|roughly|around|nearly|almost|over|under|least|most|between|hundred|thousand|"
    "million|billion|trillion|dozen|half|quarter|twice|double|triple|k"
)


# How lm-evaluation-harness reads GSM8K (its filters of these names), which is less careful than ``read_answer``. Each pattern
# has two groups, so that ``findall`` returns pairs for both.
PUBLISHED = {"strict-match": r"#### (-?[0-9.,]+)()", "flexible-extract": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"}


@dataclass(frozen=True)
class Reading:
    """Whether an answer can be read, whether it is right, and the position of the option that it names."""

    readable: bool
    right: bool
    choice: int | None = None


def read_answer(item: ExamItem, completion: Completion) -> Reading:
    """Read the answer to an item: an option, a number, a program, or any text where the item's answer is a text."""
    text = completion.answer or ""
    if item.tests:
        outcome = run_tests(complete(item.question, text), item.tests)
        return Reading(bool(text.strip()) and outcome not in NO_CODE, outcome == PASSED)
    if not completion.finished and text[-1:].isalnum():
        text = ""  # the length limit may have cut through a word or a number
    if item.options:
        choice = read_choice(text, item.options)
        return Reading(choice is not None, choice is not None and item.is_right(choice), choice)
    if item.aliases:
        said = spelling(text)
        return Reading(bool(said), bool(said) and said in map(spelling, item.aliases))
    expected = read_number(item.answer)
    if expected is None:
        return Reading(bool(text.strip()), bool(text.strip()) and plain(text) == plain(item.answer))
    number = read_number(text)
    return Reading(number is not None, number == expected)


def published_reading(rule: str, item: ExamItem, completion: Completion) -> Reading:
    """Read a number by a rule of lm-evaluation-harness: "strict-match" or "flexible-extract"."""
    found = re.findall(PUBLISHED[rule], completion.answer or "")
    said = "".join(found[0 if rule == "strict-match" else -1]) if found else ""
    return Reading(bool(found), said.replace(",", "").replace("$", "").removesuffix(".") == item.answer)


def read_choice(text: str, options: Sequence[str]) -> int | None:
    """Return the position of the option that an answer names, or None when that is not certain."""
    if len(text) > MAX_ANSWER_CHARS + max(map(len, options)):
        return None
    said, *shown = (" ".join(part.split()) for part in (text, *options))
    for index, option in enumerate(shown):
        if said == render_option(option, LETTERS[index]) and said not in shown:
            return index
    choices = {_choice(_unwrapped(part), options) for part in _final_parts(text)}
    return choices.pop() if len(choices) == 1 else None


def read_number(text: str) -> Decimal | None:
    """Return the number that an answer gives, or None when that is not certain."""
    if len(text) > MAX_ANSWER_CHARS:
        return None
    numbers = {_number(_unwrapped(part)) for part in _final_parts(text)}
    return numbers.pop() if len(numbers) == 1 else None


def _choice(text: str, options: Sequence[str]) -> int | None:
    """Return the position of the option that one part of an answer names, or None; the forms are tried one after another."""
    whole = _matching(text, options)
    if not whole and (introduction := _INTRODUCTION.match(text)):
        text = text[introduction.end() :]
        whole = _matching(text, options)
    if verdict := _VERDICT.fullmatch(text):
        text = verdict[1]
        whole = _matching(text, options)
    letter, beside, after = "", "", ""
    may_differ = False  # whether the text beside the letter may differ from the option's
    if found := _LONE.fullmatch(_QUOTES.sub("", text)):
        letter = found[1] or found[2]
    elif found := _TAIL.fullmatch(text):
        letter, beside, may_differ = found[2], found[1], True
    elif whole:
        pass  # "E. coli" and "Vitamin (A): deficiency" may be texts of options
    elif found := _HEAD.fullmatch(text):
        letter, beside = found[1] or found[2], found[3]
    elif (found := _BARE_HEAD.fullmatch(text)) and not _LETTER.search(found[2]):
        letter, beside = found.groups()
    elif found := _EXPLAINED.fullmatch(text):
        beside, letter, after = found.groups()
    if not letter or (index := LETTERS.index(letter.upper())) >= len(options):
        return whole[0] if len({wording(options[index]) for index in whole}) == 1 else None
    if whole and index not in whole:
        return None  # the letter of one option and the text of another
    matching = _matching(beside, options)
    allowed = index in matching if matching or not may_differ else _is_free_of_doubt(beside, index, options)
    return index if (allowed or not beside.strip()) and _is_free_of_doubt(after, index, options) else None


def _is_free_of_doubt(text: str, index: int, options: Sequence[str]) -> bool:
    """Return whether the words around a letter hold no negation, alternative, other letter or text of another option.

    The words of the option itself do not count: "no growth (B)" names B when that is its text.
    """
    words, own = _words(text), _words(options[index])
    if any(map(_DOUBT.fullmatch, set(words) - set(own))):
        return False
    letters = {(found[1] or found[2]).lower() for found in _LETTER.finditer(text)} - set(own)
    if letters & set(LETTERS.lower()[: len(options)]) - {LETTERS[index].lower()}:
        return False
    others = (f" {' '.join(_words(option))} " for option in options)
    said, meant = f" {' '.join(words)} ", f" {' '.join(own)} "
    return not any(other.strip() and other in said and other not in meant for other in others)


def _matching(text: str, options: Sequence[str]) -> list[int]:
    """Return the positions of the options with this text; "AA" is not "Aa" where both are options."""
    for form in (wording, lambda text: plain(_unwrapped(text))):
        said = form(text)
        found = [index for index, option in enumerate(options) if said and form(option) == said]
        if found:
            return found
    return []


def _number(text: str) -> Decimal | None:
    if introduction := _INTRODUCTION.match(text):
        text = text[introduction.end() :]
    work, _, result = text.rpartition("=")  # 48 + 24 = 72
    if "=" in work or any(map(_DOUBT.fullmatch, _words(text))) or any(map(_OTHER_NUMBER.fullmatch, _words(result))):
        return None
    numbers = []
    for word in result.strip("\"'“”‘’ ").split():
        if found := _NUMBER.fullmatch(word):
            number = Decimal(found[1].replace(",", ""))
            numbers.append(number.copy_negate() if "-" in word else number)  # arithmetic would round it to 28 digits
        elif any(character.isnumeric() for character in word) or (not _words(word) and word.strip("%$€£¥₹.,;:!")):
            return None  # 5k, 3², 1/2, or an operator
    if len(numbers) != 1 or (work and _number(work) not in (None, numbers[0])):
        return None
    return numbers[0]


def _final_parts(text: str) -> list[str]:
    """Return what ``\\boxed{}`` or ``####`` mark as the answer, else the whole text."""
    return [*_BOXED.findall(text), *text.split("####")[1:]] or [text]


def _unwrapped(text: str) -> str:
    """Return the text without markup and line breaks, in ASCII where only the form differs."""
    text = unicodedata.normalize("NFC", text).translate(_ASCII)
    digits = {character for character in text if character.isdecimal()}
    if len({ord(digit) - unicodedata.decimal(digit) for digit in digits}) == 1:
        text = text.translate({ord(digit): str(unicodedata.decimal(digit)) for digit in digits})
    text = text.replace("\\$", "$").replace("\\%", "%")
    for _ in range(3):  # emphasis in emphasis in a box
        text = _EMPHASIS.sub(r"\2", _LATEX.sub(r" \1 ", " ".join(text.split())))
    return " ".join(text.split())


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(text)]
