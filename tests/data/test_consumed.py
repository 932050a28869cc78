"""What a run was given, against counting the rows themselves."""

import numpy as np
import pytest

from osler.data.config import CurriculumStage as Stage
from osler.data.curriculum import lay_out
from osler.data.loader import Loader, source_metrics
from osler.data.mixture import Mixture
from osler.data.order import Order
from osler.data.packing import MixedPacking, StreamPacking, WholePacking
from tests.data.loaders import loader_of

SEQ_LEN = 16
LENGTHS = [5, 2, 9, 9, 3, 17, 2, 12, 8, 14] * 4


def alone(packing: StreamPacking | WholePacking) -> MixedPacking:
    return MixedPacking({"notes": packing}, Mixture([1]))


def test_a_source_whose_documents_are_all_left_out_is_not_counted():
    numbers = {"kept": 30.0, "too long": 0.0}
    metrics = source_metrics(tokens=numbers, consumed=numbers, of_epoch=numbers, target=numbers)
    assert metrics["data/epoch/kept"] == metrics["data/target_frac/kept"] == 1.0 and "data/epoch/too long" not in metrics


def test_a_stream_consumes_what_its_rows_hold(make_shards):
    shards = make_shards(LENGTHS)
    stages = [Stage(seq_len=4, until_tokens=60), Stage(seq_len=SEQ_LEN)]
    timeline = lay_out(stages, seq_len=SEQ_LEN, batch_tokens=2 * SEQ_LEN)
    order = Order(shards, 1)
    packings = [StreamPacking(order, s.seq_len, first_token=s.first_token, prompt_loss=True) for s in timeline.spans]
    loader = Loader(timeline, [alone(packing) for packing in packings])
    assert loader.bytes_per_token(1) == 1.0
    seen = 0
    for step, batch in zip(range(1, 60), loader.batches(), strict=False):
        seen += batch.ids.numel()
        found = loader.metrics(step, 1)
        assert found["data/epoch"] == found["data/epoch/notes"] == pytest.approx(seen / shards.num_tokens)
        assert (found["data/tokens/notes"], found["data/padding_frac"]) == (seen, 0)
    assert seen / shards.num_tokens > 2


def test_whole_documents_are_consumed_with_their_padding(make_shards):
    packing = WholePacking(Order(make_shards(LENGTHS), 1), SEQ_LEN, prompt_loss=True)
    loader = loader_of(packing, 3)
    used: list[int] = []
    for step in range(1, 40):
        for number in range(3 * (step - 1), 3 * step):
            row = packing.row(number)
            places = [*row.ids.tolist(), max(0, int(row.labels[-1]))]  # the last place is a label only
            used.append(int(np.flatnonzero(places)[-1]) + 2)  # a document ends with 0, as does the padding
        found = loader.metrics(step, 2)
        assert found["data/padding_frac"] == pytest.approx(1 - np.mean(used[-6:]) / (SEQ_LEN + 1))
        assert found["data/epoch"] == pytest.approx(sum(used) / sum(LENGTHS))
    assert found["data/epoch"] > 2
    ahead, later = loader.metrics(step, 1, skipped_tokens=6 * SEQ_LEN), loader.metrics(step + 2, 1)
    assert ahead == later  # six rows were passed over: two steps
