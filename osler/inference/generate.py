"""Text out of the engine, piece by piece: how a text goes on, or the answer to a question.

Text appears as soon as it is certain: the bytes of a character that is still incomplete wait for the next token. The new tokens
are cut to what the model's ``max_seq_len`` leaves. A prompt that leaves no room raises UserError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from osler.inference.engine import InferenceEngine
from osler.ops.sampling_params import SamplingParams
from osler.tokenizer.bpe import ANSWER, Tokenizer
from osler.tokenizer.chat import encode_prompt

Part = Literal["thinking", "answer"]
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what the bytes of half a character decode to


def continue_text(engine: InferenceEngine, tokenizer: Tokenizer, text: str, sampling: SamplingParams) -> Iterator[str]:
    """Yield what the model writes after ``text``, which follows an end-of-text token, as documents do in training."""
    written = _Text(tokenizer)
    for token in _tokens(engine, tokenizer, [tokenizer.eos_id, *tokenizer.encode(text)], sampling):
        if token != tokenizer.eos_id:
            yield from written.add(token)
    yield from written.rest()


def stream_answer(
    engine: InferenceEngine, tokenizer: Tokenizer, question: str, sampling: SamplingParams, *, reasoning: bool = True
) -> Iterator[tuple[Part, str]]:
    """Yield the reply to ``question`` as it is drawn; with ``reasoning`` it begins with the thinking part.

    The markers of the template tell thinking and answer apart and are not shown.
    """
    part: Part = "thinking" if reasoning else "answer"
    written = _Text(tokenizer)
    for token in _tokens(engine, tokenizer, encode_prompt(tokenizer, question, reasoning=reasoning), sampling):
        is_marker = token in tokenizer.special_ids
        yield from ((part, text) for text in (written.rest() if is_marker else written.add(token)))
        if token == tokenizer.special_id(ANSWER):
            part = "answer"
    yield from ((part, text) for text in written.rest())


def _tokens(engine: InferenceEngine, tokenizer: Tokenizer, prompt: Sequence[int], sampling: SamplingParams) -> Iterator[int]:
    room = engine.model.config.max_seq_len - len(prompt)
    new_tokens = max(min(sampling.max_new_tokens, room), 1)
    return engine.stream(prompt, replace(sampling, max_new_tokens=new_tokens, stop_ids=(tokenizer.eos_id,)))


class _Text:
    """The text of tokens that arrive one by one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = 0

    def add(self, token: int) -> Iterator[str]:
        """Yield the text that a token completes, if any."""
        self.ids.append(token)
        certain = self.tokenizer.decode(self.ids).removesuffix(_INCOMPLETE)
        if len(certain) > self.shown:
            yield certain[self.shown :]
            self.shown = len(certain)

    def rest(self) -> Iterator[str]:
        """Yield what waits for bytes that will not come, if anything, and begin anew."""
        rest = self.tokenizer.decode(self.ids)[self.shown :]
        if rest:
            yield rest
        self.ids, self.shown = [], 0
