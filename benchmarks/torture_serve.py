"""Does the server keep serving when most of its clients are bad? Then it is killed, and started again.

    python benchmarks/torture_serve.py [--minutes 3] [--idle 5000] [--model tiny] [--seed 0] [--out FILE]

Before, during and after the attack a good client asks the same questions, one after the other, always for the likeliest tokens.
The attackers: ``idle`` connections send nothing; ``half`` send a part of a request and wait; ``slow`` take a long stream byte by
byte; ``leaving`` go in the middle of a stream, half of them with a reset; ``broken`` send what is no HTTP, no JSON or no
parameter, bodies that are too large, or shorter than they say. Connections that the server closes are opened again. At the end
all leave.

An answer is lost when it does not come, and ``different`` when it has other tokens than before the attack (rows that are drawn
together round differently, so tokens of nearly equal probability may change places). Memory is the server's resident memory;
``growth_mb`` compares its medians in the second and the last third of the attack. After the attack no row may be drawn and no
connection be open; then comes SIGKILL, and the same command must serve at the same port. Prints one JSON object; exits with 1
when an answer was lost, something was left, or the server ended by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import resource
import signal
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from bench_sample import MODELS
from bench_serve import HEAD, make_checkpoint, started
from measuring import publish

CONNECTIONS = {"half": 40, "slow": 20, "leaving": 12, "broken": 4}  # at a time; idle ones are an option
QUESTIONS = [{"prompt": [10 + n, 20 + n], "max_tokens": 24, "temperature": 0, "logit_bias": {"0": -100}} for n in range(8)]
STREAM = {"prompt": [5, 6, 7], "max_tokens": 120, "stream": True, "logit_bias": {"0": -100}}
ANSWER_SECONDS = 60.0  # after which an answer is lost
SAMPLE_SECONDS = 2.0
BROKEN = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
    b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000,
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    HEAD + b"Content-Length: 100\r\n\r\n{",
    HEAD + b"Content-Length: 99999999999\r\n\r\n" + b"[" * 100_000,
    HEAD + b"Content-Length: 3000000\r\n\r\n" + b" " * 3_000_000,
    HEAD + b"Content-Length: 9\r\n\r\n" + b"[[[[[[[[[",
    HEAD + b"Content-Length: 34\r\n\r\n" + b'{"prompt": "A", "max_tokens": -99}',
]


def request(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data


async def ask(port: int, body: dict[str, Any]) -> tuple[str | None, float]:
    """The text of an answer (None: lost), and its seconds."""
    began = time.perf_counter()
    try:
        answer = await asyncio.wait_for(exchange(port, request(body)), ANSWER_SECONDS)
        return json.loads(answer)["choices"][0]["text"], time.perf_counter() - began
    except (OSError, ValueError, KeyError, asyncio.TimeoutError):
        return None, time.perf_counter() - began


async def exchange(port: int, sent: bytes) -> bytes:
    """The body of the answer to a request, on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
    answer = await reader.read()
    writer.close()
    return answer.partition(b"\r\n\r\n")[2]


async def questions(port: int) -> list[tuple[str | None, float]]:
    return [await ask(port, body) for body in QUESTIONS]


class Attack:
    """Bad clients, until ``end`` of ``time.monotonic``."""

    def __init__(self, port: int, seconds: float, seed: int) -> None:
        self.port, self.end, self.rng = port, time.monotonic() + seconds, random.Random(seed)
        self.made: Counter[str] = Counter()

    async def repeat(self, name: str, behave: Callable[..., Awaitable[None]]) -> None:
        """Let one client after the other behave badly."""
        while time.monotonic() < self.end:
            with contextlib.suppress(OSError, asyncio.TimeoutError), socket.socket() as client:
                client.setblocking(False)
                if name == "slow":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", self.port))
                self.made[name] += 1
                await asyncio.wait_for(behave(client), max(self.end - time.monotonic(), 0.01))
            await asyncio.sleep(0.01)

    async def idle(self, client: socket.socket) -> None:
        await asyncio.get_running_loop().sock_recv(client, 1)  # until the server closes

    async def half(self, client: socket.socket) -> None:
        whole = request(STREAM)
        await asyncio.get_running_loop().sock_sendall(client, whole[: self.rng.randrange(1, len(whole))])
        await asyncio.wait_for(self.idle(client), self.rng.uniform(0, 60))

    async def slow(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, request(STREAM))
        while await loop.sock_recv(client, 1):
            await asyncio.sleep(0.1)

    async def leaving(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, request(STREAM))
        for _ in range(self.rng.randrange(6)):
            await loop.sock_recv(client, 400)
        if self.rng.random() < 0.5:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def broken(self, client: socket.socket) -> None:
        await asyncio.get_running_loop().sock_sendall(client, self.rng.choice(BROKEN))
        await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 4096), self.rng.uniform(0, 5))

    async def run(self, idle: int) -> None:
        tasks = []
        for name, count in {**CONNECTIONS, "idle": idle}.items():
            for number in range(count):
                tasks.append(asyncio.create_task(self.repeat(name, getattr(self, name))))
                if number % 100 == 99:
                    await asyncio.sleep(0.05)
        await asyncio.gather(*tasks)


async def attacked(port: int, pid: int, options: argparse.Namespace) -> dict[str, Any]:
    """Attack the server while the good client asks; return what both saw."""
    before = await questions(port)
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    attack = Attack(port, 60 * options.minutes, options.seed)
    during: list[tuple[str | None, float]] = []
    memory: list[float] = []
    most_open = 0

    async def good() -> None:
        while time.monotonic() < attack.end:
            during.extend(await questions(port))

    async def watch() -> None:
        nonlocal most_open
        while time.monotonic() < attack.end:
            memory.append(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
            most_open = max(most_open, len(os.listdir(f"/proc/{pid}/fd")) - descriptors)
            await asyncio.sleep(SAMPLE_SECONDS)

    await asyncio.gather(attack.run(options.idle), good(), watch())
    after = await questions(port)
    await asyncio.sleep(2)  # the last connections close
    metrics = (await exchange(port, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")).decode()
    rows = sum(map(float, re.findall(r"^osler_completions_(?:running|waiting)\{.*\} (\S+)", metrics, re.MULTILINE)))
    third = len(memory) // 3
    return {
        "connections": dict(attack.made),
        "most_open": most_open,
        "good": len(during),
        "lost": sum(text is None for text, _ in before + during + after),
        "different": sum(text != before[number % len(QUESTIONS)][0] for number, (text, _) in enumerate(during + after)),
        "seconds_before_p50": statistics.median(seconds for _, seconds in before),
        "seconds_during_p50": statistics.median(seconds for _, seconds in during),
        "seconds_during_max": max(seconds for _, seconds in during),
        "memory_mb": [
            round(memory[0]),
            round(statistics.median(memory[third : 2 * third])),
            round(statistics.median(memory[-third:])),
        ],
        "growth_mb": statistics.median(memory[-third:]) - statistics.median(memory[third : 2 * third]),
        "rows_left": rows,
        "connections_left": len(os.listdir(f"/proc/{pid}/fd")) - descriptors,
    }


def main() -> None:
    options = parsed()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the server inherits it
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(options.model, Path(folder))
        arguments = ["-m", "osler.cli", "serve", f"model={checkpoint}", "--port"]
        server, port = started([*arguments, "0"], options.threads, Path(folder) / "server.log")
        try:
            found = asyncio.run(attacked(port, server.pid, options))
            assert server.poll() is None, (Path(folder) / "server.log").read_text()[-3000:]
            server.kill()
            server.wait(60)
            began = time.perf_counter()
            server, again = started([*arguments, str(port)], options.threads, Path(folder) / "server.log")
            answers = asyncio.run(questions(again))
            found["seconds_to_serve_after_kill"] = time.perf_counter() - began
            found["lost"] += sum(text is None for text, _ in answers)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
        found["exit_code"] = server.returncode
    settings = {key: getattr(options, key) for key in ("model", "minutes", "idle", "seed", "threads")}
    publish({**settings, **found}, options.out)
    sys.exit(bool(found["lost"] or found["rows_left"] or found["connections_left"] > 0 or found["exit_code"]))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--idle", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
