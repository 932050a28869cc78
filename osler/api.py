"""Osler in Python: build a model, load a run, generate, chat, sit an exam, take a loss.

    from osler import api

    model = api.load("runs/quickstart/sft")
    print(api.chat(model, "Which drug lowers a fever: (A) aspirin (B) salt").answer)
    for exam in api.score(model, "clinic", subset=100):
        print(exam.split, exam.accuracy, exam.interval)

These functions and their arguments stay the same from release to release. They return the objects that the commands use, so the
rest of Osler can be called with them. ``UserError`` says what does not exist or does not fit, and what to do. Importing this
module does not import torch; every function does, except ``model_config``.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from osler.config.recipe import load_recipe
from osler.model.config import ModelConfig, model_in
from osler.ops.sampling_params import SamplingParams
from osler.runtime.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from osler.eval.score import ScoredExam
    from osler.inference.load import LoadedModel
    from osler.model.transformer import Transformer

__all__ = ["Reply", "SamplingParams", "build", "chat", "generate", "load", "loss", "model_config", "score"]

DRAWN = SamplingParams(max_new_tokens=200, temperature=0.7, top_p=0.95)  # the defaults of `osler generate` and `osler chat`


class Reply(NamedTuple):
    """The answer to a question, and what the model thought before it ("" where it does not reason)."""

    thinking: str
    answer: str


def model_config(recipe: str, *overrides: str) -> ModelConfig:
    """Return the config of a recipe's model, with ``num_parameters``, ``flops_per_token`` and ``kv_cache_bytes``.

    ``recipe`` is a name that ``osler recipes`` lists, or a YAML file; ``overrides`` are texts such as ``"model.num_layers=6"``.
    """
    config = model_in(load_recipe(recipe, overrides), recipe)
    if config is None:
        raise UserError(f"The recipe {recipe} has no model of its own: it starts from a checkpoint. Give another recipe.")
    return config


def build(recipe: str, *overrides: str, seed: int = 0) -> Transformer:
    """Return a recipe's model with its initial weights: a plain ``torch.nn.Module``, in fp32 on the CPU.

    Called with ids [B, T] it returns hidden states, and ``logits`` turns them into scores of every token.
    """
    from osler.model.transformer import Transformer

    model = Transformer(model_config(recipe, *overrides))
    model.init_weights(seed)
    return model


def load(path: str | Path, *, which: Literal["newest", "best"] = "newest", device: str = "auto") -> LoadedModel:
    """Load a run's newest good or best checkpoint, or a given checkpoint, with its tokenizer.

    ``device`` is auto, cpu, cuda or cuda:N. The result has the torch module as ``.model``, and ``.tokenizer``.
    """
    from osler.inference.load import open_model

    return open_model(path, device=device, which=which)


def _check_loaded(model: object) -> None:
    """Raise UserError for anything but the result of ``load``, such as the path of a run."""
    if not hasattr(model, "tokenizer"):
        raise UserError(f"{model!r} is not a loaded model: give api.load(RUN), which takes a run folder or a checkpoint.")


def _one_text(text: object, name: str) -> None:
    """Raise UserError for anything else, such as a list of texts."""
    if not isinstance(text, str):
        raise UserError(f"The {name} is {type(text).__name__}, not text: call the function once for each text.")


def generate(model: LoadedModel, prompt: str = "", sampling: SamplingParams = DRAWN, *, stop: str | Sequence[str] = ()) -> str:
    """Return a model's continuation of one text; it ends before ``stop``, or the first of several."""
    from osler.inference.chat import continue_text
    from osler.inference.engine import InferenceEngine

    _check_loaded(model)
    _one_text(prompt, "prompt")
    return "".join(continue_text(InferenceEngine(model.model), model.tokenizer, prompt, sampling, stop))


def chat(model: LoadedModel, question: str, sampling: SamplingParams = DRAWN, *, reasoning: bool | None = None) -> Reply:
    """Return a model's reply to a question. With ``reasoning`` None it thinks first if it learned to.

    Raises UserError for a model that was trained on text alone. The answer is empty where ``max_new_tokens`` ends the thinking.
    """
    from osler.inference.chat import stream_answer
    from osler.inference.engine import InferenceEngine

    _check_loaded(model)
    _one_text(question, "question")
    if not model.answers_questions:
        raise UserError(f"{model.path} was trained on text alone: let it continue a text with generate, or fine-tune it first.")
    reasoning = model.reasons if reasoning is None else reasoning
    pieces = list(stream_answer(InferenceEngine(model.model), model.tokenizer, question, sampling, reasoning=reasoning))
    thinking, answer = ("".join(text for part, text in pieces if part == name).strip() for name in Reply._fields)
    return Reply(thinking, answer)


def score(model: LoadedModel, exam: str | dict[str, Any] | None = None, **settings: Any) -> list[ScoredExam]:
    """Let a model sit an exam, and return a score for each of its parts: ``accuracy``, its 95 % ``interval``, ``results``.

    ``exam`` is what ``osler eval`` takes as ``task``: "clinic", "medqa:FILE", the name of a public exam, or a section of fields;
    None takes the exam of the run's training. ``settings`` are fields of ``osler show eval``, such as ``subset=200`` or
    ``method="likelihood"``. Nothing is written to the run folder.
    """
    from osler.eval.config import config_of
    from osler.eval.run import complete, sit

    _check_loaded(model)
    config, _ = complete(config_of([], settings if exam is None else {**settings, "task": exam}), model)
    if not config.exams:
        raise UserError(f"What shall {model.path} be examined on? It learned text alone: name an exam, such as medqa:FILE.")
    return sit(config, model, model.kind or "model", None)


def loss(model: Transformer | LoadedModel, rows: Tensor | Sequence[Sequence[int]]) -> Tensor:
    """Return the mean cross-entropy, in nats per token, of each token given those before it in its row. It has a gradient.

    ``rows`` are token ids, [B, T] or lists of any lengths, with two tokens or more. A sparse model adds the loss of its index.
    """
    import torch

    from osler.eval.likelihood import pad_rows
    from osler.model.transformer import SummedLoss, Transformer
    from osler.ops.labels import IGNORED
    from osler.runtime.device import to_device

    if not isinstance(model, Transformer):
        _check_loaded(model)
    module = model if isinstance(model, Transformer) else model.model
    try:
        ids = [[operator.index(token) for token in row] for row in (rows.tolist() if isinstance(rows, torch.Tensor) else rows)]
    except TypeError as error:
        raise UserError(f"Rows are lists of token ids, such as [model.tokenizer.encode(TEXT)] ({error}).") from error
    longest = module.config.max_seq_len + 1
    if not ids or not all(2 <= len(row) <= longest for row in ids):
        raise UserError(f"Rows have {sorted({len(row) for row in ids})} tokens: give rows of 2 to {longest:,}.")
    if not all(0 <= token < module.config.vocab_size for row in ids for token in row):
        raise UserError(f"A row has a token outside the vocabulary of {module.config.vocab_size:,}: it is of another tokenizer.")
    inputs, labels = pad_rows([(row[:-1], row[1:]) for row in ids])
    device = module.embed_tokens.weight.device
    sums = SummedLoss(module)(to_device(inputs, device), to_device(labels, device), None)
    return sums.view(-1)[-1] / (labels != IGNORED).sum()
