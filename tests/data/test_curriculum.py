"""Stages over the steps of a run: exact at every border, and the stream of tokens goes on across them."""

from __future__ import annotations

import numpy as np
import pytest

from osler.data.config import CurriculumStage as Stage
from osler.data.curriculum import Span, Timeline, lay_out, rows_per_micro_batch
from osler.data.order import Order
from osler.data.packing import StreamPacking

# Batches of 96 tokens: 12 rows of 8, 4 rows of 24, and, of its own, 10 of 16; borders at, after and before an end of a step.
STAGES = (
    Stage(seq_len=8, until_tokens=192),
    Stage(seq_len=24, until_tokens=400),
    Stage(seq_len=16, until_tokens=700, batch_tokens=160),
    Stage(seq_len=32),
)
SPANS = (Span(1, 8, 12, 0, 0, 2), Span(2, 24, 4, 2, 192, 5), Span(3, 16, 10, 5, 480, 7), Span(4, 32, 3, 7, 800, None))


@pytest.fixture
def timeline() -> Timeline:
    return lay_out(STAGES, seq_len=32, batch_tokens=96)


def test_one_stage_is_a_constant_run():
    timeline = lay_out((), seq_len=32, batch_tokens=96)
    assert timeline.spans == (Span(1, 32, 3, 0, 0, None),)
    for tokens in range(1000):
        assert timeline.steps_within(tokens) == tokens // 96
        assert timeline.steps_for(tokens) == -(-tokens // 96)
    assert [timeline.tokens_before(step) for step in range(5)] == [0, 96, 192, 288, 384]


def test_steps_and_tokens_agree_at_every_token(timeline):
    """Against a walk from step to step, which needs no arithmetic of borders."""
    assert timeline.spans == SPANS, "a stage ends with the first step at or after its border"
    seen = [0]  # tokens before each step
    number = 0
    while seen[-1] < 1200:
        while STAGES[number].until_tokens is not None and seen[-1] >= STAGES[number].until_tokens:
            number += 1
        span = timeline.at_step(len(seen) - 1)
        assert (span.number, span.seq_len) == (number + 1, STAGES[number].seq_len)
        seen.append(seen[-1] + span.batch_tokens)
    assert [timeline.tokens_before(step) for step in range(len(seen))] == seen
    for tokens in range(seen[-1]):
        assert timeline.steps_within(tokens) == max(step for step, before in enumerate(seen) if before <= tokens)
        assert timeline.steps_for(tokens) == min(step for step, before in enumerate(seen) if before >= tokens)


def test_what_each_stage_gets_of_a_run(timeline):
    for shares in [1], [192], [192, 1], [192, 288], [192, 288, 320, 1], [192, 288, 320, 200]:
        assert [tokens for _, tokens in timeline.shares(sum(shares))] == shares


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((Stage(seq_len=8), Stage(seq_len=16)), r"stage 1 of 2 \(seq_len 8\): until_tokens is missing"),
        ((Stage(seq_len=8, until_tokens=500),), r"stage 1 of 1 \(seq_len 8\): the last stage runs to total_tokens.* 500"),
        (
            (Stage(seq_len=8, until_tokens=100), Stage(seq_len=16, until_tokens=192), Stage(seq_len=32)),
            r"stage 2 of 3 \(seq_len 16\): it has no step, because until_tokens 192 is not above the 192 tokens",
        ),
        ((Stage(seq_len=64),), "its rows are longer than the run's seq_len 32"),
    ],
)
def test_stages_that_contradict_each_other(stages, message):
    with pytest.raises(ValueError, match=message):
        lay_out(stages, seq_len=32, batch_tokens=96)


def test_batches_hold_whole_rows_and_micro_batches_are_equal_parts_of_them():
    with pytest.raises(ValueError, match="batch_tokens=20 is not a multiple of seq_len=8"):
        Stage(seq_len=8, batch_tokens=20)
    assert [rows_per_micro_batch(12, 8, tokens) for tokens in (None, 96, 64, 40, 8, 7)] == [12, 12, 6, 4, 1, 1]


def test_no_token_is_repeated_or_dropped_where_a_stage_ends(timeline, make_shards):
    """The rows of a stage, in whatever order, are its part of one stream; across epochs too."""
    order = Order(make_shards([5, 2, 40, 9, 9, 130, 3, 17, 2, 33]), 1)
    steps, seen, wanted = 12, [], []
    for span in timeline.spans:
        packing = StreamPacking(order, span.seq_len, first_token=span.first_token, num_rows=span.num_rows or None)
        num_rows = span.num_rows or (steps - span.first_step) * span.rows_per_batch
        seen += [(*row.ids.tolist(), int(row.labels[-1])) for row in map(packing.row, range(num_rows))]
        if span.num_rows == 0:
            continue
        documents = [document for epoch in range(9) for document, _ in order.documents_from(epoch, 0)]
        stream = np.concatenate([order.shards.document(document)[0] for document in documents]).tolist()
        starts = range(span.first_token, span.first_token + num_rows * span.seq_len, span.seq_len)
        wanted += [tuple(stream[at : at + span.seq_len + 1]) for at in starts]
        assert sorted(seen) == sorted(wanted)
    assert len(timeline.spans) > 1 and timeline.tokens_before(steps) > 4 * order.shards.num_tokens
