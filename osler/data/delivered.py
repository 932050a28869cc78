"""What a run has been given so far: epochs, padding, and tokens of each source, as pure functions of the step.

The order of the data is computed, so what was in it is too: nothing is counted while training, every rank would say the same, and
a resumed run goes on with the same numbers. A source is what the documents were written from: a file, or a kind of text of the
clinic. Nothing mixes them, so what is asked of a source is its share of the data, and what is delivered settles on that. Data
that a run passed over, after it went back, counts as gone through.
"""

from __future__ import annotations

from collections.abc import Mapping

from osler.data.curriculum import Timeline
from osler.data.loader import StagedLoader


class Delivered:
    """The batches of a run seen from its steps, which count from 1 and include all ranks."""

    def __init__(self, loader: StagedLoader) -> None:
        self.timeline: Timeline = loader.timeline
        self.packings = [stage.packing for stage in loader.loaders]

    @property
    def bytes_per_token(self) -> float | None:
        """Of the training text; None where only a part of it is learned."""
        shards = self.packings[0].order.shards
        return shards.num_bytes / shards.num_tokens if self.packings[0].prompt_loss else None

    def epochs(self, step: int, skipped_tokens: int = 0) -> float:
        """How often the data have been gone through after ``step`` steps."""
        packing = self.packings[self.timeline.at_step(step - 1).number - 1]
        return packing.epochs(self.timeline.rows_at(step - 1, skipped_tokens).stop)

    def metrics(self, step: int, steps: int, *, by_source: bool, skipped_tokens: int = 0) -> dict[str, float]:
        """The state after ``step`` steps, and the padding of the last ``steps`` of them; ``by_source`` visits every document."""
        span = self.timeline.at_step(step - 1)
        packing = self.packings[span.number - 1]
        stop = self.timeline.rows_at(step - 1, skipped_tokens).stop
        first = max(0, stop - steps * span.rows_per_batch)
        metrics = {"data/epoch": self.epochs(step, skipped_tokens), "data/padding_frac": packing.padding(first, stop)}
        if by_source:
            tokens_S, epoch_S = packing.tokens_by_source(stop), packing.tokens_of_epoch
            names = packing.order.shards.sources
            given, of_epoch = (dict(zip(names, part.tolist(), strict=True)) for part in (tokens_S, epoch_S))
            metrics |= of_sources(tokens=given, given=given, of_epoch=of_epoch, asked=of_epoch)
        return metrics


def of_sources(
    *, tokens: Mapping[str, float], given: Mapping[str, float], of_epoch: Mapping[str, float], asked: Mapping[str, float]
) -> dict[str, float]:
    """What a run was given of each source: ``given`` and ``of_epoch`` count the same thing, ``asked`` only compares sources."""
    metrics: dict[str, float] = {}
    all_given, all_asked = sum(given.values()), sum(asked.values())
    for name in given:
        if not of_epoch[name]:  # all its documents are left out, because they are too long
            continue
        metrics[f"data/tokens/{name}"] = tokens[name]
        metrics[f"data/epoch/{name}"] = given[name] / of_epoch[name]
        metrics[f"data/asked_frac/{name}"] = asked[name] / all_asked
        metrics[f"data/delivered_frac/{name}"] = given[name] / all_given
    return metrics
