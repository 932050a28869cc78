"""Finds the languages of texts with py3langid. Here its automaton reads many texts at once, which is five times as fast."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from osler.runtime.errors import UserError


def languages_of(texts: Sequence[str]) -> list[str]:
    """Return the ISO 639-1 codes of the languages of texts."""
    return _identify()(texts)


def check_languages(names: Sequence[str], key: str) -> None:
    """Raise UserError when a language is unknown, or the library is missing; ``key`` is the field that names the languages."""
    known = sorted(code for code, _ in _langid().rank(""))
    for name in names:
        if name not in known:
            raise UserError(
                f"{key}: `{name}` is not the ISO 639-1 code of a language that can be told; known: {', '.join(known)}"
            )


@functools.cache
def _identify() -> Callable[[Sequence[str]], list[str]]:
    langid = _langid()
    try:
        return _Automaton(langid._get_identifier()).languages_of
    except AttributeError:  # another version of the library
        return lambda texts: [str(langid.classify(text)[0]) for text in texts]


def _langid() -> Any:
    try:
        from py3langid import langid
    except ImportError:
        remedy = "pip install -e '.[clean]' in Osler's source tree, or leave clean.languages out."
        raise UserError(f"Languages are told by py3langid: {remedy}") from None
    return langid


class _Automaton:
    """The model of the library: a naive Bayes classifier of the sequences of bytes that an automaton finds in a text."""

    def __init__(self, model: Any) -> None:
        self._rows = np.array(model.tk_row, np.int64) << 8
        self._next = np.frombuffer(model.tk_nextmove, np.dtype(model.tk_nextmove.typecode))
        self._feature = np.array(model.tk_output, np.int64)
        self._weights, self._prior, self._names = model.nb_ptc, model.nb_pc, model.nb_classes
        self._encode = model._encode

    def languages_of(self, texts: Sequence[str]) -> list[str]:
        encoded = [self._encode(text) for text in texts]
        longest = max(map(len, encoded), default=0)
        letters = np.frombuffer(b"".join(text.ljust(longest, b"\0") for text in encoded), np.uint8).reshape(len(texts), longest).T
        states = np.zeros(len(texts), np.int64)
        found = np.empty(letters.shape, np.int64)
        for place, column in enumerate(letters):
            states = self._next[self._rows[states] + column].astype(np.int64)
            found[place] = self._feature[states]
        size = len(self._weights)
        keys = found + np.arange(len(texts)) * size  # one number for each text and feature
        inside = np.arange(longest)[:, None] < np.array([len(text) for text in encoded], np.int64)
        pairs, counts = np.unique(keys[(found >= 0) & inside], return_counts=True)
        weights, ends = np.log1p(counts.astype(np.float32)), np.searchsorted(pairs, np.arange(len(texts) + 1) * size).tolist()
        return [self._name(pairs[first:last] % size, weights[first:last]) for first, last in pairwise(ends)]

    def _name(self, features: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> str:
        scores = weights @ self._weights[features] + self._prior
        return str(self._names[int(scores.argmax()) if len(features) else 0])
