"""What a tokenizer loses of a text: refused where it falsifies bits per byte, a warning where it is meant."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from osler.data.documents import Document, in_memory
from osler.data.from_recipe import tokenizer_inspect
from osler.data.prepare import prepare
from osler.runtime.errors import UserError
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.round_trip import Losses, refuse_missing_bytes
from tests.tokenizer.test_bpe import CORPUS


def without_bytes() -> Tokenizer:
    backend = Backend(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return Tokenizer(backend).with_specials()


def words(*known: str) -> Tokenizer:
    vocab = {word: index for index, word in enumerate(("[UNK]", *known))}
    backend = Backend(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(backend).with_specials()


def test_a_byte_level_tokenizer_without_some_byte_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loses text.*'A'"):
        refuse_missing_bytes(without_bytes())
    with pytest.raises(UserError, match="'a cab' is read back as 'aab'"):
        Losses().look(without_bytes(), ["a cab"])
    assert refuse_missing_bytes(Tokenizer.train(CORPUS, 400))
    for tokenizer in (without_bytes(), words("the")):
        with pytest.raises(UserError, match="loses text"):
            prepare({"notes": in_memory([Document(text=text) for text in CORPUS])}, tokenizer, tmp_path / "out")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tokenizer", "said"), [(without_bytes(), "is read back as"), (Tokenizer.train(CORPUS, 400), "loses         0 of")]
)
def test_inspect_tells_what_is_lost(tokenizer: Tokenizer, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.json").write_bytes(tokenizer.to_bytes())
    tokenizer_inspect(str(tmp_path / "t.json"), "a cab")
    out = capsys.readouterr().out
    assert said in out and ("read back as  'aab'" in out) == (said == "is read back as")


def test_one_rare_character_is_enough_for_a_byte_level_tokenizer() -> None:
    backend = Backend(models.BPE({chr(code): code for code in range(33, 127)} | {"Ġ": 0}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer, losses = Tokenizer(backend), Losses()
    losses.look(tokenizer, ["plain ASCII text " * 100])
    with pytest.raises(UserError, match="5 µg"):
        losses.look(tokenizer, ["plain ASCII text " * 100 + "5 µg"])


def test_unknown_words_are_refused_and_what_is_little_or_meant_is_only_told(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="loses text"):
        Losses().look(words("the", "of"), ["the fever of malaria"])
    backend = Backend.from_str(Tokenizer.train(CORPUS, 400)._backend.to_str())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    normalizing = refuse_missing_bytes(Tokenizer(backend))
    for tokenizer, text, said in [
        (words("the", "fever"), "the fever " * 200 + "rash", ["rash"]),
        (normalizing, "Fever ABC", ["44.44%", "'fever abc'"]),
    ]:
        losses = Losses()
        losses.look(tokenizer, [text])
        with caplog.at_level(logging.WARNING):
            losses.warn()
        assert all(part in caplog.text for part in said)


@pytest.mark.parametrize("path", ["gpt2", "gpt2/encoder.json", "superbpe-t80k"])
def test_published_tokenizers_pass(path: str, shared_data: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = refuse_missing_bytes(Tokenizer.load(shared_data(f"tokenizers/{path}")))
    losses = Losses()
    losses.look(tokenizer, [*CORPUS, "ΔG ≥ 5 µg/ml 👩‍👩‍👧 日本語\r\n\t <|answer|>"])
    losses.warn()
    assert losses.lost == 0 and not caplog.text


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace", "wordpiece"])
def test_other_kinds_pass(kind: str) -> None:
    letters = sorted({*"".join(CORPUS), "▁"} - {" ", "\n"})
    if kind == "wordpiece":
        vocab = {token: index for index, token in enumerate(["[UNK]", *letters, *("##" + letter for letter in letters)])}
        backend = Backend(models.WordPiece(vocab, unk_token="[UNK]"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    else:
        vocab = {token: index for index, token in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters])}
        backend = Backend(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        bytes_back = [decoders.ByteFallback(), decoders.Fuse()]
        if kind == "metaspace":
            backend.pre_tokenizer = pre_tokenizers.Metaspace()
            backend.decoder = decoders.Sequence([*bytes_back, decoders.Metaspace()])
        else:
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), *bytes_back, decoders.Strip(" ", 1, 0)])
    tokenizer, texts = Tokenizer(backend), [text.replace("\n", " ") for text in CORPUS]
    Losses().look(tokenizer, texts)  # raises when text is lost
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert "".join(tokenizer.decode(ids).split()) == "".join(text.split())
