"""Training a tokenizer of either type, in a child process if it takes long, so that a signal stops it at once."""

import json
import os
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable

from osler.runtime.errors import UserError
from osler.tokenizer import superbpe
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.config import BPEConfig, SuperBPEConfig

SHORT_BYTES = 1_000_000  # training on less text takes less time than starting a child process


def train(texts: Iterable[str], wanted: BPEConfig | SuperBPEConfig) -> Tokenizer:
    """Train a tokenizer as a config describes it, and raise KeyboardInterrupt as soon as a signal asks for it.

    The library trains in one call of seconds or minutes, during which Python handles no signal. So, unless the text is short, a
    child process trains. A signal to the parent kills it, and it ends by itself when nobody reads its result any more. The
    tokenizer is the same to the byte.
    """
    sizes = [wanted.vocab_size, *([wanted.bpe_size] if isinstance(wanted, SuperBPEConfig) else [])]
    with tempfile.TemporaryFile() as lines:
        try:
            for text in texts:
                lines.write(json.dumps(text).encode() + b"\n")
            lines.flush()
        except OSError as error:
            raise UserError(
                f"The text for the tokenizer could not be written to {tempfile.gettempdir()}: {error.strerror}. Free space "
                "there, set TMPDIR to another folder, or lower tokenizer.max_bytes."
            ) from error
        size = lines.tell()
        lines.seek(0)
        if size < SHORT_BYTES:
            return _learn(map(json.loads, lines), *sizes)
        child = subprocess.run(
            [sys.executable, "-m", "osler.tokenizer.train", *map(str, sizes)],
            stdin=lines,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # only this process handles Ctrl-C
        )
    if child.returncode != 0:
        raise UserError(
            f"The process that trains the tokenizer ended with exit code {child.returncode} (-9: killed, most often for want of "
            "memory). Set tokenizer.max_bytes to train it on less text."
        )
    return Tokenizer.from_bytes(child.stdout)


def _learn(texts: Iterable[str], vocab_size: int, transition: int | None = None) -> Tokenizer:
    return Tokenizer.train(texts, vocab_size) if transition is None else superbpe.train(texts, vocab_size, transition)


def _end_with_parent() -> None:
    pipe = select.poll()
    pipe.register(1, 0)  # no events need be named: poll always reports that nobody reads
    pipe.poll()
    os._exit(1)


if __name__ == "__main__":
    if hasattr(select, "poll"):  # Windows has no poll
        threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stdout.buffer.write(_learn(map(json.loads, sys.stdin.buffer), *map(int, sys.argv[1:])).to_bytes())
