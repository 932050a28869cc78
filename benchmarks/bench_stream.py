"""Training on data that are still being prepared: how soon the first step ends, and how far data are ahead of training.

    python benchmarks/bench_stream.py [--megabytes 100] [--set key.path=value ...] [--out FILE]

The text is pseudo-random words in JSONL files, so its size is free to choose; the tokenizer is trained on it beforehand. The same
run is started twice with the words of a user, once with data.streaming=true, and ended by its number of steps. Seconds count from
the start of the command to the first line of metrics, which is written after each step.
The losses of both runs are compared, and one thread reads batches from the shards that the streamed run has left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import ROOT, publish

from osler.data.config import FilesData
from osler.data.curriculum import lay_out
from osler.data.loader import Loader
from osler.data.mixture import Mixture
from osler.data.order import Order
from osler.data.packing import MixedPacking, StreamPacking
from osler.data.prepared import open_folder
from osler.data.sources import train_tokenizer
from osler.tokenizer.config import BPEConfig

FILES, STEPS, LOADED_BATCHES = 8, 20, 200


def write_texts(folder: Path, num_bytes: int) -> None:
    """Write so many bytes of documents of 20 to 1,000 words from a vocabulary of 20,000, the frequent ones first."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeiounrtslcdmp", k=rng.randint(2, 11))) for _ in range(20_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    for number in range(FILES):
        with open(folder / f"part-{number}.jsonl", "w") as file:
            while file.tell() < num_bytes / FILES:
                stock = rng.choices(words, weights, k=100_000)
                place = 0
                while place < len(stock):
                    length = rng.randint(20, 1000)
                    file.write(json.dumps({"text": " ".join(stock[place : place + length])}) + "\n")
                    place += length


def start(run: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Carry out a run; return the seconds to its first step, its speed, and the share of a step that waits for data."""
    command = [sys.executable, "-m", "osler.cli", "pretrain", *overrides, "--run", str(run)]
    began = time.time()
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in written if "train/loss" in line]
    parts = ("data", "forward", "backward", "optimizer")
    spent = {part: sum(line[f"perf/{part}_ms"] for line in lines[2:]) for part in parts}
    return {
        "first_step_seconds": round(lines[0]["time"] - began, 2),
        "waits_for_data_percent": round(100 * spent["data"] / sum(spent.values()), 3),
        "tokens_per_second": round(lines[-1]["perf/tokens_per_second"]),
        "losses": [line["train/loss"] for line in lines],
    }


def loader_rate(data: Path, seq_len: int, batch_tokens: int) -> int:
    """Return the tokens of batches that one thread makes in a second from what is in a folder of shards."""
    (shards,) = open_folder(data).train
    packing = MixedPacking({"texts": StreamPacking(Order(shards, 0), seq_len, prompt_loss=True)}, Mixture([1]))
    loader = Loader(lay_out([], seq_len=seq_len, batch_tokens=batch_tokens), [packing])
    loader.batch(0)
    began = time.perf_counter()
    for step in range(LOADED_BATCHES):
        loader.batch(step)
    return round(LOADED_BATCHES * batch_tokens / (time.perf_counter() - began))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="overrides of the run")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        texts, tokenizer = Path(root) / "texts", Path(root) / "tokenizer.json"
        texts.mkdir()
        write_texts(texts, arguments.megabytes * 1_000_000)
        tokenizer.write_bytes(train_tokenizer(FilesData(path=str(texts)), BPEConfig(vocab_size=2048)).to_bytes())
        batch_tokens, seq_len = 8192, 128
        common = [
            "data.type=files", f"data.path={texts}", f"tokenizer.path={tokenizer}", f"batch_tokens={batch_tokens}",
            f"seq_len={seq_len}", f"total_tokens={STEPS * batch_tokens}", "log_every_steps=1", "eval_every_tokens=1000000000000",
            "compile=never", *arguments.set,
        ]  # fmt: skip
        runs = {
            name: start(Path(root) / name, [*common, f"data.streaming={streaming}"])
            for name, streaming in (("streamed", "true"), ("prepared", "false"))
        }
        same = runs["streamed"].pop("losses") == runs["prepared"].pop("losses")
        rate = loader_rate(Path(root) / "streamed" / "data", seq_len, batch_tokens)
    result = {
        "benchmark": "stream",
        "megabytes": arguments.megabytes,
        "overrides": arguments.set,
        "losses_are_equal": same,
        **runs,
        "loader_tokens_per_second": rate,
        "loader_over_training": round(rate / runs["streamed"]["tokens_per_second"], 1),
    }
    publish(result, arguments.out)


if __name__ == "__main__":
    main()
