"""SuperBPE (Liu et al. 2025, arXiv 2503.13423): byte-level BPE whose later tokens may span up to four words.

The first tokens are those of ordinary BPE. A second pass learns from the same text in pieces of many words. Each token is written
as one character, so the library's own trainer learns merges of tokens, which are then read as merges of bytes. A token is
refused, with the merges that use it, if it has more than four words, ends in a space, or has a space after a colon: with the last
two, a prompt such as "Answer:" would get other tokens than the same words followed by an answer.
"""

import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from osler.tokenizer.bpe import SPECIALS, Tokenizer, split_bytes

MAX_WORDS = 4
# As in BPE, a digit, the letter of an option and line breaks are separate pieces. Other pieces have up to 64 words, so that the
# time of learning and encoding is in proportion to the text. In a longer word, each part of 16 characters counts as a word.
_ALONE = r" ?\p{N}| ?\([A-Z]\)"
_WORD = rf"(?!{_ALONE})(?:[ (][^ (\p{{N}}\r\n]{{0,16}}|[^ (\p{{N}}\r\n]{{1,16}})"
PIECES = rf"{_ALONE}|[\r\n]+|(?:{_WORD}){{1,64}}"

_SPACE = "Ġ"  # byte-level BPE's sign for it
_FIRST = 0x10000  # the token of id i is the character of code _FIRST + i, which is never a surrogate
_LEAST_OCCURRENCES = 2  # a superword that occurs only once is not worth a token
_PART_CHARS = 1 << 16  # texts are encoded in parts of this length, because every encoding takes memory
_BATCH = 32  # parts


def train(texts: Iterable[str], vocab_size: int, transition: int) -> Tokenizer:
    """Learn `transition` tokens of BPE (see `Tokenizer.train`), and then superwords up to `vocab_size`.

    The same texts give the same tokenizer; little text may yield fewer tokens. Raises UserError for too small a `transition`.
    """
    texts = list(texts)
    content = json.loads(Tokenizer.train(texts, transition).to_bytes())
    bpe = Backend.from_str(json.dumps(content))
    bpe.pre_tokenizer = split_bytes(PIECES)
    bpe.encode_special_tokens = True  # a special token inside text is plain text
    lines = list(_written_in_tokens(bpe, texts))
    vocab: dict[str, int] = content["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    tries = (vocab_size - len(tokens)) * 9 // 8  # more than needed, because some are refused
    while True:
        learned = _learn(lines, len(tokens), tries)
        vocab, merges = _with_superwords(tokens, content["model"]["merges"], learned, vocab_size)
        if len(vocab) == vocab_size or len(learned) < tries:
            break
        tries *= 2
    content["model"] |= {"vocab": vocab, "merges": merges}
    content["pre_tokenizer"] = json.loads(bpe.to_str())["pre_tokenizer"]
    return Tokenizer.from_bytes(json.dumps(content).encode())


def _written_in_tokens(bpe: Backend, texts: Sequence[str]) -> Iterator[str]:
    """Yield the texts with a character for each token and a space between pieces."""
    parts = [text[start : start + _PART_CHARS] for text in texts for start in range(0, len(text), _PART_CHARS)]
    for start in range(0, len(parts), _BATCH):
        for encoding in bpe.encode_batch(parts[start : start + _BATCH], add_special_tokens=False):
            characters = np.array(encoding.ids, dtype="<u4") + np.array(_FIRST, dtype="<u4")
            borders = np.flatnonzero(np.diff(np.array(encoding.word_ids))) + 1
            yield np.insert(characters, borders, ord(" ")).tobytes().decode("utf-32-le")


def _learn(lines: Sequence[str], num_tokens: int, num_merges: int) -> list[tuple[str, str]]:
    """Return the merges that BPE learns from texts written in tokens, as pairs of such texts."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens + num_merges,
        min_frequency=_LEAST_OCCURRENCES,
        initial_alphabet=[chr(_FIRST + token_id) for token_id in range(num_tokens)],
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    return [(left, right) for left, right in json.loads(backend.to_str())["model"]["merges"]]


def _with_superwords(
    tokens: Sequence[str], merges: Sequence[Sequence[str]], learned: Sequence[tuple[str, str]], vocab_size: int
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and the merges of BPE, extended by the merges learned of its tokens, up to `vocab_size`.

    Two ways to cut a text may have led to the same merge of bytes, or to the same token. The first way decides its rank or id.
    """
    written = {chr(_FIRST + token_id): token for token_id, token in enumerate(tokens)}
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    ranked = dict.fromkeys((left, right) for left, right in merges)
    for pair in learned:
        left, right = ("".join(map(written.__getitem__, side)) for side in pair)
        if len(vocab) == vocab_size:
            break
        if left in vocab and right in vocab and not _is_refused(left + right):
            vocab.setdefault(left + right, len(vocab))
            ranked.setdefault((left, right))
    return vocab, list(ranked)


def _is_refused(token: str) -> bool:
    """Whether a token, in the characters of byte-level BPE, is refused; text must never become a special token."""
    words = sum(map(bool, token.split(_SPACE)))
    ends_in_space = words > 0 and token.endswith(_SPACE)
    return words > MAX_WORDS or ends_in_space or f":{_SPACE}" in token or token in SPECIALS
