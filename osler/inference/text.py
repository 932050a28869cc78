"""From tokens to text while they are drawn: text appears as soon as it is certain, and ends before a stop string.

Two things wait because they may still change: the bytes of half a character, and the possible beginning of a stop string.
"""

import logging
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace
from itertools import chain

from osler.inference.engine import InferenceEngine
from osler.ops.sampling_params import SamplingParams
from osler.runtime.errors import UserError
from osler.tokenizer.bpe import INCOMPLETE, Tokenizer

logger = logging.getLogger(__name__)

_END = -1  # stands after the last token
# Tokens that are decoded again with the next one. A character has at most four; 12 are whole ones where all are equally long.
_CONTEXT, _MOST_CONTEXT = 12, 32


class TextStream:
    """The text of one row, token by token. It is cut into parts by markers, and ends before the first of the ``stops``.

    Raises UserError where one of these is empty. A text by itself counts as the only one, not as its characters.
    ``decoded`` counts the characters of the present part that are certain, ``shown`` those of them that ``add`` has returned.
    """

    def __init__(self, tokenizer: Tokenizer, markers: Set[int], stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.markers = tokenizer, markers
        self.stops = (stops,) if isinstance(stops, str) else stops
        if "" in self.stops:
            raise UserError("A text to end before (stop) is empty, which every text begins with: leave it out.")
        self._is_byte_level = tokenizer.is_byte_level
        self.is_stopped = False  # whether one of ``stops`` came
        self._begin()

    def _begin(self) -> None:
        self.decoded = self.shown = 0
        self._ids: list[int] = []  # the last tokens
        self._length = 0  # characters of these tokens' text that are in ``decoded``
        self._waiting = ""  # text that may be the beginning of a stop string

    def add(self, token: int) -> str:
        """Return the text that is certain with one more token. A marker is no text; it makes all text of its part certain.

        A character that lacks bytes when a marker comes is returned as a replacement character. Nothing follows a stop string.
        """
        if self.is_stopped:
            return ""
        is_marker = token in self.markers
        self._ids += [] if is_marker else [token]
        text = self.tokenizer.decode(self._ids)
        is_whole = is_marker or not text.endswith(INCOMPLETE)
        known = text if is_whole else self._certain(text)
        new = known[self._length :]
        self._waiting += new
        self.decoded += len(new)
        self._length = max(self._length, len(known))
        if is_whole and len(self._ids) > _MOST_CONTEXT:
            rest = self.tokenizer.decode(self._ids[-_CONTEXT:])
            if self._is_byte_level or INCOMPLETE not in rest:
                self._ids, self._length = self._ids[-_CONTEXT:], len(rest)
        found = [self._waiting.index(stop) for stop in self.stops if stop in self._waiting]
        self.is_stopped = bool(found)
        held_back = 0 if is_marker else _possible_stop(self._waiting, self.stops)
        certain = min(found, default=len(self._waiting) - held_back)
        said, self._waiting = self._waiting[:certain], self._waiting[certain:]
        self.shown += len(said)
        return said

    def _certain(self, text: str) -> str:
        """Return a text without the half character at its end.

        Where bytes only stand in for characters that have no token (byte fallback), half a character makes all bytes that follow
        one another unreadable, the whole characters among them too.
        """
        return text.removesuffix(INCOMPLETE) if self._is_byte_level else text.rstrip(INCOMPLETE)

    def next_part(self, stops: Sequence[str] | None = None) -> None:
        """Begin the part after a marker, which ends before the first of the ``stops`` (None: of those before)."""
        self.stops = self.stops if stops is None else stops
        self._begin()


def pieces(
    engine: InferenceEngine,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: SamplingParams,
    markers: Set[int],
    stops: Sequence[str] = (),
    tell: Callable[[str], object] = logger.warning,
) -> Iterator[str | int]:
    """Yield text as soon as it is certain and markers as ids, then -1 at the end unless a stop string came.

    New tokens are cut to what the model's ``max_seq_len`` leaves, and ``tell`` gets a sentence when this ends the text.
    """
    asked, room = sampling.max_new_tokens, max(engine.model.config.max_seq_len - len(prompt), 1)
    sampling = replace(sampling, max_new_tokens=min(asked, room), stop_ids=(tokenizer.eos_id,))
    text = TextStream(tokenizer, {*markers, _END}, stops)
    drawn, last = 0, _END
    for token in chain(engine.stream(prompt, sampling), [_END]):
        if token == _END and drawn == room < asked and last != tokenizer.eos_id:
            tell(
                f"The text ends after {drawn:,} of the {asked:,} new tokens asked for: with the {len(prompt):,} of the prompt "
                f"these are all {engine.model.config.max_seq_len:,} tokens that the model reads (max_seq_len)."
            )
        drawn, last = drawn + 1, token
        if said := text.add(token):
            yield said
        if text.is_stopped:
            return
        if token in text.markers:
            yield token
            text.next_part()


def _possible_stop(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of a text could be the beginning of a stop string."""
    return max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
