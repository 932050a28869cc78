"""Collects the measurements of a run between two lines of metrics, at a level that limits their cost.

Level ``off`` logs what training knows anyway. ``basic`` adds memory and the time of each part of a step. It costs marks in the
stream, and a few system calls per line. ``full`` also probes the model (``model_stats.py``) in the first step that ends a line
and in every ``full_every_steps``-th, rounded up to a step that ends a line. So no checkpoint falls between a probe and its line,
and resume is exact. The weights are the same at every level; ``benchmarks/bench_monitor.py`` measures what the levels cost.

Nothing waits for the device before a line is written. Each rank probes its own rows, and the mean over the ranks is logged, also
for maxima. Times and memory are those of rank 0. Under DeepSpeed there are no statistics of gradients and update, which it hides.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from osler.config.devices import peak_flops_of
from osler.model.config import ModelConfig
from osler.model.transformer import Transformer
from osler.monitor.config import MonitorConfig
from osler.monitor.model_stats import ProbeRows, activation_stats, gradient_stats, update_stats, weight_stats
from osler.runtime.device import Stopwatch, gpu_name, peak_bytes, resident_bytes
from osler.runtime.neighbours import busy_elsewhere, read_cpus
from osler.runtime.world import World

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Collector:
    """Follows the steps of a run: ``fetch`` or ``begin`` starts one; call ``mark`` and ``update`` in it, ``line`` after it."""

    def __init__(
        self,
        config: MonitorConfig,
        model: Transformer,
        device: torch.device,
        *,
        lines_every: int = 1,  # steps between two lines
        world: World = World(),  # noqa: B008 - frozen
        whole_weights: Callable[[], Mapping[str, Tensor]] | None = None,  # the whole state dict; collective, as every probe is
        has_gradients: bool = True,  # whether backward passes leave averaged gradients
    ) -> None:
        self.level = config.level
        self.model, self.device, self.world = model, device, world
        self.whole_weights = whole_weights or model.state_dict
        self.has_gradients = has_gradients
        if config.level == "full" and not has_gradients:
            logger.info("monitor.level=full leaves out grad/* and update/*: DeepSpeed keeps gradients and updates to itself.")
        self.first_probe = lines_every
        self.probe_every = -(-config.full_every_steps // lines_every) * lines_every
        self.stopwatch = Stopwatch(device)
        self.steps = 0  # steps since the last line, or since the clock was restarted
        self.is_probing = False
        self.probed: dict[str, Tensor] = {}
        self.forward_only: ModelConfig | None = None  # a teacher's shape: its forward pass reads every token, too
        self.cpus = read_cpus()  # at the last line

    def fetch(self, batches: Iterator[T], step: int) -> T:
        """Begin to follow a step by taking its batch."""
        self.begin(step)
        batch = next(batches)
        self.mark("data")
        return batch

    def begin(self, step: int) -> None:
        """Begin to follow a step, counted from 1. The time since the step before belongs to no part."""
        self.is_probing = self.level == "full" and (step == self.first_probe or step % self.probe_every == 0)
        self.steps += 1
        if self.level != "off":
            self.stopwatch.start()

    def mark(self, part: str) -> None:
        """End a part of the step: data, forward, backward, optimizer or monitor."""
        if self.level != "off":
            self.stopwatch.mark(part)

    def restart_clock(self) -> None:
        """Forget the times since the last line, because a step since then compiled the model."""
        self.stopwatch.read()
        self.steps = 0

    @contextmanager
    def update(self, rows: Callable[[], ProbeRows]) -> Iterator[None]:
        """Wrap an optimizer's step. Before it the gradients exist and are not clipped yet; after it they are gone.

        ``rows`` gives rows of the step's batch, and is called only when a probe is due.
        """
        few = rows().few() if self.is_probing else None
        self.is_probing = False
        # Rows without a token to learn show nothing, and a mean over the ranks needs all ranks.
        if few is None or not self.world.all_reduce_min(few.learns)[0]:
            yield
            return
        weights = self.whole_weights()
        self.probed = weight_stats(weights) | activation_stats(self.model, weights, few.on(self.device))
        del weights
        parameters = dict(self.model.named_parameters()) if self.has_gradients else {}
        if parameters:
            self.probed |= gradient_stats((name, p.grad) for name, p in parameters.items() if p.grad is not None)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.mark("monitor")
        yield
        self.mark("optimizer")
        if parameters:
            self.probed |= update_stats(before, parameters)
        self.mark("monitor")

    def line(self) -> dict[str, float]:
        """Return the measurements since the last line; waits for the device and is collective."""
        metrics: dict[str, float] = {}
        if self.probed:
            values = self.world.all_reduce_mean(torch.stack([value.float() for value in self.probed.values()])).tolist()
            metrics |= dict(zip(self.probed, values, strict=True))
            self.probed = {}
        if self.level != "off":
            seconds = self.stopwatch.read()
            metrics |= {f"perf/{part}_ms": 1000 * spent / self.steps for part, spent in seconds.items()}
            metrics |= self._memory()
            before, self.cpus = self.cpus, read_cpus()
            if before is not None and self.cpus is not None:
                metrics["perf/other_cpus"] = busy_elsewhere(before, self.cpus)
        self.steps = 0
        return metrics

    def _memory(self) -> dict[str, float]:
        if self.device.type == "cuda":
            allocated, reserved = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
            found: dict[str, int | None] = {"perf/memory_allocated_bytes": allocated, "perf/memory_reserved_bytes": reserved}
        else:
            found = {"perf/memory_resident_bytes": resident_bytes()}
        found["perf/memory_peak_bytes"] = peak_bytes(self.device)
        return {name: number for name, number in found.items() if number is not None}

    def peak(self) -> dict[str, float]:
        """Return the peak memory so far; an evaluation may take more than the steps."""
        found = None if self.level == "off" else peak_bytes(self.device)
        return {} if found is None else {"perf/memory_peak_bytes": found}

    def speed(self, tokens_per_second: float, *, tokens_left: int, seq_len: int) -> dict[str, float]:
        """Return the metrics that follow from a speed of training, among them the share of the GPUs' peak."""
        left = {"perf/eta_seconds": max(0, tokens_left) / tokens_per_second}
        return {"perf/tokens_per_second": tokens_per_second, **left, **self.mfu(tokens_per_second, seq_len)}

    def mfu(self, tokens_per_second: float, seq_len: int) -> dict[str, float]:
        """Return the share of the GPUs' peak at a speed of training on rows of ``seq_len`` tokens, where the peak is known."""
        peak = peak_flops_of(gpu_name(self.device))
        forward_flops = 0 if self.forward_only is None else self.forward_only.flops_per_token(seq_len) // 3
        flops = tokens_per_second * (self.model.config.flops_per_token(seq_len) + forward_flops)
        return {} if peak is None else {"perf/mfu": flops / (peak * self.world.size)}


def has_learned(loss: float, grad_norm: float) -> bool:
    """Return whether any rank had a token to learn in a step. Only a step without one has a NaN loss and a gradient norm of 0."""
    return not (math.isnan(loss) and math.isfinite(grad_norm))


def step_stats(window: Sequence[Sequence[float]], clip_norm: float, bytes_per_token: float | None) -> dict[str, float]:
    """Return the metrics of the steps since the last line; a row of ``window`` begins with loss, gradient norm and skip flag.

    ``bytes_per_token`` is the mean over the text, or None where not all of the text is learned.
    """
    learned = [row for row in window if has_learned(row[0], row[1])]
    unlearned = {"train/unlearned_steps": float(len(window) - len(learned))}
    if not learned:
        return unlearned
    losses = [row[0] for row in learned if math.isfinite(row[0])] or [math.nan]
    loss = sum(losses) / len(losses)
    metrics = {
        "train/loss": loss,
        "train/perplexity": math.exp(min(loss, 700.0)),
        "train/grad_norm": learned[-1][1],
        "train/skipped_steps": sum(row[2] for row in learned),
        **norm_stats([row[1] for row in learned], clip_norm),
        **unlearned,
    }
    if bytes_per_token is not None:
        metrics["train/bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return metrics


def norm_stats(norms: Sequence[float], clip_norm: float) -> dict[str, float]:
    """Return the metrics that follow from the gradient norms, before clipping, of the updates since the last line."""
    finite = [norm for norm in norms if math.isfinite(norm)]
    return {
        "grad/norm_max": max(finite, default=math.nan),
        "grad/clipped_frac": sum(norm > clip_norm for norm in finite) / len(finite) if finite else math.nan,
    }
