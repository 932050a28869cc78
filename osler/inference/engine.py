"""Sampling: token ids in, token ids and the log-probabilities they were drawn with out. It knows no tokenizer.

What makes it fast changes nothing that is drawn:

- all rows of a wave decode together against one key/value cache;
- a distinct prompt is run through the model once, and its keys and values are copied to all of its rows;
- rows that have drawn a stop token are flagged on the device; the host looks every ``poll_steps`` steps only, and moves the rows
  that still run to a smaller batch (powers of two) once at least half are done;
- randomness belongs to (seed, row, position) and not to the batch.

The tests compare it with the plain loop in ``recompute.py``. Every call copies the weights that the model has then. Shapes: P
distinct prompts, B rows, R some of the rows, N new tokens, V vocabulary, E bytes of a packed mask.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from osler.model.config import ModelConfig
from osler.model.decoder import Decoder
from osler.model.layers import Layout
from osler.model.transformer import Transformer
from osler.ops.sampling import pack_mask, row_uniform, sample
from osler.ops.sampling_params import SamplingParams
from osler.runtime.errors import UserError

_PREFILL_TOKENS = 16_384  # prompts run through the model this many tokens at a time: bounds the attention mask


@dataclass(frozen=True)
class Rollout:
    """Completions without their prompts, one per row; row r belongs to prompt r // samples_per_prompt.

    A completion includes its stop token; ``finished`` is False where the length limit cut it. ``logprobs`` are those that the
    tokens were drawn with: at the sampling temperature, over the sampling mask (greedy: temperature 1, whole vocabulary).
    ``packed_masks`` are these masks by ``pack_mask``, uint8 [tokens, V / 8] on the CPU; None when every token could be drawn.
    """

    completions: list[list[int]]
    logprobs: list[list[float]]
    finished: list[bool]
    packed_masks: list[Tensor] | None = None


class _Wave:
    """Rows that decode together: what they carry from step to step, on the device.

    Its row k is row ``numbers[k]`` of the rollout. Random numbers belong to the number of a row from ``first_row`` on.
    """

    def __init__(
        self, decoder: Decoder, prompts: Sequence[tuple[int, ...]], sampling: SamplingParams, start: int = 0, first_row: int = 0
    ) -> None:
        """Run each distinct prompt through the model once, give each row its copy and draw each row's first token."""
        self.decoder, self.sampling = decoder, sampling
        self.numbers = list(range(start, start + len(prompts)))
        distinct = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        prompt_B = torch.tensor([distinct[prompt] for prompt in prompts], device=decoder.device)
        width = max(len(prompt) for prompt in prompts)
        self.cache = decoder.new_cache(len(prompts), width + sampling.max_new_tokens - 1)
        chunk = max(_PREFILL_TOKENS // width, 1)
        logits = []
        for first in range(0, len(distinct), chunk):
            filled, logits_PV = decoder.prefill(list(distinct)[first : first + chunk], width)
            row_R = ((prompt_B >= first) & (prompt_B < first + chunk)).nonzero().squeeze(1)
            self.cache.put(row_R, filled, prompt_B[row_R] - first)
            logits.append(logits_PV)
        number_B1 = torch.tensor(self.numbers, device=decoder.device)[:, None] + first_row
        position_BN = self.cache.length_B[:, None] + torch.arange(sampling.max_new_tokens, device=decoder.device)
        self.uniform_BN = row_uniform(sampling.seed, number_B1, position_BN)  # the random number of every token to come
        self.tokens_BN = torch.zeros_like(position_BN)
        self.logprobs_BN = torch.zeros(position_BN.shape, device=decoder.device)
        self.packed_masks_BNE: Tensor | None = None
        if sampling.truncates(decoder.config.vocab_size):
            packed = -(-decoder.config.vocab_size // 8)
            self.packed_masks_BNE = torch.zeros(*position_BN.shape, packed, dtype=torch.uint8, device=decoder.device)
        self.length_B = torch.zeros_like(self.cache.length_B)  # tokens drawn, up to and with the stop token
        self.done_B = torch.zeros_like(self.length_B, dtype=torch.bool)
        self.token_B = self._draw(torch.cat(logits)[prompt_B])  # drawn last, not yet in the cache

    def advance(self) -> None:
        """Feed every row's last token into the cache and draw its next; no host sync."""
        self.token_B = self._draw(self.decoder.step(self.token_B, self.cache))

    def _draw(self, logits_BV: Tensor) -> Tensor:
        """Draw one token per row and store it; finished rows write behind their end."""
        place_B1 = self.length_B[:, None]
        token_B, logp_B, mask_BV = sample(logits_BV, self.uniform_BN.gather(1, place_B1).squeeze(1), self.sampling)
        self.tokens_BN.scatter_(1, place_B1, token_B[:, None])
        self.logprobs_BN.scatter_(1, place_B1, logp_B[:, None])
        if self.packed_masks_BNE is not None and mask_BV is not None:
            packed_B1E = pack_mask(mask_BV)[:, None]
            self.packed_masks_BNE.scatter_(1, place_B1[..., None].expand_as(packed_B1E), packed_B1E)
        self.length_B += ~self.done_B
        for stop in self.sampling.stop_ids:
            self.done_B |= token_B == stop
        return token_B

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.numbers = [self.numbers[row] for row in rows]
        row_R = torch.tensor(rows, device=self.decoder.device)
        self.cache = self.cache.select(row_R)
        for name, tensor in vars(self).items():
            if isinstance(tensor, Tensor):
                setattr(self, name, tensor[row_R])

    def store(self, rollout: Rollout, rows: Sequence[int]) -> None:
        """Store the tokens that these rows have drawn."""
        lengths, done = self.length_B.tolist(), self.done_B.tolist()
        tokens, logprobs = self.tokens_BN.tolist(), self.logprobs_BN.tolist()
        masks = None if self.packed_masks_BNE is None else self.packed_masks_BNE.cpu()
        for row in rows:
            number, length = self.numbers[row], lengths[row]
            rollout.completions[number] = tokens[row][:length]
            rollout.logprobs[number] = logprobs[row][:length]
            rollout.finished[number] = done[row]
            if masks is not None and rollout.packed_masks is not None:
                rollout.packed_masks[number] = masks[row, :length].clone()


class InferenceEngine:
    """Draws completions from ``model``, on its device and in ``dtype`` (default: the model's compute dtype).

    ``max_rows`` bounds the rows decoded at once, and with them the cache; more are done in waves.
    """

    def __init__(
        self, model: Transformer, *, dtype: torch.dtype | None = None, max_rows: int = 256, poll_steps: int = 16
    ) -> None:
        self.model = model
        self.dtype = model.compute_dtype if dtype is None else dtype
        self.max_rows, self.poll_steps = max_rows, poll_steps

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, samples_per_prompt: int = 1, first_row: int = 0
    ) -> Rollout:
        """Draw ``samples_per_prompt`` completions of every prompt; row r belongs to prompt r // samples_per_prompt.

        A row's random numbers belong to its number, which counts from ``first_row`` where a call does a part of a larger one.
        Raises UserError where ``check_prompts`` does.
        """
        check_prompts(self.model.config, prompts, sampling)
        asked = [tuple(prompt) for prompt in prompts for _ in range(samples_per_prompt)]
        masks = [torch.empty(0)] * len(asked) if sampling.truncates(self.model.config.vocab_size) else None
        rollout = Rollout([[]] * len(asked), [[]] * len(asked), [False] * len(asked), masks)
        decoder = Decoder(self.model, Layout(self.dtype, min(self.max_rows, max(len(asked), 1))))
        for start in range(0, len(asked), self.max_rows):
            self._finish(_Wave(decoder, asked[start : start + self.max_rows], sampling, start, first_row), rollout)
        return rollout

    def stream(self, prompt: Sequence[int], sampling: SamplingParams) -> Iterator[int]:
        """Yield one completion's tokens as they are drawn, the stop token included: those that ``generate`` would give."""
        check_prompts(self.model.config, [prompt], sampling)
        # Entered around each step and not around the loop: a generator's caller must not find itself in inference mode.
        with torch.inference_mode():
            wave = _Wave(Decoder(self.model, Layout(self.dtype, 1)), [tuple(prompt)], sampling)
            token = int(wave.token_B)
        yield token
        for _ in range(1, sampling.max_new_tokens):
            if token in sampling.stop_ids:
                return
            with torch.inference_mode():
                wave.advance()
                token = int(wave.token_B)
            yield token

    def _finish(self, wave: _Wave, rollout: Rollout) -> None:
        """Decode the rows of a wave to their end and store them in the rollout."""
        for step in range(1, wave.sampling.max_new_tokens):
            if wave.sampling.stop_ids and step % self.poll_steps == 0:
                running = [row for row, done in enumerate(wave.done_B.tolist()) if not done]
                if not running:
                    break
                size = 1 << (len(running) - 1).bit_length()
                if size < len(wave.numbers):
                    finished = sorted(set(range(len(wave.numbers))) - set(running))
                    wave.store(rollout, finished[size - len(running) :])
                    wave.keep(running + finished[: size - len(running)])
            wave.advance()
        wave.store(rollout, range(len(wave.numbers)))


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> None:
    """Raise UserError for what the model cannot continue, naming the prompt and the numbers."""
    for index, prompt in enumerate(prompts):
        room = config.max_seq_len - len(prompt)
        if not prompt:
            raise UserError(f"Prompt {index} is empty: give at least one token, for example the end-of-text token.")
        if sampling.max_new_tokens > room:
            raise UserError(
                f"Prompt {index} has {len(prompt)} tokens and {sampling.max_new_tokens} new ones were asked for, but the model "
                f"was built for max_seq_len {config.max_seq_len}: shorten the prompt or ask for at most {max(room, 0)} tokens."
            )
        if unknown := [token for token in (min(prompt), max(prompt)) if not 0 <= token < config.vocab_size]:
            raise UserError(
                f"Prompt {index} has token id {unknown[0]}, and the model's vocabulary has ids 0 to {config.vocab_size - 1}; "
                "is this prompt from another tokenizer?"
            )
