"""What reading the log of a long run costs: seconds and peak memory of report, watch, compare and a resume, by lines.

    python benchmarks/bench_report.py [--lines 3000 30000 300000] [--out FILE]

The lines are those that `text-10min` writes, an evaluation behind every 400th. Every measurement is a process of its own, its
imports included; a resume heals the log (its last tenth lies behind the checkpoint) and replays its alerts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import measured, publish

from osler.runtime.machine import peak_process_bytes

STEPS_PER_LINE, TOKENS_PER_STEP, SECONDS_PER_LINE = 10, 4096, 0.35
MODES = ("report", "watch", "compare", "heal", "replay")


def write_run(folder: Path, lines: int) -> None:
    """A run folder with so many lines of training, always the same ones."""
    draw = random.Random(0)
    folder.mkdir()
    (folder / "config.yaml").write_text("kind: pretrain\ntotal_tokens: 1000000000\n", encoding="utf-8")
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for number in range(1, lines + 1):
            step = number * STEPS_PER_LINE
            own = {"step": step, "tokens": step * TOKENS_PER_STEP, "time": round(1.7e9 + SECONDS_PER_LINE * number, 3)}
            loss = 3 + 5 * math.exp(-6 * number / lines) + draw.gauss(0, 0.05)
            row = {
                **own, "train/loss": loss, "train/perplexity": math.exp(loss), "train/grad_norm": 0.5 + 0.1 * draw.random(),
                "train/skipped_steps": 0.0, "grad/norm_max": 0.6 + 0.1 * draw.random(), "grad/clipped_frac": 0.0,
                "train/bits_per_byte": 0.6 * loss, "train/lr": 0.02 * (1 - number / lines),
                **{f"perf/{part}_ms": 9 * draw.random() for part in ("data", "forward", "backward", "optimizer")},
                "perf/memory_resident_bytes": 249008128, "perf/memory_peak_bytes": 308953088,
                "data/epoch": number / 1000, "data/padding_frac": 0.0, "perf/tokens_per_second": draw.gauss(40_000, 900),
                "perf/eta_seconds": SECONDS_PER_LINE * (lines - number),
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
            if number % 400 == 0:
                row = {**own, "eval/loss": loss + 0.1, "eval/bits_per_byte": 0.6 * loss, "eval/seconds": 0.1}
                file.write(json.dumps(row) + "\n")


def work_of(mode: str, folder: Path, lines: int) -> Callable[[], object]:
    """What a mode does with a run, imports included."""

    def resume() -> None:
        from osler.records.jsonl import MetricsFile

        MetricsFile(folder / "copy.jsonl", last_step=STEPS_PER_LINE * lines * 9 // 10)

    def replay() -> None:
        from osler.monitor.alerts import replay
        from osler.monitor.history import RunSettings

        replay(RunSettings(lr=0.02, clip_norm=1.0, warmup_tokens=163_840, vocab_size=8192), folder / "metrics.jsonl")

    def verb(*words: str) -> None:
        from osler.cli.main import main

        with contextlib.redirect_stdout(io.StringIO()):
            if code := main(list(words)):
                raise SystemExit(code)

    if mode == "heal":
        shutil.copy(folder / "metrics.jsonl", folder / "copy.jsonl")
    other, page = folder.with_name("other"), str(folder / "page.html")
    return {
        "report": lambda: verb("report", str(folder), "--out", page),
        "watch": lambda: verb("watch", str(folder), "--once"),
        "compare": lambda: verb("compare", str(folder), str(other), "--out", page),
        "heal": resume,
        "replay": replay,
    }[mode]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="+", default=[3_000, 30_000, 300_000])
    parser.add_argument("--out", type=Path, help="also write the JSON here, as benchmarks/results/bench_report.json")
    parser.add_argument("--measure", nargs=3, metavar=("MODE", "FOLDER", "LINES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        mode, folder, lines = args.measure
        work = work_of(mode, Path(folder), int(lines))
        began, cpu = time.perf_counter(), time.process_time()
        work()
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        peak = peak_process_bytes()
        print(json.dumps({"seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3), "peak_bytes": peak}))
        return

    result: dict[str, Any] = {"benchmark": "bench_report"}
    for lines in args.lines:
        with tempfile.TemporaryDirectory() as top:
            for name in ("run", "other"):
                write_run(Path(top) / name, lines)
            given = [__file__, "--measure"]
            result[f"{lines} lines"] = {mode: measured([*given, mode, str(Path(top) / "run"), str(lines)]) for mode in MODES}
    publish(result, args.out)


if __name__ == "__main__":
    main()
