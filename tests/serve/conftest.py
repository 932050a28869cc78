"""A server in a thread, with models that know nothing: its address, and what a client sends."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from osler.checkpoint import store
from osler.inference.load import LoadedModel, describing_files
from osler.model.config import ModelConfig
from osler.model.transformer import Transformer
from osler.serve.app import Api
from osler.serve.config import ServeConfig
from osler.serve.process import Server, listening
from osler.serve.worker import Served, Worker
from osler.tokenizer.bpe import Tokenizer

TEXT = "A fever of 39 degrees → 🩺 rest, tea and sleep. The patient eats well and sleeps; nothing else helps against a cold. "


def model_of(kind: str, seed: int = 0, max_seq_len: int = 256) -> LoadedModel:
    """A model that answers questions after some reasoning (sft), or continues text (pretrain)."""
    tokenizer = Tokenizer.train([TEXT] * 3, vocab_size=320)
    config = ModelConfig(
        num_layers=1, hidden_size=32, intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=16,
        vocab_size=tokenizer.vocab_size, max_seq_len=max_seq_len, head_init="normal",
    )  # fmt: skip
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2, generator=generator)
    return LoadedModel(Path(kind), model.eval(), tokenizer, {"kind": kind}, {"kind": kind, "data": {"reasoning": True}})


class Running:
    """A server that runs in a thread."""

    def __init__(self, models: dict[str, LoadedModel], key: str | None, settings: dict[str, Any]) -> None:
        self.config = ServeConfig(port=0, **settings)
        self.served = [Served(name, ready, self.config) for name, ready in models.items()]
        self.api = Api(Worker(self.served, self.config), self.config, key)
        self.server = Server(self.api)
        self._listening = listening(self.config)
        listener = self._listening.__enter__()
        self.host, self.port = listener.getsockname()
        self.url = f"http://{self.host}:{self.port}"
        self._thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self._thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until a condition holds; fail if it does not."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the server never got there"
            time.sleep(0.005)

    def stop(self) -> None:
        """Stop it, and wait for its end."""
        self.server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
        self._listening.__exit__(None, None, None)


@pytest.fixture(scope="session")
def models() -> dict[str, LoadedModel]:
    return {"asked": model_of("sft"), "text": model_of("pretrain", seed=1)}


@pytest.fixture(scope="session")
def long_models() -> dict[str, LoadedModel]:
    """One that can write for many seconds."""
    return {"text": model_of("pretrain", max_seq_len=4096)}


@pytest.fixture
def checkpoint(models: dict[str, LoadedModel], tmp_path: Path) -> Path:
    """The model that answers as a checkpoint of a run."""
    ready = models["asked"]
    files = describing_files(ready.model.config, ready.tokenizer)
    tensors = {"model": ready.model.state_dict()}
    return store.save(tmp_path / "clinic" / "checkpoints", 7, tensors=tensors, state=ready.state, files=files)


@pytest.fixture
def serve(models: dict[str, LoadedModel]) -> Iterator[Callable[..., Running]]:
    """``serve(key=..., **settings)`` starts a server of its own."""
    started: list[Running] = []

    def start(key: str | None = None, **settings: Any) -> Running:
        started.append(Running(settings.pop("models", models), key, settings))
        return started[-1]

    yield start
    for running in started:
        running.stop()


@pytest.fixture(scope="session")
def server(models: dict[str, LoadedModel]) -> Iterator[Running]:
    """A server that tests share."""
    running = Running(models, None, {})
    yield running
    running.stop()
