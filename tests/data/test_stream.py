"""Reading shards that are still being written: the same batches as from finished shards, and waits that are told."""

from __future__ import annotations

import json
import logging
import threading
import time
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch

from osler.checkpoint.folders import folder_name
from osler.data import order, preparer, stream
from osler.data.curriculum import lay_out
from osler.data.loader import Loader, StagedLoader
from osler.data.mixture import Mixture
from osler.data.order import Order
from osler.data.packing import MixedPacking, StreamPacking, WholePacking
from osler.data.shard_set import NotPreparedYet, ShardSet, evict, num_evicted
from osler.data.shards import FORMAT_VERSION, ShardWriter
from osler.data.stream import DiskBudget, wait_for_batches, wait_together
from osler.runtime.errors import UserError
from osler.runtime.stop import AskedToStop, StopFlag
from osler.runtime.world import World

LENGTHS = np.random.default_rng(0).integers(2, 40, 400).tolist()  # about 170 shards, in windows of 1, 1, 2 ... 64
SEQ_LEN, VOCAB = 16, 1000


CHECKPOINT_STEPS = 10


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

    def describe(self) -> None:
        """Write what else is in a folder of data: a manifest, and the journal, for sources of a byte per token."""
        content = {"files": [["notes.txt", sum(self.lengths), ""]]}
        manifest = {"format_version": FORMAT_VERSION, "sources": {self.folder.parent.name: {"content": content}}}
        (self.folder.parents[1] / "manifest.json").write_text(json.dumps(manifest))
        line = {"counts": {"bytes": self.writer.num_tokens}}
        (self.folder.parent / "train.jsonl").write_text(json.dumps(line) + "\n")

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


def test_a_source_that_rests_needs_no_shard(tmp_path):
    """The bytes of a token are asked for at every line of metrics, also in a stage in which a source has weight 0."""
    parts = {name: Written(tmp_path / name) for name in "ab"}
    parts["a"].write(40)
    packings = {name: StreamPacking(Order(part.open(), 0), SEQ_LEN, prompt_loss=True) for name, part in parts.items()}
    assert MixedPacking(packings, Mixture([1, 0])).bytes_per_token(1) == packings["a"].order.shards.bytes_per_token(SEQ_LEN)


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


def test_examples_that_do_not_fit_are_told_window_by_window(tmp_path, caplog):
    written = Written(tmp_path / "train", [30, 5, 30, 30])
    shards = written.open()
    for length in written.lengths:
        written.writer.add([1] * length, [0] + [1] * (length - 1), 3)
    written.write()
    rows = WholePacking(Order(shards, 0), SEQ_LEN, drop_torn=True)
    assert rows.row(0).ids[:4].tolist() == [1] * 4
    assert f"1 of the next 2 documents of {shards.folder} are examples longer than a row of seq_len 16" in caplog.text
    with pytest.raises(UserError, match=r"No document in .* fits into a row of seq_len 2"):
        WholePacking(Order(shards, 0), 2, drop_torn=True).row(0)


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


@pytest.fixture
def budget(tmp_path, monkeypatch):
    """A source of about 8,000 tokens that is written while there is room for 5,000; the budget, and the loader of the run."""
    monkeypatch.setattr(order, "WINDOW_SHARDS", 8)
    monkeypatch.setattr(preparer, "SHARD_TOKENS", 60)
    written = Written(tmp_path / "data" / "notes" / "train")
    loader = loader_of({"notes": written.open()})
    limit = 5000 * 2
    room = partial(preparer.wait_for_room, tmp_path / "data", limit, 2)
    written.writer.before_shard = lambda: (written.describe(), room())

    def make(total_tokens: int) -> DiskBudget:
        settings = {"keep_last": 1, "total_tokens": total_tokens}
        return DiskBudget(tmp_path / "data", limit / preparer.GIGABYTE, loader, tmp_path / "checkpoints", **settings)

    thread = threading.Thread(target=written.write, daemon=True)
    thread.start()
    yield written, loader, make, limit
    evict(written.folder, 10**6)
    thread.join()


def save(folder, step: int) -> None:
    for old in folder.glob("*"):
        old.rmdir()
    (folder / folder_name(step)).mkdir(parents=True)


def test_a_disk_budget_is_kept_and_changes_no_batch(budget, tmp_path):
    written, loader, make, limit = budget
    tended, steps = make(sum(LENGTHS)), sum(LENGTHS) // (4 * SEQ_LEN)
    batches = wait_for_batches(loader.batches(), list(loader.sources.values()), World(), tended.make_room)
    found = []
    for step in range(1, steps + 1):
        found.append(next(batches))
        assert preparer.shard_bytes(tmp_path / "data") <= limit
        if step % CHECKPOINT_STEPS == 0:
            save(tmp_path / "checkpoints", step)
    batches.close()
    whole = Written(tmp_path / "whole")
    whole.write()
    expected = loader_of({"notes": whole.open(growing=False)}).batches()
    assert all(same(*pair) for pair in zip(found, expected, strict=False))
    shards = written.open(growing=False)
    gone = num_evicted(written.folder)
    assert 0 < gone < shards.num_shards and shards.verify() == [] and shards.fingerprint == whole.open().fingerprint
    with pytest.raises(UserError, match=r"was deleted to keep within .*, and is needed again"):
        StreamPacking(Order(shards, 1), SEQ_LEN).row(0)


def test_a_disk_budget_that_cannot_work_is_an_error(budget, tmp_path):
    written, _, make, _ = budget
    while not (tmp_path / "data" / preparer.PAUSED).exists():
        time.sleep(0.01)
    make(sum(LENGTHS)).make_room(0.0)  # no checkpoint: all is needed, but what is there may be enough to save one
    with pytest.raises(UserError, match=r"from the oldest checkpoint on, more is needed at once.*save checkpoints more often"):
        make(sum(LENGTHS)).make_room(stream.STUCK_SECONDS + 1)
    with pytest.raises(UserError, match=r"the run reads notes 2\.\d times\. All shards take about 1\.\de-05 GB"):
        make(5 * sum(LENGTHS) // 2).make_room(0.0)
    assert num_evicted(written.folder) == 0
