"""Minutes of bad clients: what is generated from the description of the endpoints, idle connections, kills. All of it is slow."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

pytestmark = pytest.mark.slow
SCHEMATHESIS = [
    "--max-examples=20",
    "--request-timeout=20",
    "--exclude-checks=positive_data_acceptance",  # what fits the schema may still be refused, such as an unknown model
    "--no-color",
    "--seed=0",
]


def test_generated_requests_find_no_error_of_the_server(serve: Callable[..., Any], tmp_path: Path) -> None:
    running = serve(max_new_tokens=32, max_seconds=15.0)
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{running.url}/openapi.json", *SCHEMATHESIS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"[1-9]\d* generated, [1-9]\d* passed", done.stdout)
    running.wait_for(lambda: not any(served.batch for served in running.served))


def completion(url: str, **changes: Any) -> dict[str, Any]:
    body = {"model": "text", "prompt": "A", "max_tokens": 4, "seed": 1, **changes}
    with urlopen(
        Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}), timeout=20
    ) as told:
        return json.loads(told.read())


def test_thousands_of_idle_connections_and_half_requests_delay_nobody(serve: Callable[..., Any]) -> None:
    count = min(5000, (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 500) // 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * count + 400), hard))
    if count < 5000:
        pytest.skip(f"this process may have {hard} files open, and 10,400 are needed")
    running = serve()
    expected = completion(running.url)["choices"]
    idle = []
    for number in range(count):
        client = socket.create_connection((running.host, running.port), timeout=20)
        if number % 2:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Le")
        idle.append(client)
    for _ in range(10):
        assert completion(running.url)["choices"] == expected
    for client in idle:
        client.close()
    assert completion(running.url)["choices"] == expected


def test_memory_stays_flat_while_clients_come_leave_and_fail(serve: Callable[..., Any]) -> None:
    """Mixed clients, some of whom leave in the middle; after a warm-up memory grows no further."""
    from osler.runtime.device import resident_bytes

    running = serve(max_rows=8)
    stop = threading.Event()
    wrong: list[str] = []

    def client(number: int) -> None:
        kinds: list[Callable[[], Any]] = [
            lambda: completion(running.url, n=3, max_tokens=30),
            lambda: completion(running.url, max_tokens=20, logprobs=3, top_p=0.5),
            lambda: leave(),
            lambda: refused(),
        ]

        def leave() -> None:
            with socket.create_connection((running.host, running.port), timeout=20) as one:
                body = json.dumps({"model": "text", "prompt": "A", "max_tokens": 250, "stream": True}).encode()
                head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                one.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                one.recv(100)

        def refused() -> None:
            try:
                completion(running.url, temperature=7)
                wrong.append("a wrong temperature was taken")
            except URLError:
                pass

        turn = number
        while not stop.is_set():
            try:
                kinds[turn % len(kinds)]()
            except OSError as error:
                wrong.append(repr(error))
            turn += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(6)
    before = resident_bytes()
    time.sleep(12)
    after = resident_bytes()
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert before and after and after - before < 20_000_000
    running.wait_for(lambda: sum(served.outstanding for served in running.served) == 0)


@pytest.fixture
def started(checkpoint: Path) -> Iterator[Callable[[Path, str], tuple[subprocess.Popen[bytes], str]]]:
    """``started(log, port)`` starts the command, and returns it with its address; it ends with the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(log: Path, port: str) -> tuple[subprocess.Popen[bytes], str]:
        command = ["serve", f"text={checkpoint}", "--port", port, "--max-new-tokens", "250"]
        with log.open("wb") as told:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen([sys.executable, "-m", "osler.cli", *command], stderr=told, env=environment)
        processes.append(process)
        for _ in range(600):
            if found := re.search(r"Serving at (http://[\d.]+:\d+)", log.read_text()):
                return process, found[1]
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        raise AssertionError(log.read_text())

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_the_command_serves_ends_by_a_signal_and_starts_again_after_a_kill(started: Callable[..., Any], tmp_path: Path) -> None:
    first, url = started(tmp_path / "first.log", "0")
    expected = completion(url)["choices"]
    first.kill()
    assert first.wait(20) == -signal.SIGKILL
    again, same = started(tmp_path / "again.log", url.rpartition(":")[2])
    assert same == url and completion(url)["choices"] == expected
    body = {"model": "text", "prompt": "A", "max_tokens": 250, "stream": True, "logit_bias": {"0": -100}}
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=20) as stream:
        stream.readline()
        again.send_signal(signal.SIGTERM)
        assert stream.read().endswith(b"data: [DONE]\n\n")
    assert again.wait(20) == 0
    assert "SIGTERM: no new requests; 1 run" in (tmp_path / "again.log").read_text()
