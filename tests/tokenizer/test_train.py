"""Training a tokenizer in a child process: the same tokenizer, and a signal is heard while it computes."""

import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from osler.runtime.child import start
from osler.runtime.errors import UserError
from osler.tokenizer import superbpe
from osler.tokenizer import train as training
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.config import BPEConfig, SuperBPEConfig
from osler.tokenizer.train import SHORT_CHARS, train

TEXTS = ["Fever and rusty sputum suggest pneumonia, d'où 38.5 °C.\n" * 40, "", "A cough that lasts. " * 9, "n\0l"]


@pytest.mark.parametrize(
    ("wanted", "learned"),
    [
        (BPEConfig(vocab_size=400), Tokenizer.train(TEXTS, 400)),
        (SuperBPEConfig(vocab_size=400), superbpe.train(TEXTS, 400, 300)),
        (SuperBPEConfig(vocab_size=400, transition=350), superbpe.train(TEXTS, 400, 350)),
    ],
    ids=["bpe", "superbpe", "superbpe with a transition"],
)
def test_a_child_trains_the_same_tokenizer_to_the_byte(
    monkeypatch: pytest.MonkeyPatch, wanted: BPEConfig | SuperBPEConfig, learned: Tokenizer
) -> None:
    whole = learned.to_bytes()
    assert train(iter(TEXTS), wanted).to_bytes() == whole
    monkeypatch.setattr(training, "SHORT_CHARS", 1000)
    assert train(iter(TEXTS), wanted).to_bytes() == whole


def test_a_signal_is_heard_while_the_library_computes() -> None:
    """On words of minutes of work: the signal comes when all text has been handed over."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=1000)) for _ in range(1 + SHORT_CHARS // 1000)]

    def texts() -> Iterator[str]:
        for number in range(30):
            yield " ".join(word[number:] + word[:number] for word in words)
        signal.setitimer(signal.ITIMER_REAL, 0.2)

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            train(texts(), BPEConfig(vocab_size=8000))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < 30


def test_a_child_ends_when_nobody_waits_for_it() -> None:
    """As when its parent is killed. It would train for minutes."""
    rng = random.Random(0)
    words = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=3_000_000))
    text = " ".join(words[at : at + 1000] for at in range(0, len(words), 1000))
    for sent in (pickle.dumps(text) + pickle.dumps(None), pickle.dumps(text)[:-9]):
        child = start("osler.tokenizer.train", "30000")
        assert child.stdin is not None
        child.stdin.write(sent)
        child.stdin.close()
        assert child.wait(60) == 1


def test_a_child_that_is_lost_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SHORT_CHARS", 10)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"ended with exit code 1 .*Set tokenizer\.max_bytes"):
        train(["some text of more than ten characters"] * 9, BPEConfig(vocab_size=400))
    assert subprocess._active == []  # type: ignore[attr-defined]  # nothing is left to be waited for
