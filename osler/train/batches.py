"""How a run's data become batches: a packing of each source in each stage, mixed by weight."""

from __future__ import annotations

from osler.data.config import wrong_weights
from osler.data.loader import Loader
from osler.data.mixture import Mixture
from osler.data.order import Order
from osler.data.packing import MixedPacking, StreamPacking, WholePacking
from osler.data.prepared import Prepared
from osler.runtime.errors import UserError
from osler.runtime.world import World
from osler.train.config import TrainConfig


def make_loader(
    config: TrainConfig,
    prepared: Prepared,
    world: World = World(),  # noqa: B008 - frozen
    *,
    pin_memory: bool = False,
) -> Loader:
    """Return the loader of this rank's batches. In each source a stage begins where the stage before it ended.

    Raises UserError when the sources that a stage names are not those of the data.
    """
    orders = {source.name: Order(source.train, config.seed) for source in prepared.sources}
    # Shards that were prepared elsewhere have names and weights of their own.
    of_data = {name: s.weight for name, s in config.sources.items()} or {s.name: s.weight for s in prepared.sources}
    prompt_loss = config.kind == "pretrain"  # pretraining learns every token, fine-tuning those that loss masks select
    first_tokens = dict.fromkeys(orders, 0)
    stages = []
    for span in config.timeline.spans:
        weights = (config.curriculum[span.number - 1].weights if config.curriculum else None) or of_data
        if problem := wrong_weights(span.number, weights, of_data):
            raise UserError(f"{problem}.")
        mixture = Mixture([weights[name] for name in of_data])
        packings: dict[str, StreamPacking | WholePacking] = {}
        for (name, order), rows in zip(orders.items(), mixture.rows(span.num_rows), strict=True):
            if config.packs_whole:
                packings[name] = WholePacking(order, span.seq_len, prompt_loss=prompt_loss, drop_torn=config.drops_torn)
            else:
                packings[name] = StreamPacking(
                    order,
                    span.seq_len,
                    first_token=first_tokens[name],
                    num_rows=None if span.end_step is None else rows,
                    prompt_loss=prompt_loss,
                )
            first_tokens[name] += rows * span.seq_len
        stages.append(MixedPacking(packings, mixture))
    return Loader(config.timeline, stages, world.rank, world.size, config.loader_workers, pin_memory)
