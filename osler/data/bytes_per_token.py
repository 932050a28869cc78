"""The command `osler tokenizer compare`: how many bytes of a text one token stands for, tokenizer by tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from osler.data.readers import TextFiles
from osler.runtime import format as fmt
from osler.runtime.errors import UserError
from osler.tokenizer.bpe import Tokenizer

_BATCH = 256  # documents


def compare(paths: Sequence[str], texts: Sequence[str], field: str) -> str:
    """Return a table with a row for each tokenizer and a column for each file or folder of text.

    A line below it names each tokenizer that does not give the texts back, because its numbers are too good. Raises UserError.
    """
    tokenizers = [Tokenizer.load(path) for path in paths]
    counts = [count(tokenizers, TextFiles(text, field, path_key="--text", field_key="--field")) for text in texts]
    rows = [["bytes per token", "vocabulary", *(Path(text).name for text in texts)]]
    for number, (path, tokenizer) in enumerate(zip(paths, tokenizers, strict=True)):
        rates = [f"{size / tokens[number]:.3f}" if tokens[number] else "–" for size, tokens, _ in counts]
        rows.append([path, f"{tokenizer.vocab_size:,}", *rates])
    lossy = [path for number, path in enumerate(paths) if any(number in changed for _, _, changed in counts)]
    notes = (f"{path} does not give every text back, so its numbers are too good." for path in lossy)
    return "\n".join([fmt.table(rows), *notes])


def count(tokenizers: Sequence[Tokenizer], documents: TextFiles) -> tuple[int, list[int], set[int]]:
    """Return the bytes in documents, each tokenizer's tokens for them, and which tokenizers do not give the texts back."""
    size, tokens, changed = 0, [0] * len(tokenizers), set()
    remaining = (document.text for document in documents)
    while batch := list(itertools.islice(remaining, _BATCH)):
        for number, tokenizer in enumerate(tokenizers):
            encoded = tokenizer.encode_batch(batch)
            tokens[number] += sum(map(len, encoded))
            if any(tokenizer.decode(ids) != text for ids, text in zip(encoded, batch, strict=True)):
                changed.add(number)
        size += sum(len(text.encode()) for text in batch)
    if not size:
        raise UserError(f"There is no text in {documents.path} to compare tokenizers on.")
    return size, tokens, changed
