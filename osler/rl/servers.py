"""Rollouts from vLLM servers, behind the same ``generate`` as our engine's.

A server is started on the folder that ``osler export --to hf`` wrote, with ``VLLM_SERVER_DEV_MODE=1``, which opens the endpoints
that training needs (https://docs.vllm.ai/en/latest/training/weight_transfer/), and with ``--logprobs-mode processed_logprobs``,
so that log-probabilities are at the sampling temperature. vLLM's backends of ``/update_weights`` move tensors between GPUs (NCCL,
CUDA IPC); a file works on any machine. So the weights are written once, ``/pause`` lets a server finish its requests,
``/collective_rpc`` makes it call ``reload_weights`` on the file, ``/resume`` lets it go on, and ``/update_weight_version`` names
the weights.

Every request is preceded by ``/weight_info``: a server that was restarted has other weights, and gets ours again. So a
server may be lost and come back at any time. A group is one request with ``n`` completions. vLLM gives completion i of a request
its seed plus i, so every row keeps a seed of its own, whatever the number of servers and ranks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from osler.checkpoint.store import write_tensors
from osler.export.huggingface import WEIGHTS_FILE, qwen3_weights, standard_form
from osler.inference.engine import InferenceEngine
from osler.inference.rows import Continuation
from osler.ops.sampling_params import SamplingParams
from osler.rl.config import ServerRollout
from osler.runtime.errors import UserError
from osler.runtime.files import fingerprint
from osler.runtime.stop import AskedToStop, asked
from osler.runtime.world import World

logger = logging.getLogger(__name__)

MOST_REQUESTS = 64  # the most in flight at a time; the server queues what it cannot take yet
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 15.0  # between two tries
POLL_SECONDS = 0.2  # between two checks whether the run was asked to stop
TRANSIENT = (408, 429, 500, 502, 503, 504)  # statuses of a server that may answer later
CERTAIN = -1e-3  # the log-probability of a token that is sure to be drawn is 0, or with rounding at least this


class Unavailable(Exception):
    """A server that does not answer now and may do so later."""


@dataclass
class _Server:
    url: str
    lock: threading.Lock = field(default_factory=threading.Lock)  # one thread at a time gives the server weights
    model: str = ""  # the name under which it serves
    is_lost: bool = False  # whether it has not answered since its outage was logged; each outage is logged once


class RolloutServers:
    """Draws completions from the model of ``engine`` on servers. All ranks call ``generate``, and rank 0 asks the servers.

    Raises UserError for a model that the servers cannot hold, before anything is drawn.
    """

    def __init__(self, config: ServerRollout, engine: InferenceEngine, folder: Path, world: World) -> None:
        self.config, self.engine, self.world = config, engine, world
        try:
            standard_form(engine.model.config, engine.model.config.max_seq_len)
        except UserError as error:
            raise UserError(f"rollout.type=server: {error} rollout.type=engine samples from every model.") from error
        self.servers = [_Server(url) for url in config.urls]
        self.folder = folder.absolute() / "rollout-weights"
        if config.weights_dir is not None:  # several runs may share it
            self.folder = Path(config.weights_dir).absolute() / fingerprint(str(folder.absolute()))
        self._name, self._count = uuid.uuid4().hex[:8], 0  # another run on the same servers has another name
        self._written: Callable[[], object] = lambda: None  # returns the model whose weights are in the folder, while it exists
        self._given_up, self._log_lock = threading.Event(), threading.Lock()
        weakref.finalize(self, _remove, self.folder, self._name)  # at the end of the process, too

    @property
    def version(self) -> str:
        """The name of the weights that were written last."""
        return f"{self._name}-{self._count}"

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, samples_per_prompt: int = 1, first_row: int = 0
    ) -> list[Continuation]:
        """Draw completions as ``InferenceEngine.generate`` does; row r has the seed ``sampling.seed`` + r.

        Raises UserError, with the server's address and what to do, when a server cannot be reached for ``retry_seconds``, or when
        nothing can be learned from its answer. Raises AskedToStop on every rank when the run is asked to stop meanwhile, because
        a server that hangs would hold it up for ``timeout_seconds``. The resumed run draws the same completions.
        """
        shares = self.world.all_gather([list(prompt) for prompt in prompts])
        asked_for = [prompt for share in shares for prompt in share]
        drawn = self.world.broadcast_from_first(lambda: self._draw(asked_for, sampling, samples_per_prompt))
        if drawn is None:
            raise AskedToStop
        return drawn[first_row : first_row + len(prompts) * samples_per_prompt]

    def _draw(self, prompts: Sequence[list[int]], sampling: SamplingParams, size: int) -> list[Continuation] | None:
        """Return the completions of all prompts, or None when the run is asked to stop before they are there."""
        model, drawn = self.engine.model, list[Continuation]()
        if self._written() is not model:
            self._write()
            self._written = weakref.ref(model)
        self._given_up.clear()
        pool = ThreadPoolExecutor(min(len(prompts), MOST_REQUESTS))
        try:
            groups = [
                pool.submit(self._group, self.servers[number % len(self.servers)], prompt, sampling, number * size, size)
                for number, prompt in enumerate(prompts)
            ]
            for group in groups:
                while not wait([group], POLL_SECONDS).done:
                    if asked():
                        return None
                drawn += group.result()
            return drawn
        finally:
            self._given_up.set()  # after an error or Ctrl-C no thread goes on waiting
            pool.shutdown(wait=False, cancel_futures=True)
            if len(drawn) < len(prompts) * size:  # a run that is refused at its start leaves nothing
                _remove(self.folder, self._name)
                self._written = lambda: None

    def _write(self) -> None:
        """Write the model's weights into a new folder, and delete the folder of the weights before."""
        before = self.folder / self.version
        model = self.engine.model
        if not self._count:
            shutil.rmtree(self.folder, ignore_errors=True)  # an earlier process of this run may have been killed
        self._count += 1
        (self.folder / self.version).mkdir(parents=True)
        write_tensors(self.folder / self.version / WEIGHTS_FILE, qwen3_weights(model.config, model.state_dict()))
        shutil.rmtree(before, ignore_errors=True)

    def _group(self, server: _Server, prompt: list[int], sampling: SamplingParams, row: int, size: int) -> list[Continuation]:
        """Return the completions of a prompt, whose rows begin at ``row``."""
        body = {
            "prompt": prompt,
            "n": size,
            "seed": (sampling.seed + row) % (1 << 62),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "stop_token_ids": list(sampling.stop_ids),
        }
        deadline, pause = 0.0, FIRST_WAIT_SECONDS
        while True:
            try:
                self._give_weights(server, prompt)
                completions = self._completions(server, body)
                server.is_lost = False
                return completions
            except Unavailable as error:
                now = time.monotonic()
                deadline = deadline or now + self.config.retry_seconds
                with self._log_lock:
                    if not server.is_lost:
                        patience = f"trying again for {self.config.retry_seconds:g} s"
                        logger.warning(f"The rollout server {server.url} {error}; {patience}.")
                    server.is_lost = True
                if now + pause > deadline:
                    raise UserError(
                        f"The rollout server {server.url} {error}, and did not recover for {self.config.retry_seconds:g} "
                        "seconds. Start it again; the same command then goes on from the newest checkpoint. "
                        "(rollout.retry_seconds sets how long a run waits for a server.)"
                    ) from error
                if self._given_up.wait(pause):
                    raise
                pause = min(2 * pause, LONGEST_WAIT_SECONDS)
            except (LookupError, TypeError, AttributeError) as error:
                raise UserError(f"The rollout server {server.url} answers in another form than vLLM: {error!r}.") from error

    def _give_weights(self, server: _Server, prompt: list[int]) -> None:
        """Make the server load the weights that were written last, unless it has them."""
        with server.lock:
            held = self._ask(server, "/weight_info").get("weight_version")
            if held == self.version:
                return
            server.model = self._ask(server, "/v1/models")["data"][0]["id"]
            self._ask(server, "/pause?mode=wait", {})  # this also empties its cache of prompts
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder / self.version)}}
            self._ask(server, "/collective_rpc", reload, final=500)
            self._ask(server, "/reset_prefix_cache", {})
            self._ask(server, "/resume", {})
            # With top_k=1 one token is certain. Its log-probability is 0 only if the server computes it after top_k.
            probe = {"prompt": prompt, "n": 1, "max_tokens": 1, "temperature": 1.0, "top_k": 1, "stop_token_ids": []}
            if self._completions(server, probe)[0].logprobs[0] < CERTAIN:
                raise UserError(
                    f"The rollout server {server.url} returns log-probabilities of another distribution than the one that it "
                    "draws from: start it with --logprobs-mode processed_logprobs."
                )
            self._ask(server, "/update_weight_version", {"new_version": self.version})

    def _completions(self, server: _Server, body: dict[str, Any]) -> list[Continuation]:
        """Return the completions of a request, in the order of their seeds; raises UserError for an unusable answer."""
        answer = self._ask(server, "/v1/completions", {"model": server.model, "logprobs": 0, "return_token_ids": True, **body})
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if answer["model"] != server.model or len(choices) != body["n"]:
            raise UserError(
                f"The rollout server {server.url} returned {len(choices)} completions of {answer['model']!r}, where {body['n']} "
                f"of {server.model!r} were asked for: is it a vLLM server, and does this run have it alone?"
            )
        return [self._continuation(server, choice, body["stop_token_ids"]) for choice in choices]

    def _continuation(self, server: _Server, choice: dict[str, Any], stop_ids: Sequence[int]) -> Continuation:
        ids: list[int] = choice.get("token_ids") or []
        logprobs: list[float] = (choice.get("logprobs") or {}).get("token_logprobs") or []
        reason = choice["finish_reason"]
        finished = bool(ids) and ids[-1] in stop_ids
        vocab_size = self.engine.model.config.vocab_size
        problem = ""
        if reason not in ("stop", "length"):
            raise Unavailable(f"ended a completion with {reason!r}")
        if not ids:
            problem = "without token ids: it must be a vLLM that knows return_token_ids"
        elif not 0 <= min(ids) <= max(ids) < vocab_size:
            problem = (
                f"with token id {max(ids)}, and the model's vocabulary has ids below {vocab_size}: does it serve this model?"
            )
        elif len(logprobs) != len(ids) or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in logprobs):
            problem = f"of {len(ids)} tokens with {len(logprobs)} log-probabilities: every token needs one"
        elif stop_ids and finished != (reason == "stop"):
            problem = f"that ended by {reason!r} with token {ids[-1]}, where {list(stop_ids)} end one"
        if problem:
            raise UserError(f"The rollout server {server.url} returned a completion {problem}.")
        return Continuation(ids, logprobs, finished)

    def _ask(self, server: _Server, path: str, body: dict[str, Any] | None = None, final: int | None = None) -> dict[str, Any]:
        """Return the JSON object that a server answers with; a request with a body is a POST.

        Raises Unavailable when the server may answer later, and UserError for other statuses and ``final``.
        """
        data = None if body is None else json.dumps(body).encode()
        request = Request(server.url + path, data, {"Content-Type": "application/json"})
        try:
            with _OPENER.open(request, timeout=self.config.timeout_seconds) as answer:
                told = answer.read()
        except HTTPError as error:
            said = ""
            with contextlib.suppress(OSError, HTTPException):  # the connection may also break while this is read
                said = error.read(1000).decode("utf-8", "replace").strip()
            if error.code in TRANSIENT and error.code != final:
                raise Unavailable(f"answered {path} with {error.code} ({said})") from error
            raise UserError(
                f"The rollout server {server.url} refused {path}: {error.code} ({said}). It must be a vLLM server of the folder "
                "that `osler export --to hf` wrote of this model, started with VLLM_SERVER_DEV_MODE=1 in its environment."
            ) from error
        except (OSError, HTTPException, ValueError) as error:
            raise Unavailable(f"cannot be reached at {path} ({getattr(error, 'reason', error)})") from error
        try:
            return dict(json.loads(told or b"{}"))
        except ValueError as error:  # another server, or a proxy in between
            raise Unavailable(f"answers {path} without JSON ({told.decode('utf-8', 'replace').strip():.80})") from error


def _remove(folder: Path, name: str) -> None:
    """Delete the weights that one process wrote, and their folder if no other has some in it."""
    for weights in folder.glob(f"{name}-*"):
        shutil.rmtree(weights, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


_OPENER = build_opener(ProxyHandler({}))  # no proxy, because the servers are in the same network as the run
