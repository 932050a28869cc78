"""``osler ablate``: what a change of a recipe does, by runs in pairs that differ in this change alone.

    runs/text-10min-pretrain-ablation/  ablation.json, recipe-seed0/, optim.lr=0.04-seed0/ ...   each an ordinary run folder

With every seed the recipe itself is trained and, one at a time, each change of it. Runs of one seed begin with the same random
numbers and read the same data in the same order, so their difference is the change's, and its spread over the seeds gives the
interval. The same command always continues: it skips finished runs and resumes an interrupted one from its checkpoint. More
seeds and more changes may be given later.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from osler.config.recipe import load_recipe, run_name
from osler.config.schema import decode, encode, nearest
from osler.eval.score import Difference, mean_change
from osler.monitor.metrics import METRICS, declared_name
from osler.parallel.compile import compiled_anew, forget_compiled, should_compile
from osler.records.jsonl import END, FINISHED, newest_lifetime_event, read_events, read_metrics
from osler.runs.folder import refuse_another, taken
from osler.runtime import format as fmt
from osler.runtime.device import pick_device
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, write_json
from osler.runtime.stop import EXIT_STOPPED
from osler.runtime.world import joined
from osler.train.config import TrainConfig
from osler.train.run import JOB

logger = logging.getLogger(__name__)

RECIPE = "recipe"  # the name of the unchanged recipe
RESULTS = "ablation.json"
NO_END = 10**12  # tokens that no run by the clock reaches
_FIELD = re.compile(r"[\w.\[\]]+=")
_NOT_IN_NAMES = re.compile(r"[^-+=.,\w]+")


@dataclass(frozen=True)
class Ablation:
    """The recipe and its changes by name, what is measured of their runs, and the folder of them all."""

    configs: Mapping[str, TrainConfig]
    metrics: Sequence[str]
    seeds: int
    root: Path

    def folder(self, name: str, seed: int) -> RunFolder:
        return RunFolder(self.root / f"{_NOT_IN_NAMES.sub('-', name)}-seed{seed}")

    def values(self, name: str, seed: int) -> dict[str, float] | None:
        """Return the last values of the metrics in a finished run, and the tokens that it trained on; None before its end."""
        folder = self.folder(name, seed)
        newest = newest_lifetime_event(read_events(folder.events))
        if newest is None or (newest.kind, newest.name) != (END, FINISHED):
            return None
        found: dict[str, float] = {}
        for metric in self.metrics:
            lines = list(read_metrics(folder.metrics, having=metric))
            if not lines:
                known = sorted({name for line in read_metrics(folder.metrics) for name in line.values if "/" in name})
                raise UserError(f"{folder.metrics} has no {metric}, which --metric asks for. It has: {', '.join(known)}.")
            found |= {metric: lines[-1].values[metric], "tokens": lines[-1].tokens}
        return found


def run(
    recipe: str | None,
    overrides: Sequence[str] = (),
    *,
    run_dir: str | None = None,
    seeds: int = 3,
    minutes: float | None = None,
    flops: float | None = None,
    tokens: int | None = None,
    metrics: Sequence[str] = (),
) -> int:
    """Run the command ``ablate``, and return the process's exit code."""
    if recipe is None:
        raise UserError("Which recipe is to be changed? `osler recipes` lists them.")
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: give 1 or more; an interval needs 2.")
    fixed, changes = read_grid(overrides)
    for given in (*fixed, *(field for change in changes for field in change)):
        if given.startswith("seed="):
            raise UserError(f"{given}: all changes are trained with the seeds 0, 1 and so on, and --seeds says with how many.")
    lengths = [length for length in (minutes, flops, tokens) if length is not None]
    if len(lengths) > 1 or not all(length > 0 for length in lengths):
        raise UserError("--minutes, --flops and --tokens all say how long a run is: give one of them, above 0.")
    for metric in metrics:
        if declared_name(metric) is None:
            meant = nearest(metric, list(METRICS), list_all=False)
            raise UserError(f"--metric {metric}: no metric has this name{meant} (`osler metrics` lists all)")
    configs = configs_of(recipe, fixed, changes, partial(within, minutes=minutes, flops=flops, tokens=tokens))
    base = configs[RECIPE]
    metrics = metrics or ("eval/bits_per_byte" if base.kind == "pretrain" else "eval/loss",)
    root = Path(run_dir or Path("runs") / f"{run_name(recipe, base.kind)}-ablation")
    ablation = Ablation(configs, metrics, seeds, root)
    with joined(base.device) as world, taken(RunFolder(root), world):
        check(ablation, world.size)
        if world.is_first:  # whether compiling works is tried now, because the clock of the first run alone would count it
            for config in configs.values():
                should_compile(config.compile, pick_device(world.device), steps=config.steps_to_compile_for)
        for seed in range(seeds):
            for name in list(configs) if seed % 2 == 0 else reversed(configs):
                folder = ablation.folder(name, seed)
                if world.broadcast_from_first(partial(ablation.values, name, seed)) is not None:
                    continue
                logger.info(f"── {name}, seed {seed}")
                forget_compiled()
                config = replace(configs[name], seed=seed)
                with taken(folder, world), nullcontext() if config.max_minutes is None else compiled_anew():
                    is_done = JOB.train(config, folder, world)
                if world.is_first:
                    report(ablation)
                if not is_done:
                    logger.info("Stopped and saved. The same command goes on.")
                    return EXIT_STOPPED
        if world.is_first:
            print(report(ablation))
            logger.info(f"Saved to {root / RESULTS}.")
    return 0


def read_grid(items: Sequence[str]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the fields that all runs have, and those of each change. A text with ``|`` between values is several changes.

    Each value may be that of the first field or, where fields go together, ``a=1 b=2``.
    """
    fixed, changes = [], []
    for item in items:
        first, *others = (piece.strip() for piece in item.split("|"))
        if not others:
            fixed.append(item)
            continue
        key = first.partition("=")[0]
        for piece in (first, *others):
            fields = piece if _FIELD.match(piece) else f"{key}={piece}"
            changes.append(tuple(re.split(rf"\s+(?={_FIELD.pattern})", fields)))
    if not changes:
        raise UserError("Which changes? Give the values of a field with | between them, as in 'optim.lr=0.01|0.02'.")
    return fixed, changes


def configs_of(
    recipe: str, fixed: Sequence[str], changes: Sequence[Sequence[str]], fitted: Callable[[TrainConfig], TrainConfig]
) -> dict[str, TrainConfig]:
    """Return the config of the recipe and of each change by name, without changes that make no difference once ``fitted``."""
    configs: dict[str, TrainConfig] = {}
    for name, change in [(RECIPE, ()), *((" ".join(change), change) for change in changes)]:
        resolved = load_recipe(recipe, [*fixed, *change])
        if (kind := resolved.get("kind")) not in ("pretrain", "sft"):
            raise UserError(f"{recipe} is of kind {kind}, and `osler ablate` trains pretrain and sft.")
        config = fitted(decode(TrainConfig, resolved, source=recipe if name == RECIPE else f"{recipe} with {name}"))
        if same := [other for other, known in configs.items() if known == config]:
            logger.info(f"{name} makes the same run as {same[0]}, and is not trained beside it.")
        else:
            configs[name] = config
    if len(configs) == 1:
        raise UserError("The recipe has these values already: there is nothing to compare.")
    return configs


def within(config: TrainConfig, *, minutes: float | None, flops: float | None, tokens: int | None) -> TrainConfig:
    """Return a config whose run is as long as asked for; without a length it is as long as it was."""
    if minutes is not None:
        return replace(config, max_minutes=minutes, total_tokens=NO_END)
    if flops is not None:
        if config.init_from is not None:
            raise UserError("--flops counts those of the config's model, and this one comes from init_from: give --tokens.")
        for _ in range(3):  # exact at once, but for a curriculum, whose stages differ in FLOPs per token
            config = replace(config, total_tokens=max(1, int(flops * config.total_tokens / config.training_flops(config.model))))
        tokens = config.total_tokens
    return config if tokens is None else replace(config, total_tokens=tokens, max_minutes=None)


def check(ablation: Ablation, processes: int) -> None:
    """Raise UserError before the first run when one cannot begin, or when its folder holds another run."""
    places: dict[Path, str] = {}
    for name, config in ablation.configs.items():
        JOB.check_processes(config, processes)
        for seed in range(ablation.seeds):
            folder = ablation.folder(name, seed)
            if (other := places.setdefault(folder.root, name)) != name:
                raise UserError(f"The changes {other} and {name} would share {folder.root}: ablate one with another --run.")
            refuse_another(folder, replace(config, seed=seed))
            if not folder.config.exists():
                JOB.check(replace(config, seed=seed), folder, None)


def report(ablation: Ablation) -> str:
    """Write ``ablation.json`` from the runs that are finished, and return a table for each metric."""
    found = {
        name: {seed: run for seed in range(ablation.seeds) if (run := ablation.values(name, seed)) is not None}
        for name in ablation.configs
    }
    rows: list[dict[str, Any]] = []
    tables = []
    for metric in ablation.metrics:
        lines = [[metric, "mean", "difference", "95% interval", "shown", "seeds", "tokens"]]
        for name, runs in found.items():
            values = {seed: run[metric] for seed, run in runs.items()}
            pairs = [value - found[RECIPE][seed][metric] for seed, value in values.items() if seed in found[RECIPE]]
            change = mean_change(pairs) if pairs and name != RECIPE and all(map(isfinite, pairs)) else None
            told = {} if change is None else {"difference": change.mean, "interval": change.interval, "pairs": change.n}
            tokens = {seed: run["tokens"] for seed, run in runs.items()}
            rows.append({"change": name, "metric": metric, "values": values, "tokens": tokens, **told})
            if values:
                words = ["", "", ""] if name == RECIPE else in_words(change)
                shown = [f"{fmean(values.values()):.4f}", *words, str(len(values)), fmt.count(fmean(tokens.values()))]
                lines.append([name, *shown])
        tables.append(fmt.table(lines))
    configs = {name: encode(config) for name, config in ablation.configs.items()}
    write_json(ablation.root / RESULTS, {"seeds": ablation.seeds, "rows": rows, "configs": configs})
    return "\n\n".join(tables)


def in_words(change: Difference | None) -> list[str]:
    """Return a difference, its interval, and whether the interval shows that the metric is lower or higher, or what it lacks.

    None stands for a difference from or of a run whose metric is not a number.
    """
    if change is None:
        return [fmt.MISSING, fmt.MISSING, "no number"]
    low, high = change.interval
    shown = "needs 2 seeds" if change.n == 1 else "lower" if high < 0 else "higher" if low > 0 else "nothing"
    interval = f"{low:+.4f} to {high:+.4f}" if change.n > 1 else fmt.MISSING
    return [text.replace("-", fmt.MINUS) for text in (f"{change.mean:+.4f}", interval, shown)]
