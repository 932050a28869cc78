"""BPE and SuperBPE side by side: tokens for a book that neither was trained on, time and memory of training, speed of encoding.

    python benchmarks/bench_tokenizer.py [--data ../shared/data] [--vocab-size 32768] [--book openstax-anatomy-physiology.parquet]

Both are trained on the other texts of DATA/text, each in a fresh process on all cores: reading the files is not timed, and
``peak_bytes`` is the most that the process had resident. Beside them the book is cut by the published vocabularies in
DATA/tokenizers. ``tokens_per_second`` is that of ``--processes`` together, one thread each, that encode the book over and over;
``tokens_per_cpu_second`` is that of one of them by its own clock, which stands still while other work has the core.
``gives_back`` says whether every text of the book was decoded to what it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measuring import ROOT, measured, publish

TRAINED = ("bpe", "superbpe")
PUBLISHED = ("gpt2", "superbpe-t80k")
TEXT_FIELDS = {"medquad.parquet": "answer"}  # of tables whose text is not in the column `text`


def texts_of(path: Path) -> list[str]:
    from osler.data.readers import TextFiles

    return [document.text for document in TextFiles(path, TEXT_FIELDS.get(path.name, "text"))]


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train a tokenizer in this process and write it to a file."""
    from osler.runtime.machine import peak_process_bytes
    from osler.tokenizer import superbpe
    from osler.tokenizer.bpe import Tokenizer

    paths = sorted(path for path in (args.data / "text").iterdir() if path.name != args.book)
    texts = [text for path in paths for text in texts_of(path)]
    started = time.perf_counter()
    if args.type == "bpe":
        tokenizer = Tokenizer.train(texts, args.vocab_size)
    else:
        tokenizer = superbpe.train(texts, args.vocab_size, args.vocab_size // 2)
    seconds = time.perf_counter() - started
    args.tokenizer.write_bytes(tokenizer.to_bytes())
    peak = peak_process_bytes()
    size = sum(len(text.encode()) for text in texts)
    return {"text_bytes": size, "seconds": seconds, "peak_bytes": peak, "vocab_size": tokenizer.vocab_size}


def encode(args: argparse.Namespace) -> dict[str, Any]:
    """Encode the book in this process, once to get ready and then as often as asked."""
    from osler.tokenizer.bpe import Tokenizer

    tokenizer = Tokenizer.load(args.tokenizer)
    texts = texts_of(args.data / "text" / args.book)
    encoded = tokenizer.encode_batch(texts)
    gives_back = all(tokenizer.decode(ids) == text for ids, text in zip(encoded, texts, strict=True))
    tokens, size = sum(map(len, encoded)), sum(len(text.encode()) for text in texts)
    started, cpu_started = time.perf_counter(), time.process_time()
    for _ in range(args.passes):
        tokenizer.encode_batch(texts)
    rate = args.passes * tokens / (time.perf_counter() - started)
    cpu_rate = args.passes * tokens / (time.process_time() - cpu_started)
    rates = {"bytes_per_token": size / tokens, "tokens_per_second": rate, "tokens_per_cpu_second": cpu_rate}
    return {"tokens": tokens, "gives_back": gives_back, **rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--book", default="openstax-anatomy-physiology.parquet")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--passes", type=int, default=8, help="over the book, by each process")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--mode", choices=("train", "encode"), help=argparse.SUPPRESS)
    parser.add_argument("--type", choices=TRAINED, help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode:
        print(json.dumps(train(args) if args.mode == "train" else encode(args)))
        return

    def fresh(mode: str, tokenizer: Path, **environment: str) -> dict[str, Any]:
        own = ["--mode", mode, "--tokenizer", str(tokenizer), *(["--type", tokenizer.stem] if mode == "train" else [])]
        return measured([__file__, *sys.argv[1:], *own], **environment)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.processes) as pool:
        paths = {name: Path(folder, f"{name}.json") for name in TRAINED}
        training = {name: fresh("train", path) for name, path in paths.items()}
        paths |= {name: args.data / "tokenizers" / name for name in PUBLISHED}
        encoding = {}
        for name, path in paths.items():
            together = list(pool.map(lambda path: fresh("encode", path, RAYON_NUM_THREADS="1"), [path] * args.processes))
            encoding[name] = together[0] | {"tokens_per_second": sum(each["tokens_per_second"] for each in together)}
    result = {
        "benchmark": "tokenizer",
        "vocab_size": args.vocab_size,
        "book": args.book,
        "processes": args.processes,
        "training": training,
        "encoding": encoding,
        "superbpe_tokens_over_bpe": encoding["superbpe"]["tokens"] / encoding["bpe"]["tokens"],
    }
    publish(result, args.out)


if __name__ == "__main__":
    main()
