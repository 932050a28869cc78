"""Streams text from the engine: the continuation of a text, or the answer to a question.

Text appears as soon as it is certain: the bytes of a character that is still incomplete wait for the next token. The new tokens
are cut to what the model's ``max_seq_len`` leaves. A prompt that leaves no room raises UserError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from itertools import chain
from typing import Literal

from osler.inference.engine import InferenceEngine
from osler.ops.sampling_params import SamplingParams
from osler.tokenizer.bpe import ANSWER, Tokenizer
from osler.tokenizer.chat import encode_prompt

Part = Literal["thinking", "answer"]
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what the bytes of half a character decode to
_END = -1  # stands behind the last token


def continue_text(engine: InferenceEngine, tokenizer: Tokenizer, text: str, sampling: SamplingParams) -> Iterator[str]:
    """Yield what the model writes after ``text``, which follows an end-of-text token, as documents do in training."""
    prompt = [tokenizer.eos_id, *tokenizer.encode(text)]
    for piece in _pieces(engine, tokenizer, prompt, sampling, {tokenizer.eos_id}):
        if isinstance(piece, str):
            yield piece


def stream_answer(
    engine: InferenceEngine, tokenizer: Tokenizer, question: str, sampling: SamplingParams, *, reasoning: bool = True
) -> Iterator[tuple[Part, str]]:
    """Yield the reply to ``question`` as it is drawn; with ``reasoning`` it begins with the thinking part.

    The markers of the template tell thinking and answer apart and are not shown.
    """
    part: Part = "thinking" if reasoning else "answer"
    prompt = encode_prompt(tokenizer, question, reasoning=reasoning)
    for piece in _pieces(engine, tokenizer, prompt, sampling, tokenizer.special_ids):
        if isinstance(piece, str):
            yield part, piece
        elif piece == tokenizer.special_id(ANSWER):
            part = "answer"


def _pieces(
    engine: InferenceEngine, tokenizer: Tokenizer, prompt: Sequence[int], sampling: SamplingParams, markers: Set[int]
) -> Iterator[str | int]:
    """Yield text as soon as it is certain, and markers as ids; what waits for bytes that will not come is shown at the end."""
    room = engine.model.config.max_seq_len - len(prompt)
    sampling = replace(sampling, max_new_tokens=max(min(sampling.max_new_tokens, room), 1), stop_ids=(tokenizer.eos_id,))
    ids: list[int] = []
    shown = 0
    for token in chain(engine.stream(prompt, sampling), [_END]):
        is_marker = token == _END or token in markers
        ids += [] if is_marker else [token]
        certain = tokenizer.decode(ids)
        if not is_marker:
            certain = certain.removesuffix(_INCOMPLETE)
        if len(certain) > shown:
            yield certain[shown:]
            shown = len(certain)
        if is_marker:
            yield token
            ids, shown = [], 0
