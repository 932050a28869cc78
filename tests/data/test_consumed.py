"""What a run was given, against counting the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest

from osler.data.config import CurriculumStage as Stage
from osler.data.consumed import ConsumedData, source_metrics
from osler.data.curriculum import lay_out
from osler.data.loader import Loader, StagedLoader
from osler.data.order import Order
from osler.data.packing import StreamPacking, WholePacking
from osler.data.shards import MOST_SOURCES, ShardSet, ShardWriter

SEQ_LEN = 16
SOURCES = ["a", "b", "a", "c"]  # in blocks of ten documents; a comes twice


@pytest.fixture
def shards(tmp_path):
    """Forty documents; every token of one is the number of its source, 0 is the end-of-text token."""
    rng = np.random.default_rng(0)
    writer = ShardWriter(tmp_path / "train", vocab_size=100, with_mask=False, shard_tokens=150)
    for index in range(40):
        name = SOURCES[index // 10]
        length = int(rng.integers(2, SEQ_LEN + 2))
        writer.add([1 + "abc".index(name)] * length, None, 3 * length, f"folder {name}")
    return ShardSet(tmp_path / "train", writer.close(), tokenizer_fingerprint="", eos_id=0)


def counted(tokens) -> list[int]:
    return [int((np.asarray(tokens) == number).sum()) for number in (1, 2, 3)]


def test_sources_are_known_by_document(shards):
    assert shards.sources == ["folder-a", "folder-b", "folder-c"]
    for index in range(40):
        assert (shards.document(index)[0] == 1 + shards.source_of_document[index]).all()


def test_a_source_whose_documents_are_all_left_out_is_not_counted():
    numbers = {"kept": 30.0, "too long": 0.0}
    metrics = source_metrics(tokens=numbers, consumed=numbers, of_epoch=numbers, target=numbers)
    assert metrics["data/epoch/kept"] == metrics["data/target_frac/kept"] == 1.0 and "data/epoch/too long" not in metrics


def test_a_stream_consumes_what_its_rows_hold(shards):
    stages = [Stage(seq_len=4, until_tokens=60), Stage(seq_len=SEQ_LEN)]
    timeline = lay_out(stages, seq_len=SEQ_LEN, batch_tokens=2 * SEQ_LEN)
    loaders = [
        Loader(StreamPacking(Order(shards, 1), s.seq_len, first_token=s.first_token, prompt_loss=True), s.rows_per_batch)
        for s in timeline.spans
    ]
    loader = StagedLoader(timeline, loaders)
    consumed = ConsumedData(loader)
    assert consumed.bytes_per_token == 3.0
    seen: list[int] = []
    for step, batch in zip(range(1, 60), loader.batches(), strict=False):
        seen += batch.ids.flatten().tolist()
        found = consumed.metrics(step, 1, by_source=True)
        assert [found[f"data/tokens/folder-{name}"] for name in "abc"] == counted(seen)
        assert found["data/epoch"] == pytest.approx(len(seen) / shards.num_tokens) and found["data/padding_frac"] == 0
        assert sum(found[f"data/consumed_frac/folder-{name}"] for name in "abc") == pytest.approx(1)
    assert found["data/epoch"] > 2
    whole = counted(np.concatenate([shards.document(index)[0] for index in range(40)]))
    for name, tokens in zip("abc", whole, strict=True):
        assert found[f"data/target_frac/folder-{name}"] == pytest.approx(tokens / shards.num_tokens)
        assert found[f"data/consumed_frac/folder-{name}"] == pytest.approx(tokens / shards.num_tokens, abs=0.1)
        assert found[f"data/epoch/folder-{name}"] == pytest.approx(found["data/epoch"], abs=0.6)


def test_whole_documents_are_consumed_with_their_padding(shards):
    packing = WholePacking(Order(shards, 1), SEQ_LEN, prompt_loss=True)
    timeline = lay_out([], seq_len=SEQ_LEN, batch_tokens=3 * SEQ_LEN)
    consumed = ConsumedData(StagedLoader(timeline, [Loader(packing, 3)]))
    places = []
    for step in range(1, 3 * packing.rows_per_epoch // 3 + 2):
        for number in range(3 * (step - 1), 3 * step):
            row = packing.row(number)
            places.append([*row.ids.tolist(), max(0, int(row.labels[-1]))])  # the last place is a label only
        found = consumed.metrics(step, 2, by_source=True)
        assert [found[f"data/tokens/folder-{name}"] for name in "abc"] == counted(places)
        last = np.asarray(places[-6:])
        assert found["data/padding_frac"] == pytest.approx((last == 0).mean())
        assert found["data/epoch"] == pytest.approx(3 * step / packing.rows_per_epoch)
    assert found["data/epoch"] > 2
    ahead = consumed.metrics(step, 1, by_source=True, skipped_tokens=6 * SEQ_LEN)
    later = consumed.metrics(step + 2, 1, by_source=True)
    assert ahead == later  # six rows were passed over: two steps


def test_many_sources_are_counted_together(tmp_path):
    writer = ShardWriter(tmp_path / "train", vocab_size=100, with_mask=False)
    for index in range(MOST_SOURCES + 20):
        writer.add([1, 2], None, 2, f"note-{index}.txt")
    entry = writer.close()
    shards = ShardSet(tmp_path / "train", entry, tokenizer_fingerprint="", eos_id=0)
    assert len(shards.sources) == MOST_SOURCES + 1 and shards.sources[-1] == "others"
    assert (shards.source_of_document == MOST_SOURCES).sum() == 20
    del entry["sources"]  # prepared before they were written down
    assert ShardSet(tmp_path / "train", entry, tokenizer_fingerprint="", eos_id=0).sources == ["documents"]
