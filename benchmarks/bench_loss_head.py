"""The chunked loss head beside the unchunked formula: peak extra memory and time, forward and backward.

    python benchmarks/bench_loss_head.py [--tokens 16384] [--timed-tokens 2048] [--vocab 200005] [--width 640] [--out FILE]

Every measurement is a fresh process; the two take turns, ratios are taken round by round and medians are given. Memory is what
the process (on CUDA: the device) held at most during one forward and backward pass, less what it held before, less the
gradients of features and weight, which anyone must hold. It is measured at ``--tokens``, where the unchunked formula need not
fit; time is measured at ``--timed-tokens``, where it does. Features are bf16, the weight is fp32, labels are random.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from measuring import measured, publish

CONTESTANTS = ("chunked", "unchunked", "chunked-compiled", "unchunked-compiled")
MIB = 1 << 20


def resident_bytes() -> int:
    """What this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def reset_peak() -> None:
    """Let the high-water mark start from what is held now (Linux: 5 is the code for that)."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(contestant: str, tokens: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the median pass after a first one, and in MiB the most held during the first (compiled: a later one)."""
    import torch

    from osler.ops.cross_entropy import cross_entropy_reference, linear_cross_entropy
    from osler.runtime.device import pick_device
    from osler.runtime.machine import peak_process_bytes

    device = pick_device("auto")
    generator = torch.Generator(device).manual_seed(0)
    padded = -(-args.vocab // 64) * 64
    features = torch.empty(tokens, args.width, dtype=torch.bfloat16, device=device).normal_(generator=generator).requires_grad_()
    weight = torch.empty(padded, args.width, device=device).normal_(std=0.02, generator=generator).requires_grad_()
    labels = torch.randint(args.vocab, (tokens,), device=device, generator=generator)
    function: Any = cross_entropy_reference if contestant.startswith("unchunked") else linear_cross_entropy
    if contestant.endswith("-compiled"):
        function = torch.compile(function, fullgraph=True, dynamic=False)
    gradients = features.nbytes + weight.nbytes

    def once() -> float:
        features.grad = weight.grad = None
        started = time.perf_counter()
        (function(features, weight, labels, vocab_size=args.vocab) / tokens).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    if contestant.endswith("-compiled"):
        once()
        features.grad = weight.grad = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        first = once()
        held = torch.cuda.max_memory_allocated() - before
    else:
        reset_peak()
        before = resident_bytes()
        first = once()
        held = peak_process_bytes() - before
    seconds = [first] if args.passes == 0 else [once() for _ in range(args.passes)]
    return {"seconds": statistics.median(seconds), "extra_mib": (held - gradients) / MIB}


def fresh(contestant: str, tokens: int, passes: int, args: argparse.Namespace) -> dict[str, float]:
    """Measure in a process of its own, whose allocator gives freed memory back at once so that the peak is what is in use."""
    sizes = ["--vocab", str(args.vocab), "--width", str(args.width), "--passes", str(passes)]
    environment = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"} if passes == 0 else {}
    result = measured([__file__, "--child", contestant, str(tokens), *sizes], threads=args.threads, **environment)
    print(f"{contestant}, {tokens} tokens: {result}", file=sys.stderr)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--timed-tokens", type=int, default=2_048)
    parser.add_argument("--vocab", type=int, default=200_005)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=3, help="timed passes in each process")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child[0], int(args.child[1]), args)))
        return

    import torch

    memory = {name: fresh(name, args.tokens, 0, args)["extra_mib"] for name in CONTESTANTS if name.startswith("chunked")}
    rounds = [
        {name: fresh(name, args.timed_tokens, args.passes, args)["seconds"] for name in CONTESTANTS} for _ in range(args.rounds)
    ]
    result = {
        "benchmark": "loss_head",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": args.threads,
        "vocab": args.vocab,
        "width": args.width,
        "memory": {"tokens": args.tokens, "extra_mib": memory},
        "time": {
            "tokens": args.timed_tokens,
            "passes": args.passes,
            "median_seconds": {name: statistics.median(each[name] for each in rounds) for name in CONTESTANTS},
            "over_unchunked": {
                kind: statistics.median(each[f"chunked{kind}"] / each[f"unchunked{kind}"] for each in rounds)
                for kind in ("", "-compiled")
            },
            "rounds": rounds,
        },
    }
    publish(result, args.out)


if __name__ == "__main__":
    main()
