"""Sampling engine: token ids in, token ids and the log-probabilities they were drawn with out. It knows no tokenizer.

How it goes fast, each part leaving the result as it is:

- all rows of a wave decode together against one static key/value cache; prompts are padded on the left, so that one
  slot index serves all rows, and carry their true positions, so that nothing else notices the padding;
- a distinct prompt is run through the model once and its keys and values copied to all of its rows;
- rows that have drawn a stop token are flagged on the device; the host looks at the flags every ``poll_steps`` steps
  only, and then moves the rows still alive to a smaller batch (powers of two) once at least half are done;
- randomness belongs to (seed, row, position), not to the batch, so none of the above changes what a row draws.

``recompute.py`` is the plain loop that says the same, and the tests compare the two. There is no state between calls:
the same call gives the same rollout, and the weights are taken over from the model at every call.

Shape legend: P distinct prompts, B rows, T prompt tokens, S cache slots, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from osler.errors import UserError
from osler.inference.decode import Decoder, cache_dtype
from osler.inference.rollout import Rollout, SamplingParams, check_prompts
from osler.model.kv_cache import KVCache
from osler.model.transformer import Transformer
from osler.ops.sampling import pack_mask, row_uniform, sample

_PREFILL_TOKENS = 16_384  # prompts run through the model this many tokens at a time: bounds the attention mask
_COMPILED_READ_SLOTS = 64  # compiled steps read the cache in multiples of this, to be compiled few times


@dataclass
class _Rows:
    """Everything a wave's rows carry from step to step, on the device; rows come first, in the cache second."""

    cache: KVCache
    token_B: Tensor  # drawn last, not yet in the cache
    position_B: Tensor  # of that token in its row
    visible_BS: Tensor  # cache slots that hold a token of the row
    uniform_BN: Tensor  # the random number of every token to come
    tokens_BN: Tensor
    logprobs_BN: Tensor
    mask_BN: Tensor | None  # packed sampling masks, [B, N, V / 8]
    length_B: Tensor  # tokens drawn, up to and with the stop token
    done_B: Tensor

    def select(self, index_B: Tensor, cache: KVCache) -> _Rows:
        """Copy some rows; ``cache`` is theirs already."""
        return _Rows(
            cache=cache,
            token_B=self.token_B[index_B],
            position_B=self.position_B[index_B],
            visible_BS=self.visible_BS[index_B],
            uniform_BN=self.uniform_BN[index_B],
            tokens_BN=self.tokens_BN[index_B],
            logprobs_BN=self.logprobs_BN[index_B],
            mask_BN=None if self.mask_BN is None else self.mask_BN[index_B],
            length_B=self.length_B[index_B],
            done_B=self.done_B[index_B],
        )


class _Collected:
    """Rows that left the device, by their number in the call."""

    def __init__(self, num_rows: int) -> None:
        self.completions: list[list[int]] = [[] for _ in range(num_rows)]
        self.logprobs: list[list[float]] = [[] for _ in range(num_rows)]
        self.finished = [False] * num_rows
        self.packed_masks: list[Tensor] | None = None

    def take(self, rows: _Rows, numbers: Sequence[int], chosen: Sequence[int]) -> None:
        """Store the rows at places ``chosen``; ``numbers`` tells each place's number in the call."""
        lengths, done = rows.length_B.tolist(), rows.done_B.tolist()
        tokens, logprobs = rows.tokens_BN.tolist(), rows.logprobs_BN.tolist()
        keep = None if rows.mask_BN is None else rows.mask_BN.cpu()
        if keep is not None and self.packed_masks is None:
            self.packed_masks = [torch.empty(0)] * len(self.completions)
        for index in chosen:
            number, length = numbers[index], lengths[index]
            self.completions[number] = tokens[index][:length]
            self.logprobs[number] = logprobs[index][:length]
            self.finished[number] = done[index]
            if keep is not None and self.packed_masks is not None:
                self.packed_masks[number] = keep[index, :length].clone()


class InferenceEngine:
    """Draws completions from ``model``, on its device and in ``dtype`` (the model's compute dtype unless given).

    ``max_rows`` bounds the rows decoded at once (and with them the cache); more are done in waves. ``compile`` runs the
    decode step through torch.compile, at tens of seconds for every new batch size. On a CPU that made it slower: the
    compiler takes the small matmuls of attention apart (2 cores, 64 rows, 4 layers x 128: a quarter of the tokens/s).
    """

    def __init__(
        self,
        model: Transformer,
        *,
        dtype: torch.dtype | None = None,
        max_rows: int = 256,
        poll_steps: int = 16,
        compile: bool = False,
    ) -> None:
        if max_rows < 1 or poll_steps < 1:
            raise UserError(f"max_rows is {max_rows} and poll_steps {poll_steps}: both must be at least 1.")
        self.model = model
        self.dtype = model.compute_dtype if dtype is None else dtype
        self.max_rows, self.poll_steps = max_rows, poll_steps
        self._compile = compile
        self._step = torch.compile(self._decode, dynamic=False) if compile else self._decode
        self._decoder: Decoder | None = None
        self._counter = torch.empty(0, dtype=torch.int64)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples_per_prompt: int = 1,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_ids: Sequence[int] = (),
        seed: int = 0,
        first_row: int = 0,
    ) -> Rollout:
        """Draw ``samples_per_prompt`` completions of every prompt; row r belongs to prompt r // samples_per_prompt.

        Settings are those of :class:`SamplingParams`. Raises UserError for an empty prompt, ids outside
        the vocabulary, and prompts that with ``max_new_tokens`` exceed the model's ``max_seq_len``.
        """
        sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p, tuple(stop_ids), seed, first_row)
        check_prompts(self.model.config, prompts, samples_per_prompt, sampling)
        collected = _Collected(len(prompts) * samples_per_prompt)
        numbers = range(len(prompts) * samples_per_prompt)
        self._take_weights(min(self.max_rows, max(len(numbers), 1)))
        for start in range(0, len(numbers), self.max_rows):
            wave = numbers[start : start + self.max_rows]
            self._run(wave, [tuple(prompts[number // samples_per_prompt]) for number in wave], sampling, collected)
        return Rollout(
            completions=collected.completions,
            logprobs=collected.logprobs,
            finished=collected.finished,
            vocab_size=self.model.config.vocab_size,
            packed_masks=collected.packed_masks,
        )

    def release(self) -> None:
        """Let go of the copy of the weights, which the next call would make anew."""
        self._decoder = None

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_ids: Sequence[int] = (),
        seed: int = 0,
    ) -> Iterator[int]:
        """Yield one completion's tokens as they are drawn, the stop token included: those ``generate`` would give."""
        sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p, tuple(stop_ids), seed)
        check_prompts(self.model.config, [prompt], 1, sampling)
        # Entered around each step and not around the loop: a generator's caller must not find itself in inference mode.
        with torch.inference_mode():
            self._take_weights(1)
            rows = self._prefill([0], [tuple(prompt)], sampling)
            token = int(rows.token_B)
        yield token
        for step in range(1, max_new_tokens):
            if token in sampling.stop_ids:
                return
            with torch.inference_mode():
                self._advance(rows, sampling, len(prompt) + step - 1, step)
                token = int(rows.token_B)
            yield token

    def _take_weights(self, rows: int) -> None:
        """Lay the model's present weights out for decoding."""
        if self._compile and self._decoder is not None and self._counter.device == self.device:
            self._decoder.load(self.model)
            return
        self._decoder = Decoder(self.model, dtype=self.dtype, rows=rows, pack=not self._compile)
        self._counter = torch.arange(self.model.config.max_seq_len, device=self.device)

    def _run(self, wave: Sequence[int], prompts: list[tuple[int, ...]], sampling: SamplingParams, collected: _Collected) -> None:
        """Decode one wave to its end; ``wave`` holds its rows' numbers in the call."""
        rows, numbers = self._prefill(wave, prompts, sampling), list(wave)
        prompt_slots = max(len(prompt) for prompt in prompts)
        for step in range(1, sampling.max_new_tokens):
            slot = prompt_slots + step - 1
            if sampling.stop_ids and step % self.poll_steps == 0:
                alive = [index for index, done in enumerate(rows.done_B.tolist()) if not done]
                if not alive:
                    break
                size = 1 << (len(alive) - 1).bit_length()
                if size < len(numbers):
                    rows, numbers = self._compact(rows, numbers, alive, size, slot, collected)
            self._advance(rows, sampling, slot, step)
        collected.take(rows, numbers, range(len(numbers)))

    def _prefill(self, numbers: Sequence[int], prompts: list[tuple[int, ...]], sampling: SamplingParams) -> _Rows:
        """Run each distinct prompt through the model once, give each row its copy and draw each row's first token."""
        config, device = self.model.config, self.device
        distinct = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        prompt_B = torch.tensor([distinct[prompt] for prompt in prompts], device=device)
        width = max(len(prompt) for prompt in prompts)
        slots = width + sampling.max_new_tokens - 1
        cache = KVCache(config, len(prompts), slots, cache_dtype(device, self.dtype), device)
        chunk = max(_PREFILL_TOKENS // width, 1)
        logits = []
        for start in range(0, len(distinct), chunk):
            computed, logits_PV = self._prefill_chunk(list(distinct)[start : start + chunk], width)
            row_B = ((prompt_B >= start) & (prompt_B < start + chunk)).nonzero().squeeze(1)
            cache.k[:, row_B, :, :width] = computed.k[:, prompt_B[row_B] - start].to(cache.k.dtype)
            cache.v[:, row_B, :, :width] = computed.v[:, prompt_B[row_B] - start].to(cache.v.dtype)
            logits.append(logits_PV)
        length_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
        new_N = torch.arange(sampling.max_new_tokens, device=device)
        slot_S = torch.arange(slots, device=device)
        row_B1 = sampling.first_row + torch.tensor(numbers, device=device)[:, None]
        shape_BN = (len(prompts), sampling.max_new_tokens)
        rows = _Rows(
            cache=cache,
            token_B=torch.zeros_like(length_B),
            position_B=length_B - 1,
            visible_BS=(slot_S >= width - length_B[:, None]) & (slot_S < width),
            uniform_BN=row_uniform(sampling.seed, row_B1, length_B[:, None] + new_N),
            tokens_BN=torch.zeros(shape_BN, dtype=torch.int64, device=device),
            logprobs_BN=torch.zeros(shape_BN, device=device),
            mask_BN=None,
            length_B=torch.zeros_like(length_B),
            done_B=torch.zeros_like(length_B, dtype=torch.bool),
        )
        if sampling.truncates(config.vocab_size):
            rows.mask_BN = torch.zeros(*shape_BN, -(-config.vocab_size // 8), dtype=torch.uint8, device=device)
        self._draw(rows, torch.cat(logits)[prompt_B], sampling, self._counter[:1])
        return rows

    def _prefill_chunk(self, prompts: Sequence[Sequence[int]], width: int) -> tuple[KVCache, Tensor]:
        """Keys and values of some prompts, padded on the left to ``width``, and the logits after their last tokens."""
        device = self.device
        pads = [width - len(prompt) for prompt in prompts]
        padded = [[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
        ids_PT = torch.tensor(padded, device=device)
        slot_T = torch.arange(width, device=device)
        pad_P1 = torch.tensor(pads, device=device)[:, None]
        visible_PTS = None
        if any(pads):
            # A padded query sees itself, or its softmax would be over nothing and its NaN would reach the values.
            own_TS = torch.eye(width, dtype=torch.bool, device=device)
            visible_PTS = (slot_T[:, None] >= slot_T) & (slot_T >= pad_P1)[:, None] | own_TS
        cache = KVCache(self.model.config, len(prompts), width, self.dtype, device)
        positions_PT = (slot_T - pad_P1).clamp_min(0)
        assert self._decoder is not None, "generate lays the weights out first"
        return cache, self._decoder.prefill(ids_PT, positions_PT, visible_PTS, cache)

    def _compact(
        self, rows: _Rows, numbers: list[int], alive: list[int], size: int, filled: int, collected: _Collected
    ) -> tuple[_Rows, list[int]]:
        """Keep the rows alive and as many finished ones as fill up ``size``; collect the others."""
        finished = sorted(set(range(len(numbers))) - set(alive))
        fill = size - len(alive)
        stay = alive + finished[:fill]
        collected.take(rows, numbers, finished[fill:])
        index_B = torch.tensor(stay, device=self.device)
        cache = KVCache(self.model.config, size, rows.visible_BS.shape[1], rows.cache.k.dtype, self.device)
        cache.k[:, :, :, :filled] = rows.cache.k[:, index_B, :, :filled]
        cache.v[:, :, :, :filled] = rows.cache.v[:, index_B, :, :filled]
        return rows.select(index_B, cache), [numbers[index] for index in stay]

    def _advance(self, rows: _Rows, sampling: SamplingParams, slot: int, step: int) -> None:
        """Feed every row's last token into cache slot ``slot`` and draw its next, number ``step``; no host sync."""
        multiple = _COMPILED_READ_SLOTS if self._compile else 1
        rows.cache.read_len = min(-(-(slot + 1) // multiple) * multiple, rows.visible_BS.shape[1])
        with torch._dynamo.config.patch(recompile_limit=64) if self._compile else nullcontext():
            self._step(rows, sampling, self._counter[slot : slot + 1], self._counter[step : step + 1])

    def _decode(self, rows: _Rows, sampling: SamplingParams, slot_T: Tensor, step_T: Tensor) -> None:
        assert self._decoder is not None, "generate lays the weights out first"
        rows.visible_BS.index_fill_(1, slot_T, True)
        visible_BS = rows.visible_BS[:, : rows.cache.read_len]
        logits_BV = self._decoder.step(rows.token_B, rows.position_B, slot_T, visible_BS, rows.cache)
        self._draw(rows, logits_BV, sampling, step_T)

    def _draw(self, rows: _Rows, logits_BV: Tensor, sampling: SamplingParams, step_T: Tensor) -> None:
        """Draw one token per row and note it, in place."""
        uniform_B = rows.uniform_BN.index_select(1, step_T).squeeze(1)
        token_B, logp_B, mask_BV = sample(
            logits_BV, uniform_B, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
        )
        rows.token_B.copy_(token_B)
        rows.position_B += 1
        rows.tokens_BN.index_copy_(1, step_T, token_B[:, None])
        rows.logprobs_BN.index_copy_(1, step_T, logp_B[:, None])
        if rows.mask_BN is not None and mask_BV is not None:
            rows.mask_BN.index_copy_(1, step_T, pack_mask(mask_BV)[:, None])
        rows.length_B += ~rows.done_B
        for stop in sampling.stop_ids:
            rows.done_B |= token_B == stop
