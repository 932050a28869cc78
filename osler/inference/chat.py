"""``osler chat`` and ``osler generate``: a model in the terminal, its text printed as it is drawn.

Every question is answered without the ones before it, because models are trained on single questions. If the input is not a
terminal, every line is a question, so that a file of questions can be piped in.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from osler.files.rows import decode_lines
from osler.inference.engine import InferenceEngine
from osler.inference.load import LoadedModel, open_model
from osler.inference.text import pieces
from osler.ops.sampling_params import SamplingParams
from osler.runtime.errors import UserError
from osler.runtime.log import say
from osler.runtime.stop import Terminated
from osler.tasks.item import render_answer, render_question
from osler.tasks.registry import load_clinic
from osler.tokenizer.bpe import ANSWER, Tokenizer
from osler.tokenizer.chat import encode_prompt

logger = logging.getLogger(__name__)

PROMPT = "> "


def generate(checkpoint: str, prompt: str, sampling: SamplingParams, stop: Sequence[str] = ()) -> int:
    """Print how the model continues ``prompt`` (empty: how it begins a text): the command ``generate``."""
    ready = open_model(checkpoint)
    with telling_after() as tell:
        show_text(continue_text(InferenceEngine(ready.model), ready.tokenizer, prompt, sampling, stop, tell=tell))
    return 0


@contextlib.contextmanager
def telling_after() -> Iterator[Callable[[str], object]]:
    """Yield a function that collects sentences, and print them after the block, so that none interrupts what it prints."""
    kept: list[str] = []
    yield kept.append
    for sentence in kept:
        say(f"({sentence})")


def chat(checkpoint: str, sampling: SamplingParams, stop: Sequence[str] = (), *, reasoning: bool | None = None) -> int:
    """Answer the questions of stdin until it ends: the command ``chat``.

    The answer to question k (from 0) is drawn with the seed plus k. So the same question may later get another answer, while a
    whole session can be repeated. With ``reasoning`` None the model thinks first if it learned to. Ctrl-C stops an answer, or the
    session if questions are piped in.
    """
    ready = open_model(checkpoint)
    reasoning = ready.reasons if reasoning is None else reasoning
    interactive = sys.stdin.isatty()
    say(welcome(ready, interactive, sampling.seed))
    engine = InferenceEngine(ready.model)
    for number, line in enumerate(terminal_lines() if interactive else piped_lines()):
        if not interactive:
            print(f"{PROMPT}{line}")
        line_sampling = replace(sampling, seed=sampling.seed + number)
        try:
            with telling_after() as tell:
                if ready.answers_questions:
                    show_answer(stream_answer(engine, ready.tokenizer, line, line_sampling, stop, reasoning=reasoning, tell=tell))
                else:
                    show_text(continue_text(engine, ready.tokenizer, line, line_sampling, stop, tell=tell))
        except UserError as error:
            say(f"{error}")  # the question may be too long, and the next one may fit
        except KeyboardInterrupt as request:
            print(flush=True)
            if not interactive or isinstance(request, Terminated):
                raise
            say("(interrupted)")
    return 0


def welcome(ready: LoadedModel, interactive: bool, seed: int) -> str:
    """Return an introduction to a chat: which model, what it can do, how to leave, and a question to try."""
    lines = [ready.describe()]
    if not ready.answers_questions:
        lines.append("It was trained on text alone, so it continues what you write. `osler sft` teaches it to answer.")
    if interactive:
        what = "question" if ready.answers_questions else "beginning"
        lines.append(
            f"Write one {what} per line; the model reads each without the others. Ctrl-C stops an answer; an empty line or "
            "Ctrl-D leaves."
        )
    if interactive and ready.answers_questions and ready.knows_clinic:
        item = load_clinic(split="new_findings", limit=1, seed=seed)[0]
        lines += [
            "It learned the exam of the clinic, a synthetic world: this is not medical advice. A question must have options.",
            f"Try this one (the right answer is {render_answer(item)}):",
            "",
            f"  {render_question(item)}",
            "",
        ]
    return "\n".join(lines)


def terminal_lines() -> Iterator[str]:
    """Yield what a person types, line by line, until an empty line or Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() a history and arrow keys; Windows has none
    while True:
        try:
            line = input(PROMPT).strip()
        except (EOFError, OSError):  # the end, or a terminal that is gone
            print()
            return
        except Terminated:
            raise
        except KeyboardInterrupt:
            print("\n(an empty line or Ctrl-D leaves)")
            continue
        except UnicodeDecodeError:
            print("(that line is not UTF-8 text: set the terminal to UTF-8)")
            continue
        if not line:
            return
        yield line


def piped_lines() -> Iterator[str]:
    """Yield the lines of stdin that are not blank. Raises UserError at a line that is not UTF-8, as for any file."""
    try:
        yield from filter(None, (line.strip() for _, line in decode_lines(sys.stdin.buffer, "stdin")))
    except OSError as error:
        raise UserError(f"Standard input cannot be read: {error.strerror}. Pipe the questions in, or type them.") from error


def show_answer(reply: Iterable[tuple[str, str]]) -> None:
    """Print thinking and answer as they come, each after its name."""
    shown = ""
    for part, text in reply:
        if part != shown:
            print("\n" if shown else "", f"{part:<10}", sep="", end="")
            shown = part
        print(text, end="", flush=True)
    if shown:
        print()
    if shown != "answer":
        print("(no answer; --max-new-tokens N may leave room for one)")


def show_text(texts: Iterable[str]) -> None:
    """Print pieces of text as they come, and a line break after the last."""
    for text in texts:
        print(text, end="", flush=True)
    print()


def continue_text(
    engine: InferenceEngine,
    tokenizer: Tokenizer,
    text: str,
    sampling: SamplingParams,
    stop: Sequence[str] = (),
    *,
    tell: Callable[[str], object] = logger.warning,
) -> Iterator[str]:
    """Yield what the model writes after ``text``, which follows an end-of-text token, as documents do in training.

    ``tell`` gets a sentence when the model's ``max_seq_len`` cuts the text.
    """
    prompt = [tokenizer.eos_id, *tokenizer.encode(text)]
    for piece in pieces(engine, tokenizer, prompt, sampling, {tokenizer.eos_id}, stop, tell):
        if isinstance(piece, str):
            yield piece


def stream_answer(
    engine: InferenceEngine,
    tokenizer: Tokenizer,
    question: str,
    sampling: SamplingParams,
    stop: Sequence[str] = (),
    *,
    reasoning: bool = True,
    tell: Callable[[str], object] = logger.warning,
) -> Iterator[tuple[str, str]]:
    """Yield the reply to ``question`` as it is drawn: pieces of "thinking" (with ``reasoning``), then of the "answer".

    ``tell`` gets a sentence when the model's ``max_seq_len`` cuts the reply.
    """
    part = "thinking" if reasoning else "answer"
    prompt = encode_prompt(tokenizer, question, reasoning=reasoning)
    for piece in pieces(engine, tokenizer, prompt, sampling, tokenizer.special_ids, stop, tell):
        if isinstance(piece, str):
            yield part, piece
        elif piece == tokenizer.special_id(ANSWER):
            part = "answer"
