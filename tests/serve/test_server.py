"""The server under bad luck and bad clients: what it refuses, whom it waits for, and that the others notice nothing."""

import asyncio
import http.client
import json
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from osler.inference.rows import Request
from osler.ops.sampling_params import SamplingParams
from osler.serve.config import ServeConfig
from osler.serve.errors import ApiError
from osler.serve.worker import FEW_ROWS, Served, Worker

JSON = {"Content-Type": "application/json"}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LONG = {"model": "text", "prompt": "A", "max_tokens": 250, "logit_bias": {"0": -100}}  # never ends by itself


def ask(running: Any, body: Any, path: str = "/v1/completions", **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an answer; a body that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection(running.host, running.port, timeout=20)
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, sent, {**JSON, **headers})
    answer = connection.getresponse()
    told = answer.status, json.loads(answer.read() or b"{}")
    connection.close()
    return told


def works(running: Any) -> bool:
    status, reply = ask(running, {"model": "text", "prompt": "A", "max_tokens": 2})
    return status == 200 and reply["usage"]["completion_tokens"] <= 2


def get(running: Any, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(running.host, running.port, timeout=20)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def begin(running: Any, body: dict[str, Any], *, buffer: int = 0) -> socket.socket:
    """Send a request, and return its connection with the answer unread."""
    client = socket.socket()
    if buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.connect((running.host, running.port))
    client.settimeout(20)
    data = json.dumps(body).encode()
    client.sendall(HEAD + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return client


def events(client: socket.socket) -> Iterator[str]:
    """The data of server-sent events, until the connection or the answer ends."""
    with client.makefile("rb") as file:
        for line in file:
            if line.startswith(b"data: "):
                yield line.decode().removeprefix("data: ").strip()
            if line == b"0\r\n":
                return


def outstanding(running: Any) -> int:
    return sum(served.outstanding for served in running.served)


BAD_BODIES = {
    "nothing": b"",
    "no json": b"{",
    "no object": b"[1]",
    "nan": b'{"prompt": "A", "temperature": NaN}',
    "no utf-8": b'{"prompt": "\xff"}',
    "deep": b'{"prompt": ' + b"[" * 100_000,
    "deep value": b'{"prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}",
    "deep list": b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}",
    "less deep list": b'{"prompt": ' + b"[" * 250 + b"]" * 250 + b"}",
    "long number": b'{"seed": ' + b"9" * 5000 + b"}",
    "huge number": b'{"prompt": "A", "max_tokens": 1e400}',
    "half a character": b'{"prompt": "\\ud800"}',
    "null": b'{"prompt": null}',
    "mixed": b'{"prompt": ["A", 1]}',
    "no prompts": b'{"prompt": []}',
    "empty tokens": b'{"prompt": [[1], []]}',
    "unknown token": b'{"prompt": [99999]}',
    "negative token": b'{"prompt": [-1]}',
    "large token": b'{"prompt": [9223372036854775808]}',
    "nothing given": b"{}",
    "no utf-8 but utf-16": '{"prompt": "A"}'.encode("utf-16"),
    "twice": b'{"prompt": "A", "prompt": "B"}',
}
WORDS = {
    "deep list": "nested too deeply",
    "less deep list": "nested too deeply",
    "half a character": "half a character",
    "twice": "'prompt' occurs twice",
    "negative token": "at least 0",
}  # that say why


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_is_refused_in_the_form_of_openai(server, name) -> None:
    status, told = ask(server, BAD_BODIES[name])
    assert status == 400 and told["error"]["type"] == "invalid_request_error" and WORDS.get(name, "") in told["error"]["message"]
    if name == "unknown token":
        assert (told["error"]["param"], told["error"]["code"]) == ("prompt", "invalid_value")
    assert works(server)


def test_only_json_from_this_machine_is_answered(server) -> None:
    assert ask(server, b"{}", **{"Content-Type": "text/plain"})[0] == 415
    assert ask(server, {"prompt": "A"}, Host="attacker.example")[0] == 403
    assert get(server, "/v1/models", Host="attacker.example:8000")[0] == 403
    for name in ("localhost:1", "127.0.0.1", "[::1]:8000"):
        assert get(server, "/v1/models", Host=name)[0] == 200
    assert "access-control" not in str(http_headers(server, Origin="http://attacker.example")).lower()
    for path, status in (("/nothing", 404), ("/v1/completions", 405), ("/docs", 404), ("/v1/models/none", 404)):
        told = get(server, path)
        assert told[0] == status and json.loads(told[1])["error"]["message"]
    assert "/v1/completions takes POST, not GET" in get(server, "/v1/completions")[1]
    assert "base URL of a client ends in /v1" in get(server, "/chat/completions")[1]
    assert get(server, "/health") == (200, '{"status":"ok"}')


def test_other_ways_to_ask_over_http(server) -> None:
    status, told = ask(server, b"", **{"Content-Encoding": "gzip"})
    assert status == 415 and "gzip" in told["error"]["message"]
    for head in (b"HEAD /v1/models HTTP/1.1\r\nHost: localhost", b"HEAD / HTTP/1.0"):
        with socket.create_connection((server.host, server.port), timeout=20) as client:
            client.sendall(head + b"\r\nConnection: close\r\n\r\n")
            answer = client.makefile("rb").read()
        assert b" 200 OK" in answer and answer.endswith(b"\r\n\r\n"), "the head alone"


def test_a_stream_has_no_character_that_a_client_may_take_for_the_end_of_a_line(server) -> None:
    with begin(server, {"model": "text", "prompt": "→", "max_tokens": 100, "seed": 1, "stream": True}) as client:
        told = [json.loads(event) for event in events(client) if event != "[DONE]"]
    text = "".join(chunk["choices"][0]["text"] for chunk in told)
    with begin(server, {"model": "text", "prompt": "→", "max_tokens": 100, "seed": 1, "stream": True}) as client:
        assert not text.isascii() and "".join(events(client)).isascii()


def test_the_page_and_the_options_of_a_question_come_from_the_server_too(server) -> None:
    status, page = get(server, "/")
    assert status == 200 and page.startswith("<!doctype html>")
    assert "default-src 'none'" in dict(http_headers(server, "/"))["content-security-policy"]
    asked = {"model": "asked", "question": "Who is ill?\nA) the dog\nB) the cat", "reasoning_content": "It coughs."}
    status, told = ask(server, asked, "/v1/options")
    assert status == 200 and [option["letter"] for option in told["options"]] == ["A", "B"]
    assert sum(option["probability"] for option in told["options"]) == pytest.approx(1)
    assert ask(server, {**asked, "reasoning_content": None}, "/v1/options")[1]["options"] != told["options"]
    told = ask(server, {**asked, "model": "text"}, "/v1/options")[1]["error"]
    assert told["param"] == "reasoning_content" and "text alone" in told["message"]
    assert ask(server, {**asked, "model": "text", "reasoning_content": ""}, "/v1/options")[0] == 200
    assert ask(server, {**asked, "question": "Who?"}, "/v1/options")[1]["error"]["param"] == "question"
    assert 'osler_requests_total{model="asked",path="/v1/options",status="200"}' in get(server, "/metrics")[1]


def test_a_question_with_options_is_no_longer_than_a_prompt_may_be(serve: Callable[..., Any]) -> None:
    running = serve(max_prompt_tokens=20)
    for model in ("asked", "text"):
        asked = {"model": model, "question": "Who is ill?\nA) the dog\nB) the cat"}
        status, told = ask(running, asked, "/v1/options")
        assert (status, told["error"]["code"], told["error"]["param"]) == (400, "context_length_exceeded", "question")
        assert "takes at most 20" in told["error"]["message"]
    assert ask(running, {"model": "asked", "question": "W?\nA) d\nB) c"}, "/v1/options")[0] == 200


def http_headers(running: Any, path: str = "/v1/models", **headers: str) -> list[tuple[str, str]]:
    connection = http.client.HTTPConnection(running.host, running.port, timeout=20)
    connection.request("GET", path, headers=headers)
    return connection.getresponse().getheaders()


def test_a_body_that_is_too_large_is_not_read_to_its_end(serve: Callable[..., Any]) -> None:
    running = serve(max_body_bytes=1_000_000)
    connection = http.client.HTTPConnection(running.host, running.port, timeout=20)
    for size, status in ((4_000_000, 413), (1, 200)):  # one connection, which the refusal does not cut
        connection.request("POST", "/v1/completions", json.dumps({"model": "text", "prompt": "A" * size, "max_tokens": 1}), JSON)
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("Connection")) == (status, None) and json.loads(answer.read())
    client = socket.create_connection((running.host, running.port), timeout=20)
    client.sendall(HEAD)
    client.sendall(b"Transfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b" " * 4096 + b"\r\n")
    sent = 0
    with pytest.raises(OSError):
        while sent < 100_000_000:
            client.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
            sent += 4096
    assert works(running)


def test_a_body_that_does_not_arrive_is_not_waited_for(server, monkeypatch: pytest.MonkeyPatch) -> None:
    from osler.serve import app

    monkeypatch.setattr(app, "BODY_SECONDS", 0.1)
    with socket.create_connection((server.host, server.port), timeout=20) as client:
        client.sendall(HEAD + b'Content-Length: 100\r\n\r\n{"prompt": ')
        assert client.makefile("rb").read().startswith(b"HTTP/1.1 408")
    assert works(server)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_drawn_for_no_longer(serve: Callable[..., Any], long_models: Any, stream: bool) -> None:
    running = serve(models=long_models, max_new_tokens=4000)
    client = begin(running, {**LONG, "max_tokens": 4000, "stream": stream, "n": 3})
    if stream:
        for _, event in zip(range(12), events(client), strict=False):
            assert "error" not in event
    else:
        running.wait_for(lambda: outstanding(running) == 3)
    client.close()
    running.wait_for(lambda: outstanding(running) == 0)
    (served,) = running.served
    running.wait_for(lambda: not served.batch)
    assert max((len(place.tokens) for place in served.batch._places), default=0) < 2000  # none: it left before its rows joined
    assert 'osler_requests_cancelled_total{model="text"} 1' in get(running, "/metrics")[1]
    assert works(running)


def test_one_that_reads_nothing_delays_nobody(serve: Callable[..., Any]) -> None:
    running = serve()
    idle = [begin(running, {**LONG, "stream": True, "logprobs": 20, "n": 8}, buffer=2048) for _ in range(3)]
    running.wait_for(lambda: outstanding(running) > 0)
    assert all(works(running) for _ in range(5))
    running.wait_for(lambda: not any(served.batch for served in running.served))  # their rows end, although nobody reads
    assert works(running)
    for client in idle:
        client.close()


def test_rows_wait_for_others_and_the_rest_is_told_to_come_again(serve: Callable[..., Any]) -> None:
    running = serve(max_rows=2, max_waiting=1)
    clients = [begin(running, {**LONG, "stream": True}) for _ in range(3)]
    running.wait_for(lambda: outstanding(running) == 3)
    status, told = ask(running, {"model": "text", "prompt": "A"})
    assert status == 429 and "try again later" in told["error"]["message"]
    assert "osler_completions_waiting" in get(running, "/metrics")[1]
    for client in clients:
        assert list(events(client))[-1] == "[DONE]"
    assert works(running)


def test_rows_draw_between_two_calls_that_compute_something_else(serve: Callable[..., Any], long_models: Any) -> None:
    running = serve(models=long_models, max_new_tokens=4000)
    client = begin(running, {**LONG, "max_tokens": 4000, "stream": True})
    next(events(client))
    batch, worker, may_go_on = running.served[0].batch, running.api.worker, threading.Event()
    looks = [lambda: may_go_on.wait(20), *[lambda: max(place.drawn for place in batch._places)] * 3]
    calls = [asyncio.run_coroutine_threadsafe(worker.call(look), worker._loop) for look in looks]
    may_go_on.set()
    drawn = [call.result(20) for call in calls][1:]
    assert drawn[0] < drawn[1] < drawn[2]
    client.close()


@pytest.mark.parametrize(("rows", "found"), [(FEW_ROWS, [2, *[1] * 23]), (FEW_ROWS + 1, [2, 23])])
def test_few_rows_get_each_token_at_once_and_many_some_together(
    models: Any, monkeypatch: pytest.MonkeyPatch, rows: int, found: list[int]
) -> None:
    """The clock of the worker stands still, so many rows get nothing more until none of them may draw."""
    monkeypatch.setattr("osler.serve.worker.time", SimpleNamespace(monotonic=lambda: 1.0))
    request = Request((3, 4), SamplingParams(max_new_tokens=25, temperature=0.0))

    async def draw() -> list[list[int]]:
        served = Served("text", models["text"], ServeConfig())
        worker = Worker([served], ServeConfig())
        worker.start()
        may_begin = threading.Event()
        worker._asked.put((lambda: bool(may_begin.wait()), False))
        drawings = [worker.draw(served, [request]) for _ in range(rows)]
        may_begin.set()
        counts: list[list[int]] = [[] for _ in drawings]
        for drawing, own in zip(drawings, counts, strict=True):
            while sum(own) < 25:
                own.append(len((await drawing._news.get())[1].ids))
        worker.stop()
        return counts

    assert asyncio.run(asyncio.wait_for(draw(), 60)) == [found] * rows


@pytest.mark.parametrize(("small", "given", "threads"), [(10**6, None, 1), (1, None, 2), (10**6, "2", 2)])
def test_a_small_model_leaves_a_core_to_the_web_server(
    models: Any, monkeypatch: pytest.MonkeyPatch, small: int, given: str | None, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr("osler.serve.worker.SMALL_MODEL", small)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)

    async def ask() -> int:
        worker = Worker([Served("text", models["text"], ServeConfig())], ServeConfig())
        worker.start()
        found = await asyncio.wait_for(worker.call(torch.get_num_threads), 20)
        worker.stop()
        return found

    try:
        assert asyncio.run(ask()) == threads
    finally:
        torch.set_num_threads(before)


def test_what_takes_too_long_ends_with_an_error(serve: Callable[..., Any]) -> None:
    running = serve(max_seconds=0.01)
    assert ask(running, LONG)[0] == 504
    told = list(events(begin(running, {**LONG, "stream": True})))
    assert json.loads(told[-1])["error"]["code"] == "timeout" and "[DONE]" not in told
    counted = 'osler_requests_total{model="text",path="/v1/completions",status="504"} 2'
    running.wait_for(lambda: counted in get(running, "/metrics")[1])
    assert "osler_requests_cancelled_total{" not in get(running, "/metrics")[1]
    running.wait_for(lambda: not any(served.batch for served in running.served))


def test_a_model_that_fails_ends_its_requests_and_starts_anew(server, caplog: pytest.LogCaptureFixture) -> None:
    client = begin(server, {**LONG, "stream": True})
    server.wait_for(lambda: outstanding(server) == 1)
    server.served[1].batch.decoder._embed = torch.zeros(1000, 1)
    last = list(events(client))[-1]
    assert json.loads(last)["error"]["type"] == "server_error"
    assert "failed at a step" in caplog.text and works(server)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_thread_that_computes_ends_the_server(serve: Callable[..., Any]) -> None:
    running = serve()
    client = begin(running, {**LONG, "stream": True})
    running.wait_for(lambda: outstanding(running) == 1)
    running.served[1].batch.decoder._embed = torch.zeros(1, 1)  # an IndexError
    assert json.loads(list(events(client))[-1])["error"]["code"] == "stopped"
    running.stop()
    assert running.server.exit_code == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_waits_when_the_thread_ends_is_told_so() -> None:
    class Bug(BaseException):
        pass

    def fail() -> None:
        raise Bug

    async def ask_twice() -> list[Any]:
        worker = Worker([], ServeConfig())
        worker.start()
        told = await asyncio.wait_for(asyncio.gather(worker.call(fail), worker.call(int), return_exceptions=True), 20)
        worker.stop()
        return told

    first, second = asyncio.run(ask_twice())
    assert isinstance(first, Bug) and isinstance(second, ApiError) and second.code == "stopped"


def test_a_signal_lets_running_requests_end(serve: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="osler")
    running = serve()
    client = begin(running, {**LONG, "stream": True})
    running.wait_for(lambda: outstanding(running) == 1)
    running.server.handle_exit(signal.SIGTERM, None)
    told = list(events(client))
    assert told[-1] == "[DONE]"
    running.stop()
    assert running.server.exit_code == 0 and "SIGTERM: no new requests; 1 run" in caplog.text and "Stopped." in caplog.text
    with pytest.raises(OSError):
        works(running)


def test_nothing_begins_while_the_server_drains(serve: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="osler")
    running = serve()
    running.api.is_draining = True  # as a connection finds it that was open before the signal
    for path in ("/v1/completions", "/v1/options"):
        assert ask(running, {"prompt": "A"}, path)[0] == 503
    assert get(running, "/health")[0] == 503
    running.server.handle_exit(signal.SIGTERM, None)
    assert "SIGTERM: no new requests; none is running." in caplog.text


def test_what_does_not_end_in_time_after_a_signal_is_told_so(serve: Callable[..., Any]) -> None:
    running = serve(drain_seconds=0.0)
    client = begin(running, {**LONG, "stream": True, "n": 64})
    running.wait_for(lambda: outstanding(running) == 64)
    running.server.handle_exit(signal.SIGTERM, None)
    assert json.loads(list(events(client))[-1])["error"]["code"] == "stopped"
    running.stop()
    assert running.server.exit_code == 130


def test_nothing_of_a_request_is_logged_unless_asked_for(
    serve: Callable[..., Any], caplog: pytest.LogCaptureFixture, capfd
) -> None:
    caplog.set_level("DEBUG")
    for asked in (False, True):
        caplog.clear()
        running = serve(log_requests=asked)
        assert ask(running, {"model": "text", "prompt": "secretword", "max_tokens": 2})[0] == 200
        assert ask(running, {"model": "text", "prompt": "secretword", "n": "secretword"})[0] == 400
        running.stop()
        said = caplog.text + "".join(capfd.readouterr())
        assert "secretword" not in said
        assert ("/v1/completions 200 text 12 + 2 tokens" in re.sub(r"text \d+ \+", "text 12 +", said)) == asked


def test_metrics_are_in_the_form_of_prometheus(server) -> None:
    assert works(server)
    lines = get(server, "/metrics")[1].splitlines()
    value = re.compile(r'[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [0-9.e+-]+')
    assert all(line.startswith("# ") or value.fullmatch(line) for line in lines)
    names = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert names >= {"osler_requests_total", "osler_time_to_first_token_seconds", "process_resident_memory_bytes"}
    buckets = [line for line in lines if line.startswith('osler_request_seconds_bucket{model="text"')]
    counts = [int(line.split()[-1]) for line in buckets]
    assert counts == sorted(counts) and f'osler_request_seconds_count{{model="text"}} {counts[-1]}' in lines


def test_a_connection_without_a_request_is_closed(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from osler.serve import process

    monkeypatch.setattr(process, "HEAD_SECONDS", 0.2)
    running = serve()
    for sent in (b"", b"POST /v1/completions HTTP/1.1\r\nHost: local"):
        with socket.create_connection((running.host, running.port), timeout=10) as client:
            client.sendall(sent)
            assert client.recv(1000) == b""
    client = begin(running, {**LONG, "stream": True})
    assert list(events(client))[-1] == "[DONE]", "a request that is answered is no idle connection"
