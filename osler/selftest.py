"""``osler test``: whether this installation computes what it should. Each part is compared with a plain reference.

It is for a machine or a version of torch that nobody has tried Osler on. `osler doctor` says what a machine can do; the suite of
tests (`make test`) looks at everything, and takes minutes. The references compute on the CPU.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osler.checkpoint import store
from osler.config.schema import decode
from osler.inference.engine import InferenceEngine
from osler.model.config import ModelConfig
from osler.model.transformer import SummedLoss, Transformer
from osler.ops.attention import attention, attention_reference
from osler.ops.cross_entropy import cross_entropy_reference, linear_cross_entropy
from osler.ops.sampling_params import SamplingParams
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder
from osler.runtime.world import require_one_process
from osler.train.config import TrainConfig
from osler.train.run import train

SHAPE = ModelConfig(vocab_size=512, max_seq_len=256, copy_head_dim=16, head_init="normal", residual_init="scaled")
ROWS, LENGTH = 4, 192
NEW_TOKENS = 24
STEPS, RESUMED_FROM = 12, 8
CPU = torch.device("cpu")
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative to the largest number of the reference
# What an unknown version of torch, or a wrong result, may lead to.
BREAKS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
REMEDY = (
    "Osler does not compute right here. Install the versions of constraints.txt (`pip install -c constraints.txt -e .`). If it "
    "stays so, report these lines with the output of `osler doctor`."
)


class Wrong(Exception):
    """A result differs from its reference; the message says by how much."""


class Part(NamedTuple):
    """One line of the table."""

    name: str
    seconds: float
    problem: str  # empty: as it should be


def run(*, gpu: bool = False) -> int:
    """Run the command ``test``: print each part with its time as it is done; return 0 if all are right, else 2."""
    require_one_process("osler test")
    if gpu and not torch.cuda.is_available():
        raise UserError("This torch sees no GPU: `osler doctor` says why. Without --gpu the CPU is tested.")
    device = torch.device("cuda" if gpu else "cpu")
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__} on {name}", flush=True)
    parts = []
    for title, check in PARTS.items():
        parts.append(part := carry_out(title, check, device))
        print(f"{'wrong' if part.problem else 'ok':7}{title:34}{part.seconds:5.1f} s  {part.problem}".rstrip(), flush=True)
    wrong = [part.name for part in parts if part.problem]
    print(f"\n{', '.join(wrong)}: {REMEDY}" if wrong else f"\nAll right, in {sum(part.seconds for part in parts):.0f} s.")
    return 2 if wrong else 0


def carry_out(title: str, check: Callable[[torch.device], None], device: torch.device) -> Part:
    """Time one check; what it raises is its problem, because the others shall be tried too."""
    start, problem = time.perf_counter(), ""
    logging.disable(logging.WARNING)  # a run of a few seconds has nothing to tell
    try:
        check(device)
    except (Wrong, UserError, *BREAKS) as error:
        problem = next(iter(str(error).splitlines()), type(error).__name__)
    finally:
        logging.disable(logging.NOTSET)
    return Part(title, time.perf_counter() - start, problem)


def compare(name: str, found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Raise Wrong when two tensors differ by more than rounding in ``dtype``, or when a number is not finite."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= LARGEST_ERROR[dtype]:
        raise Wrong(f"{name} are off by {error:.1e} of the largest, where {LARGEST_ERROR[dtype]:.0e} is rounding")


def model_and_ids(device: torch.device) -> tuple[Transformer, Tensor]:
    """Return a small random model in fp32 and rows of tokens, [B, T]; both are the same on every device."""
    model = Transformer(SHAPE)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    return model.to(device), torch.randint(SHAPE.vocab_size, (ROWS, LENGTH + 1), generator=generator).to(device)


def exact(model: Transformer) -> Transformer:
    """Return a copy of a model that computes in fp64 on the CPU."""
    weights = {name: weight.detach().double().cpu() for name, weight in model.state_dict().items()}
    copy = model.eager_copy(weights, torch.float64)
    copy.make_tables(CPU)
    return copy


def check_forward(device: torch.device) -> None:
    """Logits of the model against fp64."""
    model, ids_BT = model_and_ids(device)
    reference = exact(model)
    compare("logits", logits_of(model, ids_BT), logits_of(reference, ids_BT.cpu()))


def logits_of(model: Transformer, ids_BT: Tensor) -> Tensor:
    """Return the logits of every token, [B, T, V]."""
    hidden_BTD = model(ids_BT)
    return model.logits(hidden_BTD, model.copies(hidden_BTD, ids_BT))


def check_backward(device: torch.device) -> None:
    """Every gradient of the training loss against fp64."""
    model, ids_BT = model_and_ids(device)
    reference = exact(model)
    for each, ids in ((model, ids_BT), (reference, ids_BT.cpu())):
        each.requires_grad_(True)
        SummedLoss(each)(ids[:, :-1], ids[:, 1:], None).backward()
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None and expected.grad is not None
        compare(f"gradients of {name}", parameter.grad, expected.grad)


def check_loss(device: torch.device) -> None:
    """The loss head by chunks against full logits, with gradients."""
    generator = torch.Generator().manual_seed(2)
    features, weight = (torch.randn(count, 64, generator=generator) for count in (500, 1000))
    labels = torch.randint(1000, (500,), generator=generator)
    grads = []
    for loss_of, place in ((partial(linear_cross_entropy, chunk_tokens=128), device), (cross_entropy_reference, CPU)):
        inputs = [each.to(place, copy=True).requires_grad_() for each in (features, weight)]
        loss = loss_of(inputs[0], inputs[1], labels.to(place))
        grads.append([loss, *torch.autograd.grad(loss, inputs)])
    for name, found, expected in zip(("losses", "gradients of features", "gradients of the head"), *grads, strict=True):
        compare(name, found, expected)


def check_attention(device: torch.device) -> None:
    """The attention kernels against the formula: two lengths, causal, with a mask of documents, with a window; fp32 and bf16."""
    generator = torch.Generator().manual_seed(3)
    for length in (48, 320):
        q, k, v = (torch.randn(2, heads, length, 32, generator=generator) for heads in (4, 2, 2))
        document_BT = (torch.arange(length) >= length // 3).long().expand(2, -1)
        same = document_BT[:, :, None] == document_BT[:, None, :]
        in_document = (same & torch.ones_like(same[0]).tril())[:, None]
        for mask, window in ((None, None), (in_document, None), (None, 20)):
            for dtype in LARGEST_ERROR:
                inputs = [each.to(dtype) for each in (q, k, v)]
                there = [each.to(device) for each in inputs]
                found = attention(*there, mask=None if mask is None else mask.to(device), window=window)
                name = f"attention outputs in {dtype}".replace("torch.", "")
                compare(name, found, attention_reference(*inputs, mask=mask, window=window), dtype)


def check_sampling(device: torch.device) -> None:
    """Greedy and drawn tokens of the engine against the whole forward pass over them."""
    model, ids_BT = model_and_ids(device)
    reference = exact(model)
    prompts = [row[: 5 + 7 * number].tolist() for number, row in enumerate(ids_BT)]
    for temperature in (0.0, 1.0):
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=temperature)
        for prompt, drawn in zip(prompts, InferenceEngine(model).generate(prompts, sampling), strict=True):
            with torch.no_grad():
                logits_1TV = logits_of(reference, torch.tensor([[*prompt, *drawn.ids[:-1]]]))
                logp_TV = logits_1TV[0, len(prompt) - 1 :].log_softmax(-1)
            own = logp_TV.gather(1, torch.tensor(drawn.ids)[:, None])[:, 0]
            compare("log-probabilities of drawn tokens", torch.tensor(drawn.logprobs), own)
            if temperature == 0 and bool((logp_TV.max(-1).values - own).max() > LARGEST_ERROR[torch.float32]):
                raise Wrong("greedy decoding chose a token that is not the likeliest")


def check_training(device: torch.device) -> None:
    """A run that learns, and that goes on from a checkpoint as if it had never been stopped."""
    with tempfile.TemporaryDirectory() as root:
        whole, resumed = RunFolder(Path(root) / "whole"), RunFolder(Path(root) / "resumed")
        config = recipe(str(device))
        train(config, whole)
        lines = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
        losses = [line["train/loss"] for line in lines if "train/loss" in line]
        if not losses[-1] < losses[0]:
            raise Wrong(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f} in {STEPS} steps")
        checkpoint = whole.checkpoints / f"step-{RESUMED_FROM:09d}"
        resumed.root.mkdir()
        for name in ("config.yaml", "tokenizer.json", "data"):
            (whole.root / name).rename(resumed.root / name)
        resumed.checkpoints.mkdir()
        checkpoint.rename(resumed.checkpoints / checkpoint.name)
        train(config, resumed)
        found, expected = (store.load(store.resolve(folder.root)) for folder in (resumed, whole))
        for name, tensor in expected.tensors["model"].items():
            if not torch.equal(found.tensors["model"][name], tensor):
                compare(f"after a resume, weights of {name}", found.tensors["model"][name], tensor)
                if device.type == "cpu":
                    raise Wrong(f"after a resume, {name} is not equal to the bit")


def recipe(device: str) -> TrainConfig:
    """Return a run of the clinic that takes seconds."""
    clinic: dict[str, Any] = {"passages": 60, "examples": 40, "cards": 0, "drills": 0}
    given = {
        "kind": "pretrain", "device": device, "precision": "fp32", "compile": "never", "seq_len": 64, "batch_tokens": 1024,
        "model": {"num_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 512},
        "tokenizer": {"vocab_size": 512},
        "data": {"type": "clinic", **clinic, "validation_passages": 6, "validation_examples": 6}, "total_tokens": STEPS * 1024,
        "optim": {"lr": 0.01}, "schedule": {"warmup_tokens": 1024}, "checkpoint": {"every_tokens": 4096, "in_background": False},
        "log_every_steps": 1,
    }  # fmt: skip
    return decode(TrainConfig, given)


PARTS: dict[str, Callable[[torch.device], None]] = {
    "forward pass": check_forward,
    "gradients": check_backward,
    "loss head": check_loss,
    "attention kernels": check_attention,
    "sampling": check_sampling,
    "training, checkpoint and resume": check_training,
}
