"""Reading shards that are still being written: the same batches as from finished shards, and waits that are told."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from itertools import islice

import numpy as np
import pytest

from osler.checkpoint.folders import folder_name
from osler.data import order, preparer, stream
from osler.data.config import CurriculumStage, FilesData
from osler.data.curriculum import lay_out
from osler.data.loader import Loader
from osler.data.mixture import Mixture
from osler.data.order import Order
from osler.data.packing import MixedPacking, StreamPacking, WholePacking
from osler.data.shard_set import NotPreparedYet, ShardSet, evict, num_evicted
from osler.data.shards import FORMAT_VERSION, ShardWriter, read_data_manifest
from osler.data.sources import prepare_sources
from osler.data.stream import DiskBudget, steps_ready, wait_for_batches, wait_together
from osler.runtime.errors import UserError
from osler.runtime.files import write_json
from osler.runtime.stop import AskedToStop, StopFlag
from osler.runtime.world import World
from osler.tokenizer.bpe import Tokenizer
from tests.data.loaders import loader_of, same

LENGTHS = np.random.default_rng(0).integers(2, 40, 400).tolist()  # about 170 shards, in windows of 1, 1, 2 ... 64
SEQ_LEN, VOCAB = 16, 1000


CHECKPOINT_STEPS = 10


class Written:
    """A preparation that a test drives: the growth of a split, its end, and the manifest and the journal beside it."""

    def __init__(self, root, lengths=LENGTHS) -> None:
        self.folder, self.lengths = root / "notes" / "train", lengths
        self.writer = ShardWriter(self.folder, vocab_size=VOCAB, shard_tokens=50)
        self.describe()

    @property
    def finished(self) -> bool:
        return self.writer.num_documents == len(self.lengths)

    def describe(self, splits=()) -> None:
        """Write what else is in a folder of data, for a source of a byte per token."""
        entry = {"content": {"files": [["notes.txt", sum(self.lengths), ""]]}, "splits": dict.fromkeys(splits)}
        manifest = {"format_version": FORMAT_VERSION, "complete": False, "sources": {"notes": entry}, "validation": {}}
        write_json(self.folder.parents[1] / "manifest.json", manifest)
        line = {"digest": "", "counts": {"bytes": self.writer.num_tokens}}
        (self.folder.parent / "train.jsonl").write_text(json.dumps(line) + "\n")

    def write(self, documents=None) -> None:
        """Write the next documents; all that are left, and the end, when no number is given."""
        start = self.writer.num_documents
        for number in range(start, len(self.lengths) if documents is None else start + documents):
            self.writer.add([(number * 7 + place) % (VOCAB - 1) + 1 for place in range(self.lengths[number] - 1)] + [0], None, 3)
        if documents is None:
            self.writer.close()
            self.describe(splits=["train"])

    def open(self, *, growing: bool = True) -> ShardSet:
        return ShardSet(self.folder, vocab_size=VOCAB, tokenizer_fingerprint="", eos_id=0, growing=growing)


def mixed(sources, packing=StreamPacking) -> MixedPacking:
    packings = {name: packing(Order(shards, 1), SEQ_LEN, prompt_loss=True) for name, shards in sources.items()}
    return MixedPacking(packings, Mixture([3, 1][: len(sources)]))


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
    loaders = [loader_of(mixed(growing, packing), 4, rank=rank, world_size=2, workers=workers) for rank in range(2)]
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
        whole = loader_of(mixed(finished, packing), 4, rank=rank, world_size=2)
        assert all(same(*pair) for pair in zip(found[rank], islice(whole.batches(), 150), strict=True))
    assert whole.packings[0].tokens(600)["small"] > 3 * finished["small"].num_tokens * 0.9
    assert all(shards.is_complete for shards in growing.values())


@pytest.mark.parametrize("packing", [StreamPacking, WholePacking])
def test_the_first_window_yields_rows_at_once(tmp_path, packing):
    """One shard is enough for a stream, and for whole documents the knowledge that another one follows."""
    written = Written(tmp_path)
    rows = packing(Order(written.open(), 0), SEQ_LEN)
    with pytest.raises(NotPreparedYet, match="0 tokens so far"):
        rows.row(0)
    while written.writer.num_tokens < 110:
        written.write(1)
    first = rows.row(0).ids.tolist()
    assert rows.tokens(1) > 0 and rows.epoch_tokens is None
    written.write()
    assert packing(Order(written.open(growing=False), 0), SEQ_LEN).row(0).ids.tolist() == first


def test_a_window_that_is_not_prepared_needs_the_row_that_leads_into_it(tmp_path):
    """A rollback may skip rows of it before one was read. Its first row begins in the window before, which must stay."""
    written = Written(tmp_path)
    written.write(100)
    packing = StreamPacking(Order(written.open(), 1), SEQ_LEN)
    prepared = int(packing.order.epoch(0).ends[-1])
    rows = range(prepared // SEQ_LEN, prepared // SEQ_LEN + 20)
    found = [packing.first_needed(row) for row in rows]
    written.write()
    assert found == [packing.first_needed(row) for row in rows] and max(found) < prepared


def test_examples_that_do_not_fit_are_told_window_by_window(tmp_path, caplog):
    written = Written(tmp_path, [30, 5, 30, 30])
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
    written = Written(tmp_path)
    growing = written.open()
    with pytest.raises(NotPreparedYet):
        growing.head(2)
    written.write(100)
    head, ends = growing.head(2), written.open(growing=False).ends_of_tokens.tolist()
    for most, count in ((ends[1], 2), (ends[2] - 1, 2), (1, 1)):  # as many as fit, and one at least
        assert growing.head_within(most).num_tokens == ends[count - 1]
    with pytest.raises(NotPreparedYet):  # a later shard may fit as well
        growing.head_within(ends[-1])
    written.write()
    growing.refresh()
    assert head.is_complete and head.num_shards == 2 and head.fingerprint == growing.fingerprint_up_to(2)
    assert sum(map(len, head.documents())) == head.num_tokens == growing.ends_of_tokens[1]
    assert growing.head(10**6).num_documents == growing.head_within(10**9).num_documents == len(LENGTHS)


def test_a_wait_is_told_and_ends(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(stream, "PATIENCE_SECONDS", 0.0)
    written = Written(tmp_path)
    batches = wait_for_batches(loader_of(mixed({"notes": written.open()}), 4), range(9), World())
    thread = threading.Thread(target=written.write)
    monkeypatch.setattr(stream.time, "sleep", lambda seconds: thread.start() if thread.ident is None else thread.join())
    assert next(batches).ids.shape == (4, SEQ_LEN)
    assert f"Training waits for data, which are still being prepared: {written.folder} has 0 tokens so far." in caplog.text
    assert "Training goes on: it waited" in caplog.text
    batches.close()


def test_a_rank_that_has_its_data_says_that_it_waits_for_others(monkeypatch, caplog):
    class Late(World):
        votes = 0

        def all_reduce_min(self, found, go_on):
            self.votes += 1
            return [found and self.votes > 3, go_on]

    def attempt() -> str:
        if not caplog.messages:
            raise NotPreparedYet("notes have 0 tokens so far")
        return "data"

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(stream, "PATIENCE_SECONDS", 0.0)
    assert wait_together(attempt, Late(), "Training") == "data"
    told = [message.partition("prepared: ")[2] for message in caplog.messages]
    assert told == ["notes have 0 tokens so far.", "other processes wait for theirs.", "other processes wait for theirs.", ""]


def test_a_preparation_that_died_is_an_error_and_a_stop_ends_a_wait(tmp_path):
    def tend(waited: float) -> None:
        raise UserError("The process that prepares was killed.")

    loader = loader_of(mixed({"notes": Written(tmp_path).open()}), 4, workers=2)
    with StopFlag() as flag, pytest.raises(AskedToStop):
        flag.requested = True
        next(wait_for_batches(loader, range(9), World()))
    with pytest.raises(UserError, match="was killed"):
        next(wait_for_batches(loader, range(9), World(), tend))


class Ranks(World):
    """A rank whose peers know the data of three steps more at each vote about steps, until all are prepared."""

    votes = 0

    def all_reduce_min(self, *values):
        Ranks.votes += 1
        return [min(value, 3) if 3 < value < stream.ALL_STEPS else value for value in values]


def test_steps_are_agreed_on_up_to_the_end_of_a_stage(tmp_path):
    """In the second stage a source rests, so its rows do not tell what is there for the first one."""
    parts = {name: Written(tmp_path / name) for name in "ab"}
    for name, documents in {"a": 300, "b": 20}.items():
        parts[name].write(documents)
    packings = {name: StreamPacking(Order(part.open(), 1), SEQ_LEN) for name, part in parts.items()}
    stages = (CurriculumStage(seq_len=SEQ_LEN, until_tokens=14 * 4 * SEQ_LEN), CurriculumStage(seq_len=SEQ_LEN))
    timeline = lay_out(stages, seq_len=SEQ_LEN, batch_tokens=4 * SEQ_LEN)
    loader = Loader(timeline, [MixedPacking(packings, Mixture(weights)) for weights in ([1, 1], [1, 0])])
    steps = steps_ready(loader, 0, 0)
    assert steps == 8 and all(loader.batch(step).ids.shape == (4, SEQ_LEN) for step in range(steps))
    assert steps_ready(loader, 14, 0) == 64


@pytest.mark.parametrize("workers", [0, 2])
def test_the_ranks_agree_on_many_steps_at_once(tmp_path, workers):
    written, Ranks.votes = Written(tmp_path), 0
    written.write(300)
    batches = wait_for_batches(loader_of(mixed({"notes": written.open()}), 4, workers=workers), range(9), Ranks())
    found = list(islice(batches, 30))
    assert Ranks.votes == 2 * 10  # whether all have data, and for how many steps
    written.write()
    found += islice(batches, 100)  # beyond an epoch
    assert Ranks.votes < 2 * 20, "what is prepared takes no votes"
    expected = loader_of(mixed({"notes": written.open(growing=False)}), 4).batches()
    assert all(same(*pair) for pair in zip(found, expected, strict=False))
    batches.close()


TOKENS = sum(LENGTHS)


@pytest.fixture
def budget(tmp_path, monkeypatch):
    """A source of about 170 shards that is written while there is room for 60; its loader, and what makes its budget."""
    monkeypatch.setattr(order, "WINDOW_SHARDS", 8)
    written = Written(tmp_path / "data")
    loader, limit = loader_of(mixed({"notes": written.open()}), 4), 70 * preparer.BLOCK_BYTES

    def before_shard(num_bytes: int) -> None:
        written.describe()
        preparer.wait_for_room(tmp_path / "data", limit, num_bytes)

    def make(total_tokens: int) -> DiskBudget:
        plan = {"keep_last": 1, "total_tokens": total_tokens, "spare_tokens": 320}
        return DiskBudget(tmp_path / "data", limit / preparer.GIGABYTE, loader, tmp_path / "checkpoints", **plan)

    written.writer.before_shard = before_shard
    thread = threading.Thread(target=written.write, daemon=True)
    thread.start()
    yield written, loader, make, limit
    written.writer.before_shard = lambda num_bytes: None
    evict(written.folder, 10**6)
    (tmp_path / "data" / preparer.PAUSED).unlink(missing_ok=True)
    thread.join()


def save(folder, step: int) -> None:
    for old in folder.glob("*"):
        shutil.rmtree(old)
    (folder / folder_name(step)).mkdir(parents=True)
    (folder / folder_name(step) / "state.json").write_text('{"incidents": {"data_offset": 0}}')


def test_a_disk_budget_is_kept_and_changes_no_batch(budget, tmp_path):
    written, loader, make, limit = budget
    tended, steps = make(7 * TOKENS // 10), 7 * TOKENS // 10 // (4 * SEQ_LEN)
    found, batches = [], wait_for_batches(loader, range(steps), World(), tended.make_room)
    for step in range(1, steps + 1):
        found.append(next(batches))
        assert preparer.disk_bytes(tmp_path / "data") <= limit
        if step % CHECKPOINT_STEPS == 0:
            save(tmp_path / "checkpoints", step)
    batches.close()
    whole = Written(tmp_path / "whole")
    whole.write()
    expected = loader_of(mixed({"notes": whole.open(growing=False)}), 4).batches()
    assert all(same(*pair) for pair in zip(found, expected, strict=False))
    shards = written.open(growing=False)
    assert 0 < num_evicted(written.folder) < shards.num_shards and shards.verify() == []
    with pytest.raises(UserError, match=r"was deleted to keep within .*, and is needed again"):
        shards.document(0)


def test_a_disk_budget_that_cannot_work_is_an_error(budget, tmp_path, monkeypatch):
    """Nothing is deleted that the run may still need; without news nothing is read again."""
    written, _, make, _ = budget
    paused, reads = tmp_path / "data" / preparer.PAUSED, []
    while not paused.exists():
        time.sleep(0.01)
    monkeypatch.setattr(stream, "read_data_manifest", lambda folder: reads.append(folder) or read_data_manifest(folder))
    tended = make(7 * TOKENS // 10)
    for _ in range(3):  # no checkpoint: all is needed, but what is there may be enough to save one
        tended.make_room(0.0)
    assert len(reads) == 1
    with pytest.raises(
        UserError, match=r"more shards are needed at once from the oldest checkpoint on.*save checkpoints more often"
    ):
        tended.make_room(stream.STUCK_SECONDS + 1)
    save(tmp_path / "checkpoints", 20)
    for total in (95 * TOKENS // 100, TOKENS, 3 * TOKENS):  # it is not certain that the source has as many, or certain that not
        with pytest.raises(UserError, match=r"rollbacks included, .*: [\d,]+ tokens of notes, which .* set total_tokens lower"):
            make(total).make_room(0.0)
    assert num_evicted(written.folder) == 0 and paused.exists()
    tended.make_room(0.0)
    assert num_evicted(written.folder) > 0


def test_a_source_that_is_smaller_than_expected_is_told_as_soon_as_it_is_known(tmp_path):
    written = Written(tmp_path)
    written.write()
    evict(written.folder, 2)
    steps = TOKENS // (4 * SEQ_LEN)
    loader = loader_of(mixed({"notes": written.open()}), 4)
    assert loader.batch(20).ids.shape == (4, SEQ_LEN)
    with pytest.raises(UserError, match=r"reads [\d,]+ tokens of notes, which has [\d,]+. The first of them were deleted"):
        next(wait_for_batches(loader, range(20, steps + 1), World()))
    assert next(wait_for_batches(loader, range(20, steps), World())).ids.shape == (4, SEQ_LEN)


def test_a_preparation_begins_without_the_request_of_one_that_ended(tmp_path):
    """It may have been given more room, and a run that finds the request would end before it could tell."""
    (tmp_path / "notes.txt").write_text("A cough and a fever.")
    given = FilesData(path=str(tmp_path / "notes.txt"), holdout_fraction=0.0), Tokenizer.train(["A cough and a fever."], 300)
    prepare_sources(*given, tmp_path / "data")
    (tmp_path / "data" / preparer.PAUSED).touch()
    preparer.Preparer(*given, tmp_path / "data", consent=None, validation=()).close()
    assert not (tmp_path / "data" / preparer.PAUSED).exists()


@pytest.mark.parametrize("mask", [None, [0, 1, 1]])
def test_room_is_asked_for_all_of_a_shard(tmp_path, mask):
    writer, asked = ShardWriter(tmp_path, vocab_size=VOCAB), []
    writer.before_shard = asked.append
    writer.add([1, 2, 0], mask, 3)
    writer.close()
    assert asked == [(tmp_path / "shard-0000000.bin").stat().st_size] == [4 + 3 * (2 if mask is None else 3)]
