"""Rows: every token of an epoch served exactly once, labels are the next token, and any row stands by itself."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osler.data.best_fit import best_fit
from osler.data.order import WINDOW_SHARDS, Order
from osler.data.packing import StreamPacking, WholePacking
from osler.data.shard_set import ShardSet, fingerprint_of, is_continuation
from osler.ops.labels import IGNORED
from osler.runtime.errors import UserError

LENGTHS = [5, 2, 40, 9, 9, 130, 3, 17, 2, 33]  # 250 tokens; one document is several rows long


def stream_of(order: Order, epochs: int) -> list[int]:
    """The endless stream spelled out, the slow way."""
    return [
        int(token)
        for epoch in range(epochs)
        for document, _ in order.documents_from(epoch, 0)
        for token in order.shards.document(int(document))[0]
    ]


def documents_of(order: Order, epoch: int) -> list[int]:
    return [document for document, _ in order.documents_from(epoch, 0)]


def test_an_epoch_has_each_document_once_in_an_order_of_its_own(make_shards) -> None:  # type: ignore[no-untyped-def]
    shards, other = make_shards(LENGTHS * 30), make_shards([*LENGTHS * 30, 4])
    orders = [documents_of(Order(of, seed), epoch) for of, seed, epoch in [(shards, 0, 0), (shards, 0, 1), (shards, 1, 0)]]
    assert shards.num_shards > WINDOW_SHARDS
    assert all(sorted(order) == list(range(300)) for order in orders)
    assert len({tuple(order) for order in [*orders, documents_of(Order(other, 0), 1)[:300]]}) == 4
    again = ShardSet(shards.folder, vocab_size=shards.num_tokens, tokenizer_fingerprint="", eos_id=0)
    assert documents_of(Order(again, 0), 0) == orders[0]


def test_the_first_epoch_does_not_depend_on_what_comes_later(make_shards) -> None:  # type: ignore[no-untyped-def]
    """A stream reads shards while others are still being written."""
    whole, begun = Order(make_shards(LENGTHS * 40), 3), Order(make_shards(LENGTHS * 25), 3)
    borders, last = begun.epoch(0).borders.tolist(), len(begun.epoch(0).ends) - 1
    assert borders[:7] == [0, 1, 2, 4, 8, 16, 32]
    for number in range(last):  # the last window is not full yet
        assert all(np.array_equal(*pair) for pair in zip(whole.window(0, number), begun.window(0, number), strict=True))
    assert not np.array_equal(whole.window(0, last).documents, begun.window(0, last).documents)


def test_the_first_window_has_so_many_tokens(make_shards) -> None:  # type: ignore[no-untyped-def]
    whole, begun = make_shards([10] * 30, shard_tokens=30), make_shards([10] * 9, shard_tokens=30)
    for tokens, borders in ((0, [0, 1, 2, 4, 8, 10]), (30, [0, 1, 2, 4, 8, 10]), (31, [0, 2, 4, 8, 10]), (1000, [0, 10])):
        whole.first_window_tokens = tokens
        assert Order(whole, 0).epoch(0).borders.tolist() == borders
    assert sorted(documents_of(Order(whole, 0), 0)[:20]) != list(range(20))  # the last value: all documents in one window
    assert fingerprint_of([whole]) == f"{whole.fingerprint}+1000" and not is_continuation([whole], whole.fingerprint)
    begun.first_window_tokens, begun.is_complete = 91, False
    assert is_continuation([begun], recorded := fingerprint_of([begun])) and recorded == f"{begun.fingerprint}+91@3"
    assert len(Order(begun, 0).epoch(0).ends) == 0
    begun.first_window_tokens = 90
    assert not is_continuation([begun], recorded)
    assert Order(begun, 0).epoch(0).ends.tolist() == [90]


def test_the_order_is_this_one_in_every_version(make_shards) -> None:  # type: ignore[no-untyped-def]
    """A stored run resumes in this order: if these numbers change, every old run breaks silently."""
    order = Order(make_shards([3] * 12, shard_tokens=9), 7)
    assert (order.shards.num_shards, order.shards.fingerprint) == (4, "a7a9167aed02f074")
    assert documents_of(order, 0) == [2, 0, 1, 3, 5, 4, 7, 9, 11, 8, 6, 10]
    assert documents_of(order, 5) == [1, 2, 5, 11, 10, 4, 6, 3, 0, 7, 9, 8]


def cuts_of(order: Order, seq_len: int, epochs: int, first_token: int = 0) -> list[list[tuple[int, ...]]]:
    """The rows of a stream cut out of its tokens, the slow way: a list for each window, of the rows that end in it."""
    stream, windows = stream_of(order, epochs), []
    ends = [epoch * order.shards.num_tokens + int(end) for epoch in range(epochs) for end in order.epoch(epoch).ends]
    place = first_token
    for end in ends:
        windows.append([tuple(stream[at : at + seq_len + 1]) for at in range(place, end - seq_len, seq_len)])
        place += seq_len * len(windows[-1])
    return windows


@pytest.mark.parametrize("seq_len", [1, 4, 7, 64, 250, 1000])
def test_the_rows_of_a_window_are_the_cuts_of_the_stream_that_end_there(make_shards, seq_len: int) -> None:  # type: ignore[no-untyped-def]
    order = Order(make_shards(LENGTHS * 3, shard_tokens=60), 3)
    packing, index, is_moved = StreamPacking(order, seq_len), 0, False
    for cuts in cuts_of(order, seq_len, 2 + 2 * seq_len // 750):
        rows = {at: packing.row(at) for at in reversed(range(index, index + len(cuts)))}  # random access: the last row first
        index += len(cuts)
        found = [(*row.ids.tolist(), int(row.labels[-1])) for _, row in sorted(rows.items())]
        assert sorted(found) == sorted(cuts)
        is_moved |= found != cuts
        for row in rows.values():
            assert row.ids[1:].tolist() == row.labels[:-1].tolist()
            assert row.document_ids.tolist() == [0, *np.cumsum(row.ids == 0)[:-1].tolist()]
            assert row.ids.dtype == row.labels.dtype == row.document_ids.dtype == np.int64
    assert index and (is_moved or seq_len >= 250), "windows of several rows are permuted"


def test_the_rows_of_a_stage_that_ends_are_the_first_tokens_of_its_stream(make_shards) -> None:  # type: ignore[no-untyped-def]
    """The next stage begins with the token after them. Rows behind them, which a rollback asks for, are as in the stream."""
    order, num_rows = Order(make_shards(LENGTHS), 3), 17
    packing, stream = StreamPacking(order, 5, first_token=20, num_rows=num_rows), stream_of(order, 2)
    found = [tuple(packing.row(index).ids.tolist()) for index in range(num_rows + 3)]
    cuts = [tuple(stream[at : at + 5]) for at in range(20, 20 + 5 * (num_rows + 3), 5)]
    assert sorted(found[:num_rows]) == sorted(cuts[:num_rows]) and found[:num_rows] != cuts[:num_rows]
    assert found[num_rows:] == cuts[num_rows:]


def test_what_is_needed_begins_with_the_window_that_is_being_read(make_shards) -> None:  # type: ignore[no-untyped-def]
    order, seq_len = Order(make_shards(LENGTHS * 12, shard_tokens=60), 3), 7
    packing, windows = StreamPacking(order, seq_len), cuts_of(order, seq_len, 1)
    expected, index = [], 0
    for cuts in windows:
        expected += [index * seq_len] * len(cuts)
        index += len(cuts)
    assert [packing.first_needed(row) for row in range(index)] == expected


def test_stream_masks_and_prompt_loss(make_shards) -> None:  # type: ignore[no-untyped-def]
    masks = [[0] * 3 + [1] * 5, [1] * 8, [0] * 8]
    order = Order(make_shards([8, 8, 8], masks=masks), 0)
    row, full = StreamPacking(order, 24).row(0), StreamPacking(order, 24, prompt_loss=True).row(0)
    whole = [WholePacking(order, 30, prompt_loss=prompt_loss).row(0).labels for prompt_loss in (False, True)]
    assert [(labels != IGNORED).sum() for labels in whole] == [5 + 7, 3 * 7]
    wanted = [bit for document in documents_of(order, 0) for bit in masks[document]][1:]
    assert (row.labels[:23] != IGNORED).tolist() == [bool(bit) for bit in wanted]
    assert (full.labels != IGNORED).all()
    assert np.array_equal(np.where(row.labels == IGNORED, full.labels, row.labels), full.labels)


def rows_of_epoch(packing: WholePacking, epoch: int) -> range:
    """The rows of an epoch: no row holds tokens of two."""
    borders = [epoch * packing.epoch_tokens, (epoch + 1) * packing.epoch_tokens]
    rows = itertools.count()
    return range(*(next(number for number in rows if packing.tokens(number) == border) for border in borders))


def check_whole_epoch(packing: WholePacking, epoch: int) -> None:
    """All tokens of the epoch are there, each but the first of a document is a label exactly once."""
    rows = [packing.row(number) for number in rows_of_epoch(packing, epoch)]
    labels = [int(label) for row in rows for label in row.labels if label != IGNORED]
    shards = packing.order.shards
    wanted = [int(token) for document in range(shards.num_documents) for token in shards.document(document)[0][1:]]
    assert sorted(labels) == sorted(wanted)
    for row in rows:
        assert row.ids.shape == row.labels.shape == row.document_ids.shape == (packing.seq_len,)
        learned = row.labels != IGNORED
        assert learned.any(), "a row without one learned token"
        assert (np.diff(row.document_ids) >= 0).all()
        inside = learned[:-1]
        assert (row.ids[1:][inside] == row.labels[:-1][inside]).all()
        assert (row.document_ids[1:][inside] == row.document_ids[:-1][inside]).all()


@pytest.mark.parametrize("seq_len", [1, 4, 16, 39, 64, 500])
def test_whole_rows_conserve_tokens(make_shards, seq_len: int) -> None:  # type: ignore[no-untyped-def]
    packing = WholePacking(Order(make_shards(LENGTHS), 0), seq_len)
    for epoch in (0, 3):
        check_whole_epoch(packing, epoch)
    places = packing.rows_of_first_epoch * (seq_len + 1)
    pieces = [-(-(length - 1) // seq_len) for length in LENGTHS]
    padding = 1 - (sum(LENGTHS) + sum(pieces) - len(pieces)) / places
    assert packing.padding(0, packing.rows_of_first_epoch) == pytest.approx(padding)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(2, 60), min_size=1, max_size=30), st.integers(1, 40), st.integers(0, 3))
def test_both_packings_conserve_tokens_for_any_lengths(make_shards, lengths, seq_len, seed) -> None:  # type: ignore[no-untyped-def]
    order = Order(make_shards(lengths), seed)
    check_whole_epoch(WholePacking(order, seq_len), 1)
    packing, cuts = StreamPacking(order, seq_len), [*itertools.chain(*cuts_of(order, seq_len, 3))]
    found = [packing.row(index) for index in range(len(cuts))]
    assert sorted((*row.ids.tolist(), int(row.labels[-1])) for row in found) == sorted(cuts)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(2, 9), max_size=4), st.integers(20, 90), st.integers(1, 12), st.integers(0, 3))
def test_a_document_longer_than_a_row_goes_on_in_the_next_one(make_shards, others, length, seq_len, seed) -> None:  # type: ignore[no-untyped-def]
    """Each of its tokens is read once and predicted once; in a row it is one document, so its mask never crosses a row."""
    order = Order(make_shards([*others, length]), seed)
    packing, document = StreamPacking(order, seq_len), order.shards.document(len(others))[0].tolist()
    rows = [packing.row(index) for index in range(sum(map(len, cuts_of(order, seq_len, 2))))]
    pairs = [pair for row in rows for pair in zip(row.ids.tolist(), row.labels.tolist(), strict=True)]
    assert set(itertools.pairwise(document)) <= set(pairs)
    for row in rows:
        goes_on = np.isin(row.ids[:-1], document[:-1]) & (row.ids[1:] == row.ids[:-1] + 1)
        assert (row.document_ids[1:][goes_on] == row.document_ids[:-1][goes_on]).all()


def test_whole_documents_that_fit_are_never_cut(make_shards) -> None:  # type: ignore[no-untyped-def]
    packing = WholePacking(Order(make_shards([9, 9, 17, 5, 5, 6, 2]), 0), 16)
    assert packing.rows_of_first_epoch == 4  # 17 | 9 6 2 | 9 5 | 5: best fit decreasing
    starts = 0
    for index in range(4):
        row = packing.row(index)
        used = row.ids != 0
        starts += len(np.unique(row.document_ids[used]))
        for document in np.unique(row.document_ids[used]):
            tokens = row.ids[(row.document_ids == document) & used]
            assert (np.diff(tokens) == 1).all()
    assert starts == 7


def test_whole_padding_is_its_own_document_and_never_learned(make_shards) -> None:  # type: ignore[no-untyped-def]
    row = WholePacking(Order(make_shards([4, 3]), 0), 12).row(0)
    assert row.document_ids.tolist() in ([0] * 4 + [1] * 3 + [2] * 5, [0] * 3 + [1] * 4 + [2] * 5)
    assert (row.labels[6:] == IGNORED).all() and (row.labels != IGNORED).sum() == 5
    assert (row.ids[7:] == 0).all()


@st.composite
def starving(draw) -> tuple[list[int], list[list[int]]]:  # type: ignore[no-untyped-def]
    """Lengths and masks of examples: questions of any length, answers of at least the end of the document."""
    parts = draw(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 12)), min_size=1, max_size=20))
    return [question + answer for question, answer in parts], [[0] * question + [1] * answer for question, answer in parts]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(starving(), st.integers(1, 40), st.booleans(), st.booleans())
def test_no_row_is_without_a_token_to_learn_or_learns_a_question_beside_answers(  # type: ignore[no-untyped-def]
    make_shards, examples, seq_len, drop_torn, prompt_loss
) -> None:
    """Whatever the questions: cut into rows of their own, or dropped where that is asked for."""
    (lengths, masks), fitting = examples, [length for length in examples[0] if length <= seq_len + 1]
    order = Order(make_shards(lengths, masks=masks), 0)
    learnable = {token for document in range(len(lengths)) for token in learned_of(order.shards, document)}
    whole = WholePacking(order, seq_len, drop_torn=drop_torn, prompt_loss=prompt_loss)
    if drop_torn and not fitting:
        with pytest.raises(UserError, match="fits into a row of"):
            whole.row(0)
        return
    for packing, rows in ((whole, whole.rows_of_first_epoch + 2), (StreamPacking(order, seq_len, prompt_loss=prompt_loss), 60)):
        for number in range(rows):
            row = packing.row(number)
            labels = {int(label) for label in row.labels if label != IGNORED}
            assert labels and row.ids.shape == (seq_len,)
            if labels & learnable and not prompt_loss:
                assert labels <= learnable
    if drop_torn:
        assert whole.tokens(whole.rows_of_first_epoch) == sum(fitting), "exactly the examples that fit"


def learned_of(shards: ShardSet, document: int) -> list[int]:
    """The ids of a document that its mask lets learn."""
    ids, mask = shards.document(document)
    return [int(token) for token, bit in zip(ids, mask, strict=True) if bit]  # type: ignore[arg-type]


def test_best_fit_is_best_fit() -> None:
    lengths = np.array([7, 6, 5, 4, 3, 3, 2])
    assert best_fit(lengths, 10).tolist() == [0, 1, 2, 1, 0, 2, 2]
    rng = np.random.default_rng(0)
    many = np.sort(rng.integers(2, 129, 3000))[::-1]
    rows = best_fit(many, 128)
    filled = np.bincount(rows, weights=many)
    assert filled.max() <= 128 and len(filled) <= 1.03 * many.sum() / 128 + 1


def test_a_far_row_is_found_without_the_epochs_before_it(make_shards) -> None:  # type: ignore[no-untyped-def]
    packing, near = (WholePacking(Order(make_shards(LENGTHS), 0), 16) for _ in range(2))
    borders = [next(row for row in itertools.count() if near.tokens(row) == epoch * near.epoch_tokens) for epoch in (1, 2)]
    rows = borders[1] - borders[0]
    far = borders[0] + 10**9 * rows
    assert packing.tokens(far) == (10**9 + 1) * packing.epoch_tokens
    assert packing.padding(far, far + rows) == near.padding(*borders) and packing.row(far).ids.shape == (16,)
