"""Training throughput: forward + backward + AdamW, Osler's model beside its peers at the same shape, batch and dtype.

    python benchmarks/bench_train.py [--peer PATH_TO_NANOCHAT] [--shape small] [--rounds 3] [--out FILE]

Every measurement is a fresh process; the contestants take turns, so that a machine that slows down slows all of them. The peer
is nanochat's ``GPT`` class imported from a checkout that you give; it is compiled as a whole, as nanochat does, and stepped by
the same fused AdamW, because the comparison is of the models and not of the optimizers. Both get random tokens. The numbers are
medians over rounds of the median step; ratios are taken round by round. "same shape" means layers, width, heads, key/value
heads, vocabulary, rows and row length, and matrix parameters as near as the two feed-forward designs allow (SwiGLU has three
matrices, nanochat's has two of four times the width).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHAPES: dict[str, dict[str, int]] = {
    # SwiGLU of 8/3 the width (rounded to 32) has the parameters of a two-matrix feed-forward of four times the width.
    "quickstart": {
        "layers": 4,
        "width": 128,
        "inner": 352,
        "heads": 4,
        "kv_heads": 2,
        "vocab": 2048,
        "rows": 64,
        "seq_len": 128,
    },
    "small": {
        "layers": 6,
        "width": 256,
        "inner": 672,
        "heads": 4,
        "kv_heads": 2,
        "vocab": 4096,
        "rows": 16,
        "seq_len": 256,
    },
}
WARMUP_STEPS, TIMED_STEPS = 3, 12


def build_osler(shape: dict[str, int], dtype: Any) -> tuple[Any, Any]:
    """Osler's transformer with its chunked loss."""
    from osler.model.config import ModelConfig
    from osler.model.transformer import Transformer
    from osler.ops.cross_entropy import linear_cross_entropy

    config = ModelConfig(
        num_layers=shape["layers"],
        hidden_size=shape["width"],
        intermediate_size=shape["inner"],
        num_heads=shape["heads"],
        num_kv_heads=shape["kv_heads"],
        head_dim=shape["width"] // shape["heads"],
        vocab_size=shape["vocab"],
        max_seq_len=shape["seq_len"],
    )
    model = Transformer(config, compute_dtype=dtype)
    model.init_weights(0)

    def loss(ids: Any, labels: Any) -> Any:
        features, weight = model.head(model(ids))
        return linear_cross_entropy(features, weight, labels.flatten()) / labels.numel()

    return model, loss


def build_nanochat(shape: dict[str, int], peer: Path) -> tuple[Any, Any]:
    """nanochat's GPT with its own loss, full attention in every layer."""
    sys.path.insert(0, str(peer))
    from nanochat.gpt import GPT, GPTConfig  # type: ignore[import-not-found]

    model = GPT(
        GPTConfig(
            sequence_len=shape["seq_len"],
            vocab_size=shape["vocab"],
            n_layer=shape["layers"],
            n_head=shape["heads"],
            n_kv_head=shape["kv_heads"],
            n_embd=shape["width"],
            window_pattern="L",
        )
    )
    model.init_weights()
    return model, lambda ids, labels: model(ids, labels)


def measure(contestant: str, shape: dict[str, int], dtype_name: str, peer: Path | None) -> dict[str, float]:
    """Time one contestant in this process."""
    import torch

    from osler.runtime.device import keep_freed_memory

    keep_freed_memory()
    dtype = getattr(torch, dtype_name)
    torch.manual_seed(0)
    if contestant == "osler":
        model, loss_function = build_osler(shape, dtype)
    else:
        assert peer is not None
        model, loss_function = build_nanochat(shape, peer)
    compiled = torch.compile(loss_function, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids, labels = (torch.randint(0, shape["vocab"], (shape["rows"], shape["seq_len"])) for _ in range(2))

    def step() -> None:
        compiled(ids, labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    started = time.perf_counter()
    step()
    first_seconds = time.perf_counter() - started
    for _ in range(WARMUP_STEPS):
        step()
    seconds = []
    for _ in range(TIMED_STEPS):
        before = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - before)
    step_seconds = statistics.median(seconds)
    return {
        "tokens_per_second": shape["rows"] * shape["seq_len"] / step_seconds,
        "step_milliseconds": step_seconds * 1000,
        "first_step_seconds": first_seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def fresh(contestant: str, args: argparse.Namespace) -> dict[str, float]:
    """Measure one contestant in a process of its own."""
    command = [sys.executable, __file__, "--contestant", contestant, "--shape", args.shape, "--dtype", args.dtype]
    if args.peer:
        command += ["--peer", str(args.peer)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "NANOCHAT_DTYPE": args.dtype,
        "OMP_NUM_THREADS": str(args.threads),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{contestant} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="a checkout of nanochat")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--contestant", choices=("osler", "nanochat"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    if args.contestant:
        print(json.dumps(measure(args.contestant, shape, args.dtype, args.peer)))
        return

    import torch

    contestants = ["osler", *(["nanochat"] if args.peer else [])]
    rounds = [{name: fresh(name, args) for name in contestants} for _ in range(args.rounds)]
    result: dict[str, Any] = {
        "benchmark": "train",
        "shape": {"name": args.shape, **shape},
        "dtype": args.dtype,
        "threads": args.threads,
        "machine": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "rounds": rounds,
        "median_tokens_per_second": {
            name: statistics.median(each[name]["tokens_per_second"] for each in rounds) for name in contestants
        },
    }
    if args.peer:
        ratios = [each["osler"]["tokens_per_second"] / each["nanochat"]["tokens_per_second"] for each in rounds]
        result["osler_over_nanochat"] = {"median": statistics.median(ratios), "each": ratios}
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
