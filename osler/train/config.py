"""What a pretraining or fine-tuning run is made of. Torch-free.

Time is tokens seen: every interval and schedule is in tokens. Defaults run on a laptop's CPU with the built-in clinic.
"""

from __future__ import annotations

from typing import Annotated, Literal

from osler.config import TAGGED, config
from osler.data.config import ClinicData, FilesData, TurnsData
from osler.model.config import ModelConfig
from osler.optim.config import AdamWConfig, LinearConfig, ScheduleConfig
from osler.tokenizer.config import TokenizerConfig

DataConfig = Annotated[ClinicData | FilesData | TurnsData, TAGGED]


@config
class ExamProbe:
    """A small exam during training: ``items`` clinic questions of each split, answered greedily, every so many tokens."""

    every_tokens: int = 0  # 0: never
    splits: tuple[str, ...] = ("validation",)
    items: int = 200

    def __post_init__(self) -> None:
        if self.every_tokens < 0:
            raise ValueError(f"every_tokens is {self.every_tokens}; it must be 0 (never) or more")
        if self.items < 1 or not self.splits:
            raise ValueError(f"items is {self.items} and splits {list(self.splits)}: an exam needs at least one of each")


@config
class TrainConfig:
    """One supervised stage: ``pretrain`` learns every token, ``sft`` learns what the model must answer."""

    kind: Literal["pretrain", "sft"] = "pretrain"
    description: str = ""
    seed: int = 0
    init_from: str | None = None  # run folder or checkpoint to start from; its model and tokenizer replace those given here
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = ClinicData()
    packing: Literal["auto", "stream", "whole"] = "auto"  # cut anywhere, or keep documents whole and pad; auto: whole for sft
    document_mask: bool = False  # attention stays inside a document
    seq_len: int = 128
    batch_tokens: int = 8_192  # tokens per optimizer step
    micro_batch_tokens: int | None = None  # tokens per forward pass; None: the whole batch at once
    total_tokens: int = 8_192_000
    max_minutes: float | None = None  # end by the clock if that comes before total_tokens; the schedule is fitted to it
    optim: AdamWConfig = AdamWConfig()
    schedule: ScheduleConfig = LinearConfig(warmup_tokens=327_680)
    clip_norm: float = 1.0
    # bf16 computes in bf16 from fp32 weights, fp8 also multiplies in FP8; pure-bf16 keeps weights and moments in bf16 too
    precision: Literal["auto", "bf16", "fp32", "pure-bf16", "fp8"] = "auto"
    recompute: Literal["off", "selective", "full"] = "off"  # activations computed again in the backward pass, to save memory
    compile: Literal["auto", "always", "never"] = "auto"
    device: str = "auto"
    loader_workers: int = 1
    log_every_steps: int = 10
    eval_every_tokens: int = 2_048_000
    save_every_tokens: int = 2_048_000
    keep_last: int = 2
    max_skipped_steps: int = 20  # so many steps in a row with a non-finite gradient end the run
    exam: ExamProbe = ExamProbe()

    def __post_init__(self) -> None:
        counts = ("seq_len", "total_tokens", "log_every_steps", "eval_every_tokens", "save_every_tokens", "keep_last")
        for name in (*counts, "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        rows, rest = divmod(self.batch_tokens, self.seq_len)
        if rest or rows < 1:
            raise ValueError(f"batch_tokens {self.batch_tokens} is not a positive multiple of seq_len {self.seq_len}")
        if self.init_from is None and self.seq_len > self.model.max_seq_len:
            raise ValueError(f"seq_len {self.seq_len} is longer than model.max_seq_len {self.model.max_seq_len}")
        micro = self.micro_batch_tokens
        if micro is not None and (micro < self.seq_len or micro % self.seq_len or self.batch_tokens % micro):
            raise ValueError(
                f"micro_batch_tokens {micro} must be a multiple of seq_len {self.seq_len} that divides "
                f"batch_tokens {self.batch_tokens}"
            )
        if self.tokenizer.path is None and self.init_from is None and self.tokenizer.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"tokenizer.vocab_size {self.tokenizer.vocab_size} is larger than model.vocab_size {self.model.vocab_size}; "
                f"set model.vocab_size={self.tokenizer.vocab_size}, or tokenizer.vocab_size={self.model.vocab_size}"
            )
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"max_minutes {self.max_minutes} must be above 0")
        if self.clip_norm <= 0:
            raise ValueError(f"clip_norm {self.clip_norm} must be above 0")

    @property
    def rows_per_batch(self) -> int:
        return self.batch_tokens // self.seq_len

    @property
    def rows_per_micro_batch(self) -> int:
        return (self.micro_batch_tokens or self.batch_tokens) // self.seq_len

    @property
    def total_steps(self) -> int:
        """Optimizer steps that cover ``total_tokens``, the last one rounded up."""
        return -(-self.total_tokens // self.batch_tokens)
