"""``osler chat`` and ``osler generate``: a model in the terminal, its text printed as it is drawn.

Every question is answered without the ones before it, because models are trained on single questions. If the input is not a
terminal, every line is a question, so that a file of questions can be piped in.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace

from osler.files import decode_lines
from osler.inference.engine import InferenceEngine
from osler.inference.generate import Part, continue_text, stream_answer
from osler.inference.load import LoadedModel, open_model
from osler.ops.sampling_params import SamplingParams
from osler.runtime.errors import UserError
from osler.runtime.log import is_terminal, say
from osler.runtime.stop import Terminated
from osler.tasks.item import render_answer, render_question
from osler.tasks.registry import load_clinic

PROMPT = "> "
LEAVE = ("/quit", "/exit")
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def generate(checkpoint: str, prompt: str, sampling: SamplingParams) -> int:
    """Print how the model continues ``prompt`` (empty: how it begins a text): the command ``generate``."""
    ready = open_model(checkpoint)
    if colours():
        print(f"{DIM}{prompt}{PLAIN}", end="", flush=True)
    show_text(continue_text(InferenceEngine(ready.model), ready.tokenizer, prompt, sampling))
    return 0


def chat(checkpoint: str, sampling: SamplingParams, *, reasoning: bool | None = None) -> int:
    """Answer the questions of stdin until it ends: the command ``chat``.

    A model that never learned to answer continues them. Question k of a session is drawn with the seed plus k, so asking again
    may give another answer and a session can be repeated. With ``reasoning`` None the model thinks first if it learned to.
    Ctrl-C stops the current answer; if the questions are piped in, it ends the session.
    """
    ready = open_model(checkpoint)
    reasoning = ready.reasons if reasoning is None else reasoning
    interactive = sys.stdin.isatty()
    say(welcome(ready, interactive, sampling.seed))
    engine = InferenceEngine(ready.model)
    for number, line in enumerate(terminal_lines() if interactive else piped_lines()):
        if not interactive:
            print(f"{PROMPT}{line}")
        of_line = replace(sampling, seed=sampling.seed + number)
        try:
            if ready.answers_questions:
                show_answer(stream_answer(engine, ready.tokenizer, line, of_line, reasoning=reasoning))
            else:
                show_text(continue_text(engine, ready.tokenizer, line, of_line))
        except UserError as error:
            say(f"{error}")  # a question too long: the next may fit
        except KeyboardInterrupt as request:
            print(PLAIN if colours() else "", flush=True)
            if not interactive or isinstance(request, Terminated):
                raise
            say("(interrupted)")
    return 0


def welcome(ready: LoadedModel, interactive: bool, seed: int) -> str:
    """Return an introduction to a chat: which model, what it can do, how to leave, and a question to try."""
    lines = [ready.describe()]
    if not ready.answers_questions:
        lines.append("It was trained on text alone: it goes on with what you write. To teach it to answer: `osler sft`.")
    if interactive:
        what = "question" if ready.answers_questions else "beginning"
        lines.append(f"One {what} a line, each on its own. An empty line, /quit or Ctrl-D leaves; Ctrl-C stops an answer.")
    if interactive and ready.answers_questions and ready.knows_clinic:
        item = load_clinic(split="new_findings", limit=1, seed=seed)[0]
        lines += [
            "It learned the clinic's exam: a synthetic world, not medical advice, and every question comes with its options.",
            f"Try this one (the right answer is {render_answer(item)}):",
            "",
            f"  {render_question(item)}",
            "",
        ]
    return "\n".join(lines)


def terminal_lines() -> Iterator[str]:
    """Yield what a person types, line by line, until an empty line, /quit or Ctrl-D."""
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
        if not line or line in LEAVE:
            return
        yield line


def piped_lines() -> Iterator[str]:
    """Yield the lines of stdin that are not blank. Raises UserError at a line that is not UTF-8, as for any file."""
    try:
        for _, line in decode_lines(sys.stdin.buffer, "stdin"):
            if line.strip() in LEAVE:
                return
            if line.strip():
                yield line.strip()
    except OSError as error:
        raise UserError(f"Standard input cannot be read: {error.strerror}. Pipe the questions in, or type them.") from error


def show_answer(pieces: Iterable[tuple[Part, str]]) -> None:
    """Print thinking (dimmed where there are colours) and answer as they come, each behind its name."""
    dim, plain = (DIM, PLAIN) if colours() else ("", "")
    shown = ""
    for part, text in pieces:
        if part != shown:
            print(f"{plain}\n" if shown else "", f"{dim}thinking  " if part == "thinking" else "answer    ", sep="", end="")
            shown = part
        print(text, end="", flush=True)
    if shown:
        print(plain)
    if shown != "answer":
        print("(no answer; --max-new-tokens N may leave room for one)")


def show_text(texts: Iterable[str]) -> None:
    """Print pieces of text as they come, and a line break after the last."""
    for text in texts:
        print(text, end="", flush=True)
    print()


def colours() -> bool:
    """Return whether stdout is a terminal with styles that the user has not switched off (https://no-color.org)."""
    return is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")
