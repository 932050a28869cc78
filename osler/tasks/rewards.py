"""Rewards of reinforcement learning: pure functions of (item, completion). Osler's own return 0 to 1.

Answers are read as the exam reads them (``osler.tasks.answers``), in bounded time. A reward for format alone destroys accuracy
(a published run fell from 0.228 to 0.025), so ``format`` is for logging and ``gated_format`` pays for form only in right answers.

A function of one's own is named by its module or file (``my_module:brevity``, ``rewards.py:brevity``). Each rank runs it in a
process of its own, because only a process can be stopped whatever it does.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import math
import os
import pickle
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osler.runtime.child import start
from osler.runtime.errors import UserError
from osler.tasks.answers import MAX_ANSWER_CHARS, read_answer
from osler.tasks.item import LETTERS, ExamItem, render_option

if TYPE_CHECKING:
    from osler.tokenizer.chat import Completion

LOAD_SECONDS = 120.0  # the module of a user's function may take this long to load
MAX_THINKING_CHARS = 2000  # about 400 words, for ``brief_correct``


def correct(item: ExamItem, completion: Completion) -> float:
    """Return 1 when the answer is right."""
    return float(read_answer(item, completion).right)


def format_ok(item: ExamItem, completion: Completion) -> float:
    """Return 1 when the completion follows the template, has some thinking, and answers in the form that is taught.

    That form is ``option text (letter)``, a number, or any text for an item whose answer is a text.
    """
    answer = (completion.answer or "").strip()
    if not completion.well_formed or not completion.thinking.strip() or len(answer) > MAX_ANSWER_CHARS:
        return 0.0
    if item.options:
        return float(answer in map(render_option, item.options, LETTERS))
    return float(read_answer(item, completion).readable)


def gated_format(item: ExamItem, completion: Completion) -> float:
    """Return 1 for the right answer in the form that is taught."""
    return correct(item, completion) * format_ok(item, completion)


def brief_correct(item: ExamItem, completion: Completion) -> float:
    """Return 1 for the right answer after at most ``MAX_THINKING_CHARS`` characters of thinking."""
    return correct(item, completion) if len(completion.thinking) <= MAX_THINKING_CHARS else 0.0


def by_lot(item: ExamItem, completion: Completion) -> float:
    """Return 0 or 1 by a hash of item and completion: a control from which nothing can be learned."""
    said = f"{item.id}\n{completion.thinking}\n{completion.answer}"
    return float(hashlib.sha256(said.encode("utf-8", "replace")).digest()[0] & 1)


Reward = Callable[["ExamItem", "Completion"], float]
REWARDS: dict[str, Reward] = {
    "correct": correct,
    "format": format_ok,
    "gated_format": gated_format,
    "brief_correct": brief_correct,
    "random": by_lot,
}


def label_of(name: str) -> str:
    """Return the name of a reward in metrics, which is the function's name."""
    return name.rpartition(":")[2]


def reward_of(name: str, seconds: float) -> Reward:
    """Return the reward with this name; a user's function may take ``seconds`` for a completion."""
    return REWARDS[name] if name in REWARDS else OwnReward(name, seconds)


def check_reward(name: str) -> None:
    """Raise UserError when there is no such reward."""
    if name not in REWARDS:
        OwnReward(name, LOAD_SECONDS).close()


class OwnReward:
    """A user's function in a process of its own; the function takes an ExamItem and a Completion and returns a number.

    Raises UserError, naming the item, when the function raises, takes too long, ends its process or returns no finite number.
    """

    def __init__(self, name: str, seconds: float) -> None:
        """Start the process, which ends with this one, and wait for the function; raises UserError when there is none."""
        self.name, self.seconds = name, seconds
        try:
            self.process = start("osler.tasks.rewards", stdout=subprocess.PIPE)
        except OSError as error:
            raise UserError(f"The reward {name} cannot have a process of its own: {error.strerror}.") from error
        self.close = weakref.finalize(self, _end, self.process)  # called by hand, or when nothing holds this object any more
        self._ask((name,), LOAD_SECONDS, "when it was loaded.")

    def __call__(self, item: ExamItem, completion: Completion) -> float:
        """Return the reward."""
        return self._ask((item, completion), self.seconds, f"for an answer to item {item.id}: {completion.answer!r:.200}")

    def _ask(self, question: tuple[Any, ...], seconds: float, when: str) -> float:
        to_process, from_process = self.process.stdin, self.process.stdout
        assert to_process is not None and from_process is not None
        try:
            pickle.dump((seconds, question), to_process)
            to_process.flush()
            value = pickle.load(from_process)
        except (EOFError, OSError, pickle.UnpicklingError):
            code = self.process.wait()
            timed_out = code == -getattr(signal, "SIGALRM", 0)
            value = f"took more than {seconds:g} s" if timed_out else f"ended its process with exit code {code}"
        if isinstance(value, str):
            self.close()
            raise UserError(f"The reward {self.name} {value} {when}")
        return float(value)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError), process:  # leaving it waits for the process and closes its pipes
        process.kill()


def serve() -> None:
    """Answer the questions of an ``OwnReward`` from stdin until there are none; an answer in words says what is wrong.

    The first question names the function.
    """
    asked, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the function prints is no answer
    limit = getattr(signal, "setitimer", lambda *_: None)  # ends this process, whatever it does; not on Windows
    function: Callable[..., Any] | None = None

    def answer(value: object) -> None:
        pickle.dump(value, answers)
        answers.flush()

    while True:
        try:
            seconds, question = pickle.load(asked)
        except EOFError:
            return
        try:
            limit(getattr(signal, "ITIMER_REAL", 0), seconds)
            if function is None:
                function, value = _find(*question), 0.0
            else:
                value = function(*question)
            number = float(value) if hasattr(value, "__float__") else math.nan
            limit(getattr(signal, "ITIMER_REAL", 0), 0)
        except Exception as error:
            answer(f"raised {type(error).__name__} ({error})")
            raise
        answer(number if math.isfinite(number) else f"returned {value!r:.100}, which is no finite number,")


def _find(name: str) -> Callable[..., Any]:
    """Return the function ``module:function`` or ``path/to/file.py:function``."""
    where, _, wanted = name.rpartition(":")
    if where.endswith(".py"):
        spec = importlib.util.spec_from_file_location(f"osler_rewards_{Path(where).stem}", where)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    function: Callable[..., Any] = getattr(module, wanted)
    return function


if __name__ == "__main__":
    serve()
