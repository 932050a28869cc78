"""A server that speaks the part of vLLM's HTTP contract that rollouts use, and draws with Osler's own engine.

Paths, fields and their meaning are those of vLLM's ``entrypoints`` (``openai/completion/protocol.py``,
``rl/online/api_router.py`` and the dev-mode routers beside it). vLLM draws with its own random numbers; here a row's seed says
which row of which rollout of our engine it is, so that what is drawn must equal what the engine draws.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from safetensors.torch import load_file

from osler.inference.engine import InferenceEngine
from osler.model.transformer import Transformer
from osler.ops.sampling_params import SamplingParams
from osler.rl.rollout import rollout_seed

Change = Callable[[str, dict[str, Any]], dict[str, Any] | int | None]


class VllmContract:
    """A server on a port of its own; ``change(path, answer)`` may return another answer, a status, or None to hang up."""

    def __init__(self, model: Transformer, seeds: Iterable[int], *, port: int = 0, change: Change | None = None) -> None:
        self.model, self.first = deepcopy(model), model
        self.rollouts = {rollout_seed(seed, step, refill) for seed in seeds for step in range(8) for refill in range(4)}
        self.change, self.port, self.lock = change, port, threading.Lock()
        self.log: list[str] = []
        self.groups: list[tuple[int, int]] = []  # samples and tokens of the prompt of every request for a group
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Serve, with the weights and the state of a server that was just started."""
        handler = type("Handler", (_Handler,), {"contract": self})
        with self.lock:
            self.model.load_state_dict(self.first.state_dict())
            self.version, self.paused = "default", False
            self.http = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any] | int | None:
        """The answer to one request, under the lock."""
        self.log.append(path)
        answer: dict[str, Any] = {}
        if path == "/weight_info":
            answer = {"weight_version": self.version}
        elif path == "/v1/models":
            answer = {"object": "list", "data": [{"id": "policy", "max_model_len": self.model.config.max_seq_len}]}
        elif path == "/pause?mode=wait":
            self.paused, answer = True, {"status": "paused"}
        elif path == "/resume":
            self.paused, answer = False, {"status": "resumed"}
        elif path == "/update_weight_version":
            self.version, answer = body["new_version"], {"success": True, "new_version": body["new_version"]}
        elif path == "/collective_rpc":
            assert self.paused and body["method"] == "reload_weights"
            self.load(body["kwargs"]["weights_path"])
            answer = {"results": [None]}
        elif path == "/v1/completions":
            assert not self.paused and body["model"] == "policy"
            answer = self.complete(body)
        elif path != "/reset_prefix_cache":
            return 404
        return self.change(path, answer) if self.change else answer

    def load(self, folder: str) -> None:
        """Take the weights of a folder: norms that this model has not are ones, and its padding rows are not in the file."""
        own = self.model.state_dict()
        for name, tensor in load_file(f"{folder}/model.safetensors").items():
            name = name.removeprefix("model.")
            if name in own:
                own[name][: len(tensor)] = tensor
            else:
                assert "norm" in name and bool((tensor == 1).all())
        self.model.load_state_dict(own)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Draw the completions of one prompt; stop tokens are part of the token ids, as in vLLM."""
        seed, row = 0, 0
        if "seed" in body:  # vLLM gives completion i of a request the request's seed plus i
            self.groups.append((body["n"], len(body["prompt"])))
            row, seed = min(((body["seed"] - s) % (1 << 62), s) for s in self.rollouts)
        sampling = SamplingParams(
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
            top_k=body.get("top_k"),
            stop_ids=tuple(body["stop_token_ids"]),
            seed=seed,
        )
        assert body["logprobs"] == 0 and body["return_token_ids"] is True
        drawn = InferenceEngine(self.model).generate([body["prompt"]], sampling, samples_per_prompt=body["n"], first_row=row)
        choices = [
            {
                "index": index,
                "text": "",
                "finish_reason": "stop" if one.finished else "length",
                "token_ids": one.ids,
                "logprobs": {"token_logprobs": one.logprobs, "tokens": [""] * len(one.ids)},
            }
            for index, one in enumerate(drawn)
        ]
        return {"object": "text_completion", "model": "policy", "choices": choices[::-1]}  # by index, in any order


class _Handler(BaseHTTPRequestHandler):
    contract: VllmContract

    def do_GET(self) -> None:
        self.reply({})

    def do_POST(self) -> None:
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body: dict[str, Any]) -> None:
        with self.contract.lock, torch.inference_mode():
            is_alive = self.server is self.contract.http  # what a server before this one was asked died with it
            answer = self.contract.answer(self.path, body) if is_alive else None
        if answer is None:
            self.connection.close()
            return
        data = json.dumps(answer if isinstance(answer, dict) else {"detail": "no"}).encode()
        self.send_response(200 if isinstance(answer, dict) else answer)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""
