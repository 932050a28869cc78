"""How tokens are drawn, as one object from the command line to the kernel. Torch-free, because configurations use it too."""

import math
from typing import Annotated

from osler.config.schema import Fraction, Ge, Gt, Le, NonNegativeInt, PositiveFloat, PositiveInt, config

COLDEST = 1e-30  # the smallest temperature above 0: a logit divided by less may be too large for fp32


@config
class SamplingParams:
    """How a row's tokens are drawn until a stop token or ``max_new_tokens``; by default from the model's own distribution."""

    max_new_tokens: PositiveInt = 128  # the most tokens of a completion, its stop token included
    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: PositiveInt | None = None  # draw from this many of the likeliest tokens; None: from all
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0  # draw from the fewest likeliest tokens that have this share of the probability
    min_p: Fraction = 0.0  # draw no token whose probability is below this share of the likeliest one's
    repetition_penalty: PositiveFloat = 1.0  # above 1, tokens that were in the prompt or were drawn become less likely
    presence_penalty: Annotated[float, Ge(-2), Le(2)] = 0.0  # subtracted from the logit of a token that was drawn before
    frequency_penalty: Annotated[float, Ge(-2), Le(2)] = 0.0  # subtracted from a logit for each time that its token was drawn
    logit_bias: tuple[tuple[int, float], ...] = ()  # tokens, and what is added to their logits before anything else
    top_logprobs: NonNegativeInt = 0  # how many of the likeliest tokens are reported at the place of every drawn token
    stop_ids: tuple[int, ...] = ()  # tokens that end a row
    seed: int = 0  # the same seed gives a row the same random numbers, whatever shares its batch

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        for token, value in self.logit_bias:
            if token < 0 or not value < math.inf:
                raise ValueError(f"logit_bias adds {value} to token {token}: give ids from 0 and numbers (-inf: never draw it)")

    def truncates(self, vocab_size: int) -> bool:
        """Return whether tokens are drawn from a part of the vocabulary."""
        bounded = self.top_p < 1 or self.min_p > 0 or (self.top_k is not None and self.top_k < vocab_size)
        return self.temperature > 0 and bounded


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless a temperature is 0 or a number that logits can be divided by."""
    if temperature != 0 and not COLDEST <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: give 0 (always the likeliest token), or a number of at least {COLDEST}")
