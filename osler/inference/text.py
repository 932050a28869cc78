"""From tokens to text while they are drawn: text appears as soon as it is certain, and ends before a stop string.

Two things wait because they may still change: the bytes of half a character, and the possible beginning of a stop string.
"""

from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from itertools import chain

from osler.inference.engine import InferenceEngine
from osler.ops.sampling_params import SamplingParams
from osler.tokenizer.bpe import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what the bytes of half a character decode to
_END = -1  # the marker behind the last token


def pieces(
    engine: InferenceEngine,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: SamplingParams,
    markers: Set[int],
    stops: Sequence[str] = (),
) -> Iterator[str | int]:
    """Yield text as soon as it is certain, and markers as ids; at the end, unless a stop string came, -1.

    A character that never gets all of its bytes is shown as a replacement character before the next marker. New tokens are cut to
    what the model's ``max_seq_len`` leaves. The text ends before the first of the ``stops``.
    """
    room = engine.model.config.max_seq_len - len(prompt)
    sampling = replace(sampling, max_new_tokens=max(min(sampling.max_new_tokens, room), 1), stop_ids=(tokenizer.eos_id,))
    ids: list[int] = []
    shown = 0
    for token in chain(engine.stream(prompt, sampling), [_END]):
        is_marker = token == _END or token in markers
        ids += [] if is_marker else [token]
        text = tokenizer.decode(ids)
        if not is_marker:
            text = text.removesuffix(_INCOMPLETE)
        found = [text.index(stop) for stop in stops if stop in text]
        certain = min(found) if found else len(text) - (0 if is_marker else _waiting(text, stops))
        if certain > shown:
            yield text[shown:certain]
            shown = certain
        if found:
            return
        if is_marker:
            yield token
            ids, shown = [], 0


def _waiting(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of a text could be the beginning of a stop string."""
    return max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
