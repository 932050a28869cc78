"""From drawn tokens to the JSON of OpenAI's API: chat completions and completions, whole or as chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from osler.inference.rows import Continuation
from osler.inference.text import TextStream
from osler.serve.config import ChatRequest
from osler.serve.requests import Asked
from osler.tokenizer.bpe import ANSWER, INCOMPLETE, Tokenizer

_END = -1  # stands after the last token
REASONING, CONTENT = "reasoning_content", "content"  # the parts of an answer


@dataclass
class TokenLogprob:
    """A token, its log-probability, those of the likeliest tokens in its place, and the character where its text begins."""

    token: int
    logprob: float
    likeliest: dict[int, float]
    offset: int


@dataclass
class Piece:
    """New text of a completion, all in one part of it: ``REASONING`` or ``CONTENT``."""

    part: str
    text: str
    tokens: list[TokenLogprob] = field(default_factory=list)


class Choice:
    """One completion while it is drawn: turns tokens into pieces of text, and knows how it ended.

    An answer ends at the next special token of any kind, as in an exam (``parse_completion``), or before a stop text. Thinking
    may hold that text, because otherwise there would be no answer.
    """

    def __init__(self, asked: Asked, limit: int) -> None:
        self._tokenizer, self._limit, self._tells_tokens = asked.served.ready.tokenizer, limit, asked.logprobs is not None
        self._is_chat = isinstance(asked.given, ChatRequest)
        markers = self._tokenizer.special_ids if self._is_chat else {self._tokenizer.eos_id}
        self._stops = asked.given.stops
        self._text = TextStream(self._tokenizer, {*markers, _END}, () if asked.reasons else self._stops)
        self._answer_id = self._tokenizer.special_id(ANSWER) if self._is_chat else None
        self._part = REASONING if asked.reasons else CONTENT
        self._waiting: deque[TokenLogprob] = deque()
        self.finish: str | None = None  # stop or length
        self.tokens = self.reasoning_tokens = 0

    def add(self, news: Continuation) -> list[Piece]:
        """Add tokens and return the text that is certain now; tokens after the end are ignored."""
        pieces: list[Piece] = []
        for place, token in enumerate(news.ids):
            if self.finish is not None:
                break
            self.tokens += 1
            self.reasoning_tokens += self._part == REASONING
            is_marker = token in self._text.markers
            if self._tells_tokens and not is_marker and self._part == CONTENT:
                likeliest = news.top_logprobs[place] if news.top_logprobs else {}
                self._waiting.append(TokenLogprob(token, news.logprobs[place], likeliest, self._text.decoded))
            said = self._text.add(token)
            is_end = token == self._tokenizer.eos_id or (is_marker and self._part == CONTENT)
            is_last = is_end or self.tokens == self._limit
            if is_last and not is_marker:
                said += self._text.add(_END)
            if is_last or self._text.is_stopped:
                self.finish = "stop" if is_end or self._text.is_stopped else "length"
            self._keep(pieces, said, is_whole=(is_marker or is_last) and not self._text.is_stopped)
            if is_marker:
                if token == self._answer_id:
                    self._part = CONTENT
                self._text.next_part(self._stops if self._part == CONTENT else ())
        return pieces

    def _keep(self, pieces: list[Piece], said: str, *, is_whole: bool) -> None:
        """Add text, and the tokens that it comes from, to the last piece, or to a new one where the part changes."""
        tokens: list[TokenLogprob] = []
        while self._waiting and (is_whole or self._waiting[0].offset < self._text.shown):
            tokens.append(self._waiting.popleft())
        if not said and not tokens:
            return
        if not pieces or pieces[-1].part != self._part:
            pieces.append(Piece(self._part, ""))
        pieces[-1].text += said
        pieces[-1].tokens += tokens


class Reply:
    """The answer to one request, in the form of its endpoint."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.choices = [Choice(asked, row.sampling.max_new_tokens) for row in asked.rows]
        self._is_chat = isinstance(asked.given, ChatRequest)
        self._tokenizer = asked.served.ready.tokenizer
        self._head = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self._is_chat else "text_completion",
            "created": int(time.time()),
            "model": asked.served.name,
        }
        options = asked.given.stream_options
        self._tells_usage = options is not None and bool(options.include_usage)

    @property
    def is_finished(self) -> bool:
        """Whether all completions have ended."""
        return all(choice.finish is not None for choice in self.choices)

    def usage(self) -> dict[str, Any]:
        """Return the numbers of tokens."""
        prompt, drawn = self.asked.prompt_tokens, sum(choice.tokens for choice in self.choices)
        usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}
        if self._is_chat:
            reasoning = sum(choice.reasoning_tokens for choice in self.choices)
            usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
        return usage

    def whole(self, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """Return the answer to a request without ``stream``, from all pieces of every completion."""
        found = []
        for index, (choice, own) in enumerate(zip(self.choices, pieces, strict=True)):
            text = {part: "".join(piece.text for piece in own if piece.part == part) for part in (REASONING, CONTENT)}
            form: dict[str, Any] = {"text": text[CONTENT]}
            if self._is_chat:
                form = {"message": {"role": "assistant", "content": text[CONTENT], REASONING: text[REASONING] or None}}
            tokens = [token for piece in own for token in piece.tokens]
            found.append({"index": index, **form, "logprobs": self._logprobs(tokens), "finish_reason": choice.finish})
        return {**self._head, "choices": found, "usage": self.usage()}

    def first_chunks(self) -> list[dict[str, Any]]:
        """Return the chunks that begin a stream: in a chat they give the role."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, {"delta": delta}, [], None) for index in range(len(self.choices))] if self._is_chat else []

    def chunks(self, index: int, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        """Return the chunks for new pieces of a completion; if it has ended, the last chunk says how."""
        found = []
        for piece in pieces:
            form = {"delta": {piece.part: piece.text}} if self._is_chat else {"text": piece.text}
            found.append(self._chunk(index, form, piece.tokens, None))
        if (finish := self.choices[index].finish) is not None:
            found.append(self._chunk(index, {"delta": {}} if self._is_chat else {"text": ""}, [], finish))
        return found

    def last_chunks(self) -> list[dict[str, Any]]:
        """Return the chunk with the numbers of tokens, if the request asks for it."""
        return [{**self._stream_head, "choices": [], "usage": self.usage()}] if self._tells_usage else []

    @property
    def _stream_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"} if self._is_chat else self._head

    def _chunk(self, index: int, form: dict[str, Any], tokens: Sequence[TokenLogprob], finish: str | None) -> dict[str, Any]:
        choice = {"index": index, **form, "logprobs": self._logprobs(tokens) if tokens else None, "finish_reason": finish}
        return {**self._stream_head, "choices": [choice], **({"usage": None} if self._tells_usage else {})}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        if self._is_chat:
            content = []
            for token in tokens:
                likeliest = [_named(self._tokenizer, *pair) for pair in _possible(token.likeliest)]
                content.append({**_named(self._tokenizer, token.token, token.logprob), "top_logprobs": likeliest})
            return {"content": content, "refusal": None}
        return {
            "tokens": [_distinct(self._tokenizer, token.token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {_distinct(self._tokenizer, other): value for other, value in reversed(_possible(token.likeliest))}
                for token in tokens
            ],
            "text_offset": [token.offset for token in tokens],
        }


def _possible(likeliest: dict[int, float]) -> list[tuple[int, float]]:
    """Return the tokens with a probability above 0, the likeliest first."""
    return [(token, value) for token, value in likeliest.items() if value > float("-inf")]


def _named(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    """Return a token with its text and its bytes, which make whole what is half a character in the text."""
    written = tokenizer.bytes_of(token)
    return {"token": tokenizer.decode([token]), "logprob": logprob, "bytes": None if written is None else list(written)}


def _distinct(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a token; for half a character its bytes, as OpenAI writes them, so that no two tokens have one text."""
    text, written = tokenizer.decode([token]), tokenizer.bytes_of(token)
    if INCOMPLETE not in text or written is None or written == text.encode():
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)
