"""Load on the server: 64 clients at once against one after the other, and against ``transformers serve``.

    python benchmarks/bench_serve.py [--model tiny] [--clients 64] [--requests 256] [--rounds 3] [--threads N] [--out FILE]

Requests are texts of 8 to 152 random tokens, and stream 8 to 144 new ones at temperature 1, without an end. The contestants take
turns, each with a fresh server: "osler" is ``osler serve`` asked by all clients at once, and "one at a time" is the same server
asked by one client. "transformers serve" is the command of that name with the folder that ``osler export --to hf`` writes of the
model; it answers one request at a time, and several with ``--continuous-batching``. Who answers one at a time gets a quarter of
the requests.
The clients are one process on the same cores, with a socket for each request. A request is lost when its stream does not end
with all tokens. Times are those of a client: to its first token, and between its tokens on average; memory is that of the server
after all requests. Numbers are medians over rounds, ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_sample import MODELS, NEW_TOKENS, PROMPT_TOKENS, build_model
from measuring import ROOT, publish

LONGEST_PROMPT, LONGEST_ANSWER, SPARE = 152, 144, 8  # in tokens; a text that is encoded again may have a few more
assert LONGEST_PROMPT + LONGEST_ANSWER + SPARE == PROMPT_TOKENS + NEW_TOKENS  # that the models read
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def words(count: int, rng: random.Random) -> str:
    """Return a text of so many made-up words."""
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in "aeiou"]
    return " ".join("".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(count))


def make_checkpoint(model_name: str, folder: Path) -> Path:
    """Save the model of ``build_model`` with a tokenizer of as many tokens, as a run saves it."""
    import torch

    from osler.checkpoint import store
    from osler.inference.load import describing_files
    from osler.tokenizer.bpe import Tokenizer

    model, rng = build_model(MODELS[model_name], torch.float32), random.Random(0)
    tokenizer = Tokenizer.train([words(9000, rng)] * 2, model.config.vocab_size)
    files = describing_files(model.config, tokenizer)
    return store.save(folder, 1, tensors={"model": model.state_dict()}, state={"kind": "pretrain"}, files=files)


def exported(checkpoint: Path) -> Path:
    """Write the model for ``transformers``, which then draws as Osler does here: from all tokens, without an end."""
    from osler.cli.main import main as osler

    folder = checkpoint.parent / "hf"
    if osler(["export", str(checkpoint), "--to", "hf", "--out", str(folder)]):
        raise SystemExit("the model was not exported")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 0, "pad_token_id": 0}))
    return folder


def made_requests(checkpoint: Path, count: int) -> list[dict[str, Any]]:
    """Return the bodies of requests, which all contestants get."""
    from osler.tokenizer.bpe import Tokenizer

    tokenizer, rng = Tokenizer.load(checkpoint), random.Random(0)

    def prompt() -> str:
        return tokenizer.decode(tokenizer.encode(words(LONGEST_PROMPT, rng))[: rng.randint(8, LONGEST_PROMPT)])

    fixed = {"logit_bias": {"0": -100}, "stream": True, "stream_options": {"include_usage": True}}
    return [{"prompt": prompt(), "max_tokens": rng.randint(8, LONGEST_ANSWER), **fixed} for _ in range(count)]


def started(arguments: list[str], threads: int | None, log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start a server, and return it with its port as soon as it serves."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"OMP_NUM_THREADS": str(threads)} if threads else {}), **offline}
    with log.open("wb") as told:
        server = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=told, stderr=told, cwd=ROOT)
    while not (found := re.search(r"(?:Serving at|running on) http://127\.0\.0\.1:(\d+)", log.read_text())):
        if server.poll() is not None:
            raise SystemExit(f"the server ended:\n{log.read_text()[-3000:]}")
        time.sleep(0.05)
    return server, int(found[1])


async def ask(port: int, body: dict[str, Any]) -> tuple[float, float, int] | None:
    """Stream one answer: seconds to its first token and to its end, and its tokens; None when it is lost."""
    began, first, tokens = time.perf_counter(), 0.0, 0
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        data = json.dumps(body).encode()
        writer.write(HEAD + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        while (line := await reader.readline()) not in (b"", b"0\r\n"):  # the last chunk is empty
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - began
                if b'"completion_tokens"' in line:
                    tokens = json.loads(line[6:])["usage"]["completion_tokens"]
        writer.close()
    except OSError:
        return None
    return (first, time.perf_counter() - began, tokens) if tokens == body["max_tokens"] else None


async def load(port: int, bodies: list[dict[str, Any]], clients: int) -> dict[str, float]:
    """Send all requests, so many at a time; return throughput, times and losses."""
    waiting = iter(bodies)
    found: list[tuple[float, float, int] | None] = []

    async def client() -> None:
        for body in waiting:
            found.append(await ask(port, body))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - began
    whole = [one for one in found if one is not None]
    first = [1000 * one[0] for one in whole]
    between = [1000 * (end - start) / (tokens - 1) for start, end, tokens in whole]

    def percentile(values: list[float], share: int) -> float:
        return statistics.quantiles(values, n=100)[share - 1]

    return {
        "tokens_per_second": sum(one[2] for one in whole) / seconds,
        "requests_per_second": len(whole) / seconds,
        "first_token_ms_p50": percentile(first, 50),
        "first_token_ms_p95": percentile(first, 95),
        "token_ms_p50": percentile(between, 50),
        "token_ms_p95": percentile(between, 95),
        "lost": len(found) - len(whole),
    }


def measure(
    contestant: str, command: list[str], options: argparse.Namespace, bodies: list[dict[str, Any]], log: Path
) -> dict[str, float]:
    """Measure one contestant with a fresh server."""
    server, port = started(command, options.threads, log)
    try:
        own = bodies[: max(len(bodies) // 4, 2)] if contestant in ("one at a time", "transformers serve") else bodies
        clients = 1 if contestant == "one at a time" else options.clients
        asyncio.run(load(port, own[:2], 1))  # it warms up
        result = asyncio.run(load(port, own, clients))
        resident = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    return {**result, "resident_mb": resident / 1e6}


def main() -> None:
    options, rounds = parsed(), []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, log = make_checkpoint(options.model, Path(folder)), Path(folder) / "server.log"
        ours = ["-m", "osler.cli", "serve", f"model={checkpoint}", "--port", "0"]
        theirs = ["-m", "transformers.cli.transformers", "serve", str(exported(checkpoint)), "--host", "127.0.0.1", "--port", "0"]
        batching = "--continuous-batching"
        contestants = {"osler": ours, "one at a time": ours, "transformers serve": theirs}
        contestants[f"transformers serve {batching}"] = [*theirs, batching]
        bodies = made_requests(checkpoint, options.requests)
        for number in range(options.rounds):
            rounds.append({name: measure(name, command, options, bodies, log) for name, command in contestants.items()})
            print(f"round {number + 1}: {json.dumps(rounds[-1])}", file=sys.stderr, flush=True)
    result = {name: {key: statistics.median(one[name][key] for one in rounds) for key in rounds[0][name]} for name in contestants}
    ratios = {
        f"osler_over_{name.replace(' ', '_')}": statistics.median(
            one["osler"]["tokens_per_second"] / one[name]["tokens_per_second"] for one in rounds
        )
        for name in contestants
        if name != "osler"
    }
    settings = {key: getattr(options, key) for key in ("model", "clients", "requests", "rounds", "threads")}
    publish({**settings, "contestants": result, "throughput_ratios": ratios}, options.out)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of each server (default: it chooses)")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
