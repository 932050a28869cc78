"""Encoding that remembers the tokens of pieces of text. It is about twice as fast as Hugging Face's `tokenizers` library alone.

A tokenizer first splits text into pieces, mostly words, by a regular expression, and a piece has the same tokens everywhere. For
two such expressions, that of GPT-2 and that of tokenizers trained here, Python's `re` finds the same pieces several times
as fast. Python and the library may know different versions of Unicode. So the library itself splits the words around an
uncertain character: one beyond U+FFFF, one that Unicode 3.2 lacked or put in another category, or U+180E.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

GPT2_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MOST_PIECES = 1 << 18  # the most pieces to remember, at about 200 bytes each
LONGEST_PIECE = 24  # characters; longer pieces are not remembered, because they hardly come again

_SPACES = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # White_Space of Unicode
_WAS_SPACE = 0x180E  # a space only in the versions 4.0 to 6.2 of Unicode
_CUT = re.compile(r"(?<=[!-~]) (?=[!-~])")  # both expressions cut before such a space, whatever stands around it
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}


def pieces_of(splitter: dict[str, Any]) -> str | None:
    """Return the expression by which the pre-tokenizer of a byte-level tokenizer finds pieces; None for any other kind."""
    steps = splitter.get("pretokenizers", [splitter])
    if len(steps) == 1 and steps[0].items() >= {**_BYTE_LEVEL, "use_regex": True}.items():
        return GPT2_PIECES
    if len(steps) == 2 and steps[1].items() >= {**_BYTE_LEVEL, "use_regex": False}.items():
        is_isolated = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        return steps[0].get("pattern", {}).get("Regex") if is_isolated else None
    return None


class Memory:
    """Encodes texts by their pieces; `encode` encodes without a memory."""

    def __init__(self, pieces: str, encode: Callable[[Sequence[str]], list[list[int]]]) -> None:
        self._find = re.compile(_translated(pieces)).findall
        self._encode = encode
        self._known: dict[str, bytes] = {}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the same ids of texts as `encode`."""
        batch = []
        unknown: dict[str, list[tuple[list[bytes], int]]] = {}  # each unknown piece, and the places that need its ids
        for text in texts:
            pieces = self._split(text)
            ids: list[Any] = list(map(self._known.get, pieces))
            batch.append(ids)
            place = -1
            for _ in range(ids.count(None)):
                place = ids.index(None, place + 1)
                unknown.setdefault(pieces[place], []).append((ids, place))
        for (piece, places), encoded in zip(unknown.items(), self._encode(list(unknown)), strict=True):
            data = array("I", encoded).tobytes()
            for ids, place in places:
                ids[place] = data
            if len(piece) <= LONGEST_PIECE and len(self._known) < MOST_PIECES:
                self._known[piece] = data
        return [array("I", b"".join(ids)).tolist() for ids in batch]

    def _split(self, text: str) -> list[str]:
        """Return the pieces of a text. The text around an uncertain character, up to the next certain cuts, is one piece."""
        pieces: list[str] = []
        start = 0
        for uncertain in _uncertain()(text):
            if uncertain.start() >= start:
                left = uncertain.start()
                while (left := text.rfind(" ", start, left)) >= 0 and not _CUT.match(text, left):
                    pass
                right = _CUT.search(text, uncertain.end())
                pieces += self._find(text[start : max(start, left)])
                pieces.append(text[max(start, left) : right.start() if right else None])
                start = right.start() if right else len(text)
        return pieces + self._find(text[start:] if start else text)


@functools.cache
def _translated(pieces: str) -> str:
    """Return a regular expression of the library, rewritten for Python's `re`."""
    letters, numbers, marks = (_ranges(code for code in range(1 << 16) if _category(code)[0] == kind) for kind in "LNM")
    bare = {r"(?!\S)": f"(?![^{_SPACES}])", r" ?\p{L}+": f" ?[{letters}]+", r" ?\p{N}": f" ?[{numbers}]"}
    inside = {r"\p{L}": letters, r"\p{N}": numbers, r"\p{M}": marks, r"[^\s": f"[^{_SPACES}", r"\s": f"[{_SPACES}]"}
    for name, meaning in {**bare, **inside}.items():
        pieces = pieces.replace(name, meaning)
    return pieces


@functools.cache
def _uncertain() -> Callable[[str], Iterator[re.Match[str]]]:
    """Return a function that finds the uncertain characters of a text, as the top of this file defines them."""
    old = unicodedata.ucd_3_2_0.category
    codes = (code for code in range(1 << 16) if _category(code) == old(chr(code)) not in ("Cn", "Cs") and code != _WAS_SPACE)
    certain = _ranges(codes)
    return re.compile(f"[^{certain}]").finditer


def _category(code: int) -> str:
    return unicodedata.category(chr(code))


def _ranges(codes: Iterable[int]) -> str:
    """Return characters as ranges, to be written between the brackets of a character class of `re`."""
    runs: list[list[int]] = []
    for code in codes:
        if runs and runs[-1][1] == code - 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in runs)
