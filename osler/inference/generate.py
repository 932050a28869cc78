"""Text out of the engine: an answer to a question, piece by piece, for chat.

A piece is told apart as thinking or answer by the markers of the template, which themselves are never shown. Text appears
as soon as it is certain: bytes of a character that is still incomplete wait for the next token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from osler.inference.engine import InferenceEngine
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.chat import ANSWER, encode_prompt

Part = Literal["thinking", "answer"]
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the bytes of half a character decode to


@dataclass(frozen=True)
class Piece:
    """Some more text of one part of the reply."""

    part: Part
    text: str


def stream_answer(
    engine: InferenceEngine,
    tokenizer: Tokenizer,
    question: str,
    *,
    reasoning: bool = True,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[Piece]:
    """Yield the reply to ``question`` as it is drawn; with ``reasoning`` it begins with the thinking part.

    The new tokens are cut to what the model's ``max_seq_len`` leaves. Raises UserError when the question leaves no room.
    """
    prompt = encode_prompt(tokenizer, question, reasoning=reasoning)
    room = engine.model.config.max_seq_len - len(prompt)
    tokens = engine.stream(
        prompt,
        max_new_tokens=max(min(max_new_tokens, room), 1),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_ids=[tokenizer.eos_id],
        seed=seed,
    )
    part: Part = "thinking" if reasoning else "answer"
    answer_id, shown = tokenizer.special_id(ANSWER), 0
    ids: list[int] = []
    for token in tokens:
        if token in tokenizer.special_ids:
            yield from _rest(tokenizer, ids, shown, part)
            ids, shown = [], 0
            part = "answer" if token == answer_id else part
            continue
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith(_UNFINISHED) and len(text) > shown:
            yield Piece(part, text[shown:])
            shown = len(text)
    yield from _rest(tokenizer, ids, shown, part)


def _rest(tokenizer: Tokenizer, ids: list[int], shown: int, part: Part) -> Iterator[Piece]:
    """What was held back and will not be completed any more."""
    text = tokenizer.decode(ids)[shown:] if ids else ""
    if text:
        yield Piece(part, text)
