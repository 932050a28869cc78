"""From rows of 512 tokens to rows of 2,048, each way, measured by position: which positions of a long row a model can use.

    python benchmarks/extend_context.py FILE [FILE ...] [--tokens 1500000] [--more-tokens 300000] [--out FILE]

A small model of the recipe ``text-10min``, without its copy head, is pretrained on rows of 512 tokens. From there the same
number of tokens is trained again: in rows of 2,048 with RoPE as it was (keep), with another base (base) and with YaRN (yarn),
and in rows of 512 (short), which shows what the tokens alone bring. Each is measured before and after on the first 2,048 tokens
of held-out documents that have as many: bits per byte of the tokens at positions 0 to 512, to 1,024, to 2,048. Differences are
paired by document, with 95 % intervals from a bootstrap over documents. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import in_fresh_python, publish

from osler.data.prepared import open_prepared
from osler.eval.likelihood import label_logprobs
from osler.inference.load import load_model
from osler.model.config import ContextConfig
from osler.model.transformer import Transformer

SHORT, LONG = 512, 2048
BORDERS = (0, 512, 1024, 2048)  # of the segments of a row
SHAPE = {
    "num_layers": 3, "hidden_size": 128, "intermediate_size": 352, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32,
    "vocab_size": 2048, "max_seq_len": SHORT,
}  # fmt: skip
BATCH_TOKENS = 8192
DRAWS = 2000  # of the bootstrap
Bits = np.ndarray[Any, np.dtype[np.float64]]  # [documents, segments], of bits and of bytes


def train(run: Path, *overrides: str) -> float:
    """Pretrain in a fresh process on one thread; returns its seconds."""
    began = time.monotonic()
    fixed = [
        "max_minutes=null",
        "model.copy_head_dim=null",
        "model.attention.window=null",
        f"batch_tokens={BATCH_TOKENS}",
        "checkpoint.every_tokens=100000000",
        "eval_every_tokens=100000000",
    ]
    command = ["-m", "osler.cli", "pretrain", "text-10min", *fixed, *overrides, "--run", str(run)]
    in_fresh_python(command, threads=1)
    return time.monotonic() - began


def long_documents(run: Path, most: int) -> tuple[list[list[int]], Any]:
    """The first tokens of held-out documents, an end-of-text token before them, and the tokenizer."""
    tokenizer = load_model(run).tokenizer
    (held_out,) = open_prepared(run / "data", tokenizer).validation
    rows = [[tokenizer.eos_id, *map(int, ids[:LONG])] for ids in held_out.documents() if len(ids) > LONG]
    return rows[:most], tokenizer


def bits_of(model: Transformer, rows: Sequence[list[int]]) -> Bits:
    """Bits of the tokens in each segment of each row."""
    found = np.zeros((len(rows), len(BORDERS) - 1))
    for number, row in enumerate(rows):
        ids, labels = torch.tensor([row[:-1]]), torch.tensor([row[1:]])
        with torch.no_grad():
            logp = label_logprobs(model, ids, labels)[1].double() / -math.log(2)
        found[number] = [logp[first:last].sum() for first, last in pairwise(BORDERS)]
    return found


def bytes_of(tokenizer: Any, rows: Sequence[list[int]]) -> Bits:
    """Bytes of the text in each segment of each row."""
    parts = [[row[first + 1 : last + 1] for first, last in pairwise(BORDERS)] for row in rows]
    return np.array([[len(tokenizer.decode(part).encode()) for part in row] for row in parts], dtype=np.float64)


def extended(run: Path, rope: str) -> Transformer:
    """The model of a run with a longer context and the weights as they are."""
    ready = load_model(run)
    if ready.model.config.max_seq_len >= LONG:
        return ready.model
    config = ContextConfig(max_seq_len=LONG, rope=rope).extend(ready.model.config, SHORT)  # type: ignore[arg-type]
    model = Transformer(config)
    model.load_state_dict(ready.model.state_dict())
    return model.eval()


def compared(bits: Bits, other: Bits, num_bytes: Bits) -> list[dict[str, float]]:
    """For each segment the difference in bits per byte to ``other`` on the same documents, with its interval."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(bits), (DRAWS, len(bits)))
    lost, sizes = (bits - other)[drawn].sum(1), num_bytes[drawn].sum(1)
    low, high = np.quantile(lost / sizes, [0.025, 0.975], axis=0)
    mean = (bits - other).sum(0) / num_bytes.sum(0)
    return [{"difference": a, "low": b, "high": c} for a, b, c in zip(mean, low, high, strict=True)]


def one_seed(folder: Path, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train and measure everything with one seed of weights and data order."""
    short = folder / f"short-{seed}"
    shape = [f"model.{name}={value}" for name, value in SHAPE.items()]
    tokenizer = f"tokenizer.vocab_size={SHAPE['vocab_size']}"
    held_out = [f"data.path={folder / 'texts'}", "data.holdout_fraction=0.1", f"seed={seed}"]
    steady = ["schedule={type: linear, warmup_tokens: 65536}"]
    seconds = {"short": train(short, *shape, tokenizer, *held_out, *steady, f"seq_len={SHORT}", f"total_tokens={args.tokens}")}
    rows, reader = long_documents(short, args.documents)
    num_bytes = bytes_of(reader, rows)
    again = [f"init_from={short}", "data={type: prepared, path: %s}" % (short / "data"), f"total_tokens={args.more_tokens}"]
    again += ["optim.lr=0.005", "optim.adamw_lr=2.0e-3", f"seed={seed + 1000}", *steady]
    bits: dict[str, Bits] = {}
    for rope in ("keep", "base", "yarn"):
        bits[f"{rope}, before"] = bits_of(extended(short, rope), rows)
        run = folder / f"{rope}-{seed}"
        seconds[rope] = train(run, *again, f"seq_len={LONG}", f"context={{max_seq_len: {LONG}, rope: {rope}}}")
        bits[f"{rope}, after"] = bits_of(extended(run, rope), rows)
    seconds["more"] = train(folder / f"more-{seed}", *again, f"seq_len={SHORT}")
    bits["short, after"] = bits_of(extended(folder / f"more-{seed}", "keep"), rows)
    return {"seed": seed, "documents": len(rows), "seconds": seconds, **told(bits, num_bytes)}


def told(bits: Mapping[str, Bits], num_bytes: Bits) -> dict[str, Any]:
    """Bits per byte by segment, and the differences that answer a question."""
    pairs = [(f"{rope}, after", other) for rope in ("base", "yarn") for other in ("keep, after", "short, after")]
    pairs += [("keep, after", "short, after"), ("yarn, after", "base, after"), ("yarn, before", "keep, before")]
    return {
        "bits_per_byte": {name: (found.sum(0) / num_bytes.sum(0)).tolist() for name, found in bits.items()},
        "differences": {f"{a} - {b}": compared(bits[a], bits[b], num_bytes) for a, b in pairs},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=1_500_000, help="of pretraining")
    parser.add_argument("--more-tokens", type=int, default=300_000, help="of each stage after it")
    parser.add_argument("--documents", type=int, default=64, help="held-out documents at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "texts").mkdir()
        for file in args.files:
            shutil.copy(file, folder / "texts")
        seeds = [one_seed(folder, args, seed) for seed in args.seeds]
    result = {
        "benchmark": "extend-context",
        "files": [file.name for file in args.files],
        "shape": SHAPE,
        "tokens": args.tokens,
        "more_tokens": args.more_tokens,
        "segments": list(pairwise(BORDERS)),
        "threads": 1,
        "seeds": seeds,
    }
    publish(result, args.out)


if __name__ == "__main__":
    main()
