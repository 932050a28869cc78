"""A needle in a haystack: questions about long histories (``clinic/history.py``), by length in tokens and by depth.

The same cases are asked at every length and depth, so that differences between two cells of the grid are not differences between
questions. How many visits a history has depends on the tokenizer and on the way of asking: checkpoints that share both are asked
the same items.
"""

import re
from bisect import bisect_right
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from osler.clinic.history import Case, Visit, cases
from osler.runtime.errors import UserError
from osler.tasks.item import ExamItem, answer_texts, render_plain, render_question
from osler.tasks.registry import NeedleTask
from osler.tokenizer.bpe import Tokenizer

FEWEST_VISITS = 4  # beside the telling one, so that the five usual depths are five places
SHORTEST = 256  # tokens: the shortest of the default lengths
_CELL = re.compile(r"(\d+) tokens, (\d+)% deep")


class Context(NamedTuple):
    """How questions are measured: in the tokens of a tokenizer, with room for ``new_tokens`` of the ``max_seq_len``.

    Without ``template`` they are asked as plain text.
    """

    tokenizer: Tokenizer
    max_seq_len: int
    new_tokens: int = 0
    template: bool = True

    @property
    def room(self) -> int:
        return self.max_seq_len - self.new_tokens


def load_needle(task: NeedleTask, context: Context, key: str = "task") -> list[ExamItem]:
    """Return the items of each split, length and depth; a row falls short of its length by less than a visit.

    A row is the question with its history and options, and the answer. ``key`` is for messages. Raises UserError for a length
    that is too short for a history, or that does not fit into the context.
    """
    lengths = task.lengths or lengths_within(context.room)
    longest = max(lengths)
    if longest > context.room:
        kept = f" less {context.new_tokens:,} new tokens" if context.new_tokens else ""
        raise UserError(
            f"{key}: lengths has {longest:,}, and the model reads {context.max_seq_len:,} tokens (max_seq_len){kept}: ask for "
            f"lengths up to {context.room:,}."
        )
    splits = map(str.strip, task.split.split(","))
    rulers = [Ruler(case, split, longest, context) for split in splits for case in cases(task.seed, split, task.limit)]
    if not task.lengths:  # a tokenizer that cuts text finely needs longer rows than others
        fewest = max(ruler.tokens(FEWEST_VISITS, longest, depth) for ruler in rulers for depth in task.depths)
        lengths = tuple(length for length in lengths if length >= fewest) or (longest,)
    return [ruler.item(length, depth, key) for ruler in rulers for length in lengths for depth in task.depths]


def lengths_within(room: int) -> tuple[int, ...]:
    """Return 256, 512, 1,024 and so on up to ``room`` tokens; ``room`` alone where that is less than 256."""
    return tuple(SHORTEST << power for power in range((room // SHORTEST).bit_length())) or (room,)


class Ruler:
    """The histories of one case: enough visits for a row of ``longest`` tokens, and how many tokens each of them takes."""

    def __init__(self, case: Case, split: str, longest: int, context: Context) -> None:
        self.case, self.split, self.context = case, split, context
        self.visits: list[Visit] = []
        self.ends = [0]  # tokens before each visit, then those of all visits
        for visit in case.visits():
            if self.ends[-1] > longest and len(self.visits) > FEWEST_VISITS:
                break
            self.visits.append(visit)
            self.ends.append(self.ends[-1] + len(context.tokenizer.encode(f" {visit}")))

    def item(self, length: int, depth: int, key: str) -> ExamItem:
        """Return the case with as many visits as a row of ``length`` tokens holds; ``depth`` percent precede the telling one."""
        tokens = partial(self.tokens, length=length, depth=depth)
        fewest = tokens(FEWEST_VISITS)
        if length < fewest:
            enough, room = SHORTEST << (fewest // SHORTEST).bit_length(), self.context.room
            remedy = f"Ask for more, such as lengths=[{min(enough, room)}]."
            if fewest > room:
                remedy = f"The model reads {room:,}, so it has to learn longer rows first (context.max_seq_len of a run)."
            raise UserError(
                f"{key}: lengths has {length:,}, which is too short: {self.case.id} takes {fewest:,} tokens with a history of "
                f"{FEWEST_VISITS + 1} visits. {remedy}"
            )
        # The sums are exact unless a token spans two sentences, as with superwords.
        count = max(FEWEST_VISITS, bisect_right(self.ends, length - fewest + self.ends[FEWEST_VISITS]) - 1)
        while count > FEWEST_VISITS and tokens(count) > length:
            count -= 1
        while count < len(self.visits) and tokens(count + 1) <= length:
            count += 1
        return self._item(count, length, depth)

    def tokens(self, count: int, length: int, depth: int) -> int:
        """Return how many tokens a row with ``count`` visits beside the telling one takes."""
        return self.row_tokens(self._item(count, length, depth))

    def row_tokens(self, item: ExamItem) -> int:
        """Return how many tokens a row takes: question, options, the longest answer, markers if any, and the end of text."""
        encode, texts = self.context.tokenizer.encode, answer_texts(item, "answer")
        if self.context.template:
            return 3 + len(encode(render_question(item))) + max(len(encode(text)) for text in texts)
        return 1 + len(encode(render_plain(item, "letters"))) + max(len(encode(f" {text}")) for text in texts)

    def _item(self, count: int, length: int, depth: int) -> ExamItem:
        case, deep = self.case, self.ends[count] * depth / 100
        place = min(range(count + 1), key=lambda place: abs(self.ends[place] - deep))
        return ExamItem(
            id=f"{case.id}-{length}-{depth}",
            question=f"{case.history(self.visits[:count], place)} {case.question}",
            options=case.options,
            answer_index=case.answer_index,
            split=self.split,
            group=name_of(length, depth),
            cluster=case.id,
        )


def name_of(length: int, depth: int) -> str:
    """Return the name of a cell of the grid, by which an exam's score has its accuracy."""
    return f"{length} tokens, {depth}% deep"


def cells_in(groups: Mapping[str, Any]) -> dict[tuple[int, int], Any]:
    """Return what a score says of each cell, by length and depth, in order; empty for the score of another exam."""
    named = ((_CELL.fullmatch(name), value) for name, value in groups.items())
    cells = {(int(found[1]), int(found[2])): value for found, value in named if found}
    return {cell: cells[cell] for cell in sorted(cells)}
