"""Reading shards that are still being written: the same batches as from finished shards, and waits that are told."""

from __future__ import annotations

import logging
import threading
from itertools import islice

import numpy as np
import pytest
import torch

from osler.data import stream
from osler.data.curriculum import lay_out
from osler.data.loader import Loader, StagedLoader
from osler.data.mixture import Mixture
from osler.data.order import Order
from osler.data.packing import MixedPacking, StreamPacking, WholePacking
from osler.data.shard_set import NotPreparedYet, ShardSet
from osler.data.shards import ShardWriter
from osler.data.stream import wait_for_batches, wait_together
from osler.runtime.errors import UserError
from osler.runtime.stop import AskedToStop, StopFlag
from osler.runtime.world import World

LENGTHS = np.random.default_rng(0).integers(2, 40, 400).tolist()  # about 170 shards, in windows of 1, 1, 2 ... 64
SEQ_LEN, VOCAB = 16, 1000


class Written:
    """A preparation that a test drives: the growth of a split, and its end."""

    def __init__(self, folder, lengths=LENGTHS, error="") -> None:
        self.folder, self.lengths, self.error = folder, lengths, error
        self.finished = False
        self.writer = ShardWriter(folder, vocab_size=VOCAB, shard_tokens=50)

    def is_finished(self) -> bool:
        if self.error:
            raise UserError(self.error)
        return self.finished

    def write(self, documents=None) -> None:
        """Write the next documents; all that are left, and the end, when no number is given."""
        start = self.writer.num_documents
        for number in range(start, len(self.lengths) if documents is None else start + documents):
            self.writer.add([(number * 7 + place) % (VOCAB - 1) + 1 for place in range(self.lengths[number] - 1)] + [0], None, 3)
        if documents is None:
            self.writer.close()
            self.finished = True

    def open(self, *, growing: bool = True) -> ShardSet:
        growth = self if growing else None
        return ShardSet(self.folder, vocab_size=VOCAB, tokenizer_fingerprint="", eos_id=0, growth=growth)


def loader_of(sources, packing=StreamPacking, **settings) -> StagedLoader:
    packings = {name: packing(Order(shards, 1), SEQ_LEN, prompt_loss=True) for name, shards in sources.items()}
    loader = Loader(MixedPacking(packings, Mixture([3, 1][: len(sources)])), 4, **settings)
    return StagedLoader(lay_out([], seq_len=SEQ_LEN, batch_tokens=4 * SEQ_LEN), [loader])


def same(left, right) -> bool:
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in ("ids", "labels", "document_ids"))


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("packing", [StreamPacking, WholePacking])
def test_batches_and_metrics_are_those_of_finished_shards(tmp_path, packing, workers):
    """Two sources, of which the smaller is read three times; two ranks, which ask whenever a few documents more are there."""
    written = {"large": Written(tmp_path / "large"), "small": Written(tmp_path / "small", LENGTHS[:40])}
    growing = {name: part.open() for name, part in written.items()}
    loaders = [loader_of(growing, packing, rank=rank, world_size=2, workers=workers) for rank in range(2)]
    ranks, found, waits = [loader.batches() for loader in loaders], ([], []), 0
    while len(found[0]) < 150:
        for rank, batches in enumerate(ranks):
            while len(found[rank]) < 150:
                try:
                    found[rank].append(next(batches))
                except NotPreparedYet:
                    waits += 1
                    break
        for part in written.values():
            if not part.finished:
                left = len(part.lengths) - part.writer.num_documents
                part.write(7 if left > 7 else None)
    for batches in ranks:
        batches.close()
    assert waits > 10
    finished = {name: part.open(growing=False) for name, part in written.items()}
    for rank in range(2):
        whole = loader_of(finished, packing, rank=rank, world_size=2)
        assert all(same(*pair) for pair in zip(found[rank], islice(whole.batches(), 150), strict=True))
    assert whole.loaders[0].packing.tokens(600)["small"] > 3 * finished["small"].num_tokens * 0.9
    assert all(shards.is_complete for shards in growing.values())


@pytest.mark.parametrize("packing", [StreamPacking, WholePacking])
def test_the_first_window_yields_rows_at_once(tmp_path, packing):
    """One shard is enough for a stream, and for whole documents the knowledge that another one follows."""
    written = Written(tmp_path / "train")
    rows = packing(Order(written.open(), 0), SEQ_LEN)
    with pytest.raises(NotPreparedYet, match="0 tokens so far"):
        rows.row(0)
    while written.writer.num_tokens < 110:
        written.write(1)
    first = rows.row(0).ids.tolist()
    assert rows.tokens(1) > 0 and rows.epoch_tokens is None
    written.write()
    assert packing(Order(written.open(growing=False), 0), SEQ_LEN).row(0).ids.tolist() == first


def test_what_an_evaluation_reads_is_the_head(tmp_path):
    written = Written(tmp_path / "validation")
    growing = written.open()
    with pytest.raises(NotPreparedYet):
        growing.head(2)
    written.write(100)
    head = growing.head(2)
    written.write()
    growing.refresh()
    assert head.is_complete and head.num_shards == 2 and head.fingerprint == growing.fingerprint_up_to(2)
    assert sum(map(len, head.documents())) == head.num_tokens == growing.ends_of_tokens[1]
    assert growing.head(10**6).num_documents == len(LENGTHS)


def test_a_wait_is_told_and_ends(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(stream, "PATIENCE_SECONDS", 0.0)
    written = Written(tmp_path / "train")
    loader = loader_of({"notes": written.open()})
    batches = wait_for_batches(loader.batches(), list(loader.sources.values()), World())
    thread = threading.Thread(target=written.write)
    monkeypatch.setattr(stream.time, "sleep", lambda seconds: thread.start() if thread.ident is None else thread.join())
    assert next(batches).ids.shape == (4, SEQ_LEN)
    assert f"Training waits for data, which are still being prepared: {written.folder} has 0 tokens so far." in caplog.text
    assert "Training goes on: it waited" in caplog.text
    batches.close()


def test_a_preparation_that_died_is_an_error_and_a_stop_ends_a_wait(tmp_path):
    written = Written(tmp_path / "train")
    loader = loader_of({"notes": written.open()}, workers=2)
    with StopFlag() as flag, pytest.raises(AskedToStop):
        flag.requested = True
        next(wait_for_batches(loader.batches(), list(loader.sources.values()), World()))
    written.error = "The preparation failed: the disk is full."
    with pytest.raises(UserError, match="the disk is full"):
        next(wait_for_batches(loader.batches(), list(loader.sources.values()), World()))
    with pytest.raises(UserError, match="the disk is full"):
        wait_together(lambda: loader.sources["notes"].head(1), World(), "The evaluation")
