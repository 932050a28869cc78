"""The tokenizer: exact round trips, no forged special tokens, GPT-2's ids from either file, deterministic training."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osler.runtime.errors import UserError
from osler.tokenizer.bpe import (
    ANSWER,
    EOS,
    LONGEST_TRAINED_CHARS,
    QUESTION,
    SPECIALS,
    THINKING,
    Tokenizer,
    _cut_long_pieces,
)

CORPUS = [
    "Pneumonia is an infection of the lung. The patient has fever, cough and 38.5 degrees.\n\n",
    "Amoxicillin is the first-line treatment of pneumococcal pneumonia; it's given for 5 days.\n",
    "A 54-year-old man has rusty sputum, pleuritic pain and fever. What is the diagnosis?\n",
] * 20


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(CORPUS, 400)


@pytest.fixture(scope="module")
def gpt2(shared_data: Callable[[str], Path]) -> Tokenizer:
    return Tokenizer.load(shared_data("tokenizers/gpt2/tokenizer.json"))


AWKWARD = [
    "", " ", "\x00", "a\x00b", "\n\n\n", " \t \r\n x", "e\u0301o\u0308", "\u0301", "\ufeffstart", "\u00a0\u2003\u200b",
    "👩‍👩‍👧🇬🇧", "<|answer|>", "x<|endoftext|>y<|endoftext|>", "<|answer<|answer|>|>", "12 345.678", "Ġ Ċ Ń",
    "it's WE'LL", "العربية हिन्दी 日本語", "\U0010ffff\ufffd",
]  # fmt: skip


def check_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and b"".join(map(tokenizer.bytes_of, ids)) == text.encode()
    assert tokenizer.special_ids.isdisjoint(ids)


# Whole-Unicode text, and text made of the pieces that rules treat specially (spaces, digits, marks, markers).
ANY_TEXT = st.text() | st.lists(st.sampled_from([*AWKWARD, *"a 1\n\t<|>'", "\u0301", *SPECIALS])).map("".join)


@settings(max_examples=150, deadline=None)
@given(ANY_TEXT)
def test_any_text_round_trips(trained: Tokenizer, text: str) -> None:
    check_round_trip(trained, text)


def test_awkward_text_round_trips_in_every_tokenizer(
    trained: Tokenizer, gpt2: Tokenizer, shared_data: Callable[[str], Path]
) -> None:
    """GPT-2 comes as one file and as a pair, SuperBPE gzipped."""
    pair = Tokenizer.load(shared_data("tokenizers/gpt2/vocab.bpe"))
    superbpe = Tokenizer.load(shared_data("tokenizers/superbpe-t80k")).with_specials()
    for text in [*AWKWARD, *CORPUS[:3]]:
        check_round_trip(trained, text)
        check_round_trip(superbpe, text)
        assert gpt2.decode(gpt2.encode(text)) == text and pair.encode(text) == gpt2.encode(text)
    assert pair.fingerprint == gpt2.fingerprint and superbpe.vocab_size == 200_004
    assert gpt2.encode("Hello world") == [15496, 995]  # the published ids


def test_training_puts_specials_first_keeps_every_byte_and_digit_and_merges_words(trained: Tokenizer) -> None:
    assert [trained.special_id(name) for name in SPECIALS] == [0, 1, 2, 3]
    assert trained.eos_id == 0
    assert 260 < trained.vocab_size <= 400
    every_byte = {token_id for value in range(256) for token_id in trained.encode(bytes([value]).decode("latin-1"))}
    assert max(every_byte) < trained.vocab_size
    assert len(trained.encode("zq\U0001f9ea")) == 2 + 4
    assert "\ufffd" in trained.decode(trained.encode("\U0001f9ea")[:-1]), "half a character"
    assert [trained.decode([token_id]) for token_id in trained.encode("12345")] == list("12345")
    assert len(trained.encode(CORPUS[0])) < len(CORPUS[0]) / 2


def test_special_tokens_written_in_a_text_are_text(trained: Tokenizer) -> None:
    text = f"{QUESTION}Why?{THINKING}So.{ANSWER}Yes{EOS}"
    assert trained.special_ids.isdisjoint(trained.encode(text))
    assert trained.encode_batch([text, "plain"]) == [trained.encode(text), trained.encode("plain")]
    ids = [1, *trained.encode("Why?"), 2, *trained.encode("So."), 3, 0]
    assert trained.decode(ids) == f"{QUESTION}Why?{THINKING}So.{ANSWER}{EOS}"
    assert trained.decode(ids, skip_special=True) == "Why?So."


def test_no_injection_even_when_the_model_itself_would_make_the_token() -> None:
    """A vocabulary may hold a special token as an ordinary word (`ignore_merges` then emits it whole)."""
    content = json.loads(Tokenizer.train(CORPUS, 300).to_bytes())
    content["model"]["ignore_merges"] = True
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = Tokenizer.from_bytes(json.dumps(content).encode())
    assert EOS in content["model"]["vocab"]
    for text in (EOS, f"a{EOS}{EOS}b"):
        check_round_trip(tokenizer, text)


def test_fingerprint_ignores_layout_and_defaults_but_not_content(trained: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json.gz").write_bytes(gzip.compress(trained.to_bytes()))
    assert Tokenizer.load(tmp_path).fingerprint == trained.fingerprint
    content = json.loads(trained.to_bytes())
    content["model"].pop("ignore_merges", None)
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content["model"]["dropout"] = 0.5
    same = Tokenizer.from_bytes(json.dumps(content, indent=7).encode())
    assert same.fingerprint == trained.fingerprint and same.encode(CORPUS[0]) == trained.encode(CORPUS[0])
    content["model"]["merges"].pop()
    assert Tokenizer.from_bytes(json.dumps(content).encode()).fingerprint != trained.fingerprint


def test_missing_specials_are_appended_and_ids_stay(gpt2: Tokenizer) -> None:
    assert (gpt2.vocab_size, gpt2.eos_id) == (50257, 50256)
    with pytest.raises(UserError, match=r"no special token <\|question\|>.*with_specials"):
        gpt2.special_id(QUESTION)
    full = gpt2.with_specials()
    assert (full.vocab_size, full.eos_id) == (50260, 50256)
    assert sorted(full.special_ids) == [50256, 50257, 50258, 50259]
    assert full.encode(CORPUS[0]) == gpt2.encode(CORPUS[0])
    assert full.with_specials() is full
    assert Tokenizer.from_bytes(full.to_bytes()).fingerprint == full.fingerprint != gpt2.fingerprint


GPT2_PAIR = {"encoder.json": b"{}", "vocab.bpe": "#version: 0.2\nĠ t\n".encode()}


@pytest.mark.parametrize(
    ("files", "name", "said"),
    [
        ({}, "absent.json", "no tokenizer at .*absent.json"),
        ({}, "", "holds no tokenizer"),
        ({"tokenizer.json": b'{"version": "1.0"'}, "", r"tokenizer\.json cannot be read"),
        ({"torn.json.gz": gzip.compress(bytes(range(256)))[:200]}, "torn.json.gz", "torn.json.gz is not a whole gzip file"),
        ({"vocab.bpe": b"#version: 0.2\n"}, "vocab.bpe", r"encoder\.json is missing"),
        (GPT2_PAIR, "encoder.json", r"The pair vocab\.bpe and encoder\.json in .* cannot be read"),
        (GPT2_PAIR | {"vocab.bpe": b"#version: 0.2\nbroken\n"}, "", r"The pair .* cannot be read .* line 1"),
    ],
)
def test_files_that_are_no_tokenizer_are_refused(files: dict[str, bytes], name: str, said: str, tmp_path: Path) -> None:
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=said):
        Tokenizer.load(tmp_path / name)


def test_a_small_vocabulary_and_half_a_character_are_refused(trained: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"vocab_size=100 is too small.*260"):
        Tokenizer.train(CORPUS, 100)
    with pytest.raises(UserError, match=r"lone surrogate.*position 1"):
        trained.encode_batch(["fine", "a\ud800"])


@pytest.mark.slow
def test_a_run_of_spaces_has_no_length_at_which_encoding_fails(trained: Tokenizer) -> None:
    """The library gives up where one match looks back ten million times."""
    text = " " * 10_000_010
    assert trained.decode(trained.encode(text)) == text


def test_only_what_is_too_long_to_train_on_is_cut_and_that_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    limit = LONGEST_TRAINED_CHARS
    # Long without spaces, but no long word: Chinese with its commas, digits, base64, words at the limit.
    short = ["日本語の文、" * 900, "1234" * 900, "aB3+" * 900, "a" * limit + " " + "é" * limit, " " * limit + "a", "x" * limit]
    assert list(_cut_long_pieces(short)) == short
    assert capsys.readouterr().err == ""
    long = ["one " + "é" * (2 * limit + 5) + ", two", "a" * (limit + 1), "\n" * (limit + 1), "-" * limit + "a" * (limit + 1)]
    parts = list(_cut_long_pieces(long))
    assert "".join(parts) == "".join(long)
    assert parts[:3] == ["one " + "é" * limit, "é" * limit, "é" * 5 + ", two"]
    assert parts[3:] == ["a" * limit, "a", "\n" * limit, "\n", "-" * limit + "a" * limit, "a"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "words of more than 1,000 characters, such as 'éé" in said
