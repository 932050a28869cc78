"""The conversation template: question, thinking and answer as one row of ids with a loss mask, and a parser of completions.

    <|question|> Q <|thinking|> T <|answer|> A <|endoftext|>
    <|question|> Q <|answer|> A <|endoftext|>                   (without reasoning)

The loss mask is 1 after the prompt, which ends with the token that the model continues. The three texts are encoded separately,
so a prompt has the same ids in training and in generation, and text cannot forge a marker (`bpe.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from osler.tokenizer.bpe import ANSWER, QUESTION, THINKING, Tokenizer


@dataclass(frozen=True)
class Turn:
    """One question with its answer; `thinking` None means an example without reasoning."""

    question: str
    thinking: str | None
    answer: str


@dataclass(frozen=True)
class Completion:
    """The text that a model produced after the prompt, in parts.

    `answer` is None if the model did not reach it. `finished` says whether the model wrote ``<|endoftext|>``, and `well_formed`
    whether the text follows the template exactly.
    """

    thinking: str
    answer: str | None
    finished: bool
    well_formed: bool


def encode_prompt(tokenizer: Tokenizer, question: str, *, reasoning: bool = True) -> list[int]:
    """Return the ids up to where the model continues: ``<|thinking|>`` is last, or ``<|answer|>`` without reasoning."""
    last = THINKING if reasoning else ANSWER
    return [tokenizer.special_id(QUESTION), *tokenizer.encode(question), tokenizer.special_id(last)]


def encode_examples(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[tuple[list[int], list[int]]]:
    """Return ids and loss mask (same length) of each example; 1 marks what the model must produce."""
    encoded = iter(tokenizer.encode_batch([text for turn in turns for text in (turn.question, turn.thinking or "", turn.answer)]))
    question_id, thinking_id, answer_id = (tokenizer.special_id(name) for name in (QUESTION, THINKING, ANSWER))
    examples = []
    for turn, question, thinking, answer in zip(turns, encoded, encoded, encoded, strict=True):
        reasoning = [] if turn.thinking is None else [thinking_id, *thinking]
        row = [question_id, *question, *reasoning, answer_id, *answer, tokenizer.eos_id]
        prompt = 2 + len(question)
        examples.append((row, [0] * prompt + [1] * (len(row) - prompt)))
    return examples


def parse_completion(tokenizer: Tokenizer, ids: Sequence[int], *, reasoning: bool = True) -> Completion:
    """Read the ids that followed a prompt, well-formed or not; without `reasoning` they begin with the answer.

    The thinking ends at the first ``<|answer|>``, the answer at the next special token, the text at ``<|endoftext|>``.
    """
    ids = list(ids)
    eos_id, answer_id = tokenizer.eos_id, tokenizer.special_id(ANSWER)
    finished = eos_id in ids
    body = ids[: ids.index(eos_id)] if finished else ids
    markers = [token_id for token_id in body if token_id in tokenizer.special_ids]
    well_formed = finished and len(body) + 1 == len(ids) and markers == ([answer_id] if reasoning else [])
    border = -1  # where the marker between thinking and answer is
    if reasoning:
        border = body.index(answer_id) if answer_id in body else len(body)
    thinking, answer = body[: max(border, 0)], body[border + 1 :]
    end = next((index for index, token_id in enumerate(answer) if token_id in tokenizer.special_ids), len(answer))
    said = tokenizer.decode(answer[:end]).strip() if border < len(body) else None
    return Completion(tokenizer.decode(thinking, skip_special=True).strip(), said, finished, well_formed)
