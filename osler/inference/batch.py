"""Rows that decode together: requests join and leave while others run, and no row notices which others share its batch.

Every row has its own position in the key/value cache, its own sampling parameters and its own random numbers, which belong to
(seed, row number, position). The cache keeps a finished row until its place is needed. A prompt that begins with the same
tokens starts from that row, for example the next turn of a conversation, or an exam with worked examples. The host looks at
the rows only in ``collect`` and ``news``; no step waits for the device. Shapes: P prompts, R some rows.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

import torch
from torch import Tensor

from osler.inference.rows import Capabilities, Continuation, Request, Rows, check_request, warn_of_untrained
from osler.model.decoder import Decoder
from osler.model.kv_cache import KVCache
from osler.ops.sampling import RowSampling
from osler.ops.sampling_params import SamplingParams

_PREFILL_TOKENS = 16_384  # tokens of prompts that run through the model at a time
_WORTH_SHARING = 16  # a prompt starts from a row that has at least this many of its tokens, and at least half of them

Prompt = tuple[int, ...]


@dataclass
class _Place:
    """What the host knows of a row."""

    number: int = -1
    request: Request | None = None  # None: the row is free
    drawn: int = 0  # an upper bound of the tokens drawn, exact after ``collect``
    tokens: Prompt = ()  # tokens in the cache: of a running row its prompt, of a finished one all but the last
    returned: int = 0  # tokens that ``news`` has returned


class Batch:
    """At most ``max_rows`` rows of at most ``slots`` tokens, of which at most ``new_tokens`` are drawn; other requests wait.

    The batch grows when requests wait. When none waits, it shrinks to the smallest power of two that holds the running rows.
    Sampling masks, which are large, are kept for training; without ``keeps_masks`` no completion has them. Running rows wait
    while others join. So prompts of at most ``join_tokens`` in all (None: any) join at a step, or one prompt that is longer.
    """

    def __init__(
        self,
        decoder: Decoder,
        slots: int,
        new_tokens: int,
        max_rows: int,
        can: Capabilities,
        *,
        keeps_masks: bool = True,
        join_tokens: int | None = None,
    ) -> None:
        self.decoder, self.slots, self.new_tokens, self.max_rows, self.can = decoder, slots, new_tokens, max_rows, can
        self._mask_places, self._join_tokens = new_tokens + 1 if keeps_masks else 0, join_tokens
        self._waiting: deque[tuple[int, Request]] = deque()
        self._num_added = 0
        self._places: list[_Place] = []
        self._cache: KVCache  # cache and rows are made for the first request
        self._rows: Rows

    def __bool__(self) -> bool:
        """Return whether there is a request that was not collected."""
        return bool(self._waiting) or any(place.request is not None for place in self._places)

    @property
    def may_draw(self) -> bool:
        """Whether a step may draw a token, as far as the host knows: not when all rows have as many as they may have."""
        running = ((place.drawn, place.request) for place in self._places)
        return bool(self._waiting) or any(request and drawn < request.sampling.max_new_tokens for drawn, request in running)

    def add(self, request: Request) -> int:
        """Let a request wait for a row; return the number under which ``collect`` returns what was drawn for it.

        Raises UserError where ``check_request`` does, and ValueError when the batch was not made for such requests.
        """
        check_request(self.decoder.config, request)
        new_tokens = request.sampling.max_new_tokens
        needed = Capabilities.needed([request], self.decoder.config.vocab_size)
        if new_tokens > self.new_tokens or len(request.prompt) + new_tokens > self.slots or not self.can.cover(needed):
            raise ValueError(
                f"{len(request.prompt)} + {new_tokens} tokens with {needed}: the batch has {self.slots} slots, draws "
                f"{self.new_tokens} and has {self.can}"
            )
        self._waiting.append((self._num_added, request))
        self._num_added += 1
        return self._num_added - 1

    @torch.inference_mode()
    def step(self, count: int = 1) -> None:
        """Let waiting requests join, each with its first token, and then draw up to ``count`` more for every row that runs."""
        self._join()
        left = max((place.request.sampling.max_new_tokens - place.drawn for place in self._places if place.request), default=0)
        for _ in range(min(count, left)):
            self._rows.draw(self.decoder.step(self._rows.token_B, self._cache, self._rows.running_B), self._sampling)
        for place in self._places:
            place.drawn += min(count, left)

    def news(self) -> list[tuple[int, Continuation]]:
        """Return what each request that has a row drew since the last call; this waits for the device.

        What was drawn between the last call and ``collect`` is in the completion alone.
        """
        busy = [row for row, place in enumerate(self._places) if place.request is not None]
        places = [self._places[row] for row in busy]
        found = self._continuations(busy, [place.returned for place in places]) if busy else []
        for place, continuation in zip(places, found, strict=True):
            place.returned += len(continuation.ids)
        return [(place.number, continuation) for place, continuation in zip(places, found, strict=True)]

    @torch.inference_mode()
    def cancel(self, number: int) -> None:
        """Draw no more for a request. If it has a row, ``collect`` returns what was drawn as a completion that was cut."""
        self._waiting = deque(pair for pair in self._waiting if pair[0] != number)
        for row, place in enumerate(self._places):
            if place.request is not None and place.number == number:
                self._rows.running_B[row] = False

    @torch.inference_mode()
    def collect(self) -> list[tuple[int, Continuation]]:
        """Return the numbers and completions of the requests that have ended, and free their rows; this waits for the device."""
        if not self._places:
            return []
        running, drawn = self._rows.running_B.tolist(), self._rows.drawn_B.tolist()
        for row, place in enumerate(self._places):
            place.drawn = drawn[row]
        ended = [row for row, place in enumerate(self._places) if place.request is not None and not running[row]]
        if not ended:
            return []
        places = [self._places[row] for row in ended]
        found = self._continuations(ended, [0] * len(ended))
        for place, continuation in zip(places, found, strict=True):
            place.tokens, place.request = (*place.tokens, *continuation.ids[:-1]), None  # the last token is in no cache
            warn_of_untrained(self.decoder.usable_seq_len, len(place.tokens))
        self._shrink()
        return [(place.number, continuation) for place, continuation in zip(places, found, strict=True)]

    def _continuations(self, rows: Sequence[int], starts: Sequence[int]) -> list[Continuation]:
        requests = [place.request for place in (self._places[row] for row in rows) if place.request is not None]
        return self._rows.continuations(torch.tensor(rows, device=self.decoder.device), requests, starts)

    def _shrink(self) -> None:
        """Let attention read only as far as running rows need, and shrink to a power of two if nothing waits."""
        busy = [row for row, place in enumerate(self._places) if place.request is not None]
        self._cache.filled = max((len(self._places[row].tokens) + self._places[row].drawn - 1 for row in busy), default=0)
        size = 1 << max(len(busy) - 1, 0).bit_length()
        if busy and size < len(self._places) and not self._waiting:
            free = [row for row, place in enumerate(self._places) if place.request is None]
            self._resize([*busy, *free[: size - len(busy)]], size)

    def _resize(self, keep: Sequence[int], size: int) -> None:
        """Move the rows ``keep`` to the front of new tensors for ``size`` rows."""
        decoder, device = self.decoder, self.decoder.device
        cache = decoder.new_cache(size, self.slots)
        rows = Rows(size, self.new_tokens, self.can, decoder.config.vocab_size, device, mask_places=self._mask_places)
        if keep:
            from_R, to_R = torch.tensor(keep, device=device), torch.arange(len(keep), device=device)
            cache.put(to_R, self._cache, from_R)
            rows.put(to_R, self._rows, from_R)
        self._places = [*(self._places[row] for row in keep), *(_Place() for _ in range(size - len(keep)))]
        self._cache, self._rows = cache, rows
        self._collect_sampling()

    def _collect_sampling(self) -> None:
        """Note the sampling parameters of all rows; a free row takes those of another, so that it asks for nothing of its own."""
        given = [place.request.sampling if place.request else None for place in self._places]
        some = next((sampling for sampling in given if sampling), SamplingParams())
        self._sampling = self._sampling_of([sampling or some for sampling in given])

    def _sampling_of(self, rows: Sequence[SamplingParams]) -> RowSampling:
        return RowSampling.of(rows, self.decoder.config.vocab_size, self.decoder.device)

    def _join(self) -> None:
        """Give rows to waiting requests: run their prompts through the model and draw their first tokens."""
        busy, size = sum(place.request is not None for place in self._places), len(self._places)
        wanted = min(busy + len(self._waiting), self.max_rows)
        if wanted > size:
            self._resize(range(size), max(wanted, min(2 * size, self.max_rows)))
        free = [row for row, place in enumerate(self._places) if place.request is None]
        free = free[: self._count_joining(len(free))]
        if not free:
            return
        joining = [self._waiting.popleft() for _ in free]
        requests = [request for _, request in joining]
        device, vocab_size = self.decoder.device, self.decoder.config.vocab_size
        indices: dict[Prompt, list[int]] = {}  # where each prompt is in ``requests``
        for index, request in enumerate(requests):
            indices.setdefault(request.prompt, []).append(index)
        row_R, logits_RV = torch.tensor(free, device=device), torch.empty(len(free), vocab_size, device=device)
        filled: list[tuple[Tensor, KVCache, Tensor]] = []
        for prompts, past in self._prefills(list(indices)):
            cache, logits_PV = self.decoder.prefill(prompts, past)
            pairs = [(index, place) for place, prompt in enumerate(prompts) for index in indices[prompt]]
            request_R, prompt_R = torch.tensor(pairs, device=device).T
            logits_RV[request_R] = logits_PV[prompt_R]
            filled.append((row_R[request_R], cache, prompt_R))
            if past is None:  # prompts that start from a row came first, because this overwrites rows
                self._fill(filled)
        self._fill(filled)
        rows = Rows(len(free), self.new_tokens, self.can, vocab_size, device, mask_places=min(self._mask_places, 1))
        rows.begin(requests)
        rows.draw(logits_RV, self._sampling_of([request.sampling for request in requests]))
        self._rows.put(row_R, rows, torch.arange(len(free), device=device))
        for row, (number, request) in zip(free, joining, strict=True):
            self._places[row] = _Place(number, request, 1, request.prompt)
        self._collect_sampling()

    def _count_joining(self, most: int) -> int:
        """Return how many waiting requests join now, ``most`` at most; one joins even if it has more than ``join_tokens``."""
        lengths = [len(request.prompt) for _, request in islice(self._waiting, most)]
        if self._join_tokens is None:
            return len(lengths)
        return max(sum(total <= self._join_tokens for total in accumulate(lengths)), min(len(lengths), 1))

    def _fill(self, filled: list[tuple[Tensor, KVCache, Tensor]]) -> None:
        """Move prompts from the caches that they filled to their rows."""
        for row_R, cache, prompt_R in filled:
            self._cache.put(row_R, cache, prompt_R)
        filled.clear()

    def _prefills(self, prompts: Sequence[Prompt]) -> Iterator[tuple[list[Prompt], KVCache | None]]:
        """Split prompts into parts that run through the model together; parts whose beginning a row holds come first."""
        rows_by_beginning: dict[Prompt, list[int]] = {}
        for row, place in enumerate(self._places):
            rows_by_beginning.setdefault(place.tokens[:_WORTH_SHARING], []).append(row)
        parts: dict[int | None, list[Prompt]] = {}  # keys: the row that they start from
        shared: dict[int | None, int] = {}  # tokens at the beginning of that row and of all prompts of the part
        for prompt in prompts:
            rows = rows_by_beginning.get(prompt[:_WORTH_SHARING], [])
            count, best = max(((_num_equal(prompt[:-1], self._places[row].tokens), row) for row in rows), default=(0, -1))
            start_row = best if count >= max(_WORTH_SHARING, len(prompt) // 2) else None
            parts.setdefault(start_row, []).append(prompt)
            shared[start_row] = min(shared.get(start_row, count), count)
        for start_row, own in sorted(parts.items(), key=lambda part: part[0] is None):
            past = None if start_row is None else self._cache.beginning(start_row, shared[start_row])
            chunk = max(_PREFILL_TOKENS // (max(map(len, own)) - (past.filled if past else 0)), 1)
            for start in range(0, len(own), chunk):
                yield own[start : start + chunk], past


def _num_equal(first: Prompt, second: Prompt) -> int:
    """Return how many tokens both have in common at their beginning; bisection compares whole tuples, which is fast."""
    shorter = min(len(first), len(second))
    return bisect_left(range(1, shorter + 1), True, key=lambda count: first[:count] != second[:count])
