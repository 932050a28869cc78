"""The teacher of a distilled run: a frozen model whose predictions the run learns besides the text (arXiv 1503.02531).

The teacher reads the same rows as the model, under the same document mask. Its hidden states and its head go into the loss,
which computes both models' logits chunk by chunk (``ops/distillation.py``). It is no part of the module that is trained, so DDP,
FSDP and checkpoints do not know it; every process holds all of it. Nothing about it changes, so resume is exact.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from osler.checkpoint import store
from osler.checkpoint.folders import fingerprint_of
from osler.inference.load import described_model, load_model, tokenizer_of, trained_seq_len_of
from osler.model.config import ModelConfig
from osler.model.transformer import SummedLoss, Transformer
from osler.ops.distillation import Mix, linear_distillation
from osler.parallel.compile import compile_forward
from osler.runs.folder import check_fingerprints
from osler.runs.process import Machine
from osler.runtime.errors import UserError
from osler.tokenizer.bpe import Tokenizer
from osler.train.config import TeacherConfig, TrainConfig

logger = logging.getLogger(__name__)


class DistilledLoss(SummedLoss):
    """Map rows, and a teacher's features and head, to three sums in nats: cross-entropy, KL, and the loss to minimise."""

    def __init__(self, model: Transformer, config: TeacherConfig) -> None:
        super().__init__(model)
        self.mix = Mix(config.weight, config.temperature, model.config.vocab_size)

    def of_hidden(
        self, hidden_BTD: Tensor, ids_BT: Tensor, labels_BT: Tensor, document_BT: Tensor | None, *teacher: Tensor
    ) -> Tensor:
        features, head = teacher
        return linear_distillation(*self.model.head(hidden_BTD), labels_BT.flatten(), (features, head), self.mix)


class Teacher:
    """A frozen model in eval mode. Called with ids and document ids, it returns features [N, R] and head [V, R]."""

    def __init__(self, path: Path, fingerprint: str, machine: Machine) -> None:
        self.fingerprint = fingerprint
        # The weights are kept in the compute dtype, because the layers would cast them to it anyway.
        self.model = load_model(path, device=machine.device, compute_dtype=machine.dtype).model.to(machine.dtype)
        self.model.requires_grad_(False)
        self._hidden = compile_forward(self.model) if machine.compile else self.model.forward

    @torch.no_grad()
    def __call__(self, ids_BT: Tensor, document_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.model.head(self._hidden(ids_BT, document_BT=document_BT))


def open_teacher(
    config: TrainConfig, machine: Machine, student: ModelConfig, tokenizer: Tokenizer, start: store.Loaded | None
) -> Teacher | None:
    """Return the teacher of a run, if it has one; raises UserError for one that does not fit, or that ``start`` did not have."""
    if config.teacher is None:
        return None
    described = described_teacher(config.teacher)
    check_teacher(described, student, tokenizer.fingerprint, config.seq_len)
    fingerprint = fingerprint_of(described.path)
    if start is not None:
        check_fingerprints(start, {"teacher": fingerprint})
    teacher = Teacher(described.path, fingerprint, machine)
    logger.info(
        f"The teacher is {described.path}, {teacher.model.config.num_parameters:,} parameters; teacher.weight is "
        f"{config.teacher.weight:g} and teacher.temperature {config.teacher.temperature:g}."
    )
    return teacher


def described_teacher(config: TeacherConfig) -> store.Loaded:
    """Return the teacher's checkpoint without its tensors; raises UserError where there is no good one."""
    if not config.path:
        raise UserError("No teacher is named: give teacher.path=RUN, a run folder or one of its checkpoints.")
    try:
        return store.load(store.resolve(config.path), names=[])
    except UserError as error:
        raise UserError(f"teacher.path={config.path}: {error}") from error


def check_teacher(teacher: store.Loaded, student: ModelConfig, tokenizer: str, seq_len: int) -> None:
    """Raise UserError for a teacher that cannot teach: another tokenizer or vocabulary, or a context shorter than a row.

    ``tokenizer`` is the fingerprint of the student's tokenizer, empty while that is yet to be trained.
    """
    shape, other = described_model(teacher), tokenizer_of(teacher)
    if other.fingerprint != tokenizer:
        own = f"fingerprint {tokenizer}" if tokenizer else "yet to be trained"
        raise UserError(
            f"The teacher {teacher.path} has another tokenizer ({other.vocab_size:,} tokens, fingerprint {other.fingerprint}) "
            f"than the model to train ({own}), so it predicts other tokens. A new run without tokenizer.path, init_from and "
            "prepared shards takes the teacher's tokenizer. Where the tokenizers must differ, `osler distill` writes the "
            "teacher's right answers as examples that any model can learn."
        )
    if shape.vocab_size != student.vocab_size:
        raise UserError(
            f"The teacher {teacher.path} has a vocabulary of {shape.vocab_size:,} tokens and the model to train one of "
            f"{student.vocab_size:,}: set model.vocab_size={shape.vocab_size}."
        )
    for whose, config in ((f"The teacher {teacher.path}", shape), ("The model to train", student)):
        if config.copy_head_dim is not None:
            raise UserError(
                f"{whose} has a copy head, which distillation does not compare: it needs a model with "
                "model.copy_head_dim=null."
            )
    if shape.max_seq_len < seq_len:
        raise UserError(
            f"The teacher {teacher.path} reads {shape.max_seq_len:,} tokens (max_seq_len), and a row has seq_len {seq_len:,}: "
            "set a smaller seq_len."
        )
    if (trained := shape.usable_seq_len(trained_seq_len_of(teacher))) < seq_len:
        logger.warning(
            f"The teacher {teacher.path} was trained on rows of at most {trained:,} tokens, and a row has seq_len {seq_len:,}: "
            "beyond that it teaches what it never learned. Set a smaller seq_len, or train the teacher on longer rows first."
        )
