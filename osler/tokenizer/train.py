"""Training a tokenizer of either type, in a child process if it takes long, so that a signal stops it at once."""

import os
import pickle
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from osler.runtime.child import end_with_parent, running
from osler.runtime.errors import UserError
from osler.tokenizer import superbpe
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.config import BPEConfig, SuperBPEConfig

SHORT_CHARS = 1_000_000  # training on less text takes less time than starting a child process


def train(texts: Iterable[str], wanted: BPEConfig | SuperBPEConfig) -> Tokenizer:
    """Train a tokenizer as a config describes it, and raise KeyboardInterrupt as soon as a signal asks for it.

    The library trains in one call of seconds or minutes, during which Python handles no signal. So, unless the text is short, a
    child process trains, which ends with the parent, however that ends. The tokenizer is the same to the byte.
    """
    sizes = [wanted.vocab_size, *([wanted.bpe_size] if isinstance(wanted, SuperBPEConfig) else [])]
    remaining, first, chars = iter(texts), list[str](), 0
    while chars < SHORT_CHARS:
        text = next(remaining, None)
        if text is None:
            return _learn(first, *sizes)
        first.append(text)
        chars += len(text)
    with running("osler.tokenizer.train", *map(str, sizes)) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            for text in chain(first, remaining, [None]):
                pickle.dump(text, child.stdin)
            child.stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended; its exit code says how
        data = child.stdout.read()
        if child.wait() != 0:
            raise UserError(
                f"The process that trains the tokenizer ended with exit code {child.returncode} (-9: killed, most often for want "
                "of memory). Set tokenizer.max_bytes to train it on less text."
            )
    return Tokenizer.from_bytes(data)


def _learn(texts: Iterable[str], vocab_size: int, transition: int | None = None) -> Tokenizer:
    return Tokenizer.train(texts, vocab_size) if transition is None else superbpe.train(texts, vocab_size, transition)


def _received() -> Iterator[Any]:
    """Yield the texts that the parent sends; after the last, start a thread that ends this process with the parent."""
    try:
        yield from iter(lambda: pickle.load(sys.stdin.buffer), None)
    except (EOFError, pickle.UnpicklingError):
        os._exit(1)  # the parent is gone
    end_with_parent()


if __name__ == "__main__":
    sys.stdout.buffer.write(_learn(_received(), *map(int, sys.argv[1:])).to_bytes())
