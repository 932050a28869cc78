"""Training in a child process: the same tokenizer, and a signal is heard while it computes."""

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from osler.runtime.errors import UserError
from osler.tokenizer import train as training
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.train import SHORT_CHARS, train

CORPUS = ["Fever and rusty sputum suggest pneumonia, d'où 38.5 °C.\n" * 40, "", "A cough that lasts. " * 9, "n\0l"]


def test_a_child_trains_the_same_tokenizer_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Tokenizer.train(CORPUS, 400).to_bytes()
    assert train(iter(CORPUS), 400).to_bytes() == whole
    monkeypatch.setattr(training, "SHORT_CHARS", 1000)
    assert train(iter(CORPUS), 400).to_bytes() == whole


def test_a_signal_is_heard_while_the_library_computes() -> None:
    """On one word of minutes of work: the signal comes when all text has been handed over."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=1000)) for _ in range(1 + SHORT_CHARS // 1000)]
    handed_over, heard = threading.Event(), threading.Event()
    was_heard: list[bool] = []

    def texts() -> Iterator[str]:
        for number in range(30):
            yield " ".join(word[number:] + word[:number] for word in words)
        handed_over.set()

    def on_signal(number: int, frame: object) -> None:
        heard.set()
        raise KeyboardInterrupt

    def press() -> None:
        handed_over.wait()
        os.kill(os.getpid(), signal.SIGINT)
        was_heard.append(heard.wait(30))

    before = signal.signal(signal.SIGINT, on_signal)
    presser = threading.Thread(target=press)
    presser.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            train(texts(), 8000)
    finally:
        signal.signal(signal.SIGINT, before)
        presser.join()
    assert was_heard == [True]


def test_a_child_that_is_lost_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SHORT_CHARS", 10)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"ended with exit code 1 .*Set tokenizer\.max_bytes"):
        train(["some text of more than ten characters"] * 9, 400)
    assert subprocess._active == []  # type: ignore[attr-defined]  # nothing is left to be waited for
