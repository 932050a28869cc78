"""What sparse attention learns on real texts: the warm-up of its indexers, then sparse against dense training at equal tokens.

    python benchmarks/sparse_learning.py FILE [FILE ...] --out FILE [--seeds 0 1 2] [--set key=value ...]

One small model of each seed is pretrained with dense attention, in short rows and then in rows of 2,048 tokens. It goes on twice
from there, with the same rows in the same order: with dense attention, and with attention to 256 keys (an eighth of a row) after
a warm-up of the indexers. Both are measured by bits per byte of held-out documents, each with its own attention.

Recall is the share of attention to all keys that falls on the chosen ones, over all queries of some rows, averaged over layers:
of new indexers, after the warm-up, and after sparse training. Beside it are the recalls of the latest 256 keys, of 256 keys drawn
at random, and of the 256 keys with the most attention, which no index can exceed.

Writes one JSON object after every seed; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import in_fresh_python, publish
from torch import Tensor

from osler.config.schema import decode
from osler.data.prepared import open_prepared
from osler.inference.load import load_model
from osler.model.init import init_indexers
from osler.model.transformer import Transformer
from osler.ops.sparse_attention import attention_shares, choose, is_seen
from osler.records.jsonl import read_metrics
from osler.runs.folder import read_config
from osler.runtime.files import RunFolder
from osler.train.batches import make_loader
from osler.train.config import TrainConfig
from osler.train.shards import shards_of

SEQ_LEN, BATCH_TOKENS, TOP_K = 2048, 4096, 256
RECIPE: dict[str, Any] = {
    "kind": "pretrain",
    "model": {
        "num_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "num_kv_heads": 1, "head_dim": 32,
        "vocab_size": 2048, "max_seq_len": SEQ_LEN, "norm_weight": True, "qk_norm_weight": True, "qk_norm_init": 1.4,
        "residual_init": "scaled", "attention_init": "induction",
    },
    "tokenizer": {"vocab_size": 2048},
    "seq_len": SEQ_LEN,
    "batch_tokens": BATCH_TOKENS,
    "compile": "never",
    "log_every_steps": 1,
    "optim": {"lr": 2.5e-3},
}  # fmt: skip
SPARSE = {"type": "sparse", "top_k": TOP_K}
SHORT_TOKENS = 240 * BATCH_TOKENS  # of the first stage, in rows of 256 tokens
BRANCH = {
    "total_tokens": 40 * BATCH_TOKENS, "optim": {"lr": 1.0e-3}, "schedule": {"type": "linear", "warmup_tokens": 4 * BATCH_TOKENS},
}  # fmt: skip
STAGES: dict[str, dict[str, Any]] = {
    "dense": {
        "curriculum": [{"seq_len": 256, "until_tokens": SHORT_TOKENS}, {"seq_len": SEQ_LEN}],
        "total_tokens": SHORT_TOKENS + 60 * BATCH_TOKENS, "schedule": {"type": "constant", "warmup_tokens": 20 * BATCH_TOKENS},
    },
    "warmup": {  # one row a step
        "init_from": "dense", "trains": "indexers", "model": RECIPE["model"] | {"attention": SPARSE}, "batch_tokens": SEQ_LEN,
        "total_tokens": 400 * SEQ_LEN, "optim": {"lr": 1.0e-3}, "schedule": {"type": "constant", "warmup_tokens": 5 * SEQ_LEN},
    },
    "sparse": {"init_from": "warmup", **BRANCH},
    "dense-on": {"init_from": "dense", **BRANCH},
}  # fmt: skip


def train(name: str, seed: int, folder: Path, files: Sequence[Path], overrides: Sequence[str]) -> Path:
    """Train one stage or go on with it, and return its run. The first of all prepares the shards and the tokenizer."""
    run, shards = folder / f"{seed}-{name}", folder / "shards"
    stage = dict(STAGES[name])
    if "init_from" in stage:
        stage["init_from"] = str(folder / f"{seed}-{stage['init_from']}")
    every = {"eval_every_tokens": stage["total_tokens"], "checkpoint": {"every_tokens": stage["total_tokens"]}}
    held_out = {files[0]: 0.05}  # of one file, so that an evaluation is short
    sources = [
        {"type": "files", "path": str(file), "weight": file.stat().st_size, "holdout_fraction": held_out.get(file, 0.0)}
        for file in files
    ]
    data: dict[str, Any] = {"type": "mixture", "sources": sources}
    if shards.exists() and shards.resolve() != (run / "data").resolve():
        data = {"type": "prepared", "path": str(shards)}
    # Both branches read other rows than the first stage, and the same ones.
    recipe = {**RECIPE, **every, **stage, "data": data, "seed": seed + (1000 if name in ("sparse", "dense-on") else 0)}
    file = folder / f"{seed}-{name}.yaml"
    file.write_text(json.dumps(recipe, indent=2))
    in_fresh_python(["-m", "osler.cli", "pretrain", str(file), *overrides, "--run", str(run)])
    if not shards.exists():
        shards.symlink_to(run / "data")
    return run


def last(run: Path, name: str, count: int = 1) -> float:
    """The mean of the last values of a metric."""
    return statistics.mean([line.values[name] for line in read_metrics(RunFolder(run).metrics, having=name)][-count:])


@torch.no_grad()
def recalls(model: Transformer, ids_BT: Tensor) -> dict[str, float]:
    """The recall of a sparse model's index, of the latest keys and of the best ones, averaged over layers."""
    found: dict[str, list[float]] = {"index": [], "latest": [], "best": []}

    def look(module: Any, args: Any) -> None:
        q_BNTH, k_BKTH, _ = (heads.transpose(1, 2) for heads in module.project(*args[:3]))
        first_BT = torch.zeros_like(ids_BT)
        place_T1 = torch.arange(ids_BT.shape[1])[:, None]
        seen = is_seen(place_T1, first_BT[:, None, :, None], ids_BT.shape[1])
        p_BRTS = attention_shares(q_BNTH, k_BKTH, seen, module.indexer.choices)
        chosen_BRTX = choose(module.indexer(*args[:2]), first_BT, module.choice)
        of_index = p_BRTS.gather(-1, chosen_BRTX.long().clamp_min(0)) * (chosen_BRTX >= 0)
        latest = p_BRTS * (place_T1 - place_T1.T < module.choice.top_k)
        for name, p in {"index": of_index, "latest": latest, "best": p_BRTS.topk(module.choice.top_k).values}.items():
            found[name].append(float(p.sum(-1).mean()))

    hooks = [block.self_attn.register_forward_pre_hook(look) for block in model.layers]  # type: ignore[union-attr,operator]
    model(ids_BT)
    for hook in hooks:
        hook.remove()
    return {name: statistics.mean(values) for name, values in found.items()}


def one_seed(seed: int, folder: Path, files: Sequence[Path], overrides: list[str]) -> dict[str, Any]:
    runs, seconds = {}, {}
    for name in STAGES:
        began = time.monotonic()
        runs[name] = train(name, seed, folder, files, overrides)
        seconds[name] = time.monotonic() - began
        print(f"seed {seed}, {name}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)
    warm = load_model(runs["warmup"])
    config = decode(TrainConfig, read_config(RunFolder(runs["sparse"])))
    loader = make_loader(config, open_prepared(shards_of(config, RunFolder(runs["sparse"])), warm.tokenizer))
    ids_BT = loader.batch(0).ids
    after = recalls(warm.model, ids_BT)
    init_indexers(warm.model, warm.model.config, seed)
    new = recalls(warm.model, ids_BT)
    at_random = statistics.mean(min(1.0, TOP_K / (place + 1)) for place in range(SEQ_LEN))
    of_index = {"new": new["index"], "after_warmup": after["index"]}
    of_index["after_sparse"] = recalls(load_model(runs["sparse"]).model, ids_BT)["index"]
    kls = [line.values["index/kl"] for line in read_metrics(RunFolder(runs["warmup"]).metrics, having="index/kl")]
    bits = {name: last(run, "eval/bits_per_byte") for name, run in runs.items()}
    return {
        "seed": seed,
        "recall": of_index,
        "recall_of_others": {"random": at_random, "latest": after["latest"], "best": after["best"]},
        "warmup_kl": {"first_step": kls[0], "last_ten_steps": statistics.mean(kls[-10:])},
        "bits_per_byte": bits,
        "sparse_over_dense": bits["sparse"] / bits["dense-on"] - 1,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="texts with documents of thousands of tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/sparse-learning"), help="where runs are kept and gone on with")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="fields of all runs")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        rows.append(one_seed(seed, args.runs.absolute(), [file.absolute() for file in args.files], args.set))
        differences = [row["sparse_over_dense"] for row in rows]
        result = {
            "benchmark": "sparse_learning",
            "files": [file.name for file in args.files],
            "overrides": args.set,
            "tokens": {name: stage["total_tokens"] for name, stage in STAGES.items()},
            "sparse_over_dense": {"mean": statistics.mean(differences), "largest": max(differences, key=abs)},
        }
        publish({**result, "seeds": rows}, args.out)


if __name__ == "__main__":
    main()
