"""Ten minutes on real text: the recipe ``text-10min`` over the files you name, and the bits per byte it reaches.

    python benchmarks/text_10min.py FILE [FILE ...] [--set key.path=value ...] [--out FILE]

The files (parquet, JSONL or text) are put into one folder; the run trains its own tokenizer on it, holds out 5 % of the documents
and stops by the clock, preparation and compilation included. Bits per byte are over all held-out documents, every token predicted
once, in windows of ``seq_len`` tokens that do not overlap. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import ROOT, publish

from osler.records.jsonl import read_metrics


def train(files: Sequence[Path], overrides: Sequence[str]) -> dict[str, Any]:
    """Train the recipe over copies of ``files`` in a folder that is gone afterwards; returns what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        texts, run = Path(folder) / "texts", Path(folder) / "run"
        texts.mkdir()
        for file in files:
            shutil.copy(file, texts)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "cache")}
        command = [sys.executable, "-m", "osler.cli", "pretrain", "text-10min", f"data.path={texts}", "--run", str(run)]
        started = time.monotonic()
        if subprocess.run([*command, *overrides], env=environment).returncode:
            raise SystemExit(1)
        minutes = (time.monotonic() - started) / 60
        measured = list(read_metrics(run / "metrics.jsonl", having="eval/bits_per_byte"))
        manifest = json.loads((run / "data" / "manifest.json").read_text())
    return {
        "benchmark": "text-10min",
        "files": [file.name for file in files],
        "overrides": list(overrides),
        "minutes": minutes,
        "bits_per_byte": measured[-1].values["eval/bits_per_byte"],
        "curve": [{"tokens": line.tokens, "bits_per_byte": line.values["eval/bits_per_byte"]} for line in measured],
        "tokens_trained": measured[-1].tokens,
        "content_fingerprint": manifest["content_fingerprint"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="overrides of the recipe")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    publish(train(args.files, args.set), args.out)


if __name__ == "__main__":
    main()
