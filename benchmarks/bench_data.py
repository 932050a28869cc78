"""The order of data: how well weights are kept, what packing wastes, how fast rows come, and what a trillion tokens cost.

    python benchmarks/bench_data.py [--documents 60000] [--shards 1000000] [--out FILE]

Lengths of documents are log-normal, as those of web text are nearly. Rows are read from shards on the disk, on one thread. The
trillion tokens are an index of a million shards, of which only those that a row needs exist.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring import publish

from osler.data.mixture import PERIOD, Mixture
from osler.data.order import Order
from osler.data.packing import StreamPacking, WholePacking
from osler.data.shard_set import SIZES_CHECKED, ShardSet
from osler.data.shards import INDEX, RECORD, ShardWriter, shard_name
from osler.runtime.machine import peak_process_bytes

VOCAB, SEQ_LEN, ROWS = 50_304, 2048, 5_000
FULL = 4  # the first shard of full size
MIXTURES = {"usmle-2day": [85, 15], "synth": [40, 30, 15, 10, 5], "four-stage": [14.4, 30, 10, 3]}


def open_shards(folder: Path) -> ShardSet:
    return ShardSet(folder, vocab_size=VOCAB, tokenizer_fingerprint="", eos_id=0)


def mixture_error(weights: list[float]) -> float:
    """Return the largest error of a share over every window of a thousand rows, in per cent of the rows."""
    mixture = Mixture(weights)
    sources = [mixture.locate(row)[0] for row in range(3 * PERIOD)]
    counts = np.cumsum(np.eye(len(weights))[sources], axis=0)
    windows = (counts[PERIOD:] - counts[:-PERIOD]) / PERIOD
    return float(100 * np.abs(windows - np.array(weights) / sum(weights)).max())


def packing(folder: Path, documents: int) -> dict[str, Any]:
    """Measure both packings over written shards."""
    rng = np.random.default_rng(0)
    writer = ShardWriter(folder, vocab_size=VOCAB)
    for length in np.clip(rng.lognormal(6.2, 1.0, documents), 8, 100_000).astype(int).tolist():
        writer.add(rng.integers(1, VOCAB, length).tolist(), None, 4 * length)
    writer.close()
    shards, found = open_shards(folder), {}
    for name, make in (("stream", StreamPacking), ("whole", WholePacking)):
        rows = make(Order(shards, 0), SEQ_LEN)
        began = time.perf_counter()
        rows.row(0)
        first = time.perf_counter()
        for row in range(ROWS):
            rows.row(row)
        rate = ROWS * SEQ_LEN / (time.perf_counter() - first)
        found[name] = {"first_row_seconds": round(first - began, 4), "tokens_per_second": round(rate)}
    epoch = rows.rows_of_first_epoch
    found["whole"]["padding_percent"] = round(100 * rows.padding(0, epoch), 3)
    return {"tokens": shards.num_tokens, "documents": documents, **found}


def trillion(folder: Path, template: Path, shards: int) -> dict[str, Any]:
    """Measure the start on an index of so many shards, each a link to one written shard of full size."""
    folder.mkdir()
    previous, record = np.fromfile(template / INDEX, RECORD, FULL + 1)[-2:]
    index = np.repeat(record[None], shards)
    for name in ("documents", "tokens", "loss_tokens", "num_bytes"):
        index[name] = np.arange(1, shards + 1, dtype=np.uint64) * (record[name] - previous[name])
    index.tofile(folder / INDEX)
    for number in {*range(min(shards, SIZES_CHECKED)), *range(shards - 256, shards)}:
        os.symlink(template / shard_name(FULL), folder / shard_name(number))
    before = peak_process_bytes()
    began = time.perf_counter()
    opened = open_shards(folder)
    ready = time.perf_counter()
    stream = StreamPacking(Order(opened, 0), SEQ_LEN)
    stream.row(opened.num_tokens // SEQ_LEN - 100_000)
    first = time.perf_counter()
    stream.order.epoch(1)
    return {
        "shards": shards,
        "tokens": opened.num_tokens,
        "open_seconds": round(ready - began, 3),
        "late_row_seconds": round(first - ready, 3),
        "second_epoch_seconds": round(time.perf_counter() - first, 3),
        "memory_bytes": peak_process_bytes() - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=60_000)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "shards"
        results = {
            "mixture_error_percent": {name: round(mixture_error(weights), 4) for name, weights in MIXTURES.items()},
            "packing": packing(folder, arguments.documents),
            "trillion": trillion(Path(root) / "trillion", folder, arguments.shards),
        }
    publish({"benchmark": "data", "seq_len": SEQ_LEN, **results}, arguments.out)


if __name__ == "__main__":
    main()
