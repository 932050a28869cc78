"""Which program makes the better model of the same text in the same minutes: recipes of Osler against nanochat.

    python benchmarks/learn_minutes.py FILE [FILE ...] --runs DIR [--minutes 10] [--seeds 3] [--peer CHECKOUT_OF_NANOCHAT]
        [--recipes text-10min "text-10min optim.lr=0.03"] [--peer-setups "" "width=192 rates=0.5"]
        [--other-text FILE[:COLUMN] ...] [--out FILE]

Every contestant learns from the same documents, 5 % held out by Osler's own rule, in a fresh process with cold caches (or with
``--warm-cache`` with warm ones). Its minutes include everything: the start of the process, preparation, the training of its own
tokenizer, compilation and the evaluation of what is held out. Contestants take turns, seed by seed. A recipe may have fields
behind it, and a setup of the peer is fields of ``Setup`` in ``learn_nanochat.py``; so either side is tuned by giving several,
with ``--seeds 1``.

Bits per byte are of whole documents: the nats of all tokens, and of the end of each document, over the bytes of the text. Windows
do not overlap and begin without context. Each contestant reads as many tokens at once as it was trained on, a model of Osler
whose attention has a window as many as ``max_seq_len``, or as many as it was given (``--context``, and ``context`` of the peer's
setup). The peer is also measured with twice the tokens that it learned at once (``twice_the_context``), for the gain may be the
reading's. Other texts are measured after the clock has stopped, up to ``--other-bytes`` of documents that a hash draws.

A finished run stays in --runs, so nights add up. It is repeated when its code has changed: Osler's checkout, or for the peer its
own and ``learn_nanochat.py``. A run that was interrupted begins again. Prints one JSON object; ``ahead`` says by how many percent
each recipe is below the best setup of the peer, seed by seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from learn_nanochat import Setup
from measuring import ROOT, commit_of, publish

from osler.config.recipe import load_recipe
from osler.config.schema import decode, encode
from osler.data.documents import Document
from osler.data.readers import TextFiles
from osler.records.jsonl import read_metrics
from osler.runtime.device import describe_machine
from osler.runtime.errors import UserError
from osler.runtime.files import write_json
from osler.runtime.stop import EXIT_STOPPED, interruptible
from osler.train.config import TrainConfig

PEER = ROOT / "benchmarks" / "learn_nanochat.py"
HELD_OUT = "held-out"
HELD_OUT_SHARE = 0.05
RESERVED_MINUTES = 0.15  # less than the minutes of a run are given to Osler as max_minutes, for its start and last evaluation
LATE = 1.01  # a run that took more than this times its minutes is called late


@dataclass(frozen=True)
class Texts:
    """The files that all contestants read: JSONL of texts."""

    train: Path
    held_out: Path
    others: dict[str, Path]
    digest: str  # of all of them


@dataclass(frozen=True)
class Contestant:
    """A recipe of Osler with overrides, or with ``checkout`` a setup of the peer."""

    name: str
    fields: tuple[str, ...]
    checkout: str = ""

    def settings(self) -> Any:
        """Return everything that decides what it learns, as JSON."""
        if self.checkout:
            return {"commit": commit_of(Path(self.checkout)), "setup": self.setup}
        recipe = self.name.split()[0]
        return encode(decode(TrainConfig, load_recipe(recipe, [*self.fields, "data.type=files", "data.path=."]), source=recipe))

    @property
    def setup(self) -> dict[str, Any]:
        pairs = dict(given.partition("=")[::2] for given in self.fields)
        if unknown := pairs.keys() - Setup.__dataclass_fields__.keys():
            raise SystemExit(f"The peer's setup has no {min(unknown)}; it has {', '.join(Setup.__dataclass_fields__)}.")
        setup = Setup(**{name: value if name == "dtype" else json.loads(value) for name, value in pairs.items()})
        if setup.width % setup.head_dim:
            raise SystemExit(f"The peer's width {setup.width} is no multiple of head_dim {setup.head_dim}.")
        return asdict(setup)


def write_texts(files: Sequence[Path], others: Sequence[str], other_bytes: int, folder: Path) -> Texts:
    """Write what is learned, what is held out, and the other texts as JSONL into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = [document for file in files for document in TextFiles(file) if not document.is_empty]
    below = int(HELD_OUT_SHARE * 2**64)
    split: dict[str, list[Document]] = {"train": [], HELD_OUT: []}
    for document in documents:
        split[HELD_OUT if document.split_key() < below else "train"].append(document)
    if not all(split.values()):
        raise SystemExit("The files have too few documents: none is held out, or all are.")
    for given in others:
        path, _, column = given.partition(":")
        drawn = sorted((one for one in TextFiles(path, column or "text") if not one.is_empty), key=Document.split_key)
        if (name := Path(path).stem) in split:
            raise SystemExit(f"Two texts are called {name}: give one of them another name.")
        split[name] = list(within(drawn, other_bytes))
    digest = hashlib.blake2b(digest_size=8)
    for name, own in split.items():
        lines = "".join(json.dumps({"text": document.text}) + "\n" for document in own)
        digest.update(f"{name}\n{lines}".encode())
        (folder / f"{name}.jsonl").write_text(lines)
    paths = {name: folder / f"{name}.jsonl" for name in split}
    return Texts(paths.pop("train"), paths.pop(HELD_OUT), paths, digest.hexdigest())


def within(documents: Iterable[Document], most_bytes: int) -> Iterable[Document]:
    """Yield documents until they have this many bytes together; the last one is cut there."""
    for document in documents:
        text = document.text.encode()[:most_bytes].decode(errors="ignore")
        if not text:
            return
        most_bytes -= len(text.encode())
        yield Document(text=text)


class Contest:
    """The runs of a contest in their folder."""

    def __init__(self, args: argparse.Namespace, texts: Texts) -> None:
        self.args, self.texts, self.threads = args, texts, args.threads or os.cpu_count() or 1

    def result(self, contestant: Contestant, seed: int) -> dict[str, Any]:
        """Return the result of a run: the stored one, or that of a new run."""
        decided_by = {
            "texts": self.texts.digest,
            "threads": self.threads,
            "warm_cache": self.args.warm_cache,
            "settings": contestant.settings(),
            "code": PEER.read_text() if contestant.checkout else commit_of(ROOT),
            "osler": None if contestant.checkout else [self.args.osler_minutes, self.args.context],
        }
        digest = hashlib.blake2b(json.dumps(decided_by, sort_keys=True).encode(), digest_size=4).hexdigest()
        name = f"{contestant.name.replace('/', '-').replace(' ', ',')[:60]}-{digest}"
        folder = self.args.runs / f"{name}-{self.args.minutes:g}min-seed{seed}"
        stored = folder / "result.json"
        if not stored.exists():
            learn = partial(self.nanochat if contestant.checkout else self.osler, contestant, seed, folder)
            filled = self.args.runs / f"cache-{digest}"
            if self.args.warm_cache and not (filled / "filled").exists():
                clear(folder, filled)
                learn()
                (filled / "filled").touch()
            clear(folder, filled if self.args.warm_cache else None)
            load = os.getloadavg()[0]
            found = learn()
            shutil.rmtree(folder / "cache", ignore_errors=True)  # of one that is shared only the link
            circumstances = {"load_before": load, "machine": describe_machine(), "osler_commit": commit_of(ROOT)}
            write_json(stored, {"seed": seed, "threads": self.threads, **found, **circumstances})
        result: dict[str, Any] = json.loads(stored.read_text())
        late = " (late)" if result["seconds"] > LATE * 60 * self.args.minutes else ""
        took = f"{result['seconds'] / 60:.2f} minutes{late}, {result['tokens']:,} tokens"
        print(f"{contestant.name}, seed {seed}: {result['bits_per_byte'][HELD_OUT]:.4f} bits per byte, {took}", file=sys.stderr)
        return result

    def osler(self, contestant: Contestant, seed: int, folder: Path) -> dict[str, Any]:
        """Train a recipe by the clock, and measure its texts afterwards."""
        run, texts = folder / "run", self.texts
        given = (
            *contestant.fields,
            "data.type=files",
            f"data.path={texts.train}",
            f"validation=[{{type: files, path: {texts.held_out}}}]",
            f"max_minutes={self.args.osler_minutes}",
            "total_tokens=1000000000000",
            f"seed={seed}",
        )
        recipe = contestant.name.split()[0]
        began = time.monotonic()
        self.start(folder, ["-m", "osler.cli", "pretrain", recipe, *given, "--run", str(run)])
        seconds = time.monotonic() - began
        bits = {}
        context = [f"seq_len={self.args.context}"] if self.args.context else []
        for name, path in {HELD_OUT: texts.held_out, **texts.others}.items():
            scores = folder / "scores.json"
            self.start(folder, ["-m", "osler.cli", "eval", str(run), f"text={path}", *context, "--json", str(scores)])
            (bits[name],) = (score["bits_per_byte"] for score in json.loads(scores.read_text())["texts"].values())
        last = list(read_metrics(run / "metrics.jsonl", having="eval/bits_per_byte"))[-1]
        own = {"own_evaluation": last.values["eval/bits_per_byte"], "evaluation_seconds": last.values["eval/seconds"]}
        return {"bits_per_byte": bits, "seconds": seconds, "tokens": int(last.tokens), "steps": last.step, **own}

    def nanochat(self, contestant: Contestant, seed: int, folder: Path) -> dict[str, Any]:
        """Train a setup of the peer by the clock; its process measures the texts as well."""
        spec = {
            "checkout": contestant.checkout,
            "train": str(self.texts.train),
            "held_out": str(self.texts.held_out),
            "others": {name: str(path) for name, path in self.texts.others.items()},
            "minutes": self.args.minutes,
            "seed": seed,
            "setup": contestant.setup,
            "started": time.monotonic(),
        }
        printed = self.start(folder, [str(PEER), json.dumps(spec)])
        result: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
        return result

    def start(self, folder: Path, arguments: Sequence[str]) -> str:
        """Run Python with these arguments and a cache of compiled code in ``folder``; return what it prints."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(self.threads),
            "TORCHINDUCTOR_CACHE_DIR": str((folder / "cache").resolve()),
        }
        with (folder / "log.txt").open("a") as log:
            done = subprocess.run([sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
            log.write(done.stdout)
        if done.returncode == EXIT_STOPPED:
            raise KeyboardInterrupt
        if done.returncode:
            raise SystemExit(f"{' '.join(arguments)[:200]} failed; the end of {log.name}:\n{Path(log.name).read_text()[-3000:]}")
        return done.stdout


def clear(folder: Path, cache: Path | None) -> None:
    """Empty the folder of a run; with ``cache`` its ``cache`` is a link to that folder of compiled code."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if cache is not None:
        cache.mkdir(exist_ok=True)
        (folder / "cache").symlink_to(cache.resolve())


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values), "each": list(values)}


def ahead(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return by how many percent bits per byte of ``ours`` are below ``theirs``, of each text, seed by seed."""
    pairs = [(mine["bits_per_byte"], other["bits_per_byte"]) for mine, other in zip(ours, theirs, strict=True)]
    return {text: spread([100 * (1 - mine[text] / other[text]) for mine, other in pairs]) for text in pairs[0][0]}


def summary(args: argparse.Namespace, texts: Texts, runs: Mapping[Contestant, list[dict[str, Any]]]) -> dict[str, Any]:
    """Put the results of all runs together."""
    told: dict[str, Any] = {
        "benchmark": "learn-minutes",
        "minutes": args.minutes,
        "files": [file.name for file in args.files],
        "other_text": [Path(given).name for given in args.other_text],
        "warm_cache": args.warm_cache,
        "texts_digest": texts.digest,
        "contestants": {},
        "ahead": {},
    }
    for contestant, results in runs.items():
        bits = [run["bits_per_byte"] for run in results]
        told["contestants"][contestant.name] = {
            "bits_per_byte": {text: spread([of[text] for of in bits]) for text in bits[0]},
            "late": [run["seed"] for run in results if run["seconds"] > LATE * 60 * args.minutes],
            "settings": contestant.settings(),
            "runs": results,
        }
    peers = {contestant: results for contestant, results in runs.items() if contestant.checkout}
    if peers:
        best = min(peers, key=lambda peer: statistics.median(run["bits_per_byte"][HELD_OUT] for run in peers[peer]))
        told["best_peer"] = best.name
        told["ahead"] = {one.name: ahead(results, peers[best]) for one, results in runs.items() if not one.checkout}
    return told


def contestants_of(args: argparse.Namespace) -> list[Contestant]:
    peers = args.peer_setups if args.peer else []
    if args.peer and not (Path(args.peer) / "nanochat" / "gpt.py").exists():
        raise SystemExit(f"--peer {args.peer} is no checkout of nanochat: nanochat/gpt.py is missing there.")
    return [
        *(Contestant(recipe, tuple(shlex.split(recipe)[1:])) for recipe in args.recipes),
        *(Contestant(f"nanochat {setup}".strip(), tuple(setup.split()), str(Path(args.peer).resolve())) for setup in peers),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="parquet, JSONL or text")
    parser.add_argument("--runs", type=Path, required=True, help="a folder for the runs, which stay there")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipes", nargs="*", default=["text-10min"], metavar="RECIPE", help="or 'RECIPE a=b'")
    parser.add_argument("--peer", help="a checkout of nanochat")
    parser.add_argument("--peer-setups", nargs="*", default=[""], metavar="FIELDS", help="'width=192 rates=0.5'; '': defaults")
    parser.add_argument("--other-text", nargs="*", default=[], metavar="FILE[:COLUMN]")
    parser.add_argument("--other-bytes", type=int, default=1_000_000, help="of each other text")
    parser.add_argument("--context", type=int, help="tokens that Osler reads at once when it is measured")
    parser.add_argument("--osler-minutes", type=float, help=f"Osler's max_minutes (default: --minutes - {RESERVED_MINUTES})")
    parser.add_argument("--warm-cache", action="store_true", help="a run before the first one fills a cache of compiled code")
    parser.add_argument("--threads", type=int, help="of each contestant (default: as many as cores)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    args.osler_minutes = args.osler_minutes or args.minutes - RESERVED_MINUTES
    for contestant in (contestants := contestants_of(args)):
        contestant.settings()  # a misspelt field ends the script here, and not after an hour
    texts = write_texts(args.files, args.other_text, args.other_bytes, args.runs.resolve() / "texts")
    contest = Contest(args, texts)
    runs: dict[Contestant, list[dict[str, Any]]] = {contestant: [] for contestant in contestants}
    try:
        with interruptible():
            for seed in range(args.seeds):
                for contestant in contestants if seed % 2 == 0 else reversed(contestants):
                    runs[contestant].append(contest.result(contestant, seed))
    except KeyboardInterrupt:
        print("Interrupted. The same command begins the run that was interrupted again.", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    publish(summary(args, texts, runs), args.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
