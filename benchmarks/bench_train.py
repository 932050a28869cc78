"""Training throughput beside nanochat's GPT and Hugging Face's Qwen3, at the fixed shapes that README quotes.

    python benchmarks/bench_train.py [--peer PATH_TO_NANOCHAT] [--peer hf] [--shape small] [--batch-tokens N] [--out FILE]

How it measures stands in `beside_peers.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beside_peers import compare
from measuring import publish

from osler.config.recipe import load_recipe, override
from osler.config.schema import decode
from osler.train.config import TrainConfig

# SwiGLU of 8/3 the width (rounded to 32) has the parameters of a two-matrix feed-forward of four times the width.
SHAPES = {
    "quickstart": (
        None,
        "model.num_layers=4 model.hidden_size=128 model.intermediate_size=352 model.num_heads=4 model.num_kv_heads=2 "
        "model.head_dim=32 model.vocab_size=2048 model.norm_weight=false model.max_seq_len=128 tokenizer.vocab_size=2048 "
        "seq_len=128 batch_tokens=8192",
    ),
    "small": (
        None,
        "model.num_layers=6 model.hidden_size=256 model.intermediate_size=672 model.num_heads=4 model.num_kv_heads=2 "
        "model.head_dim=64 model.vocab_size=4096 model.norm_weight=false model.max_seq_len=256 seq_len=256 batch_tokens=4096",
    ),
    "pure-tiny": ("pure-tiny", "model.max_seq_len=512 seq_len=512 batch_tokens=4096"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], help="a checkout of nanochat, or hf")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batch-tokens", type=int, help="instead of the shape's")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    recipe, shape = SHAPES[args.shape]
    overrides = [*shape.split(), f"precision={args.precision}"]
    overrides += [f"batch_tokens={args.batch_tokens}"] if args.batch_tokens else []
    config = decode(TrainConfig, load_recipe(recipe, overrides) if recipe else override({}, overrides))
    publish(compare(config, args.shape, peers=args.peer, rounds=args.rounds, steps=args.steps), args.out)


if __name__ == "__main__":
    main()
