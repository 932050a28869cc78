"""Find questions that two exams share, however they are written.

Context and question identify an item: its options may be fewer, more, reworded or in another order, and case, white space,
punctuation and Unicode form do not matter. A question that says little by itself ("Which of the following is true?", "6 x 7?")
is the same only when half of the options agree too, or the answers when there are no options.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from osler.tasks.item import ExamItem, points_at_options

TELLING_WORDS = 4  # a question with fewer than these is identified by its options too
# Words that occur in questions of every subject.
_COMMON = re.compile(
    "an?|the|of|in|on|to|for|with|by|at|from|and|or|is|are|was|were|be|been|do|does|did|has|have|this|that|these|those|its?|what|"
    "which|who|when|where|why|how|following|ones?|all|each|any|none|not|no|except|true|false|correct|incorrect|right|wrong|best|"
    "most|least|likely|common|commonly|appropriate|statements?|answers?|options?|choices?|about|regarding|concerning|given|above|"
    "below|next|step|patients?|management|treatment|diagnosis|cause"
)


def shared_questions(items: Sequence[ExamItem], others: Iterable[ExamItem]) -> list[tuple[ExamItem, ExamItem]]:
    """Return the items that are also among ``others``, each with the one that it equals."""
    known: dict[str, list[ExamItem]] = {}
    for other in others:
        known.setdefault(_words(f"{other.context} {other.question}"), []).append(other)
    pairs = []
    for item in items:
        words = _words(f"{item.context} {item.question}")
        telling = sum(not _COMMON.fullmatch(word) for word in words.split()) >= TELLING_WORDS
        same = next((other for other in known.get(words, ()) if telling or _options_agree(item, other)), None)
        if same is not None:
            pairs.append((item, same))
    return pairs


def _options_agree(item: ExamItem, other: ExamItem) -> bool:
    mine, theirs = _options(item), _options(other)
    return 2 * len(mine & theirs) >= min(len(mine), len(theirs))


def _options(item: ExamItem) -> set[str]:
    options = item.options or (item.answer,)
    own = [option for option in options if not points_at_options(option)]  # "All of the above" says nothing about the question
    return {_words(option) for option in own or options}


def _words(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"[^\W_]+", text)) or " ".join(text.split())
