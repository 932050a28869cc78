"""The configuration of ``osler serve``, and the requests that it reads. Torch-free."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from osler.config.schema import (
    Fraction,
    Ge,
    Le,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    config,
)

MOST_TOP_LOGPROBS = 20  # as in OpenAI's API
MOST_STOPS, LONGEST_STOP_CHARS = 16, 256


@config
class ServeConfig:
    """Where the server listens, and how much work it accepts."""

    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: all of this machine's
    port: Annotated[int, Ge(0), Le(65535)] = 8000  # 0: any that is free
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    which: Literal["newest", "best"] = "newest"  # checkpoint of a run folder
    max_rows: PositiveInt = 64  # completions of a model that are drawn together; others wait
    max_waiting: NonNegativeInt = 256  # completions of a model that may wait; further requests get the status 429
    max_body_bytes: PositiveInt = 1_000_000  # the largest body of a request
    max_prompt_tokens: PositiveInt | None = None  # the longest prompt; null: as long as the model reads
    max_new_tokens: PositiveInt = 1024  # the longest completion
    max_seconds: PositiveFloat = 300.0  # the longest time for a request, waiting included
    drain_seconds: NonNegativeFloat = 30.0  # the time that running requests have after a signal to stop
    api_key_file: str | None = None  # a file whose first line is the key; null: the variable OSLER_API_KEY, or no key
    log_requests: bool = False  # a line for each request: path, status, model, tokens and seconds, never its text

    @property
    def max_outstanding(self) -> int:
        """How many completions of a model may run or wait together."""
        return self.max_rows + self.max_waiting


@config
class StreamOptions:
    """Options of a stream."""

    include_usage: bool | None = None  # end with a chunk that counts tokens


@config
class TextPart:
    """A part of a message."""

    type: Literal["text"]
    text: str


@config
class Message:
    """One message of a conversation."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | tuple[TextPart, ...] | None = None  # null, for the assistant only: no answer followed its thinking
    reasoning_content: str | None = None  # in an assistant's message: the thinking before the answer
    name: str | None = None  # has no effect

    def __post_init__(self) -> None:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content is missing in a message of the {self.role}")

    @property
    def text(self) -> str:
        """The text of all parts."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())


@config
class CommonRequest:
    """The fields of both kinds of completions; null is the same as a field that is left out."""

    model: str | None = None  # a name of /v1/models; null: its first
    max_tokens: PositiveInt | None = None  # the most tokens to draw
    temperature: Annotated[float, Ge(0), Le(2)] | None = None  # 0 takes the likeliest token; null: 1
    top_p: Fraction | None = None  # draw from the fewest tokens with this probability together; 0 takes the likeliest; null: 1
    top_k: Annotated[int, Ge(-1)] | None = None  # draw from this many of the likeliest tokens; null, 0 or -1: from all
    min_p: Fraction | None = None  # draw no token below this share of the likeliest one's probability; null: 0
    repetition_penalty: Annotated[float, Ge(0.01), Le(100)] | None = None  # above 1: tokens seen get rarer
    presence_penalty: Annotated[float, Ge(-2), Le(2)] | None = None  # subtracted from the logit of a token already drawn; null: 0
    frequency_penalty: Annotated[float, Ge(-2), Le(2)] | None = None  # the same, times how often it was drawn; null: 0
    logit_bias: dict[str, Annotated[float, Ge(-100), Le(100)] | None] | None = None  # by token id: what is added to its logit
    seed: Annotated[int, Ge(-(2**63)), Le(2**63 - 1)] | None = None  # the same seed draws the same; null: another each time
    n: Annotated[int, Ge(1), Le(128)] | None = None  # completions of a prompt; null: 1
    stop: str | tuple[str, ...] | None = None  # end before the first of these texts; thinking may hold them
    stream: bool | None = None  # send the text while it is drawn
    stream_options: StreamOptions | None = None
    user: str | None = None  # has no effect

    def __post_init__(self) -> None:
        if len(self.stops) > MOST_STOPS or not all(0 < len(stop) <= LONGEST_STOP_CHARS for stop in self.stops):
            raise ValueError(f"stop takes up to {MOST_STOPS} texts of 1 to {LONGEST_STOP_CHARS} characters")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for a stream: give stream=true, or leave it out")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()


@config
class ChatRequest(CommonRequest):
    """A request to /v1/chat/completions."""

    messages: tuple[Message, ...]
    max_completion_tokens: PositiveInt | None = None  # the newer name of max_tokens
    logprobs: bool | None = None  # return the log-probability of every token of the answer
    top_logprobs: Annotated[int, Ge(0), Le(MOST_TOP_LOGPROBS)] | None = None  # and of this many alternatives to it
    reasoning_effort: Literal["none"] | None = None  # none: answer without thinking; null: as the model was trained

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit: give one")


@config
class CompletionRequest(CommonRequest):
    """A request to /v1/completions."""

    prompt: str | tuple[str, ...] | tuple[NonNegativeInt, ...] | tuple[tuple[NonNegativeInt, ...], ...]  # texts, or token ids
    logprobs: Annotated[int, Ge(0), Le(MOST_TOP_LOGPROBS)] | None = None  # log-probabilities, with this many alternatives

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompts or () in self.prompts:
            raise ValueError("prompt is empty: give a text (which may be empty) or at least one token")

    @property
    def prompts(self) -> Sequence[str | tuple[int, ...]]:
        """The prompts, however they were given."""
        given = self.prompt
        if isinstance(given, str):
            return (given,)
        return (given,) if given and isinstance(given[0], int) else cast(Sequence[str], given)


@config
class OptionsRequest:
    """A request to /v1/options."""

    question: str  # with its options, as a person pastes it
    model: str | None = None  # a name of /v1/models; null: its first
    reasoning_content: str | None = None  # thinking to put before the answer; null: none


# Parameters of other servers that Osler does not have: the values that ask for nothing, which it accepts, and why it has none.
_NO_TOOLS = "Osler's models call no tools"
_NO_FORMS = "Osler cannot force a form on an answer"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "parallel_tool_calls": ((True, False), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "response_format": (({"type": "text"},), _NO_FORMS),
    "modalities": ((["text"],), "Osler writes text"),
    "audio": ((), "Osler writes text"),
    "prediction": ((), "there is no speculative decoding"),
    "web_search_options": ((), "Osler searches nothing"),
    "store": ((False,), "Osler stores no request"),
    "metadata": (({},), "Osler stores no request"),
    "echo": ((False,), "the prompt is not scored"),
    "suffix": (("",), "Osler's models write only forward"),
    "best_of": ((1,), "use n, and choose"),
    "service_tier": (("auto", "default"), "there is one"),
    "verbosity": (("medium",), "use max_tokens"),
    "reasoning_effort": (("none",), "leave it out to let the model think as it learned, or give 'none' for an answer at once"),
}
