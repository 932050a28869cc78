"""How do the ranks of short runs end? Not one may abort after its work is done.

    python benchmarks/rank_exits.py [--runs 20] [--out FILE]

Starts `torchrun --nproc-per-node 2` on a tiny pretraining run of 50 steps again and again. What can go wrong depends on how the
machine schedules threads, so that one run says little. Prints one JSON object: the exit codes of torchrun, and how many runs
aborted; exits with 1 when one did not end with 0.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from measuring import ROOT, publish

RUN = [
    "device=cpu", "precision=fp32", "compile=never", "parallel.type=ddp", "data.passages=60", "data.examples=40", "data.cards=0",
    "data.drills=0", "tokenizer.vocab_size=512", "model.num_layers=2", "model.hidden_size=32", "model.intermediate_size=64",
    "model.num_heads=2", "model.num_kv_heads=1", "model.head_dim=16", "model.vocab_size=512", "model.max_seq_len=64",
    "seq_len=64", "batch_tokens=256", "total_tokens=12800", "schedule.warmup_tokens=1280",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    codes: Counter[int] = Counter()
    aborted = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.runs):
            command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            command += ["-m", "osler.cli", "pretrain", *RUN, "--run-dir", f"{folder}/{number}"]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
            )
            codes[done.returncode] += 1
            aborted += "SIGABRT" in done.stderr
            if done.returncode:
                print(done.stderr[-2000:], file=sys.stderr)
    told = {str(code): count for code, count in codes.items()}
    publish({"runs": arguments.runs, "codes": told, "aborted": aborted}, arguments.out)
    return int(codes != {0: arguments.runs})


if __name__ == "__main__":
    sys.exit(main())
