"""A run's steps, tokens, row lengths and batch sizes as functions of one another. Torch-free; nothing to resume.

A curriculum trains on short rows before long ones (Li et al. 2022, arXiv 2108.06084: what it buys is stability at
large batches and learning rates). Time is tokens seen: a stage begins with a step, and ends at the first end of a step
at or after its border, so that no step mixes two lengths. Stages lie end to end in the stream of tokens, so that a
change of length neither repeats nor drops one. Trainer, loader and plans all ask the same `Timeline`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from osler.data.config import Stage


@dataclass(frozen=True)
class Span:
    """A stage laid out: the steps `first_step` ... `end_step - 1` (None: to the end of the run), from `first_token` on."""

    number: int  # 1, 2, ...
    seq_len: int
    rows_per_batch: int
    first_step: int
    first_token: int
    end_step: int | None

    @property
    def batch_tokens(self) -> int:
        """Tokens in one step."""
        return self.rows_per_batch * self.seq_len

    def rows_in(self, tokens: int) -> int:
        """The rows that hold so many tokens, the last one rounded up."""
        return -(-tokens // self.seq_len)


@dataclass(frozen=True)
class Timeline:
    """The stages of a run one after another; steps count from 0, and what is seen before step s is `tokens_before(s)`."""

    spans: tuple[Span, ...]

    def at_step(self, step: int) -> Span:
        """The stage that a step is made in."""
        return self.spans[bisect_right(self.spans, step, key=lambda span: span.first_step) - 1]

    def at_tokens(self, tokens: int) -> Span:
        """The stage that trains the token at this offset (0, 1, ...) of the stream."""
        return self.spans[bisect_right(self.spans, tokens, key=lambda span: span.first_token) - 1]

    def tokens_before(self, step: int) -> int:
        """How many tokens the steps before this one see."""
        span = self.at_step(step)
        return span.first_token + (step - span.first_step) * span.batch_tokens

    def rows_at(self, step: int, skipped_tokens: int = 0) -> range:
        """The numbers of the rows, in the packing of its stage, that a step trains on after passing over tokens of the stream."""
        span = self.at_step(step)
        first = (step - span.first_step) * span.rows_per_batch + span.rows_in(skipped_tokens)
        return range(first, first + span.rows_per_batch)

    def steps_within(self, tokens: int) -> int:
        """How many whole steps so many tokens are enough for."""
        span = self.at_tokens(tokens)
        return span.first_step + (tokens - span.first_token) // span.batch_tokens

    def steps_for(self, tokens: int) -> int:
        """The least number of steps that sees so many tokens."""
        steps = self.steps_within(tokens)
        return steps + (self.tokens_before(steps) < tokens)

    def shares(self, total_tokens: int) -> list[tuple[Span, int]]:
        """The stages that a run of so many tokens reaches, and how many of them each gets."""
        ends = [*(span.first_token for span in self.spans[1:]), total_tokens]
        reached = [(span, min(end, total_tokens) - span.first_token) for span, end in zip(self.spans, ends, strict=True)]
        return [(span, tokens) for span, tokens in reached if tokens > 0]


def lay_out(curriculum: Sequence[Stage], *, seq_len: int, batch_tokens: int) -> Timeline:
    """Place the stages of a curriculum, each with as many rows per batch as its tokens hold; without any, one to the end.

    seq_len, batch_tokens: the run's, which no row is longer than and which stages without a batch of their own take.
    Raises ValueError when stages and borders contradict each other.
    """
    stages = curriculum or (Stage(seq_len=seq_len),)
    spans: list[Span] = []
    step = token = 0
    for number, stage in enumerate(stages, start=1):
        name, border = f"curriculum, stage {number} of {len(stages)} (seq_len {stage.seq_len})", stage.until_tokens
        rows = (stage.batch_tokens or batch_tokens) // stage.seq_len
        if stage.seq_len > seq_len:
            raise ValueError(f"{name}: its rows are longer than the run's seq_len {seq_len}, which is to be that of the longest")
        if number == len(stages):
            if border is not None:
                raise ValueError(f"{name}: the last stage runs to total_tokens; leave out its until_tokens {border:,}")
            return Timeline((*spans, Span(number, stage.seq_len, rows, step, token, None)))
        if border is None:
            raise ValueError(f"{name}: until_tokens is missing; only the last stage runs to the end")
        if border <= token:
            raise ValueError(
                f"{name}: it has no step, because until_tokens {border:,} is not above the {token:,} tokens at which the "
                "stage before it ends; raise it, or leave the stage out"
            )
        steps = -(-(border - token) // (rows * stage.seq_len))
        spans.append(Span(number, stage.seq_len, rows, step, token, step + steps))
        step, token = step + steps, token + steps * spans[-1].batch_tokens
    raise AssertionError("the last stage returns")


def rows_per_micro_batch(rows: int, seq_len: int, micro_batch_tokens: int | None) -> int:
    """The rows of one forward pass: the most that its tokens hold and that divide a batch into equal parts; None: all.

    A smaller last part would be one more shape to compile.
    """
    most = rows if micro_batch_tokens is None else max(1, min(rows, micro_batch_tokens // seq_len))
    return next(part for part in range(most, 0, -1) if rows % part == 0)
