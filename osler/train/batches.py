"""How a run's data become batches: a packing of each source in each stage, mixed by weight."""

from __future__ import annotations

from osler.data.config import wrong_weights
from osler.data.curriculum import Span
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
    """Return the loader of this rank's batches. In each source a stage begins where the last stage ended."""
    orders = {source.name: Order(source.train, config.seed) for source in prepared.sources}
    first_tokens = dict.fromkeys(orders, 0)
    stages = []
    for span in config.timeline.spans:
        mixture = Mixture(weights_of(config, prepared, span))
        packings = {name: packing_of(config, order, span.seq_len, first_tokens[name]) for name, order in orders.items()}
        stages.append(MixedPacking(packings, mixture))
        for name, rows in zip(orders, mixture.rows(span.num_rows), strict=True):
            first_tokens[name] += rows * span.seq_len
    return Loader(config.timeline, stages, world.rank, world.size, config.loader_workers, pin_memory)


def weights_of(config: TrainConfig, prepared: Prepared, span: Span) -> list[float]:
    """Return the weight of each source in a stage. The stage gives the weights, or else the data.

    Raises UserError when the sources that a stage names are not those of the data.
    """
    # The shards may have been prepared under other names, with other weights.
    of_data = {name: s.weight for name, s in config.sources.items()} or {s.name: s.weight for s in prepared.sources}
    weights = (config.curriculum[span.number - 1].weights if config.curriculum else None) or of_data
    if problem := wrong_weights(span.number, weights, of_data):
        raise UserError(f"{problem}.")
    return [weights[name] for name in of_data]


def packing_of(config: TrainConfig, order: Order, seq_len: int, first_token: int) -> StreamPacking | WholePacking:
    """Return how documents become rows. Pretraining learns every token, and fine-tuning the tokens that loss masks select."""
    prompt_loss = config.kind == "pretrain"
    if config.packs_whole:
        return WholePacking(order, seq_len, prompt_loss=prompt_loss, drop_torn=config.drops_torn)
    return StreamPacking(order, seq_len, first_token=first_token, prompt_loss=prompt_loss)
