"""The state of rows that are sampled together, on the device: what was drawn, what they may still draw, and when they end.

The first dimension of every tensor is the row. Shapes: B rows, R some of them, N new tokens, K stop tokens, A alternatives, V
vocabulary, E bytes of a packed mask.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from osler.model.config import ModelConfig
from osler.ops.sampling import RowSampling, pack_mask, row_uniform, sample
from osler.ops.sampling_params import SamplingParams
from osler.runtime.errors import UserError

logger = logging.getLogger(__name__)

TOLERATED = 1.25  # rows up to this many times as long as in training give no warning: a few answers exceed all that were learned


class Request(NamedTuple):
    """A prompt to continue; its random numbers belong to ``number``."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    number: int = 0


@dataclass(frozen=True)
class Continuation:
    """What was drawn after a prompt, the stop token included; ``finished`` is False where the length limit cut it.

    ``logprobs`` are those that the tokens were drawn with: at the sampling temperature, over the sampling mask (greedy: at
    temperature 1, over the vocabulary). ``packed_masks`` are these masks by ``pack_mask``, uint8 [tokens, E] on the CPU; None
    when every token could be drawn, or masks are not kept. ``top_logprobs`` has for each token the likeliest tokens in its
    place, with log-probabilities.
    """

    ids: list[int]
    logprobs: list[float]
    finished: bool
    packed_masks: Tensor | None = None
    top_logprobs: list[dict[int, float]] = field(default_factory=list)


class Capabilities(NamedTuple):
    """What the requests of a batch may ask for; ``stop_ids`` and ``top_logprobs`` are the most that any request has."""

    stop_ids: int = 0
    truncates: bool = False
    penalises: bool = False
    top_logprobs: int = 0

    def cover(self, other: Capabilities) -> bool:
        """Return whether this is enough for requests that need ``other``."""
        return all(own >= asked for own, asked in zip(self, other, strict=True))

    @classmethod
    def needed(cls, requests: Sequence[Request], vocab_size: int) -> Capabilities:
        """Return what these requests ask for."""
        each = {request.sampling for request in requests}
        return cls(
            max((len(sampling.stop_ids) for sampling in each), default=0),
            any(sampling.truncates(vocab_size) for sampling in each),
            any(sampling.repetition_penalty != 1 for sampling in each),
            max((min(sampling.top_logprobs, vocab_size) for sampling in each), default=0),
        )


def check_prompt(config: ModelConfig, prompt: Sequence[int], name: str = "The prompt") -> None:
    """Raise UserError for a prompt that is empty or has other token ids than the model, naming the prompt and the number."""
    if not prompt:
        raise UserError(f"{name} is empty: give at least one token, for example the end-of-text token.")
    if unknown := [token for token in (min(prompt), max(prompt)) if not 0 <= token < config.vocab_size]:
        raise UserError(
            f"{name} has token id {unknown[0]}, and the model's vocabulary has ids 0 to {config.vocab_size - 1}; "
            "is this prompt from another tokenizer?"
        )


def check_request(config: ModelConfig, request: Request, name: str = "The prompt") -> None:
    """Raise UserError for what the model cannot continue, naming the prompt and the numbers."""
    prompt, new_tokens = request.prompt, request.sampling.max_new_tokens
    check_prompt(config, prompt, name)
    if (largest := max((token for token, _ in request.sampling.logit_bias), default=0)) >= config.vocab_size:
        raise UserError(f"logit_bias has token id {largest}, and the model's vocabulary has ids 0 to {config.vocab_size - 1}.")
    room = config.max_seq_len - len(prompt)
    if new_tokens > room:
        asked = f" and {new_tokens} new ones were asked for" if room > 0 else ""
        less = f", ask for at most {room} tokens" if room > 0 else f" to less than {config.max_seq_len} tokens"
        raise UserError(
            f"{name} has {len(prompt)} tokens{asked}, but the model was built for max_seq_len {config.max_seq_len}: "
            f"shorten it{less}, or train the model on longer rows with `osler pretrain init_from=RUN seq_len=... "
            "context.max_seq_len=...`."
        )


@dataclass
class _Lengths:
    """How many rows a process has read, how many were longer than in training, and whether it has warned of them."""

    rows: int = 0
    longer: int = 0
    has_warned: bool = False


@cache
def _lengths_read(trained_seq_len: int) -> _Lengths:  # cached, so one record per length of training
    return _Lengths()


def warn_of_untrained(trained_seq_len: int, length: int) -> None:
    """Count a row, and warn once in a process when it is longer than ``TOLERATED`` times what a model was trained on."""
    lengths = _lengths_read(trained_seq_len)
    lengths.rows += 1
    lengths.longer += length > trained_seq_len
    if length > TOLERATED * trained_seq_len and not lengths.has_warned:
        lengths.has_warned = True
        logger.warning(
            f"The model was trained on rows of at most {trained_seq_len:,} tokens and reads one of {length:,} now "
            f"({lengths.longer:,} of {lengths.rows:,} rows so far were longer than in training). It never learned positions so "
            f"far behind that, and its words there may mean little. Stay near {trained_seq_len:,} tokens, or train it on longer "
            "rows first: `osler pretrain init_from=RUN seq_len=... context.max_seq_len=...`."
        )


class Rows:
    """Rows that draw at most ``new_tokens`` tokens each; none runs before ``begin``."""

    def __init__(
        self,
        rows: int,
        new_tokens: int,
        can: Capabilities,
        vocab_size: int,
        device: torch.device,
        *,
        mask_places: int,
    ) -> None:
        """Rows keep their sampling masks, which are large, for their first ``mask_places`` tokens alone."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        self.vocab_size = vocab_size
        places = new_tokens + 1  # one more, because finished rows write after their end
        self.token_B = zeros()  # the token drawn last, which is not yet in the cache
        self.running_B = zeros(dtype=torch.bool)
        self.drawn_B, self.limit_B, self.stop_BK = zeros(), zeros(), zeros(can.stop_ids)
        self.uniform_BN = zeros(places, dtype=torch.float64)  # the random number of every token to come
        self.tokens_BN, self.logprobs_BN = zeros(places), zeros(places, dtype=torch.float32)
        self.masks_BNE = zeros(mask_places, -(-vocab_size // 8), dtype=torch.uint8) if can.truncates and mask_places else None
        self.seen_BV = zeros(vocab_size, dtype=torch.bool) if can.penalises else None
        self.top_ids_BNA = zeros(places, can.top_logprobs)
        self.top_logprobs_BNA = zeros(places, can.top_logprobs, dtype=torch.float32)

    def begin(self, requests: Sequence[Request]) -> None:
        """Prepare every row for the first token of its request."""
        device = self.token_B.device
        self.running_B.fill_(True)
        self.limit_B.copy_(torch.tensor([request.sampling.max_new_tokens for request in requests]))
        stops = [request.sampling.stop_ids for request in requests]
        self.stop_BK.copy_(torch.tensor([[*ids, *[-1] * (self.stop_BK.shape[1] - len(ids))] for ids in stops]))
        number_B1 = torch.tensor([[request.number] for request in requests], device=device)
        length_B1 = torch.tensor([[len(request.prompt)] for request in requests], device=device)
        position_BN = length_B1 + torch.arange(self.tokens_BN.shape[1], device=device)
        seeds = [request.sampling.seed for request in requests]
        for seed in set(seeds):
            own_R = torch.tensor([row for row, other in enumerate(seeds) if other == seed], device=device)
            self.uniform_BN[own_R] = row_uniform(seed, number_B1[own_R], position_BN[own_R])
        if self.seen_BV is not None:
            for row, request in enumerate(requests):
                self.seen_BV[row, torch.tensor(request.prompt, device=device)] = True

    def put(self, row_R: Tensor, other: Rows, from_R: Tensor) -> None:
        """Overwrite the rows ``row_R`` with the rows ``from_R`` of ``other``, which may have fewer places."""
        for name, own in vars(self).items():
            if isinstance(own, Tensor):
                new = getattr(other, name)[from_R]
                own[(row_R,) if new.ndim == 1 else (row_R, slice(new.shape[1]))] = new

    def draw(self, logits_BV: Tensor, sampling: RowSampling) -> None:
        """Draw one token for every row and store it; no host sync."""
        place_B1 = self.drawn_B[:, None]
        count_BV = self._counts(logits_BV) if sampling.counts else None
        drawn = sample(logits_BV, self.uniform_BN.gather(1, place_B1).squeeze(1), sampling, self.seen_BV, count_BV)
        self.token_B = drawn.token_B
        token_B1 = drawn.token_B[:, None]
        self.tokens_BN.scatter_(1, place_B1, token_B1)
        self.logprobs_BN.scatter_(1, place_B1, drawn.logp_B[:, None])
        if self.masks_BNE is not None and drawn.mask_BV is not None:
            _store(self.masks_BNE, place_B1, pack_mask(drawn.mask_BV))
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, token_B1, True)
        if count := sampling.top_logprobs:
            top_BA, index_BA = drawn.scaled_BV.topk(count, dim=-1)
            _store(self.top_ids_BNA[..., :count], place_B1, index_BA)
            _store(self.top_logprobs_BNA[..., :count], place_B1, top_BA - drawn.scaled_BV.logsumexp(-1, keepdim=True))
        self.drawn_B += self.running_B
        self.running_B = self.running_B & (self.drawn_B < self.limit_B) & (token_B1 != self.stop_BK).all(-1)

    def _counts(self, logits_BV: Tensor) -> Tensor:
        """Return how often each token was drawn, [B, V] like the logits."""
        is_drawn_BN = torch.arange(self.tokens_BN.shape[1], device=self.token_B.device) < self.drawn_B[:, None]
        return torch.zeros_like(logits_BV).scatter_add_(1, self.tokens_BN, is_drawn_BN.to(logits_BV.dtype))

    def continuations(self, row_R: Tensor, requests: Sequence[Request], starts: Sequence[int]) -> list[Continuation]:
        """Return what the requests of some rows have drawn, each from the token ``starts`` on; this waits for the device."""
        drawn = self.drawn_B[row_R].tolist()
        counts = [count - start for count, start in zip(drawn, starts, strict=True)]
        place_RN = torch.tensor(starts, device=row_R.device)[:, None] + torch.arange(max(counts), device=row_R.device)
        at = row_R[:, None], place_RN.clamp_max(self.tokens_BN.shape[1] - 1)
        tokens, logprobs = self.tokens_BN[at].tolist(), self.logprobs_BN[at].tolist()
        masks = None if self.masks_BNE is None else self.masks_BNE[at].cpu()
        top = self._alternatives(at, requests)
        found = []
        for row, (count, request) in enumerate(zip(counts, requests, strict=True)):
            ids, sampling = tokens[row][:count], request.sampling
            mask = masks[row, :count].clone() if masks is not None and sampling.truncates(self.vocab_size) else None
            is_finished = bool(ids) and ids[-1] in sampling.stop_ids
            found.append(Continuation(ids, logprobs[row][:count], is_finished, mask, top[row][:count]))
        return found

    def _alternatives(self, at: tuple[Tensor, Tensor], requests: Sequence[Request]) -> list[list[dict[int, float]]]:
        """Return the likeliest tokens at some places of each request's row, as many as it asks for."""
        counts = [request.sampling.top_logprobs for request in requests]
        if not any(counts):
            return [[] for _ in requests]
        ids, logprobs = self.top_ids_BNA[at].tolist(), self.top_logprobs_BNA[at].tolist()
        return [
            [dict(zip(place[:count], values[:count], strict=True)) for place, values in zip(*own, strict=True)] if count else []
            for count, own in zip(counts, zip(ids, logprobs, strict=True), strict=True)
        ]


def _store(values_BNX: Tensor, place_B1: Tensor, new_BX: Tensor) -> None:
    values_BNX.scatter_(1, place_B1[..., None].expand(-1, 1, new_BX.shape[-1]), new_BX[:, None])
