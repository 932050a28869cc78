"""What the data tests share: a small tokenizer, and a prepared split made of documents of chosen lengths."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from osler.data.shard_set import ShardSet
from osler.data.shards import ShardWriter
from osler.tokenizer.bpe import Tokenizer

EOS_ID = 0
MakeShards = Callable[..., ShardSet]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["The patient has fever and cough. Pneumonia is likely; amoxicillin treats it. "] * 9, 320)


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """Write a split whose k-th document is `length` distinct ids ending in EOS: every token says where it came from."""

    def make(lengths: Sequence[int], *, masks: Sequence[list[int]] | None = None, shard_tokens: int = 50) -> ShardSet:
        folder = tmp_path / f"shards-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        vocab_size = sum(lengths) + 1
        writer = ShardWriter(folder / "train", vocab_size=vocab_size, shard_tokens=shard_tokens)
        token = 1
        for index, length in enumerate(lengths):
            ids = [*range(token, token + length - 1), EOS_ID]
            token += length - 1
            writer.add(ids, masks[index] if masks is not None else None, num_bytes=length)
        writer.close()
        return ShardSet(folder / "train", vocab_size=vocab_size, tokenizer_fingerprint="t" * 16, eos_id=EOS_ID)

    return make
