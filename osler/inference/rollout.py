"""What sampling returns and what it refuses, for the engine and the plain loop that it is tested against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from osler.model.config import ModelConfig
from osler.ops.sampling_params import SamplingParams
from osler.runtime.errors import UserError


@dataclass(frozen=True)
class Rollout:
    """Completions without their prompts, one per row; row r belongs to prompt r // samples_per_prompt.

    A completion includes the stop token when one was drawn; ``finished`` is False where the length limit cut it. ``logprobs``
    are those that the tokens were drawn with: at the sampling temperature, over the sampling mask (greedy: temperature 1, whole
    vocabulary). ``packed_masks`` has the sampling masks of each row, packed by ``pack_mask``, uint8 [tokens, V / 8] on the CPU;
    it is None when every token could be drawn.
    """

    completions: list[list[int]]
    logprobs: list[list[float]]
    finished: list[bool]
    packed_masks: list[Tensor] | None = None

    @classmethod
    def empty(cls, rows: int, vocab_size: int, sampling: SamplingParams) -> Rollout:
        """Return a rollout with a place for every row."""
        return cls(
            completions=[[] for _ in range(rows)],
            logprobs=[[] for _ in range(rows)],
            finished=[False] * rows,
            packed_masks=[torch.empty(0)] * rows if sampling.truncates(vocab_size) else None,
        )

    @property
    def num_tokens(self) -> int:
        return sum(len(completion) for completion in self.completions)


def check_prompts(
    config: ModelConfig, prompts: Sequence[Sequence[int]], samples_per_prompt: int, sampling: SamplingParams
) -> None:
    """Raise UserError for what the model cannot continue, naming the prompt and the numbers."""
    if samples_per_prompt < 1:
        raise UserError(f"samples_per_prompt is {samples_per_prompt}: ask for at least one sample.")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"Prompt {index} is empty: give at least one token, for example the end-of-text token.")
        if len(prompt) + sampling.max_new_tokens > config.max_seq_len:
            raise UserError(
                f"Prompt {index} has {len(prompt)} tokens and {sampling.max_new_tokens} new ones were asked for, but the "
                f"model was built for max_seq_len {config.max_seq_len}: shorten the prompt or ask for at most "
                f"{max(config.max_seq_len - len(prompt), 0)} new tokens."
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= config.vocab_size:
            raise UserError(
                f"Prompt {index} contains token id {low if low < 0 else high}, but the model's vocabulary has ids 0 to "
                f"{config.vocab_size - 1}: is this prompt from another tokenizer?"
            )
    for stop in sampling.stop_ids:
        if not 0 <= stop < config.vocab_size:
            raise UserError(f"Stop id {stop} is outside the model's vocabulary (0 to {config.vocab_size - 1}).")
