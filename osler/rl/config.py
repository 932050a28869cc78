"""The configuration of GRPO: the algorithm, the sampler it draws from, and the filters of its samples. Torch-free.

The defaults are the published choices of DeepSeek-V3.2 (arXiv 2512.02556, section 3.1): advantages without the division by the
standard deviation, and the unbiased KL estimate. Its off-policy sequence mask is off until ``opsm_delta`` is given.
"""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Literal
from urllib.parse import urlsplit

from osler.config.schema import (
    TAGGED,
    Fraction,
    Ge,
    Gt,
    Le,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    config,
)
from osler.model.config import ModelConfig
from osler.ops.sampling_params import SamplingParams
from osler.optim.config import AdamWConfig, OptimConfig
from osler.optim.schedule import ConstantConfig, RepeatsWeightDecay, ScheduleConfig
from osler.parallel.config import DdpConfig, FsdpConfig, NoParallelConfig
from osler.runs.config import CheckpointConfig, RunConfig
from osler.tasks.registry import ClinicTask, TaskConfig
from osler.tasks.rewards import REWARDS, label_of


@config
class ClipConfig:
    """Range ``[1 - low, 1 + high]`` of the importance ratio."""

    low: Annotated[float, Gt(0), Le(1)] = 0.2  # how far below 1 the ratio may go
    high: PositiveFloat = 0.2  # how far above 1; a value above low is "clip-higher" (DAPO, arXiv 2503.14476)


@config
class QualityConfig:
    """The sample-quality filter: what counts as a bad sample (no answer, or much repetition) and what happens to it."""

    # zero gives a bad sample reward 0 and leaves it in its group; drop takes it out of group and loss, which biases the
    # baseline; off only measures
    action: Literal["zero", "drop", "off"] = "zero"
    require_answer: bool = True  # whether a sample without an answer that can be read is bad
    ngram: PositiveInt = 4  # length in tokens of the n-grams whose repeats are counted
    max_repeated_frac: Fraction = 0.5  # share of n-grams that may repeat an earlier one; a sample with more is degenerate
    min_tokens: PositiveInt = 32  # shorter samples are never degenerate


@config
class AlgorithmConfig:
    """One GRPO algorithm: sampling, advantages, ratio, KL, masks and how tokens are averaged."""

    prompts_per_step: PositiveInt = 8  # questions in one rollout
    samples_per_prompt: Annotated[int, Ge(2)] = 8  # completions of each question: the group; one alone has no advantage
    updates_per_batch: PositiveInt = 1  # the most optimizer updates on each rollout batch; every update uses the whole batch
    # the update that finds the policy farther than this from the one that drew the batch is the last one on that batch
    max_masked_frac: Fraction | None = None  # share of completions under the off-policy mask (opsm_delta); null: any
    target_kl: PositiveFloat | None = None  # KL in nats per token (approx_kl); null: any
    balanced_letters: bool = False  # whether the right answers of a step's questions are spread evenly over the letters
    max_new_tokens: PositiveInt = 128  # the most tokens of a completion

    # these three are of sampling; the samples of a group must differ, so their ranges leave greedy sampling out
    temperature: Annotated[float, Ge(0.01)] = 1.0
    top_p: Annotated[float, Ge(0.1), Le(1)] = 1.0  # share of the probability to sample from; 1: all
    top_k: Annotated[int, Ge(2)] | None = None  # sample from this many of the likeliest tokens; null: all

    # what is subtracted from a reward: mean, the group's mean; mean_std, the same and then divided by the standard deviation;
    # leave_one_out, the mean of the group's other samples
    advantage: Literal["mean", "mean_std", "leave_one_out"] = "mean"
    # sequence_mean averages over the tokens of a completion, then over completions; token_mean over all tokens of the update
    # (DAPO); constant divides by completions times max_new_tokens (Dr. GRPO, arXiv 2503.20783)
    aggregate: Literal["sequence_mean", "token_mean", "constant"] = "sequence_mean"
    # importance ratio of each token, or the length-normalised one of the sequence (GSPO, arXiv 2507.18071); the KL keeps the
    # token ratio
    ratio: Literal["token", "sequence"] = "token"
    clip: ClipConfig = ClipConfig()
    # unbiased is the importance-weighted k3; k3, k2, k1 are the plain estimates. On-policy the gradient of k2 is right as well,
    # that of k1 is zero on average, and that of k3 belongs to the reversed divergence
    kl: Literal["unbiased", "k3", "k2", "k1"] = "unbiased"
    beta: NonNegativeFloat = 0.01  # weight of the KL to the reference in the loss
    beta_schedule: ScheduleConfig = ConstantConfig()  # factor on beta over the run, as on the learning rate
    # off-policy sequence mask: a completion with a negative advantage and more KL per token than this keeps its KL term alone
    opsm_delta: NonNegativeFloat | None = None  # null: no mask
    # steps after which the reference becomes the model as it is then; null: it stays the model that the run began with
    reference_refresh_steps: PositiveInt | None = None

    dynamic_sampling: bool = False  # whether groups whose rewards are all equal are replaced
    max_refills: NonNegativeInt = 3  # the most further rollouts in a step that replace them
    # difficulty pools: a question whose samples all earned the same is left out of the next epoch; when it happens again, of the
    # next two; and so on up to this number. Others are asked in its place. 0: every epoch asks every question
    most_rested_epochs: NonNegativeInt = 0
    # a completion cut at the length limit: mask gives it no gradient but keeps it in the baseline and in the denominators,
    # penalise takes overlong_penalty off its reward, keep changes nothing
    overlong: Literal["mask", "penalise", "keep"] = "keep"
    overlong_penalty: NonNegativeFloat = 0.5  # taken off the reward with overlong=penalise
    quality: QualityConfig = QualityConfig()

    def __post_init__(self) -> None:
        if self.max_masked_frac is not None and self.opsm_delta is None:
            raise ValueError("max_masked_frac counts what the off-policy mask leaves out: give opsm_delta too, for example 0.2")

    @property
    def sampling(self) -> SamplingParams:
        """The sampling parameters of completions, without the seed and the token that ends them."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
        )

    @property
    def completions_per_step(self) -> int:
        """Completions in one rollout batch."""
        return self.prompts_per_step * self.samples_per_prompt


@config
class EngineRollout:
    """The processes of the run draw the completions themselves."""

    type: Literal["engine"] = "engine"


@config
class ServerRollout:
    """vLLM servers draw the completions; rank 0 asks them, and gives them the policy's weights before each step."""

    type: Literal["server"] = "server"
    urls: tuple[str, ...]  # the servers, such as http://localhost:8000; each gets its share of a step's questions
    # where the run makes a folder for its weights, which the servers read under the same path; null: in the run folder
    weights_dir: str | None = None
    timeout_seconds: PositiveFloat = 600.0  # for one request; a request that takes longer is sent again
    retry_seconds: PositiveFloat = 300.0  # how long the run waits for a server that cannot be reached, such as one that restarts

    def __post_init__(self) -> None:
        wrong = [url for url in self.urls if not _is_address(url)]
        if wrong or not self.urls or len(set(self.urls)) < len(self.urls):
            raise ValueError(
                f"urls {wrong or list(self.urls)}: give the address of each server once, such as http://localhost:8000, without "
                "a path"
            )


def _is_address(url: str) -> bool:
    """Return whether a URL names a host, perhaps with a port, and nothing else."""
    try:
        parts = urlsplit(url)
        return re.fullmatch(r"https?://[^/\s?#@]+", url) is not None and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number, or too large
        return False


@config
class RlTaskConfig:
    """Questions to train on: an exam, its share of every step, and which rewards count how much in the total."""

    task: TaskConfig = ClinicTask(split="train", limit=4000)
    name: str = ""  # its name in metrics; empty: the exam's type
    weight: PositiveFloat = 1.0  # share of every step's questions, relative to the other tasks
    # functions of osler/tasks/rewards.py with their weights, or functions of your own, MODULE:FUNCTION or FILE.py:FUNCTION; a
    # reward for form alone destroys accuracy, gated_format pays for it only when the answer is right
    rewards: dict[str, float] = field(default_factory=lambda: {"correct": 1.0})
    reward_seconds: PositiveFloat = 10.0  # time limit of a function of your own, for one completion
    reasoning: bool = True  # whether the model thinks before it answers

    def __post_init__(self) -> None:
        unknown = sorted(name for name in self.rewards if name not in REWARDS and ":" not in name)
        if unknown or not self.rewards:
            own = "or MODULE:FUNCTION and FILE.py:FUNCTION for your own"
            raise ValueError(f"rewards {unknown or 'are missing'}; known: {', '.join(REWARDS)}, {own}")
        if len(set(map(label_of, self.rewards))) < len(self.rewards):
            raise ValueError(f"rewards {sorted(self.rewards)}: two functions have one name, which their metrics need")

    @property
    def label(self) -> str:
        """The task's name in metrics."""
        return self.name or self.task.exam


@config
class StepCheckpoints(CheckpointConfig):
    """When checkpoints are saved, how, and which are kept."""

    every_steps: PositiveInt = 20  # steps between two checkpoints
    keep_every_steps: NonNegativeInt = 0  # steps between two milestones, which are checkpoints kept for good; 0: none


@config
class GrpoConfig(RunConfig):
    """One GRPO run: where it starts, what it asks, how it learns.

    How many tokens will be sampled is not known in advance, so the schedule counts the budget of the rollouts.
    """

    kind: Literal["grpo"] = "grpo"  # the command sets it
    seed: Seed = 0  # decides the questions and the sampling
    init_from: str  # run folder or checkpoint to start from, with its model and tokenizer
    tasks: tuple[RlTaskConfig, ...] = (RlTaskConfig(),)  # what is asked: a list of exams, each with its weight and its rewards
    eval_task: TaskConfig | None = ClinicTask(split="validation", limit=200)  # the exam sat during training; null: none
    eval_permutations: PositiveInt = 1  # option orders per evaluated question
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optim: OptimConfig = AdamWConfig(lr=3e-5, weight_decay=0.0)  # lr far below that of pretraining: 1e-6 to 1e-4 for AdamW
    # counts the token budget of the rollouts: completions of a step times max_new_tokens
    schedule: ScheduleConfig = ConstantConfig()
    micro_batch_tokens: PositiveInt = 16_384  # prompt and completion tokens per forward pass of one process, padding included
    rollout: Annotated[EngineRollout | ServerRollout, TAGGED] = EngineRollout()  # who draws the completions
    rollout_rows: PositiveInt = 256  # completions sampled at once by one process; bounds the key/value cache

    steps: PositiveInt = 100  # rollouts, each with updates_per_batch updates
    eval_every_steps: PositiveInt = 20  # steps between two exams
    checkpoint: StepCheckpoints = StepCheckpoints()
    # before a run begins, the model answers the first step's questions: refuse ends a run whose model neither earns a reward nor
    # gives an answer that can be read, warn says so and starts, off asks nothing; the run itself is the same
    preflight: Literal["refuse", "warn", "off"] = "refuse"
    zero_reward_patience: PositiveInt = 5  # steps in a row without a reward after which the run warns

    # how several processes share the work; with fsdp each of them gathers the whole policy to sample
    parallel: Annotated[NoParallelConfig | DdpConfig | FsdpConfig, TAGGED] = NoParallelConfig()
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # activations; weights are fp32; auto: bf16 where it is faster here

    def __post_init__(self) -> None:
        labels = [task.label for task in self.tasks]
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(f"tasks need at least one entry, each with its own name, got {labels}")
        if isinstance(self.rollout, ServerRollout) and (self.algorithm.top_p < 1 or self.algorithm.top_k is not None):
            raise ValueError(
                "rollout.type=server returns no sampling masks, without which the loss cannot be computed: leave algorithm.top_p "
                "and algorithm.top_k out"
            )
        if self.early_stopping_patience is not None and self.eval_task is None:
            raise ValueError("early_stopping_patience counts exams: give an eval_task, or leave early_stopping_patience out")
        if isinstance(self.optim.weight_decay_schedule, RepeatsWeightDecay):
            raise ValueError("optim.weight_decay_schedule.type=repeats counts epochs of text, and GRPO reads none: use constant")

    @property
    def budget_tokens_per_step(self) -> int:
        """Completion tokens of one step if every completion ran to the limit: the unit of the schedule."""
        return self.algorithm.completions_per_step * self.algorithm.max_new_tokens

    @property
    def budget_tokens(self) -> int:
        """Completion tokens of the whole run, counted in the same way."""
        return self.steps * self.budget_tokens_per_step

    def numbers(self, model: ModelConfig | None = None) -> dict[str, str]:
        algorithm = self.algorithm
        return {
            "completions": f"{self.steps * algorithm.completions_per_step:,} of at most {algorithm.max_new_tokens} tokens",
            "optimizer steps": f"{self.steps * algorithm.updates_per_batch:,}",
        }
