"""The settings of the optimizers. Torch-free."""

from typing import Annotated, Literal

from osler.config.schema import TAGGED, NonNegativeFloat, PositiveFloat, PositiveInt, config
from osler.optim.schedule import ConstantWeightDecay, Momentum, MomentumWarmup, WeightDecayConfig


@config
class AdamWConfig:
    """AdamW (arXiv 1711.05101) in three groups: matrices, embeddings with the head, and vectors. Vectors never decay."""

    type: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 2.5e-3  # peak learning rate of matrices and vectors
    embedding_lr: PositiveFloat | None = None  # the rate of embeddings and head; null: lr
    beta1: Momentum = 0.9  # decay of the mean of gradients, per step
    beta2: Momentum = 0.95  # decay of the mean of their squares, per step
    eps: PositiveFloat = 1e-8  # added to the root of the mean square
    weight_decay: NonNegativeFloat = 0.1  # per step, matrices shrink by this times their learning rate
    # whether embeddings and head shrink, too, each of their matrices by as much as those of the layers; helps in later epochs
    decay_embeddings: bool = False
    # how it changes over the run; with repeats there is none while a source of data is in its first epoch
    weight_decay_schedule: WeightDecayConfig = ConstantWeightDecay()


@config
class MuonConfig:
    """Muon (see ``optim/muon.py``) for matrices; embeddings, head and vectors have AdamW. Vectors never decay.

    A step changes a matrix by about ``lr`` in spectral norm, or by ``lr * sqrt(rows / columns)`` if it is tall. The learning
    rates of Muon and AdamW follow the run's schedule.
    """

    type: Literal["muon"] = "muon"
    lr: PositiveFloat = 0.02  # peak learning rate of matrices
    momentum: Momentum = 0.95  # decay of the mean of gradients, per step
    momentum_warmup: MomentumWarmup = MomentumWarmup()
    newton_schulz_steps: PositiveInt = 5  # steps of the iteration that makes singular values equal
    weight_decay: NonNegativeFloat = 0.01  # per step, matrices shrink by this times their learning rate
    # whether embeddings and head shrink, too, each of their matrices by as much as those of the layers; helps in later epochs
    decay_embeddings: bool = False
    # how it changes over the run; with repeats there is none while a source of data is in its first epoch
    weight_decay_schedule: WeightDecayConfig = ConstantWeightDecay()
    adamw_lr: PositiveFloat = 2.5e-3  # peak learning rate of embeddings, head and vectors
    # the rate of the input and value embeddings, whose rows get a gradient only where their token occurs; null: adamw_lr
    input_embedding_lr: PositiveFloat | None = None
    beta1: Momentum = 0.9  # AdamW's decay of the mean of gradients, per step
    beta2: Momentum = 0.95  # AdamW's decay of the mean of their squares, per step
    eps: PositiveFloat = 1e-8  # added to the root of the mean square in AdamW


OptimConfig = Annotated[AdamWConfig | MuonConfig, TAGGED]
