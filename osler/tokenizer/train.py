"""Trains a tokenizer so that Ctrl-C and SIGTERM end it at once.

The library trains in one call of seconds or minutes, during which Python handles no signal. Unless the text is short, this
happens in a child process, which a signal to the parent kills. The tokenizer is the same to the byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from itertools import chain

from osler.runtime.errors import UserError
from osler.tokenizer.bpe import Tokenizer

SHORT_CHARS = 1_000_000  # of text that trains faster than a child process starts


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer like `Tokenizer.train`, and raise KeyboardInterrupt as soon as a signal asks for it."""
    rest = iter(texts)
    begin: list[str] = []
    chars = 0
    for text in rest:
        begin.append(text)
        chars += len(text)
        if chars > SHORT_CHARS:
            return _train_in_child(chain(begin, rest), vocab_size)
    return Tokenizer.train(begin, vocab_size)


def _train_in_child(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    child = subprocess.Popen(
        [sys.executable, "-m", "osler.tokenizer.train", str(vocab_size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # only this process handles Ctrl-C
    )
    assert child.stdin is not None and child.stdout is not None
    trained = b""
    try:
        with contextlib.suppress(BrokenPipeError):  # the exit code, below, says why
            for text in texts:
                child.stdin.write(json.dumps(text).encode() + b"\n")
            child.stdin.close()
            trained = child.stdout.read()
    except BaseException:
        child.kill()
        raise
    finally:
        code = child.wait()
        child.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
    if code != 0:
        raise UserError(
            f"The process that trains the tokenizer ended with exit code {code} (-9: killed, most often for want of memory). "
            "Set tokenizer.max_bytes to train it on less text."
        )
    return Tokenizer.from_bytes(trained)


if __name__ == "__main__":
    sys.stdout.buffer.write(Tokenizer.train(map(json.loads, sys.stdin.buffer), int(sys.argv[1])).to_bytes())
