"""nanochat's GPT and MuonAdamW as a contestant of ``learn_minutes.py``: one run by the clock, in a process of its own.

    python benchmarks/learn_nanochat.py SPEC       (JSON: a ``Spec``)

The model, the optimizer, the tokenizer and the formulas of its schedules are those of a checkout, whose code is imported. What
its training script does by the count of steps happens by the share of the time here, because the clock ends the run. Its own
loader drops the rest of a document that does not fit into a row, which of long documents is nearly all. So rows are cut from a
stream of all documents, in another order in each epoch.

Rates are the peer's for a batch of 524,288 tokens, times ``rates`` or, as it does, times √(batch / 524,288). Its rule for weight
decay takes the number of tokens, which no run by the clock knows. The checkout needs rustbpe, tiktoken and filelock. Prints one
JSON object.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from osler.eval.likelihood import batches, windows
from osler.ops.labels import IGNORED
from osler.runtime.device import keep_freed_memory, pick_device, pick_dtype

DOCUMENT_CHARACTERS = 10_000  # of a document that its tokenizer is trained on, as in its own script
EVALUATED_TOKENS = 4096  # of a forward pass of an evaluation; its logits are held whole, in fp32
REFERENCE_BATCH = 524_288  # tokens of the batch that its rates are for
SLOWER = 1.1  # an evaluation may take so much longer than was estimated


@dataclass(frozen=True)
class Setup:
    """What can be tuned of the peer."""

    depth: int = 4
    width: int = 128
    head_dim: int = 64
    vocab: int = 8192
    rows: int = 16  # of a batch
    seq_len: int = 256
    context: int = 0  # tokens read at once in evaluations, at most ten times seq_len, where its rotary cache ends; 0: seq_len
    dtype: str = "auto"  # bf16 or fp32; auto: bf16 where it is faster
    compiled: bool = True  # model and optimizer; without it more of a short run's minutes are left for steps
    rates: float = 0.0  # all rates are multiplied by it; 0: by its own rule for the batch
    matrix_lr: float = 0.02
    embedding_lr: float = 0.3
    unembedding_lr: float = 0.008
    scalar_lr: float = 0.5
    weight_decay: float = 0.28  # of matrices at the start, falling to zero
    warmup_steps: int = 40
    momentum_steps: int = 400  # until the highest momentum
    warmdown: float = 0.65  # share of the time
    final_rate: float = 0.05  # share of the rate at the end

    @property
    def scale(self) -> float:
        """What all rates are multiplied by."""
        return self.rates or math.sqrt(self.rows * self.seq_len / REFERENCE_BATCH)


@dataclass(frozen=True)
class Spec:
    """One run: it ends so that the evaluation of ``held_out`` is finished ``minutes`` after ``started``."""

    checkout: str
    train: str  # JSONL files of texts
    held_out: str
    others: dict[str, str]  # more texts by name, evaluated afterwards
    minutes: float
    started: float  # the clock (time.monotonic) when the process was started
    seed: int
    setup: dict[str, Any] = field(default_factory=dict)


def uncompiled(function: Any = None, **_: Any) -> Any:
    """Stand for ``torch.compile``, also as a decorator with options, and leave the function as it is."""
    return uncompiled if function is None else function


def read_texts(path: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]


class Learner:
    """The peer's model, tokenizer and optimizer, and the clock of its run."""

    def __init__(self, spec: Spec, setup: Setup) -> None:
        self.spec, self.setup = spec, setup
        self.device = pick_device("auto")
        dtype = pick_dtype(setup.dtype, self.device)
        os.environ["NANOCHAT_DTYPE"] = self.dtype = str(dtype).removeprefix("torch.")
        if not setup.compiled:  # the checkout also decorates functions of its optimizer
            torch.compile = uncompiled
        sys.path.insert(0, spec.checkout)
        gpt = importlib.import_module("nanochat.gpt")
        texts = read_texts(spec.train)
        cut = (text[:DOCUMENT_CHARACTERS] for text in texts)
        self.tokenizer = importlib.import_module("nanochat.tokenizer").RustBPETokenizer.train_from_iterator(cut, setup.vocab)
        self.start_id: int = self.tokenizer.get_bos_token_id()
        self.documents = [np.array(ids, np.int32) for ids in self.encode(texts)]
        heads = setup.width // setup.head_dim
        self.model = gpt.GPT(
            gpt.GPTConfig(
                sequence_len=setup.seq_len,
                vocab_size=self.tokenizer.get_vocab_size(),
                n_layer=setup.depth,
                n_head=heads,
                n_kv_head=heads,
                n_embd=setup.width,
                window_pattern="L",
            )
        )
        torch.manual_seed(spec.seed)
        self.model.to(self.device)
        self.model.init_weights()
        self.optimizer = self.model.setup_optimizer(
            unembedding_lr=setup.unembedding_lr * setup.scale,
            embedding_lr=setup.embedding_lr * setup.scale,
            scalar_lr=setup.scalar_lr * setup.scale,
            matrix_lr=setup.matrix_lr * setup.scale,
            weight_decay=setup.weight_decay,
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text behind the token that begins a document."""
        found: list[list[int]] = self.tokenizer.encode(list(texts), prepend=self.start_id, num_threads=os.cpu_count() or 1)
        return found

    @property
    def seconds(self) -> float:
        """Seconds since the process was started."""
        return time.monotonic() - self.spec.started

    def rows(self) -> Iterator[Tensor]:
        """Yield batches of rows of ``seq_len`` + 1 tokens; each epoch has another order of documents and of the rows in them."""
        setup = self.setup
        for epoch in count():
            rng = np.random.default_rng((self.spec.seed, epoch))
            stream = np.concatenate([self.documents[number] for number in rng.permutation(len(self.documents))])
            starts = rng.permutation((len(stream) - 1) // setup.seq_len) * setup.seq_len
            for first in range(0, len(starts) - setup.rows + 1, setup.rows):
                taken = starts[first : first + setup.rows, None] + np.arange(setup.seq_len + 1)
                yield torch.from_numpy(stream[taken]).long().to(self.device)

    def train(self, until: float) -> dict[str, Any]:
        """Train until so many seconds after the start of the process."""
        model, setup = torch.compile(self.model, dynamic=False), self.setup
        steps, began = 0, self.seconds
        for ids in self.rows():
            if steps and self.seconds >= until:
                break
            if steps < 2:  # the schedule begins behind the first step, which compiles
                began = self.seconds
            self.set_rates(steps, (self.seconds - began) / max(until - began, 1e-9))
            model(ids[:, :-1], ids[:, 1:].contiguous()).backward()
            self.optimizer.step()
            self.model.zero_grad(set_to_none=True)
            steps += 1
            if steps == 1:
                gc.collect()
                gc.freeze()
                gc.disable()
        tokens = steps * setup.rows * setup.seq_len
        return {"steps": steps, "tokens": tokens, "compiled_seconds": began, "training_seconds": self.seconds - began}

    def set_rates(self, step: int, done: float) -> None:
        """Set rates, momentum and weight decay for a step, as its training script has them, at this share of the time."""
        setup = self.setup
        left = min(1.0, (1 - done) / setup.warmdown)
        rate = min((step + 1) / setup.warmup_steps, left + (1 - left) * setup.final_rate)
        momentum = 0.85 + (0.97 - 0.85) * min(1.0, step / setup.momentum_steps)
        momentum = momentum if left == 1 else min(momentum, 0.90 + (0.97 - 0.90) * left)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = setup.weight_decay * 0.5 * (1 + math.cos(math.pi * done))

    def batches_of(self, texts: Sequence[str], context: int = 0) -> list[tuple[Tensor, Tensor]]:
        """Return texts in windows by Osler's own rule: every token is a label once, and so is the end of each document."""
        documents = ([*ids[1:], self.start_id] for ids in self.encode(texts))
        cut = windows(documents, seq_len=context or self.setup.context or self.setup.seq_len, start_id=self.start_id)
        return list(batches(cut, batch_tokens=EVALUATED_TOKENS))

    @torch.no_grad()
    def nats(self, ids: Tensor, labels: Tensor) -> float:
        """Return the summed cross-entropy of a batch."""
        if ids.shape[1] == 1:  # its model reads two tokens at least
            ids, labels = nn.functional.pad(ids, (0, 1)), nn.functional.pad(labels, (0, 1), value=IGNORED)
        wanted = labels.masked_fill(labels == IGNORED, -1)
        summed: float = self.model(ids.to(self.device), wanted.to(self.device), loss_reduction="sum").item()
        return summed

    def seconds_of_evaluation(self, cut: Sequence[tuple[Tensor, Tensor]]) -> float:
        """Return about how long the evaluation of these batches will take, by the first one's second pass."""
        self.nats(*cut[0])
        began = self.seconds
        self.nats(*cut[0])
        return (self.seconds - began) * len(cut) * SLOWER

    def bits_per_byte(self, texts: Sequence[str], cut: Sequence[tuple[Tensor, Tensor]] | None = None) -> float:
        nats = sum(self.nats(*batch) for batch in cut or self.batches_of(texts))
        return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    keep_freed_memory()
    learner, held_out = Learner(spec, Setup(**spec.setup)), read_texts(spec.held_out)
    cut = learner.batches_of(held_out)
    evaluation = learner.seconds_of_evaluation(cut)
    prepared = learner.seconds
    told = learner.train(60 * spec.minutes - evaluation)
    bits = {"held-out": learner.bits_per_byte(held_out, cut)}
    seconds = learner.seconds
    bits |= {name: learner.bits_per_byte(read_texts(path)) for name, path in spec.others.items()}
    doubled = {}  # what it would score if it read twice as many tokens at once as it learned
    for name, path in {"held-out": spec.held_out, **spec.others}.items():
        doubled[name] = learner.bits_per_byte(texts := read_texts(path), learner.batches_of(texts, 2 * learner.setup.seq_len))
    parameters = sum(parameter.numel() for parameter in learner.model.parameters())
    setup = {**asdict(learner.setup), "rates": learner.setup.scale}
    about = {"preparation_seconds": prepared, "parameters": parameters, "dtype": learner.dtype, "setup": setup}
    print(json.dumps({"bits_per_byte": bits, "twice_the_context": doubled, "seconds": seconds, **told, **about}))


if __name__ == "__main__":
    main()
