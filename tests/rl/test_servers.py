"""Rollouts from servers: the same as from the engine, through lost servers, and what is refused."""

from __future__ import annotations

import gc
import socket
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import replace

import pytest
import torch
from vllm_contract import VllmContract

from osler.config.schema import decode
from osler.inference.engine import InferenceEngine
from osler.rl import servers as servers_module
from osler.rl.config import AlgorithmConfig, GrpoConfig, QualityConfig, ServerRollout
from osler.rl.rollout import RolloutWorker
from osler.rl.servers import RolloutServers
from osler.runtime.errors import UserError
from osler.runtime.stop import AskedToStop, StopFlag
from osler.runtime.world import World
from tests.models import tiny_model

ALGORITHM = AlgorithmConfig(
    prompts_per_step=5, samples_per_prompt=3, max_new_tokens=8, temperature=0.8, dynamic_sampling=True, max_refills=1,
    quality=QualityConfig(action="off"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(servers_module, "FIRST_WAIT_SECONDS", 0.02)


@pytest.fixture
def serve(make_policy):
    """A function that starts a server with the policy's first weights; all are stopped after the test."""
    started = []

    def start(change=None):
        started.append(VllmContract(make_policy(), [3], change=change))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def make_worker(make_policy, tokenizer, short_task, tmp_path):
    """A function that builds a worker whose completions come from servers, or without any from its engine."""

    def build(*urls, algorithm=ALGORITHM, **options):
        engine = InferenceEngine(make_policy())
        config = ServerRollout(urls=urls, **{"retry_seconds": 5.0, **options}) if urls else None
        servers = config and RolloutServers(config, engine, tmp_path, World())
        return RolloutWorker(engine, tokenizer, [short_task], algorithm, seed=3, servers=servers)

    return build


def learn(worker, amount=0.3):
    """Another policy, as after an update."""
    worker.engine.model = worker.engine.model.eager_copy(
        {k: v * (1 + amount) for k, v in worker.engine.model.state_dict().items()}
    )


def assert_same(worker, other, step):
    (groups, tokens), (expected, expected_tokens) = worker.step(step), other.step(step)
    assert tokens == expected_tokens
    for one, two in zip(groups, expected, strict=True):
        for sample, wanted in zip(one.samples, two.samples, strict=True):
            assert sample.ids == wanted.ids and sample.completion == wanted.completion
            torch.testing.assert_close(sample.logprobs, wanted.logprobs, atol=1e-5, rtol=0)


def test_servers_draw_what_the_engine_draws_with_the_newest_weights(make_worker, serve, tmp_path):
    first, second = serve(), serve()
    (tmp_path / "rollout-weights" / "of-a-killed-process").mkdir(parents=True)
    worker, engine = make_worker(first.url, second.url), make_worker()
    for step in range(2):
        assert_same(worker, engine, step)
        learn(worker), learn(engine)
    assert {samples for server in (first, second) for samples, _ in server.groups} == {3}, "a group was split"
    assert len(first.groups) >= 2 * 3 and len(second.groups) >= 2 * 2
    assert first.log.count("/collective_rpc") == second.log.count("/collective_rpc") == 2, "weights travel once a step"
    assert len(list((tmp_path / "rollout-weights").iterdir())) == 1
    del worker
    gc.collect()
    assert list(tmp_path.iterdir()) == [], "weights stay behind"


def test_a_folder_for_weights_keeps_those_of_other_runs_and_none_of_a_killed_process_of_this_one(make_worker, serve, tmp_path):
    (tmp_path / "shared" / "of-another-run").mkdir(parents=True)
    worker = make_worker(serve().url, weights_dir=str(tmp_path / "shared"))
    killed = worker.servers.folder / "of-a-killed-process"
    killed.mkdir(parents=True)
    worker.step(0)
    assert worker.servers.folder.parent == tmp_path / "shared" and not killed.exists()
    del worker
    gc.collect()
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["of-another-run"]


def test_a_server_that_dies_and_comes_back_with_old_weights_changes_nothing(make_worker, serve):
    """It dies with a request under way, and the next one finds nobody; its first weights would draw other tokens."""

    def die_once(path, answer):
        if path == "/v1/completions" and len(server.groups) == 2 and not died:
            died.append(path)
            threading.Thread(target=restart).start()
            return None
        return answer

    def restart():
        server.stop()
        time.sleep(0.1)
        server.start()

    died = []
    worker, engine = make_worker((server := serve()).url), make_worker()
    learn(worker), learn(engine)
    server.change = die_once
    assert_same(worker, engine, 0)
    assert died and server.log.count("/collective_rpc") == 2
    server.version = "default"  # started anew between two steps, and already there again
    assert_same(worker, engine, 1)
    assert server.log.count("/collective_rpc") == 3


def without(key):
    def change(path, answer):
        if path != "/v1/completions":
            return answer
        return {**answer, "choices": [{name: value for name, value in c.items() if name != key} for c in answer["choices"]]}

    return change


def at_completions(**changed):
    return lambda path, answer: {**answer, **changed} if path == "/v1/completions" else answer


def raw(path, answer):
    """Log-probabilities from before top_k, as without ``--logprobs-mode processed_logprobs``."""
    for choice in answer.get("choices", []):
        choice["logprobs"]["token_logprobs"][0] -= 0.2
    return answer


def other_vocabulary(path, answer):
    for choice in answer.get("choices", []):
        choice["token_ids"][0] = 70_000
    return answer


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (at_completions(choices=[]), "returned 0 completions of 'policy', where 1"),
        (at_completions(model="another"), "completions of 'another', where 1 of 'policy'"),
        (without("logprobs"), "of 1 tokens with 0 log-probabilities"),
        (without("token_ids"), "without token ids"),
        (without("finish_reason"), "in another form than vLLM: KeyError"),
        (raw, "--logprobs-mode processed_logprobs"),
        (other_vocabulary, "token id 70000, and the model's vocabulary has ids below"),
        (lambda path, answer: 404 if path == "/weight_info" else answer, "VLLM_SERVER_DEV_MODE=1"),
        (lambda path, answer: 500 if path == "/collective_rpc" else answer, "`osler export --to hf` wrote"),
        (
            lambda path, answer: 503 if path == "/v1/completions" else answer,
            "answered /v1/completions with 503 .*for 0.2 seconds",
        ),
        (lambda path, answer: None, "cannot be reached at /weight_info"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_and_leaves_nothing(make_worker, serve, tmp_path, change, told):
    worker = make_worker((server := serve(change)).url, retry_seconds=0.2)
    with pytest.raises(UserError, match=told) as refusal:
        worker.step(0)
    assert server.url in str(refusal.value) and list(tmp_path.iterdir()) == []


def test_a_server_that_is_silent_or_gone_ends_the_run_in_time(make_worker, serve, caplog):
    worker = make_worker((server := serve()).url, timeout_seconds=0.1, retry_seconds=0.3)
    with server.lock, pytest.raises(UserError, match="timed out"):
        worker.step(0)
    server.stop()
    with pytest.raises(UserError, match="Connection refused"):
        make_worker(server.url, retry_seconds=0.3).step(0)
    assert caplog.text.count("Connection refused") == 1, "five groups wait for one server"
    server.start()


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "hanging"])
def test_a_request_to_stop_ends_the_wait_for_a_server_at_once(make_worker, serve, tmp_path, gone):
    worker = make_worker((server := serve()).url, retry_seconds=600.0)
    if gone:
        server.stop()
    with StopFlag() as flag, nullcontext() if gone else server.lock:
        flag.requested = True
        with pytest.raises(AskedToStop):
            worker.step(0)
    assert list(tmp_path.iterdir()) == []
    if gone:
        server.start()


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"200 OK\r\nContent-Length: 6\r\n\r\n<html>", r"answers /weight_info without JSON \(<html>\)"),
        (b"500 no\r\nContent-Length: 99\r\n\r\n", r"answered /weight_info with 500 \(\)"),
        (b"200 OK\r\nContent-Length: 2\r\n\r\n[]"[:-1], "cannot be reached at /weight_info"),
    ],
    ids=["page", "error that breaks off", "answer that breaks off"],
)
def test_what_is_no_answer_of_vllm_is_told(make_worker, raw, told):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            with suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 " + raw)
                    held.append(connection)

        held = []
        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(UserError, match=told):
            make_worker(url, timeout_seconds=0.1, retry_seconds=0.1).step(0)


def test_a_model_that_servers_cannot_hold_is_refused_before_anything_is_drawn(tmp_path):
    engine = InferenceEngine(tiny_model(value_embeddings="all"))
    with pytest.raises(UserError, match=r"value_embeddings=none.*rollout\.type=engine"):
        RolloutServers(ServerRollout(urls=("http://a:1",)), engine, tmp_path, World())


def test_configs_that_cannot_be_meant_are_refused():
    start = {"kind": "grpo", "init_from": "run"}
    unusable = [
        "localhost:8000",
        "http://a:1/v1",
        "http://a:80O0",
        "http://a:80000",
        "http://:80",
        "http://[::1",
        "http://me:x@a:1",
    ]
    for urls in ([], ["http://a:1", "http://a:1"], *([url] for url in unusable)):
        with pytest.raises(UserError, match="urls"):
            decode(GrpoConfig, {**start, "rollout": {"type": "server", "urls": urls}})
    with pytest.raises(UserError, match="top_p"):
        decode(GrpoConfig, {**start, "rollout": {"type": "server", "urls": ["http://a:1"]}, "algorithm": {"top_p": 0.9}})
    assert replace(decode(GrpoConfig, start)).rollout.type == "engine"
