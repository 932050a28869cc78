"""A run's steps, tokens, row lengths and batch sizes as functions of one another. Torch-free; there is no state to resume.

A curriculum trains on short rows before long ones, which keeps training stable at large batches and learning rates (Li et al.
2022, arXiv 2108.06084). A stage ends with the first step that reaches its `until_tokens`, so no step mixes two lengths. Stages
follow one another in the stream of tokens, so that a change of length neither repeats nor drops a token. Trainer, loader and
plans use the same `Timeline`.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from osler.data.config import CurriculumStage
from osler.runtime.errors import UserError


@dataclass(frozen=True)
class Span:
    """A stage with its place: steps `first_step` to `end_step` - 1 (None: no end), from token `first_token` of the run on."""

    number: int  # 1, 2, ...
    seq_len: int
    rows_per_batch: int
    first_step: int
    first_token: int
    end_step: int | None

    @property
    def batch_tokens(self) -> int:
        """Return the number of tokens in one step."""
        return self.rows_per_batch * self.seq_len

    @property
    def num_rows(self) -> int:
        """Return how many rows the stage has; 0 for the last one, which has no end."""
        return 0 if self.end_step is None else (self.end_step - self.first_step) * self.rows_per_batch


@dataclass(frozen=True)
class Timeline:
    """The stages of a run, one after another; steps count from 0."""

    spans: tuple[Span, ...]

    def at_step(self, step: int) -> Span:
        """Return the stage that a step belongs to."""
        return self.spans[bisect_right(self.spans, step, key=lambda span: span.first_step) - 1]

    def tokens_before(self, step: int) -> int:
        """Return how many tokens are seen before a step."""
        span = self.at_step(step)
        return span.first_token + (step - span.first_step) * span.batch_tokens

    def rows_at(self, step: int) -> range:
        """Return the numbers of a step's rows in the packing of its stage."""
        span = self.at_step(step)
        first = (step - span.first_step) * span.rows_per_batch
        return range(first, first + span.rows_per_batch)

    def steps_within(self, tokens: int) -> int:
        """Return how many whole steps this number of tokens is enough for."""
        span = self.spans[bisect_right(self.spans, tokens, key=lambda span: span.first_token) - 1]
        return span.first_step + (tokens - span.first_token) // span.batch_tokens

    def steps_for(self, tokens: int) -> int:
        """Return the smallest number of steps that sees this number of tokens."""
        steps = self.steps_within(tokens)
        return steps if self.tokens_before(steps) >= tokens else steps + 1

    def shares(self, total_tokens: int) -> list[tuple[Span, int]]:
        """Return the stages that a run of this length reaches, with the number of tokens that each gets."""
        ends = [*(span.first_token for span in self.spans[1:]), total_tokens]
        reached = [(span, min(end, total_tokens) - span.first_token) for span, end in zip(self.spans, ends, strict=True)]
        return [(span, tokens) for span, tokens in reached if tokens > 0]


def lay_out(curriculum: Sequence[CurriculumStage], *, seq_len: int, batch_tokens: int) -> Timeline:
    """Return the timeline of a curriculum; without stages it is one stage to the end of the run.

    `seq_len` is the run's longest row, `batch_tokens` the batch of stages that name none. Raises ValueError when stages clash.
    """
    stages = curriculum or (CurriculumStage(seq_len=seq_len),)
    spans: list[Span] = []
    step = token = 0
    for number, stage in enumerate(stages, start=1):
        name, border = f"curriculum, stage {number} of {len(stages)} (seq_len {stage.seq_len})", stage.until_tokens
        rows = (stage.batch_tokens or batch_tokens) // stage.seq_len
        if stage.seq_len > seq_len:
            raise ValueError(f"{name}: its rows are longer than the run's seq_len {seq_len}; raise it to the longest of them")
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


def check_shares(timeline: Timeline, world_size: int) -> None:
    """Raise UserError when the ranks cannot share the rows of a batch equally."""
    for span in timeline.spans:
        rows = span.rows_per_batch
        if rows < 1 or rows % world_size:
            batch = f"Stage {span.number} of the curriculum: a batch" if len(timeline.spans) > 1 else "A batch"
            raise UserError(
                f"{batch} of {rows} rows (of {span.seq_len} tokens) cannot be shared equally by {world_size} ranks; make the "
                f"number of rows a multiple of {world_size}."
            )


def rows_per_micro_batch(rows: int, seq_len: int, micro_batch_tokens: int | None) -> int:
    """Return the rows of one forward pass: the most that divide the batch equally within `micro_batch_tokens` (None: no limit).

    It is one row at least. A smaller last pass would be one more shape to compile.
    """
    most = rows if micro_batch_tokens is None else max(1, min(rows, micro_batch_tokens // seq_len))
    return next(part for part in range(most, 0, -1) if rows % part == 0)
