"""What a run has consumed of its data, as pure functions of the step.

The order of the data is computed, so nothing is counted while training: every rank gets the same numbers, and a resumed run
continues them. Data that a rollback passed over count as consumed.
"""

from collections.abc import Mapping

from osler.data.curriculum import Timeline
from osler.data.loader import Loader


class ConsumedData:
    """The data of a run's first steps, of all ranks together; steps count from 1."""

    def __init__(self, loader: Loader) -> None:
        self.timeline: Timeline = loader.timeline
        self.loader = loader

    def bytes_per_token(self, step: int) -> float | None:
        """Return the bytes of text per token at a step; None when only a part of the tokens is learned."""
        stop = self.timeline.rows_at(step - 1).stop
        return self.loader.packing(step - 1).bytes_per_token(stop)

    def planned_tokens(self, total_tokens: int) -> dict[str, float]:
        """Return how many tokens of each source a run of `total_tokens` reads, with padding counted as data."""
        found: dict[str, float] = {}
        for span, tokens in self.timeline.shares(total_tokens):
            packing = self.loader.packings[span.number - 1]
            for name, fraction in zip(packing.packings, packing.mixture.fractions, strict=True):
                found[name] = found.get(name, 0.0) + fraction * tokens
        return found

    def metrics(self, step: int, steps: int, *, skipped_tokens: int = 0) -> dict[str, float]:
        """Return the metrics after ``step`` steps: padding of the last ``steps``, the largest epoch of a source, and more."""
        span, stop = self.timeline.at_step(step - 1), self.timeline.rows_at(step - 1).stop
        packing = self.loader.packing(step - 1, skipped_tokens)
        tokens, of_epoch = packing.tokens(stop), packing.epoch_tokens
        target = dict(zip(tokens, packing.mixture.fractions, strict=True))
        epochs = [tokens[name] / size for name, size in of_epoch.items() if size]
        return {
            **({"data/epoch": max(epochs)} if epochs else {}),
            "data/padding_frac": packing.padding(max(0, stop - steps * span.rows_per_batch), stop),
            **source_metrics(tokens=tokens, consumed=tokens, of_epoch=of_epoch, target=target),
        }


def source_metrics(
    *,
    tokens: Mapping[str, float],
    consumed: Mapping[str, float],
    of_epoch: Mapping[str, float | None],
    target: Mapping[str, float],
) -> dict[str, float]:
    """Return the metrics of each source.

    ``consumed`` and ``of_epoch`` are in one unit (tokens, or questions); ``target`` holds weights relative to one another. A
    source without anything in an epoch, because all its documents are too long, is left out. While a source is still
    being prepared (None), its epoch is not known.
    """
    metrics: dict[str, float] = {}
    for name, size in of_epoch.items():
        if size != 0:
            metrics |= {} if size is None else {f"data/epoch/{name}": consumed[name] / size}
            metrics[f"data/tokens/{name}"] = tokens[name]
            metrics[f"data/target_frac/{name}"] = target[name] / sum(target.values())
            metrics[f"data/consumed_frac/{name}"] = consumed[name] / sum(consumed.values())
    return metrics
