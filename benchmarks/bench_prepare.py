"""`osler data prepare` beside `datasets.map` with the same fast tokenizer, and its memory over the size of the input.

    python benchmarks/bench_prepare.py [--megabytes 100] [--memory 50 500 2000] [--repeats 3] [--text FILE ...] [--out FILE]

Both read the same JSON lines with two processes and the same tokenizer.json. Each run is a fresh process, and the two take turns.
Ours is timed from the files to finished shards, hold-out and hashes included; of the other only `map` is timed, as well as the
reading of the file into its own format (`load_seconds`). Text is drawn from a seed, with word frequencies as those of a language,
or cut from the documents of `--text`; it repeats until there is enough, each piece with a number, so that none is a copy.
`peak_bytes` is the proportional share of all processes together, `largest_process_bytes` that of the largest, both sampled; they
are measured for each size of `--memory` too; `growth` is the peak of the last size over that of the first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import string
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from measuring import measured, publish

PROCESSES, DOCUMENT_CHARS, SYNTHETIC_DOCUMENTS, VOCABULARY = 2, 3000, 10_000, 32_768
SAMPLE_SECONDS = 0.05


def synthetic(seed: int) -> list[str]:
    """Return documents of words by Zipf's law; their lengths are log-normal, as those of web text are nearly."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 12))) for _ in range(60_000)]
    words += [word.capitalize() for word in words[:20_000]] + [f"{word}," for word in words[:2000]]
    cumulative = list(itertools.accumulate(1 / (rank + 2.7) for rank in range(len(words))))
    documents = []
    for _ in range(SYNTHETIC_DOCUMENTS):
        count = int(min(20_000, max(20, rng.lognormvariate(6, 0.9))))
        chosen = rng.choices(words, cum_weights=cumulative, k=count)
        numbered = (f"{word} {rng.randint(0, 999)}.\n" if place % 17 == 16 else word for place, word in enumerate(chosen))
        documents.append(" ".join(numbered))
    return documents


def cut(paths: list[Path]) -> list[str]:
    """Return pieces of the documents in files, shuffled."""
    from osler.data.readers import TextFiles

    texts = [document.text for path in paths for document in TextFiles(path)]
    pieces = [text[at : at + DOCUMENT_CHARS] for text in texts for at in range(0, len(text), DOCUMENT_CHARS)]
    random.Random(0).shuffle(pieces)
    return pieces


def write(path: Path, pieces: list[str], megabytes: float) -> None:
    """Let a file of JSON lines have so much of the text, again and again, each piece with a number."""
    with open(path, "w", encoding="utf-8") as file:
        size, numbers = 0, itertools.count()
        while size < megabytes * 1e6:
            number = next(numbers)
            size += file.write(json.dumps({"text": f"{pieces[number % len(pieces)]} {number}"}, ensure_ascii=False) + "\n")


class PeakMemory(threading.Thread):
    """Samples the memory of this process and of those that it started."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = self.largest_bytes = 0

    def run(self) -> None:
        while True:
            children = [line.split() for line in self._read("/proc/self/task/*/children")]
            sizes = [self._share(pid) for pid in ("self", *itertools.chain(*children))]
            self.peak_bytes, self.largest_bytes = max(self.peak_bytes, sum(sizes)), max(self.largest_bytes, *sizes)
            time.sleep(SAMPLE_SECONDS)

    @staticmethod
    def _read(pattern: str) -> list[str]:
        return [path.read_text() for path in Path("/").glob(pattern.lstrip("/"))]

    def _share(self, pid: str) -> int:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            return 0
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def ours(data: Path, tokenizer: Path, folder: Path) -> dict[str, Any]:
    from osler.data.config import FilesData
    from osler.data.sources import prepare_sources
    from osler.tokenizer.bpe import Tokenizer

    memory = PeakMemory()
    memory.start()
    loaded = Tokenizer.load(tokenizer)
    began = time.perf_counter()
    prepared = prepare_sources(FilesData(path=str(data)), loaded, folder / "shards", processes=PROCESSES)
    seconds = time.perf_counter() - began
    tokens = prepared.num_tokens + sum(shards.num_tokens for shards in prepared.validation)
    return {"tokens": tokens, "seconds": seconds, "peak_bytes": memory.peak_bytes, "largest_process_bytes": memory.largest_bytes}


def theirs(data: Path, tokenizer: Path, folder: Path) -> dict[str, Any]:
    import datasets
    from transformers import PreTrainedTokenizerFast

    loaded = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    datasets.disable_progress_bars()

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = loaded(batch["text"], return_attention_mask=False, return_token_type_ids=False)
        return {"input_ids": ids["input_ids"]}

    began = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=str(folder))
    read = time.perf_counter()
    mapped = rows.map(encode, batched=True, num_proc=PROCESSES, remove_columns=rows.column_names)
    seconds = time.perf_counter() - read
    tokens = sum(len(ids) for batch in mapped.iter(1000) for ids in batch["input_ids"])
    return {"tokens": tokens, "seconds": seconds, "load_seconds": read - began}


CONTESTANTS = {"osler": ours, "datasets.map": theirs}


def run(name: str, data: Path, tokenizer: Path) -> dict[str, Any]:
    """Run a contestant in a fresh process, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        where = ["--data", str(data), "--tokenizer", str(tokenizer), "--folder", folder]
        found = measured([__file__, "--contestant", name, *where], HF_HUB_OFFLINE="1", HF_HOME=folder)
    return {**found, "tokens_per_second": found["tokens"] / found["seconds"]}


def median(found: list[dict[str, Any]]) -> dict[str, float]:
    return {key: round(statistics.median(one[key] for one in found), 2) for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--memory", type=float, nargs="*", default=[50, 500, 2000], metavar="MEGABYTES")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--text", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json; one is trained on the text if none is given")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        print(json.dumps(CONTESTANTS[arguments.contestant](arguments.data, arguments.tokenizer, arguments.folder)))
        return
    from osler.tokenizer.bpe import Tokenizer

    with tempfile.TemporaryDirectory() as root:
        data, tokenizer = Path(root) / "data.jsonl", Path(root) / "tokenizer.json"
        pieces = cut(arguments.text) if arguments.text else synthetic(0)
        if arguments.tokenizer:
            loaded = Tokenizer.load(arguments.tokenizer).with_specials()
        else:
            loaded = Tokenizer.train(pieces[:5000], VOCABULARY)
        tokenizer.write_bytes(loaded.to_bytes())
        write(data, pieces, arguments.megabytes)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
        for _ in range(arguments.repeats):
            for name, results in found.items():
                results.append(run(name, data, tokenizer))
        rates = {name: median(results) for name, results in found.items()}
        memory = {}
        for megabytes in arguments.memory:
            write(data, pieces, megabytes)
            found_here = run("osler", data, tokenizer)
            memory[f"{megabytes:g} MB"] = {key: found_here[key] for key in ("seconds", "peak_bytes", "largest_process_bytes")}
        peaks = [entry["peak_bytes"] for entry in memory.values()]
        ratio = rates["osler"]["tokens_per_second"] / rates["datasets.map"]["tokens_per_second"]
        result = {
            "benchmark": "prepare",
            "processes": PROCESSES,
            "megabytes": arguments.megabytes,
            "text": [path.name for path in arguments.text] if arguments.text else "synthetic",
            "vocabulary": loaded.vocab_size,
            "median_of": arguments.repeats,
            **rates,
            "ratio": round(ratio, 2),
            "memory": memory,
            "growth": round(peaks[-1] / peaks[0], 3) if peaks else None,
            "cores": os.cpu_count(),
        }
    publish(result, arguments.out)


if __name__ == "__main__":
    main()
