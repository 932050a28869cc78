"""What a run has consumed of its data, as pure functions of the step.

The order of the data is computed, so nothing is counted while training: every rank gets the same numbers, and a resumed run
goes on with them. Data that a rollback passed over count as consumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from osler.data.curriculum import Timeline
from osler.data.loader import StagedLoader
from osler.data.packing import MixedPacking


class ConsumedData:
    """The data of a run's first steps, those of all ranks together; steps count from 1."""

    def __init__(self, loader: StagedLoader) -> None:
        self.timeline: Timeline = loader.timeline
        self.packings = [cast(MixedPacking, stage.packing) for stage in loader.loaders]

    def bytes_per_token(self, step: int) -> float | None:
        """Return the bytes of text per token at a step; None when only a part of the tokens is learned."""
        return self._packing_at(step).bytes_per_token

    def epochs(self, step: int, skipped_tokens: int = 0) -> float:
        """Return how many epochs the first ``step`` steps have consumed of the source that they repeat most."""
        packing = self._packing_at(step)
        tokens, of_epoch = packing.tokens(self._rows(step, skipped_tokens)), packing.epoch_tokens
        return max(tokens[name] / of_epoch[name] for name in tokens)

    def planned_epochs(self, total_tokens: int) -> dict[str, float]:
        """Return how many epochs of each source a run of so many tokens reads, if padding were data."""
        found = dict.fromkeys(self.packings[0].packings, 0.0)
        for span, tokens in self.timeline.shares(total_tokens):
            packing = self.packings[span.number - 1]
            for (name, part), fraction in zip(packing.packings.items(), packing.mixture.fractions, strict=True):
                found[name] += fraction * tokens / part.order.shards.num_tokens
        return found

    def metrics(self, step: int, steps: int, *, skipped_tokens: int = 0) -> dict[str, float]:
        """Return the metrics after ``step`` steps; padding is that of the last ``steps``."""
        packing, stop = self._packing_at(step), self._rows(step, skipped_tokens)
        first = max(0, stop - steps * self.timeline.at_step(step - 1).rows_per_batch)
        metrics = {"data/epoch": self.epochs(step, skipped_tokens), "data/padding_frac": packing.padding(first, stop)}
        if len(packing.packings) > 1:
            tokens = packing.tokens(stop)
            target = dict(zip(tokens, packing.mixture.fractions, strict=True))
            metrics |= source_metrics(tokens=tokens, consumed=tokens, of_epoch=packing.epoch_tokens, target=target)
        return metrics

    def _packing_at(self, step: int) -> MixedPacking:
        return self.packings[self.timeline.at_step(step - 1).number - 1]

    def _rows(self, step: int, skipped_tokens: int) -> int:
        return self.timeline.rows_at(step - 1, skipped_tokens).stop


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
