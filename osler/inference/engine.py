"""Sampling: token ids go in, and token ids come out with the log-probabilities of their draws. It knows no tokenizer.

What makes it fast does not change what is drawn:

- all rows decode together against one key/value cache, and a row that ends makes room for a prompt that waits (``batch.py``);
- a distinct prompt is run through the model once, and its keys and values are copied to all of its rows;
- the device notices when a row ends, and the host looks only every ``poll_steps`` steps;
- randomness belongs to (seed, row, position) and not to the batch.

The tests compare it with the plain loop in ``recompute.py``.
"""

from collections.abc import Iterator, Sequence

import torch

from osler.inference.batch import Batch
from osler.inference.rows import Capabilities, Continuation, Request, check_request
from osler.model.decoder import Decoder
from osler.model.layers import Layout
from osler.model.transformer import Transformer
from osler.ops.sampling_params import SamplingParams


class InferenceEngine:
    """Draws completions from ``model``, on its device and in ``dtype`` (default: the model's compute dtype).

    ``max_rows`` bounds the rows that decode together, and so the cache; other requests wait. Every call copies the weights.
    """

    def __init__(
        self, model: Transformer, *, dtype: torch.dtype | None = None, max_rows: int = 256, poll_steps: int = 16
    ) -> None:
        self.model = model
        self.dtype = model.compute_dtype if dtype is None else dtype
        self.max_rows, self.poll_steps = max_rows, poll_steps

    def open(
        self,
        slots: int,
        new_tokens: int,
        max_rows: int,
        can: Capabilities,
        *,
        keeps_masks: bool = True,
        join_tokens: int | None = None,
    ) -> Batch:
        """Return an empty batch with a copy of the model's present weights; the other arguments are those of ``Batch``."""
        decoder = Decoder(self.model, Layout(self.dtype, max_rows))
        return Batch(decoder, slots, new_tokens, max_rows, can, keeps_masks=keeps_masks, join_tokens=join_tokens)

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[int, Continuation]]:
        """Yield the index and the completion of every request, in the order in which they end.

        Raises UserError where ``check_request`` does.
        """
        if not requests:
            return
        batch = self.open(
            max(len(request.prompt) + request.sampling.max_new_tokens for request in requests),
            max(request.sampling.max_new_tokens for request in requests),
            min(self.max_rows, len(requests)),
            Capabilities.needed(requests, self.model.config.vocab_size),
        )
        for request in requests:
            batch.add(request)
        while batch:
            batch.step(self.poll_steps)
            yield from batch.collect()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, samples_per_prompt: int = 1, first_row: int = 0
    ) -> list[Continuation]:
        """Draw ``samples_per_prompt`` completions of every prompt; result r (from 0) continues prompt r // samples_per_prompt.

        Result r has the random numbers of row ``first_row`` + r, so several calls can share a larger one and draw the same.
        Raises UserError where ``check_request`` does.
        """
        for index, prompt in enumerate(prompts):
            check_request(self.model.config, Request(tuple(prompt), sampling), f"Prompt {index}")
        rows = [tuple(prompt) for prompt in prompts for _ in range(samples_per_prompt)]
        found = self.complete([Request(prompt, sampling, first_row + row) for row, prompt in enumerate(rows)])
        return [continuation for _, continuation in sorted(found, key=lambda pair: pair[0])]

    def stream(self, prompt: Sequence[int], sampling: SamplingParams) -> Iterator[int]:
        """Yield one completion's tokens as they are drawn, the stop token included; ``generate`` would give the same tokens."""
        request = Request(tuple(prompt), sampling)
        can = Capabilities.needed([request], self.model.config.vocab_size)
        batch = self.open(len(prompt) + sampling.max_new_tokens, sampling.max_new_tokens, 1, can, keeps_masks=False)
        batch.add(request)
        count = 0
        while batch:
            batch.step(count)
            count = 1  # the first token is drawn when the request joins the batch
            for _, continuation in batch.news():
                yield from continuation.ids
            batch.collect()
