"""What a run has consumed of its data: epochs, padding and tokens of each source, as pure functions of the step.

The order of the data is computed, so nothing is counted while training: every rank gets the same numbers, and a resumed run
goes on with them. A source is what documents were written from: a file, or a kind of text of the clinic. The target share of a
source is its share of the data, because nothing mixes sources. Data that a rollback passed over count as consumed.
"""

from __future__ import annotations

from collections.abc import Mapping

from osler.data.curriculum import Timeline
from osler.data.loader import StagedLoader


class ConsumedData:
    """The data of a run's first steps, those of all ranks together; steps count from 1."""

    def __init__(self, loader: StagedLoader) -> None:
        self.timeline: Timeline = loader.timeline
        self.packings = [stage.packing for stage in loader.loaders]

    @property
    def bytes_per_token(self) -> float | None:
        """Return the bytes of text per token; None when only a part of the tokens is learned."""
        shards = self.packings[0].order.shards
        return shards.num_bytes / shards.num_tokens if self.packings[0].prompt_loss else None

    def epochs(self, step: int, skipped_tokens: int = 0) -> float:
        """Return how many epochs the first ``step`` steps have consumed."""
        packing = self.packings[self.timeline.at_step(step - 1).number - 1]
        return packing.epochs(self.timeline.rows_at(step - 1, skipped_tokens).stop)

    def metrics(self, step: int, steps: int, *, by_source: bool, skipped_tokens: int = 0) -> dict[str, float]:
        """Return the metrics after ``step`` steps; padding is that of the last ``steps``, ``by_source`` visits every document."""
        span = self.timeline.at_step(step - 1)
        packing = self.packings[span.number - 1]
        stop = self.timeline.rows_at(step - 1, skipped_tokens).stop
        first = max(0, stop - steps * span.rows_per_batch)
        metrics = {"data/epoch": self.epochs(step, skipped_tokens), "data/padding_frac": packing.padding(first, stop)}
        if by_source:
            names = packing.order.shards.sources
            consumed = dict(zip(names, packing.tokens_by_source(stop).tolist(), strict=True))
            of_epoch = dict(zip(names, packing.tokens_of_epoch.tolist(), strict=True))
            metrics |= source_metrics(tokens=consumed, consumed=consumed, of_epoch=of_epoch, target=of_epoch)
        return metrics


def source_metrics(
    *, tokens: Mapping[str, float], consumed: Mapping[str, float], of_epoch: Mapping[str, float], target: Mapping[str, float]
) -> dict[str, float]:
    """Return the metrics of each source.

    ``consumed`` and ``of_epoch`` are in one unit (tokens, or questions); ``target`` holds weights relative to one another. A
    source without anything in an epoch, because all its documents are too long, is left out.
    """
    metrics: dict[str, float] = {}
    for name in consumed:
        if of_epoch[name]:
            metrics[f"data/tokens/{name}"] = tokens[name]
            metrics[f"data/epoch/{name}"] = consumed[name] / of_epoch[name]
            metrics[f"data/target_frac/{name}"] = target[name] / sum(target.values())
            metrics[f"data/consumed_frac/{name}"] = consumed[name] / sum(consumed.values())
    return metrics
