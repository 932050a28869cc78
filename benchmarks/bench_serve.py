"""Load on the server: 64 clients at once against one after the other, and against ``transformers`` behind the same FastAPI.

    python benchmarks/bench_serve.py [--model tiny] [--clients 64] [--requests 256] [--rounds 3] [--threads 2] [--out FILE]

Requests have 8 to 160 random tokens and stream 8 to 144 new ones at temperature 1, without an end. Three contestants take turns,
each with a fresh server: "osler" is ``osler serve`` asked by all clients at once, "one at a time" is the same server asked by one
client (a quarter of the requests), and "transformers" is Qwen3ForCausalLM with the same weights (checked: equal logits), whose
``generate`` streams behind FastAPI and uvicorn, a request at a time, as ``transformers serve`` does without continuous batching.
The clients are one process on the same cores, with a socket for each request. A request is lost when its stream does not end with
all tokens and ``[DONE]``. Times are those of a client: to its first token, and between its tokens on average; memory is that of
the server after all requests. Numbers are medians over rounds, ratios are taken round by round.
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

from bench_sample import MODELS, NEW_TOKENS, PROMPT_TOKENS, build_model, build_qwen3
from measuring import ROOT, publish

LONGEST_PROMPT, LONGEST_ANSWER = 160, 144
assert LONGEST_PROMPT + LONGEST_ANSWER == PROMPT_TOKENS + NEW_TOKENS  # that the models read
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CONTESTANTS = ("osler", "one at a time", "transformers")


def make_checkpoint(model_name: str, folder: Path) -> Path:
    """Save the model of ``build_model`` with a tokenizer of as many tokens, as a run saves it."""
    import torch

    from osler.checkpoint import store
    from osler.inference.load import describing_files
    from osler.tokenizer.bpe import Tokenizer

    model, rng = build_model(MODELS[model_name], torch.float32), random.Random(0)
    words = ["".join(rng.choice("bcdfghklmnprstvw") + rng.choice("aeiou") for _ in range(rng.randint(1, 4))) for _ in range(9000)]
    tokenizer = Tokenizer.train([" ".join(words)] * 2, model.config.vocab_size)
    files = describing_files(model.config, tokenizer)
    return store.save(folder, 1, tensors={"model": model.state_dict()}, state={"kind": "pretrain"}, files=files)


def serve_transformers(model_name: str) -> None:
    """Serve ``generate`` as ``/v1/completions``, for requests as this script sends them; prints its address."""
    import queue
    import socket
    import threading

    import torch
    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse
    from transformers.generation.streamers import BaseStreamer

    qwen3, turn = build_qwen3(build_model(MODELS[model_name], torch.float32), torch.float32), threading.Lock()

    class Tokens(BaseStreamer):
        def __init__(self) -> None:
            self.queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
            self.is_prompt = True

        def put(self, value: torch.Tensor) -> None:
            if not self.is_prompt:
                self.queue.put(int(value[0]))
            self.is_prompt = False

        def end(self) -> None:
            self.queue.put(None)

    def generate(body: dict[str, Any], tokens: Tokens) -> None:
        prompt_1T = torch.tensor([body["prompt"]])
        with turn, torch.inference_mode():
            qwen3.generate(
                prompt_1T,
                attention_mask=torch.ones_like(prompt_1T),
                max_new_tokens=body["max_tokens"],
                do_sample=True,
                temperature=1.0,
                top_k=0,
                streamer=tokens,
            )

    app = FastAPI()

    async def complete(body: dict[str, Any]):  # type: ignore[no-untyped-def]
        tokens = Tokens()
        threading.Thread(target=generate, args=(body, tokens), daemon=True).start()

        async def events():  # type: ignore[no-untyped-def]
            count = 0
            while await asyncio.to_thread(tokens.queue.get) is not None:
                count += 1
                yield b'data: {"choices": [{"text": "x"}]}\n\n'
            yield b'data: {"choices": [], "usage": {"completion_tokens": %d}}\n\ndata: [DONE]\n\n' % count

        return StreamingResponse(events(), media_type="text/event-stream")

    app.add_api_route("/v1/completions", complete, methods=["POST"], response_model=None)

    listener = socket.create_server(("127.0.0.1", 0))
    print(f"Serving at http://127.0.0.1:{listener.getsockname()[1]} ", file=sys.stderr, flush=True)
    loop_threads = 2 * 64  # every stream waits in a thread
    config = uvicorn.Config(app, log_config=None, access_log=False)

    async def run() -> None:
        from concurrent.futures import ThreadPoolExecutor

        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(loop_threads))
        await uvicorn.Server(config).serve([listener])

    asyncio.run(run())


def started(arguments: list[str], threads: int, log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start a server, and return it with its port as soon as it serves."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    with log.open("wb") as told:
        server = subprocess.Popen([sys.executable, *arguments], env=environment, stderr=told, cwd=ROOT)
    while not (found := re.search(r"Serving at http://127\.0\.0\.1:(\d+)", log.read_text())):
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
        is_done = False
        while not is_done and (line := await reader.readline()):
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - began
                if b'"completion_tokens"' in line:
                    tokens = json.loads(line[6:])["usage"]["completion_tokens"]
            is_done = line.startswith(b"data: [DONE]")
        writer.close()
    except OSError:
        return None
    return (first, time.perf_counter() - began, tokens) if is_done and tokens == body["max_tokens"] else None


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


def measure(contestant: str, options: argparse.Namespace, checkpoint: Path, bodies: list[dict[str, Any]]) -> dict[str, float]:
    """Measure one contestant with a fresh server."""
    arguments = ["-m", "osler.cli", "serve", f"model={checkpoint}", "--port", "0"]
    if contestant == "transformers":
        arguments = [__file__, "--serve-transformers", "--model", options.model]
    server, port = started(arguments, options.threads, checkpoint.parent / "server.log")
    try:
        own = bodies if contestant == "osler" else bodies[: max(len(bodies) // 4, 2)]
        clients = 1 if contestant == "one at a time" else options.clients
        asyncio.run(load(port, own[:2], 1))  # it warms up
        result = asyncio.run(load(port, own, clients))
        resident = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    return {**result, "resident_mb": resident / 1e6}


def main() -> None:
    options = parsed()
    if options.serve_transformers:
        serve_transformers(options.model)
        return
    rng = random.Random(0)
    vocab = MODELS[options.model]["vocab"]
    bodies = [
        {
            "prompt": [rng.randrange(4, vocab) for _ in range(rng.randint(8, LONGEST_PROMPT))],
            "max_tokens": rng.randint(8, LONGEST_ANSWER),
            "logit_bias": {"0": -100},
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for _ in range(options.requests)
    ]
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(options.model, Path(folder))
        for number in range(options.rounds):
            rounds.append({name: measure(name, options, checkpoint, bodies) for name in CONTESTANTS})
            print(f"round {number + 1}: {json.dumps(rounds[-1])}", file=sys.stderr, flush=True)
    result = {name: {key: statistics.median(one[name][key] for one in rounds) for key in rounds[0][name]} for name in CONTESTANTS}
    ratios = {
        f"osler_over_{name.replace(' ', '_')}": statistics.median(
            one["osler"]["tokens_per_second"] / one[name]["tokens_per_second"] for one in rounds
        )
        for name in CONTESTANTS[1:]
    }
    settings = {key: getattr(options, key) for key in ("model", "clients", "requests", "rounds", "threads")}
    publish({**settings, "contestants": result, "throughput_ratios": ratios}, options.out)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve-transformers", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
