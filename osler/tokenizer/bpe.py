"""Byte-level BPE: text to token ids and back, exactly, by the `tokenizers` library.

A tokenizer that is trained here has all 256 bytes, so there is no unknown token and ``decode(encode(s)) == s`` for any text. Its
pre-tokeniser is GPT-2's (Radford et al. 2019) with three changes: digits stand alone (so numbers are compared and added digit by
digit), combining marks stay with their letter, and a run of line breaks or the letter of an option is one piece. Four special
tokens mark a conversation; a trained vocabulary has them first (ids 0..3), and `with_specials` appends those that a loaded one
lacks. Only the program can produce a special token: text that contains ``<|answer|>`` is encoded as plain characters.
"""

from __future__ import annotations

import functools
import gzip
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from osler.runtime.errors import UserError
from osler.runtime.files import fingerprint, read_json
from osler.tokenizer.memory import GPT2_PIECES, Memory, pieces_of

logger = logging.getLogger(__name__)

QUESTION = "<|question|>"
THINKING = "<|thinking|>"
ANSWER = "<|answer|>"
EOS = "<|endoftext|>"
SPECIALS = (EOS, QUESTION, THINKING, ANSWER)
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what the bytes of half a character decode to

PIECES = (
    r"'(?:[sdmt]|ll|ve|re)"  # English contractions
    r"| ?\([A-Z]\)"  # the letter of an option; one token, so that finding it is one step of copying for a small model
    r"| ?[\p{L}\p{M}]+"  # a word with the space before it
    r"| ?\p{N}"  # one digit
    r"| ?[^\s\p{L}\p{M}\p{N}]+"  # punctuation
    r"|\s{0,1000}[\r\n]+"  # line breaks and the spaces before them; the library's regular expressions bound how far they look
    r"|\s+(?!\S)|\s+"  # other spaces; the last one before a word belongs to the word
)
# The time of training grows with the square of a piece's length. No language has longer words; genomes and binary data do.
LONGEST_TRAINED_CHARS = 1000
_LONG = f"{{{LONGEST_TRAINED_CHARS + 1},}}"
_LONG_RUN = re.compile(rf"(?<!\S)\S{_LONG}|(?<!\s)\s{_LONG}")  # only such runs can hold a longer piece
_LOOK_CHARS = 1 << 16  # a long run is looked at in stretches of this length, because every piece takes memory
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which UTF-8 cannot write


class Tokenizer:
    """Encodes text as token ids and decodes them; immutable and safe to share between threads."""

    def __init__(self, backend: Backend) -> None:
        """Wrap a `tokenizers` object, which must not change later; this switches padding, truncation and dropout off."""
        backend.no_padding()
        backend.no_truncation()
        if isinstance(backend.model, models.BPE):
            backend.model.dropout = None
        backend.encode_special_tokens = True  # a special token inside text is plain text
        self._backend = backend
        added = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        names = added | {name for name in SPECIALS if backend.token_to_id(name) is not None}
        vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self._id_of_special = {name: vocab[name] for name in sorted(names)}
        self.special_ids = frozenset(self._id_of_special.values())
        self.vocab_size = max(vocab.values(), default=-1) + 1  # the smallest number above every id
        self._any_special = re.compile("|".join(map(re.escape, sorted(names))) or "(?!)")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json[.gz], GPT-2's vocab.bpe with encoder.json, or a folder with one of these; raises UserError."""
        path = Path(path)
        if path.is_dir():
            names = ("tokenizer.json", "tokenizer.json.gz", "vocab.bpe")
            found = next((path / name for name in names if (path / name).is_file()), None)
            if found is None:
                raise UserError(f"{path} holds no tokenizer: none of {', '.join(names)} is in it.")
            path = found
        if not path.is_file():
            raise UserError(f"There is no tokenizer at {path}.")
        if path.name in ("vocab.bpe", "encoder.json"):
            return cls.from_bytes(_gpt2_pair_as_json(path.parent), name=f"The pair vocab.bpe and encoder.json in {path.parent}")
        data = path.read_bytes()
        if path.suffix == ".gz":
            try:
                data = gzip.decompress(data)
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{path} is not a whole gzip file: {error}. Copy it again.") from None
        return cls.from_bytes(data, name=str(path))

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "These bytes") -> Tokenizer:
        """Read the content of a tokenizer.json; raises UserError, which calls it `name`."""
        try:
            return cls(Backend.from_buffer(data))
        except ValueError as error:  # the one exception that the library raises for any malformed file
            raise UserError(f"{name} cannot be read as a tokenizer.json: {error}.") from None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, specials: Sequence[str] = SPECIALS) -> Tokenizer:
        """Learn byte-level BPE merges from `texts`; the same texts in the same order give the same tokenizer.

        `vocab_size` counts the special tokens (which come first) and the 256 bytes, and is refused by a UserError when it is
        smaller than these. Little text may yield fewer tokens.
        """
        if vocab_size < (smallest := 256 + len(specials)):
            needed = f"the 256 bytes and {len(specials)} special tokens need at least {smallest}"
            raise UserError(f"vocab_size={vocab_size} is too small: {needed}.")
        backend = Backend(models.BPE())
        backend.pre_tokenizer = split_bytes(PIECES)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(specials),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(_cut_long_pieces(texts), trainer)
        return cls(backend)

    def with_specials(self) -> Tokenizer:
        """Return a tokenizer with Osler's special tokens; missing ones get the ids after the last id."""
        added = self._backend.get_added_tokens_decoder()
        if all((token := added.get(self._id_of_special.get(name, -1))) and token.special for name in SPECIALS):
            return self
        backend = Backend.from_str(self._backend.to_str())
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
        return Tokenizer(backend)

    def to_bytes(self) -> bytes:
        """Return the tokenizer as the content of a tokenizer.json, which `from_bytes` and Hugging Face tools read."""
        return self._backend.to_str(pretty=True).encode("utf-8")

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return 16 hex digits over what decides the ids: vocabulary, merges, added tokens, normaliser, pre-tokeniser.

        Options that are off are left out, because a newer library may write more of them.
        """
        content: dict[str, Any] = json.loads(self._backend.to_str())
        model = {key: value for key, value in content["model"].items() if value not in (None, False, "")}
        added = [[token["id"], token["content"], token["special"]] for token in content["added_tokens"]]
        return fingerprint([model, added, content["normalizer"], content["pre_tokenizer"]])

    @property
    def eos_id(self) -> int:
        """Return the id of ``<|endoftext|>``."""
        return self.special_id(EOS)

    def special_id(self, name: str) -> int:
        """Return the id of a special token; raises UserError when the tokenizer does not have it."""
        if name not in self._id_of_special:
            have = ", ".join(self._id_of_special) or "none"
            raise UserError(f"The tokenizer has no special token {name} (it has: {have}); with_specials() adds it.")
        return self._id_of_special[name]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens written in it are plain text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts; special tokens written in them are plain text. Raises UserError for half a character."""
        try:
            batch = self._encode(list(texts))
        except (TypeError, UnicodeEncodeError):
            half = next(filter(None, map(_HALF_CHARACTER.search, texts)))
            where = f"(a lone surrogate, {half[0]!r}) at position {half.start()}"
            raise UserError(f"A text holds half a character {where}.") from None
        for index, text in enumerate(texts):
            if self._any_special.search(text) and not self.special_ids.isdisjoint(batch[index]):
                # The vocabulary has a special token as an ordinary token, too: cut the text inside each special token.
                cuts = [found.start() + 1 for found in re.finditer(f"(?={self._any_special.pattern})", text)]
                parts = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
                batch[index] = [one for part in parts for one in self._backend.encode(part, add_special_tokens=False).ids]
        return batch

    @functools.cached_property
    def _encode(self) -> Callable[[Sequence[str]], list[list[int]]]:
        """The fastest way to encode texts that contain no special token."""
        backend = self._backend
        is_plain = isinstance(backend.model, models.BPE) and backend.normalizer is None and backend.pre_tokenizer is not None
        if is_plain and all(token.special for token in backend.get_added_tokens_decoder().values()):
            pieces = pieces_of(json.loads(backend.pre_tokenizer.__getstate__()))
            if pieces in (GPT2_PIECES, PIECES):
                return Memory(pieces, self.encode_anew).encode_batch
        return self.encode_anew

    def encode_anew(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts by the library alone, on all cores; the reference for `encode_batch`."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        if skip_special:
            ids = [token_id for token_id in ids if token_id not in self.special_ids]
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def bytes_of(self, token_id: int) -> bytes | None:
        """Return the bytes of one token; None for half a character where the tokens are not made of bytes."""
        text, name = self.decode([token_id]), self._backend.id_to_token(token_id) or ""
        if INCOMPLETE not in text or name == text:
            return text.encode()
        return bytes(map(_byte_of().__getitem__, name)) if self.is_byte_level else None

    @property
    def is_byte_level(self) -> bool:
        """Whether its tokens are made of bytes, so that it can write any text if it has all bytes."""
        return "ByteLevel(" in repr(self._backend.decoder)  # alone or in a sequence of decoders

    def normalize(self, text: str) -> str:
        """Return the text after the tokenizer's normalizer, which may fold case, accents or spaces."""
        normalizer = self._backend.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))


@functools.cache
def _byte_of() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for: its own, or one that cannot be printed."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = iter(sorted({*range(256)} - {*map(ord, alphabet)}))
    return {character: ord(character) if ord(character) < 256 else next(others) for character in alphabet}


def split_bytes(pieces: str) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokeniser that splits text by a regular expression and writes each byte as one character."""
    split = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _cut_long_pieces(texts: Iterable[str]) -> Iterator[str]:
    """Yield `texts`, cut into parts where a piece is too long for training; the first cut is logged."""
    splitter = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    told = False
    for text in texts:
        start = 0
        looks = ((look, run.end()) for run in _LONG_RUN.finditer(text) for look in range(run.start(), run.end(), _LOOK_CHARS))
        for look, run_end in looks:
            for _, (begin, end) in splitter.pre_tokenize_str(text[look : min(look + _LOOK_CHARS, run_end)]):
                for cut in range(look + begin + LONGEST_TRAINED_CHARS, look + end, LONGEST_TRAINED_CHARS):
                    yield text[start:cut]
                    start = cut
        if start and not told:
            told = True
            logger.info(
                f"The text holds words of more than {LONGEST_TRAINED_CHARS:,} characters, such as {text[start - 20 : start]!r}; "
                "the tokenizer is trained on parts of them."
            )
        yield text[start:]


def _gpt2_pair_as_json(folder: Path) -> bytes:
    """Return GPT-2's vocab.bpe (merges, best first) and encoder.json (token to id) as one tokenizer.json."""
    for path in (folder / "vocab.bpe", folder / "encoder.json"):
        if not path.is_file():
            raise UserError(f"A GPT-2 vocabulary is the two files vocab.bpe and encoder.json; {path} is missing.")
    text = (folder / "vocab.bpe").read_text(encoding="utf-8", errors="replace")
    merges = [line for line in text.splitlines() if line]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": read_json(folder / "encoder.json"), "merges": merges}
    content = {"version": "1.0", "pre_tokenizer": byte_level, "decoder": byte_level, "model": model}
    return json.dumps(content, ensure_ascii=False).encode("utf-8")
