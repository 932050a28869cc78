"""One policy update: rows of token ids in, a changed model and its metrics out. It has no state beyond model and optimizer.

Every rank knows all rows of the update and learns from its share of them, which is sorted by length into micro-batches of a token
budget. The weights of all tokens are made once for the whole update, so sharing and cutting it changes only the order of
floating-point sums. Rows without an advantage get a forward pass, for the metrics, and a backward pass only with a KL term.
Log-probabilities are taken at the sampler's temperature and over its sampling masks, at completion tokens only.

Ranks exchange gradients, and with FSDP also weights, in every pass, so all ranks must make the same number of passes. A rank
without rows left makes idle passes, which count in no metric and whose gradient is zero.

Shapes: B rows of a micro-batch, T completion tokens, L prompt and completion tokens, N completion tokens of all its rows,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from osler.eval.likelihood import LabelledRow, label_logprobs, pad_rows
from osler.model.transformer import ModelLoss, Transformer, nan_gradient_unless_finite
from osler.monitor.collect import Collector, norm_stats
from osler.monitor.model_stats import ProbeRows
from osler.ops.cross_entropy import entropy
from osler.ops.labels import IGNORED
from osler.ops.sampling import unpack_mask
from osler.rl.config import AlgorithmConfig
from osler.rl.loss import LossInputs, add_sums, group_advantages, grpo_loss, loss_metrics, token_weights
from osler.rl.rollout import Group
from osler.runs.micro_batch import MicroBatchLimit
from osler.runs.process import Learner
from osler.runtime.device import to_device
from osler.runtime.world import World

FIRST_UPDATE_METRICS = "sampling/"  # they compare sampler and trainer, which is only fair before the weights change
PROBED_ROWS = 16


@dataclass(frozen=True)
class TrainingRow:
    """One completion to learn from; masks and ranks are as in ``rollout.Sample``. Without ``trained`` it gets no gradient."""

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    advantage: float
    sampling_mask: Tensor | None = None
    trained: bool = True
    sampled_by_rank: int | None = None

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens."""
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def labelled(self) -> LabelledRow:
        """The ids, each with the completion token after it as its label."""
        labels = [IGNORED] * (len(self.prompt_ids) - 1) + self.completion_ids + [IGNORED]
        return self.prompt_ids + self.completion_ids, labels

    def has_gradient(self, beta: float) -> bool:
        """Return whether the row teaches anything. In a group of equal rewards only the KL term does, if there is one."""
        return self.trained and (self.advantage != 0.0 or beta > 0.0)


def training_rows(groups: Sequence[Group], algorithm: AlgorithmConfig) -> list[TrainingRow]:
    """Return the samples that stay, with their advantages over their groups."""
    rewards_PG = torch.tensor([[s.reward for s in group.samples] for group in groups], dtype=torch.float64)
    valid_PG = torch.tensor([[s.stays for s in group.samples] for group in groups])
    advantages_PG = group_advantages(rewards_PG, algorithm.advantage, valid_PG=valid_PG).tolist()
    return [
        TrainingRow(
            group.prompt_ids, sample.ids, sample.logprobs, advantage, sample.sampling_mask, sample.trained, sample.sampled_by_rank
        )
        for group, advantages in zip(groups, advantages_PG, strict=True)
        for sample, advantage in zip(group.samples, advantages, strict=True)
        if sample.stays
    ]


def assign_to_ranks(rows: Sequence[TrainingRow], chosen: Sequence[int], ranks: int) -> list[list[int]]:
    """Assign the chosen indices to ranks, longest row first: each to the rank that drew it, or to that with the fewest tokens."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for index in sorted(chosen, key=lambda i: -rows[i].tokens):
        drawn_by = rows[index].sampled_by_rank
        rank = tokens.index(min(tokens)) if drawn_by is None else drawn_by
        shares[rank].append(index)
        tokens[rank] += rows[index].tokens
    return shares


def micro_batches(rows: Sequence[TrainingRow], chosen: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Cut the chosen indices, longest row first, into lists whose padded size fits the budget; each has at least one row."""
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(chosen, key=lambda i: -rows[i].tokens):
        if not batches or (len(batches[-1]) + 1) * longest > budget_tokens:
            batches.append([])
            longest = rows[index].tokens
        batches[-1].append(index)
    return batches


def completion_logprobs(
    model: Transformer, rows: Sequence[TrainingRow], *, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (logp_BT, entropy_BT, mask_BT, index_kl_BT) of the completion tokens, zero in padding.

    ``logp_BT`` has a gradient. So has ``index_kl_BT``, the sum over the layers of a sparse model; for a dense model it is zero.
    """
    device = model.embed_tokens.weight.device
    masks = [row.sampling_mask for row in rows if row.sampling_mask is not None]
    mask_NV = unpack_mask(to_device(torch.cat(masks), device), model.config.vocab_size) if masks else None
    ids_BL, labels_BL = pad_rows([row.labelled for row in rows])
    _, logp_N, entropy_N, measured_NM = label_logprobs(
        model, ids_BL, labels_BL, statistic=entropy, temperature=temperature, mask_NV=mask_NV
    )
    mask_BT = to_device(_completion_mask(rows), device)
    empty_BT = logp_N.new_zeros(mask_BT.shape)
    # Labels come row by row, which is the order in which masked_scatter fills the mask.
    entropy_BT = empty_BT.masked_scatter(mask_BT, entropy_N.to(logp_N.dtype))
    index_kl_BT = empty_BT
    if measured_NM is not None:
        index_kl_BT = empty_BT.masked_scatter(mask_BT, measured_NM[:, 0] * model.config.num_layers)
    return empty_BT.masked_scatter(mask_BT, logp_N), entropy_BT, mask_BT, index_kl_BT


def _completion_mask(rows: Sequence[TrainingRow]) -> Tensor:
    return pad_sequence([torch.ones(len(row.completion_ids), dtype=torch.bool) for row in rows], batch_first=True)


@dataclass
class MicroBatch:
    """Rows of one micro-batch and all that updates do not change about them; ``idle`` marks a pass without rows."""

    rows: list[TrainingRow]
    learns: bool
    idle: bool
    old_BT: Tensor
    advantages_B: Tensor
    weight_BT: Tensor
    reference_BT: Tensor | None = None


class PolicyLoss(ModelLoss):
    """Maps a micro-batch to its GRPO loss and the sums for its metrics, which have no gradient.

    A sparse model's index learns in the same pass: its KL has the weights of the tokens and is in no metric.
    """

    def forward(self, batch: MicroBatch, algorithm: AlgorithmConfig) -> tuple[Tensor, dict[str, Tensor]]:
        logp_BT, entropy_BT, mask_BT, index_kl_BT = completion_logprobs(self.model, batch.rows, temperature=algorithm.temperature)
        if batch.idle:  # values under a False mask are ignored, but every weight still gets a gradient, which is zero
            mask_BT = torch.zeros_like(mask_BT)
        inputs = LossInputs(logp_BT, batch.old_BT, batch.reference_BT, mask_BT, batch.advantages_B, batch.weight_BT)
        loss, sums = grpo_loss(inputs, algorithm)
        loss = loss + (index_kl_BT * batch.weight_BT * mask_BT).sum()
        return loss, {**sums, "entropy": (entropy_BT.detach() * mask_BT).sum()}


class PolicyPasses:
    """The passes of an update over this rank's share of the rows, for ``MicroBatchLimit.make``; an update may be repeated.

    ``rows`` are the rows of all ranks, and ``reference`` is only read.
    """

    def __init__(
        self,
        learner: Learner,
        rows: Sequence[TrainingRow],
        algorithm: AlgorithmConfig,
        reference: Transformer | None,
        mark: Callable[[str], None],
    ) -> None:
        self.learner, self.rows, self.algorithm, self.reference, self.mark = learner, rows, algorithm, reference, mark
        self.world = learner.engine.world
        self.cut_for: int | None = None  # tokens of a pass at most, by which the micro-batches are cut
        self.batches: list[MicroBatch] = []
        self.padding_frac = 0.0

    def __call__(self, tokens: int | None, apart: bool) -> dict[str, Tensor]:
        """Make the passes and return the sums for the metrics."""
        engine = self.learner.engine
        if not self.batches or self.cut_for != tokens:
            self._cut(tokens)
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(self.batches, start=1):
            sends = number == len(self.batches) and not apart
            with nullcontext() if sends else engine.accumulating(), torch.set_grad_enabled(batch.learns):
                loss, part = engine.loss(batch, self.algorithm)
                self.mark("forward")
                if batch.learns:
                    # Engines average over the ranks, and the token weights are made for all rows.
                    engine.backward(nan_gradient_unless_finite(loss) * self.world.size)
                    self.mark("backward")
            sums = add_sums(sums, part)
        return sums

    def halved(self, tokens: int | None) -> int | None:
        """Return half of the largest micro-batch of any rank that can be cut, None when all have one row."""
        cuts = [shares for shares, _ in _shares(self.rows, self.algorithm, tokens, self.world)]
        several = [indices for shares in cuts for share in shares for indices in share if len(indices) > 1]
        return max((_places(self.rows, indices) for indices in several), default=0) // 2 or None

    def _cut(self, tokens: int | None) -> None:
        self.batches = []  # frees what the cut before holds
        batches, self.padding_frac = _prepare(self.rows, self.algorithm, tokens, self.learner.device, self.world)
        if self.algorithm.beta > 0.0:
            assert self.reference is not None
            with torch.no_grad():
                for batch in batches:
                    logprobs, *_ = completion_logprobs(self.reference, batch.rows, temperature=self.algorithm.temperature)
                    batch.reference_BT = logprobs
        self.batches, self.cut_for = batches, tokens


def update_policy(
    learner: Learner,
    rows: Sequence[TrainingRow],
    algorithm: AlgorithmConfig,
    *,
    reference: Transformer | None = None,
    micro_batch_limit: MicroBatchLimit | None = None,
    collector: Collector | None = None,
) -> dict[str, float]:
    """Take at most ``updates_per_batch`` optimizer steps on the rows; return the metrics, averaged over the steps.

    ``rows`` are the rows of all ranks. ``reference`` is needed when beta is above 0 and is only read. The learner's engine wraps
    a :class:`PolicyLoss`. Its optimizer is a fused one (``build_optimizer``), whose settings are used as they are. An update
    whose loss or gradient is not finite is skipped and counted under ``train/skipped_steps``.
    """
    engine, optimizer, world = learner.engine, learner.optimizer, learner.engine.world
    parameters = learner.clipped_parameters
    mark = collector.mark if collector else (lambda part: None)
    limit = micro_batch_limit or MicroBatchLimit(learner, None)
    passes = PolicyPasses(learner, rows, algorithm, reference, mark)
    history: list[dict[str, Tensor]] = []
    updates: list[Tensor] = []  # gradient norm, and 1 for a skipped update
    for update in range(1, algorithm.updates_per_batch + 1):
        sums = limit.make(passes, passes.halved, update=update)
        history.append(sums)
        with collector.update(lambda: probe_rows(rows)) if collector else nullcontext():
            updates.append(torch.stack(engine.update(optimizer, *parameters)))
        mark("optimizer")
        if update < algorithm.updates_per_batch and has_moved_too_far(sums, algorithm, world):
            break
    # A limit on how far the policy may move fetches sums after each update; without one, this is the first wait for the device.
    own = {name: torch.stack([sums[name] for sums in history]).cpu().double() for name in history[0]}
    by_update = loss_metrics(reduce(add_sums, world.all_gather(own)))
    norms, skipped = torch.stack(updates).cpu().T
    metrics = {name: float(values.mean()) for name, values in by_update.items()}
    metrics |= {name: float(values[0]) for name, values in by_update.items() if name.startswith(FIRST_UPDATE_METRICS)}
    metrics |= {"train/grad_norm": float(norms.mean()), "train/skipped_steps": float(skipped.sum())}
    metrics["opsm/updates"] = float(len(updates))
    return metrics | norm_stats(norms.tolist(), learner.clip_norm) | {"data/padding_frac": passes.padding_frac}


def has_moved_too_far(sums: dict[str, Tensor], algorithm: AlgorithmConfig, world: World) -> bool:
    """Return whether an update with these sums found the policy farther from the one that drew the rows than it may be.

    All ranks get the same answer. With a limit this waits once for the device; without one it does nothing.
    """
    limits = {"opsm_masked": algorithm.max_masked_frac, "approx_kl": algorithm.target_kl}
    if all(limit is None for limit in limits.values()):
        return False
    totals = torch.stack([sums[name].double() for name in (*limits, "rows", "tokens")]).tolist()
    *found, rows, tokens = world.all_reduce_sum(*totals)
    checks = zip(found, limits.values(), (rows, tokens), strict=True)
    return any(limit is not None and total > limit * count for total, limit, count in checks)


def probe_rows(rows: Sequence[TrainingRow]) -> ProbeRows:
    """Return the longest rows, padded, with their completions as labels, for a probe of the model."""
    longest = sorted(rows, key=lambda row: -row.tokens)[:PROBED_ROWS]
    return ProbeRows(*pad_rows([row.labelled for row in longest]))


def _places(rows: Sequence[TrainingRow], indices: Sequence[int]) -> int:
    """Return the tokens of a micro-batch with its padding."""
    return len(indices) * rows[indices[0]].tokens  # the longest comes first


def _shares(
    rows: Sequence[TrainingRow], algorithm: AlgorithmConfig, tokens: int | None, world: World
) -> list[tuple[list[list[list[int]]], bool]]:
    """Return the micro-batches of every rank as indices, of rows that only watch and of rows that learn, and which these are.

    Rows that only watch come first, so that the last pass has a backward pass. In it the ranks exchange gradients, and FSDP
    lets go of the weights that it gathered for a forward pass.
    """
    learning = [index for index, row in enumerate(rows) if row.has_gradient(algorithm.beta)]
    # With nothing to learn the update still happens, on zero gradients, because the optimizer's momentum still moves the weights.
    learning = learning or list(range(len(rows)))
    watching = sorted(set(range(len(rows))) - set(learning))
    budget = sum(row.tokens for row in rows) * len(rows) if tokens is None else tokens
    return [
        ([micro_batches(rows, share, budget) for share in assign_to_ranks(rows, chosen, world.size)], learns)
        for chosen, learns in ((watching, False), (learning, True))
    ]


def _prepare(
    rows: Sequence[TrainingRow], algorithm: AlgorithmConfig, tokens: int | None, device: torch.device, world: World
) -> tuple[list[MicroBatch], float]:
    """Cut this rank's share of the update into micro-batches; token weights come from the whole update.

    The second result is the share of places without a token in the micro-batches of all ranks.
    """
    weight = token_weights(
        _completion_mask(rows),
        algorithm.aggregate,
        max_new_tokens=algorithm.max_new_tokens,
        trained_B=torch.tensor([row.trained for row in rows]),
    )
    prepared: list[MicroBatch] = []
    places = 0
    for cut, learns in _shares(rows, algorithm, tokens, world):
        own = cut[world.rank]
        places += sum(_places(rows, indices) for share in cut for indices in share)
        prepared += [_micro_batch([rows[index] for index in indices], weight[indices], learns, device) for indices in own]
        idle = _micro_batch([TrainingRow([0], [0], [0.0], 0.0)], torch.zeros(1, 1), learns, device, idle=True)
        prepared += [idle] * (max(map(len, cut)) - len(own))
    return prepared, 1.0 - sum(row.tokens for row in rows) / places


def _micro_batch(
    rows: list[TrainingRow], weight_BT: Tensor, learns: bool, device: torch.device, *, idle: bool = False
) -> MicroBatch:
    old_BT = to_device(pad_sequence([torch.tensor(row.logprobs) for row in rows], batch_first=True), device)
    advantages_B = to_device(torch.tensor([row.advantage for row in rows], dtype=torch.float32), device)
    return MicroBatch(rows, learns, idle, old_BT, advantages_B, to_device(weight_BT[:, : old_BT.shape[1]], device))
