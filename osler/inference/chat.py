"""``osler chat`` and ``osler generate``: a model in the terminal, its text printed as it is drawn.

A question stands alone: models are trained on single questions and remember none. Where the input is no terminal every
line of it is a question, so that a file of questions can be piped in. Nothing is kept, so there is nothing to resume.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace

from osler.errors import UserError
from osler.files.read import decode_lines
from osler.inference.engine import InferenceEngine
from osler.inference.generate import Piece, stream_answer
from osler.inference.ready import ReadyModel, open_model
from osler.inference.rollout import SamplingParams
from osler.runtime.log import is_terminal, say
from osler.runtime.stop import Terminated
from osler.tasks.clinic import load as load_clinic_exam
from osler.tasks.item import render_answer, render_question
from osler.tokenizer.bpe import Tokenizer

PROMPT = "> "
LEAVE = ("/quit", "/exit")
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
HELD_BACK = "\N{REPLACEMENT CHARACTER}"  # how half a character decodes, until its other half comes


def generate(
    checkpoint: str, prompt: str, *, max_new_tokens: int = 200, temperature: float = 0.7, top_p: float = 0.95, seed: int = 0
) -> int:
    """The command ``generate``: print how the model continues ``prompt`` (empty: how it begins a text)."""
    sampling = SamplingParams(max_new_tokens, temperature, top_p=top_p, seed=seed)
    ready = open_model(checkpoint)
    if colours():
        print(f"{DIM}{prompt}{PLAIN}", end="", flush=True)
    show_text(continue_text(InferenceEngine(ready.model), ready.tokenizer, prompt, sampling))
    return 0


def chat(
    checkpoint: str,
    *,
    reasoning: bool | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
) -> int:
    """The command ``chat``: answer the questions of stdin until it ends; a model that never learned to answer continues them.

    Question k of a session is drawn with ``seed + k``, so asking again may give another answer and a session can be
    repeated. ``reasoning`` None: think first if that was trained. Ctrl-C stops the answer under way, and the session where
    nobody can type on.
    """
    sampling = SamplingParams(max_new_tokens, temperature, top_p=top_p, seed=seed)
    ready = open_model(checkpoint)
    reasoning = ready.reasons if reasoning is None else reasoning
    interactive = sys.stdin.isatty()
    say(welcome(ready, interactive, seed))
    engine = InferenceEngine(ready.model)
    for number, line in enumerate(terminal_lines() if interactive else piped_lines()):
        if not interactive:
            print(f"{PROMPT}{line}")
        try:
            reply(engine, ready, line, replace(sampling, seed=seed + number), reasoning=reasoning)
        except UserError as error:
            say(f"{error}")  # a question too long: the next may fit
        except KeyboardInterrupt as request:
            print(PLAIN if colours() else "", flush=True)
            if not interactive or isinstance(request, Terminated):
                raise
            say("(interrupted)")
    return 0


def reply(engine: InferenceEngine, ready: ReadyModel, line: str, sampling: SamplingParams, *, reasoning: bool) -> None:
    """Print the answer to a line, or how the text goes on when the model never learned to answer."""
    if not ready.answers_questions:
        show_text(continue_text(engine, ready.tokenizer, line, sampling))
        return
    pieces = stream_answer(
        engine,
        ready.tokenizer,
        line,
        reasoning=reasoning,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
    )
    show_answer(pieces)


def welcome(ready: ReadyModel, interactive: bool, seed: int) -> str:
    """What to know before the first question: which model, what it can do, how to leave, and a question to try."""
    lines = [ready.describe()]
    if not ready.answers_questions:
        lines.append("It was trained on text alone: it goes on with what you write. To teach it to answer: `osler sft`.")
    if interactive:
        what = "question" if ready.answers_questions else "beginning"
        lines.append(f"One {what} a line, each on its own. An empty line, /quit or Ctrl-D leaves; Ctrl-C stops an answer.")
    if interactive and ready.answers_questions and ready.knows_clinic:
        item = load_clinic_exam(split="new_findings", limit=1, seed=seed)[0]
        lines += [
            "It learned the clinic's exam: a synthetic world, not medical advice, and every question comes with its options.",
            f"Try this one (the right answer is {render_answer(item)}):",
            "",
            f"  {render_question(item)}",
            "",
        ]
    return "\n".join(lines)


def terminal_lines() -> Iterator[str]:
    """What a person types, line by line, until an empty line, /quit or Ctrl-D."""
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
    """The lines of stdin that are not blank; UserError at one that is not UTF-8, as in any file."""
    try:
        for _, line in decode_lines(sys.stdin.buffer, "stdin"):
            if line.strip() in LEAVE:
                return
            if line.strip():
                yield line.strip()
    except OSError as error:
        raise UserError(f"Standard input cannot be read: {error.strerror}. Pipe the questions in, or type them.") from error


def show_answer(pieces: Iterable[Piece]) -> None:
    """Print thinking (dimmed where there are colours) and answer as they come, each under its name."""
    dim, plain = (DIM, PLAIN) if colours() else ("", "")
    shown = ""
    for piece in pieces:
        if piece.part != shown:
            print(f"{plain}\n" if shown else "", end="")
            print(f"{dim}thinking  " if piece.part == "thinking" else "answer    ", end="")
            shown = piece.part
        print(piece.text, end="", flush=True)
    print(plain if shown else "", end="\n" if shown else "")
    if shown != "answer":
        print("(no answer; --max-new-tokens N may leave room for one)")


def show_text(texts: Iterable[str]) -> None:
    """Print pieces of text as they come, and a line break after the last."""
    for text in texts:
        print(text, end="", flush=True)
    print()


def continue_text(engine: InferenceEngine, tokenizer: Tokenizer, text: str, sampling: SamplingParams) -> Iterator[str]:
    """Yield what the model writes after ``text``, in pieces that hold whole characters.

    ``text`` stands after an end-of-text token, as a document does in training. New tokens are cut to what the model's
    ``max_seq_len`` leaves. Raises UserError when ``text`` leaves no room.
    """
    prompt = [tokenizer.eos_id, *tokenizer.encode(text)]
    room = engine.model.config.max_seq_len - len(prompt)
    tokens = engine.stream(
        prompt,
        max_new_tokens=max(min(sampling.max_new_tokens, room), 1),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        stop_ids=[tokenizer.eos_id],
        seed=sampling.seed,
    )
    ids: list[int] = []
    shown = 0
    for token in tokens:
        if token == tokenizer.eos_id:
            break
        ids.append(token)
        whole = tokenizer.decode(ids)
        certain = len(whole.removesuffix(HELD_BACK))
        if certain > shown:
            yield whole[shown:certain]
            shown = certain
    if rest := tokenizer.decode(ids)[shown:]:
        yield rest


def colours() -> bool:
    """Whether stdout is a terminal that shows styles and the user has not switched them off (https://no-color.org)."""
    return is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")
