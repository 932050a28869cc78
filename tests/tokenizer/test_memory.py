"""The fast way to encode gives what the library gives, character by character, for both expressions that it knows."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers

from osler.tokenizer import memory
from osler.tokenizer.bpe import SPECIALS, Tokenizer
from osler.tokenizer.memory import Memory

WORDS = ["The patient's fever, 39.5 degrees (A), isn't  new.\n\n", "x\t y \r\n z'll I'd 'twas  ", "éa µg ≥ 5—6 “so” ", "  "]


def trained() -> Tokenizer:
    return Tokenizer.train(WORDS * 9, 400)


def like_gpt2() -> Tokenizer:
    content = json.loads(trained().to_bytes())
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return Tokenizer.from_bytes(json.dumps(content).encode())


@pytest.fixture(params=[trained, like_gpt2], scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made: Tokenizer = request.param()
    assert isinstance(made._encode.__self__, Memory)  # type: ignore[attr-defined]
    return made


def test_every_character_is_split_as_the_library_does(tokenizer: Tokenizer) -> None:
    """Beside letters, digits, spaces, line ends and itself; those that Unicode moved about are left to the library."""
    characters = [chr(code) for code in (*range(0x3100), *range(0x3100, 0x10000, 23)) if not 0xD800 <= code < 0xE000]
    certain = [character for character in characters if not list(memory._uncertain()(character))]
    assert len(certain) > 5000 and "\u180e" not in certain and len(characters) - len(certain) > 1000
    texts = [f"a{c}b 1{c}2 {c}{c} x {c}\n{c}\n {c}. '{c}s{c}" for c in characters]
    assert tokenizer.encode_batch(texts) == tokenizer.encode_anew(texts)
    blocks = ["".join(characters[start : start + 500]) for start in range(0, len(characters), 500)]
    assert tokenizer.encode_batch(blocks) == tokenizer.encode_anew(blocks)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(texts=st.lists(st.text(st.sampled_from("aAzS  'sdl\n\r\t.,()12é\u00a0\u2028µ中🧪<|>") | st.characters(), max_size=40)))
def test_any_text_is_split_as_the_library_does(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == tokenizer.encode_anew(texts)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST_PIECES", 5)
    tokenizer = trained()
    texts = [*WORDS, "b" * 40, *[f"word{number} new" for number in range(20)]]
    for _ in range(2):
        assert tokenizer.encode_batch(texts) == tokenizer.encode_anew(texts)
    assert len(tokenizer._encode.__self__._known) == 5  # type: ignore[attr-defined]


def test_tokenizers_that_split_otherwise_are_left_to_the_library() -> None:
    plain = Backend.from_str(trained().to_bytes().decode())
    for change in (
        lambda backend: setattr(backend, "normalizer", normalizers.NFC()),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda backend: backend.add_tokens(["fever and"]),
    ):
        backend = Backend.from_str(plain.to_str())
        change(backend)
        tokenizer = Tokenizer(backend)
        assert tokenizer._encode == tokenizer.encode_anew
    assert Tokenizer(Backend(models.BPE()))._encode.__name__ == "encode_anew"


def test_a_textbook_and_the_special_tokens_in_a_text(tokenizer: Tokenizer, shared_data: Callable[[str], Path]) -> None:
    from osler.data.readers import TextFiles

    texts = [document.text for document in TextFiles(shared_data("text/openstax-biology.parquet"))][:20]
    assert tokenizer.encode_batch(texts) == tokenizer.encode_anew(texts)
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode(f"a {SPECIALS[0]} b{SPECIALS[1]}"))
