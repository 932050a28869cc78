"""From the body of a request to rows for the batch. Every field is either obeyed or refused by name."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, cast

from osler.config.schema import decode, hints, shown
from osler.files.rows import unique_fields
from osler.inference.rows import Request, check_prompt
from osler.ops.sampling_params import SamplingParams
from osler.runtime.errors import UserError
from osler.serve.config import REFUSED, ChatRequest, CommonRequest, CompletionRequest, Message
from osler.serve.errors import ApiError
from osler.serve.worker import Served
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.chat import Turn, encode_examples, encode_prompt

COMPLETION_TOKENS = 16  # for a request to /v1/completions without max_tokens, as in OpenAI's API
_FIRST_NAME = re.compile(r"\n  (\w+)")  # the first word in the list of errors that ``decode`` raises, which is a parameter
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")  # one way to write a number, so that no two keys are one token

Body = TypeVar("Body")


@dataclass(frozen=True)
class Asked:
    """What a request asks for: ``rows`` has one for each completion of each prompt."""

    served: Served
    given: CommonRequest
    rows: Sequence[Request]
    logprobs: int | None  # alternatives to return with each token's log-probability; None: no log-probabilities
    reasons: bool  # whether the model reasons before it answers

    @property
    def prompt_tokens(self) -> int:
        """The tokens of all prompts; a prompt with several completions counts once."""
        return sum(len(row.prompt) for row in self.rows[:: self.given.n or 1])


def json_object(data: bytes) -> dict[str, Any]:
    """Read a body; a null is the same as a field that is left out. Raises ApiError where it is no JSON object in UTF-8."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number of JSON")

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in unique_fields(pairs).items() if value is not None}

    try:
        text = data.decode("utf-8-sig")
        body = json.loads(text, parse_constant=refuse, object_pairs_hook=mapping)
        if "\\u" in text:  # an escape can write half a character, which nothing behind this can
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, "A text in the body holds half a character (a lone surrogate).", "invalid_json") from error
    except (UserError, ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not JSON that can be read: {error}".rstrip(".") + ".", "invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, "The body must be a JSON object.", "invalid_json")
    return body


def read_request(kind: type[Body], data: bytes) -> Body:
    """Return the request in a body. Raises ApiError, which names the parameter that is unknown, refused or wrong."""
    body = json_object(data)
    for name, (neutral, reason) in REFUSED.items():
        if body.get(name) is not None and body[name] not in neutral:
            raise ApiError(400, f"{name} as given is not supported: {reason}.", "unsupported_parameter", name)
    given = {name: value for name, value in body.items() if name not in REFUSED or hasattr(kind, name)}
    try:
        return decode(kind, given, source="The request")
    except UserError as error:
        found = _FIRST_NAME.search(str(error))
        is_parameter = found is not None and (found[1] in body or found[1] in hints(cast(Any, kind)))
        raise ApiError(400, str(error), "invalid_value", found[1] if found and is_parameter else None) from error


def chat_rows(request: ChatRequest, served: Served) -> Asked:
    """Return what a chat request asks for. Raises ApiError where the model cannot do it."""
    if not served.ready.answers_questions:
        message = f"{served.name} was trained on text alone and does not answer questions: use /v1/completions."
        raise ApiError(400, message, "not_a_chat_model", "model")
    reasons = served.ready.reasons and request.reasoning_effort is None
    with refused("messages"):
        prompt = _conversation(request.messages, served.ready.tokenizer, reasons=reasons)
    top = (request.top_logprobs or 0) if request.logprobs else None
    limit = request.max_tokens or request.max_completion_tokens or served.room(prompt)
    return Asked(served, request, _rows([prompt], request, served, limit, top), top, reasons)


def completion_rows(request: CompletionRequest, served: Served) -> Asked:
    """Return what a completion request asks for: a text is put after an end-of-text token, token ids are used as they are."""
    tokenizer, top = served.ready.tokenizer, request.logprobs
    with refused("prompt"):
        prompts = [
            [tokenizer.eos_id, *tokenizer.encode(prompt)] if isinstance(prompt, str) else list(prompt)
            for prompt in request.prompts
        ]
    limit = request.max_tokens or min(COMPLETION_TOKENS, *map(served.room, prompts))
    return Asked(served, request, _rows(prompts, request, served, limit, top), top, reasons=False)


@contextlib.contextmanager
def refused(param: str) -> Iterator[None]:
    """Turn a UserError or ValueError inside into an ApiError that names the parameter."""
    try:
        yield
    except (UserError, ValueError) as error:
        raise ApiError(400, str(error), "invalid_value", param) from error


def _conversation(messages: Sequence[Message], tokenizer: Tokenizer, *, reasons: bool) -> list[int]:
    """Return the ids of the last question, after the earlier turns in the form of examples, as in training data."""
    for index, message in enumerate(messages):
        if message.role in ("system", "developer"):
            raise ValueError(f"messages[{index}]: the template has no role {message.role}; put this text into the question.")
        if message.role != ("assistant" if index % 2 else "user"):
            raise ValueError(f"messages[{index}] is of the {message.role}: messages of user and assistant must alternate.")
    if len(messages) % 2 == 0:
        raise ValueError("messages must begin and end with one of the user.")
    texts = [message.text for message in messages]
    turns = [
        Turn(question, answer.reasoning_content, text)
        for question, answer, text in zip(texts[:-1:2], messages[1::2], texts[1::2], strict=True)
    ]
    before = [token for ids, _ in encode_examples(tokenizer, turns) for token in ids]
    return [*before, *encode_prompt(tokenizer, texts[-1], reasoning=reasons)]


def _rows(prompts: Sequence[Sequence[int]], request: CommonRequest, served: Served, limit: int, top: int | None) -> list[Request]:
    """Return a row for every completion of every prompt; each row draws with random numbers of its own."""
    name = "prompt" if isinstance(request, CompletionRequest) else "messages"
    config, count = served.config, request.n or 1
    if len(prompts) * count > config.max_outstanding:
        message = f"{len(prompts) * count} completions are more than this server draws and lets wait, {config.max_outstanding}."
        raise ApiError(400, message, "invalid_value", "n")
    for prompt in prompts:
        length, longest = len(prompt), served.longest_prompt
        if length > longest:
            message = f"The prompt has {length} tokens, and {served.name} takes at most {longest} and an answer: shorten it."
            raise ApiError(400, message, "context_length_exceeded", name)
        with refused(name):
            check_prompt(served.ready.model.config, prompt)
    if limit > (room := min(map(served.room, prompts))):
        message = (
            f"max_tokens is {limit}, and at most {room} tokens can follow this prompt: the model reads "
            f"{served.ready.model.config.max_seq_len} in all, and this server draws {config.max_new_tokens} at most."
        )
        code = "invalid_value" if room == config.max_new_tokens else "context_length_exceeded"
        raise ApiError(400, message, code, "max_tokens")
    sampling = _sampling(request, served, limit, top)
    return [Request(tuple(prompt), sampling, place * count + k) for place, prompt in enumerate(prompts) for k in range(count)]


def _sampling(request: CommonRequest, served: Served, limit: int, top: int | None) -> SamplingParams:
    vocab_size = served.ready.tokenizer.vocab_size
    bias = {token: value for token, value in (request.logit_bias or {}).items() if value is not None}
    if wrong := [token for token in bias if not (_TOKEN_ID.fullmatch(token) and int(token) < vocab_size)]:
        message = f"logit_bias: {shown(wrong[0])} is no token id; {served.name} has ids 0 to {vocab_size - 1}."
        raise ApiError(400, message, "invalid_value", "logit_bias")
    with refused("temperature"):
        return SamplingParams(
            max_new_tokens=limit,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_k=1 if request.top_p == 0 else request.top_k if request.top_k is not None and request.top_k > 0 else None,
            top_p=request.top_p or 1.0,
            min_p=request.min_p or 0.0,
            repetition_penalty=request.repetition_penalty or 1.0,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=tuple(sorted((int(token), value) for token, value in bias.items())),
            top_logprobs=min(top or 0, vocab_size),
            stop_ids=(served.ready.tokenizer.eos_id,),
            seed=secrets.randbits(63) if request.seed is None else request.seed,
        )
