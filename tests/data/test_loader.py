"""Batches: the same whatever the ranks, the worker threads and the restarts."""

import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import pytest
import torch

from osler.data.config import CurriculumStage
from osler.data.curriculum import lay_out
from osler.data.loader import Loader, make_batch
from osler.data.mixture import Mixture
from osler.data.order import Order
from osler.data.packing import MixedPacking, Packing, StreamPacking, WholePacking
from osler.runtime.errors import UserError
from tests.data.loaders import joined, loader_of, same

LENGTHS = [5, 2, 40, 9, 9, 130, 3, 17, 2, 33]


@pytest.fixture(params=["stream", "whole", "mixture"])
def packing(request, make_shards) -> Packing:  # type: ignore[no-untyped-def]
    kinds = {"stream": StreamPacking, "whole": WholePacking, "mixture": WholePacking}
    parts = {name: kinds[request.param](Order(make_shards(lengths), 1), 16) for name, lengths in (("a", LENGTHS), ("b", [3, 25]))}
    return MixedPacking(parts, Mixture([3, 1])) if request.param == "mixture" else parts["a"]  # type: ignore[return-value]


def test_two_resumes_ranks_1_2_4_1_and_workers_0_to_3(packing: Packing) -> None:
    """One run of 12 steps against the same run stopped three times and continued in another shape each time."""
    whole = list(islice(loader_of(packing, 4).batches(), 12))
    assert whole[0].ids.shape == (4, 16) and whole[0].ids.dtype == whole[0].labels.dtype == torch.int64
    shapes = [(1, 0), (2, 3), (4, 1), (1, 2)]
    for part, (world_size, workers) in enumerate(shapes):
        given = {"world_size": world_size, "workers": workers}
        ranks = [list(islice(loader_of(packing, 4, rank=rank, **given).batches(3 * part), 3)) for rank in range(world_size)]
        for step in range(3):
            assert same(joined([batches[step] for batches in ranks]), whole[3 * part + step])


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_threads_change_nothing_and_end_with_the_iterator(packing: Packing, workers: int) -> None:
    inline = list(islice(loader_of(packing, 4).batches(5), 20))
    iterator = loader_of(packing, 4, workers=workers).batches(5)
    assert all(same(left, right) for left, right in zip(inline, islice(iterator, 20), strict=True))
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_an_error_in_a_worker_reaches_the_caller(packing: Packing, fault) -> None:  # type: ignore[no-untyped-def]
    fault("load-batch:ioerror")
    with pytest.raises(OSError, match="injected"):
        next(loader_of(packing, 2, workers=2).batches())


def test_fewer_documents_than_ranks(make_shards) -> None:  # type: ignore[no-untyped-def]
    order = Order(make_shards([7, 12]), 0)
    for built in (StreamPacking(order, 8), WholePacking(order, 8)):
        parts = [loader_of(built, 8, rank=rank, world_size=8).batch(2) for rank in range(8)]
        assert same(joined(parts), loader_of(built, 8).batch(2))
        assert all(part.num_loss_tokens > 0 for part in parts)


def test_rows_that_cannot_be_shared_are_refused(packing: Packing) -> None:
    with pytest.raises(UserError, match=r"A batch of 6 rows \(of 16 tokens\) cannot be shared equally by 4 ranks"):
        loader_of(packing, 6, world_size=4)
    with pytest.raises(UserError, match="A batch of 0 rows"):
        loader_of(packing, 0)


def test_tokens_of_a_later_epoch_are_repeats(make_shards) -> None:  # type: ignore[no-untyped-def]
    """Of two sources the short one is repeated first; its share counts from there on, and all from where both are."""
    parts = {name: StreamPacking(Order(make_shards(lengths), 1), 16) for name, lengths in (("long", LENGTHS), ("short", [3, 25]))}
    loader = loader_of(MixedPacking(parts, Mixture([3, 1])), 1)
    shares = [loader.repeated_share(step) for step in range(30)]
    assert shares == sorted(shares) and set(shares) == {0, 0.25, 1.0}
    for share, name, size in ((0.25, "short", 28), (1.0, "long", 250)):
        first = shares.index(share)
        assert loader.tokens_before(first - 1)[name] < size <= loader.tokens_before(first)[name]
    assert loader.repeated_share(0, skipped_tokens=1000) == 1.0, "what is skipped counts as consumed"


def test_only_the_loader_knows_torch() -> None:
    program = (
        "import sys, osler.data.curriculum, osler.data.prepare, osler.data.packing, osler.data.sources;"
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0


def test_what_a_rollback_passes_over_is_seen_in_no_later_stage(make_shards) -> None:  # type: ignore[no-untyped-def]
    """Each source goes on behind what was skipped of it, also where the next stage has other weights."""
    stages = [CurriculumStage(seq_len=16, until_tokens=3200), CurriculumStage(seq_len=16)]
    timeline, orders = lay_out(stages, seq_len=16, batch_tokens=320), {name: Order(make_shards(LENGTHS), 0) for name in "ab"}
    mixtures, first = [Mixture([9, 1]), Mixture([1, 9])], [{"a": 0, "b": 0}, {"a": 2880, "b": 320}]
    packings = [
        MixedPacking({name: StreamPacking(orders[name], 16, first_token=at[name]) for name in "ab"}, mixture)
        for mixture, at in zip(mixtures, first, strict=True)
    ]
    loader = Loader(timeline, packings)
    ends, starts = loader.packing(0, 640).tokens(200), loader.packing(10, 640).tokens(0)
    assert ends == starts == {"a": 2880 + 576, "b": 320 + 576}, "nothing is repeated, nothing else is left out"
    plain = list(islice(loader.batches(0, 640), 2))
    assert same(plain[0], make_batch(MixedPacking(packings[0].packings, mixtures[0], [36, 36]), range(20)))


def test_what_a_run_needs_after_a_rollback_is_known_for_every_later_step(make_shards) -> None:  # type: ignore[no-untyped-def]
    """Also where a stage goes on behind its end, in order, and the next one permutes its rows anew."""
    order = Order(make_shards(LENGTHS * 6, shard_tokens=60), 3)
    stages = [CurriculumStage(seq_len=8, until_tokens=480), CurriculumStage(seq_len=16)]
    packings = [StreamPacking(order, 8, num_rows=60), StreamPacking(order, 16, first_token=480)]
    timeline = lay_out(stages, seq_len=16, batch_tokens=32)
    loader = Loader(timeline, [MixedPacking({"notes": packing}, Mixture([1])) for packing in packings])
    stream = [int(token) for document, _ in order.documents_from(0, 0) for token in order.shards.document(document)[0]]

    def first_read(step: int, skipped: int) -> int:
        begins = [row.tolist() for row in loader.batch(step, skipped).ids]
        return min(stream.index(max(ids)) - ids.index(max(ids)) for ids in begins)

    steps = range((len(stream) - 480) // 32)
    for skipped in (0, 32, 96, 256):
        read = [first_read(step, skipped) for step in steps]
        needed = [loader.first_needed(step, skipped)["notes"] for step in steps]
        assert all(first <= min(read[step:]) for step, first in enumerate(needed))
        assert needed[-1] > 480 or skipped == 0
