"""The families that metrics fall into, what good looks like in each, and how to tell a layer's metrics from the model's.

A name alone says both: `model/activation_rms/3` is the value of layer 3, in the family `Model health`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Metrics whose names begin alike, and one sentence on what good looks like."""

    title: str
    prefixes: tuple[str, ...]
    good: str


FAMILIES: tuple[Family, ...] = (  # the first whose prefix fits
    Family(
        "Gradients",
        ("train/grad_norm", "train/skipped_steps", "grad/", "update/"),
        "Good: calm, of one order of magnitude in all layers, and every value finite.",
    ),
    Family(
        "Plan",
        ("train/lr", "train/stage", "train/seq_len", "train/batch_tokens"),
        "What was set rather than what came out; the other curves are read by it.",
    ),
    Family(
        "Quality",
        ("train/", "eval/"),
        "Good: losses fall, accuracies climb, and what is measured on held-out text follows what is measured in training.",
    ),
    Family(
        "Performance",
        ("perf/",),
        "Good: level from the first minutes on. Memory that grows, or time that goes into data, is worth a look.",
    ),
    Family(
        "Model health",
        ("model/",),
        "Good: all layers move together and settle. One layer that leaves the others, or a share that climbs to 100%, is ill.",
    ),
    Family(
        "Data",
        ("data/",),
        "Good: the share consumed of each source matches its target, and no source is read many times over.",
    ),
    Family(
        "Reinforcement learning",
        ("reward", "frac_reward", "rewards/", "loss", "kl", "entropy", "clip_ratio/", "completions/", "sampling/", "opsm/",
         "groups/", "filters/", "answer/", "tasks/"),
        "Good: rewards climb while the distance from the reference stays small and answers stay varied.",
    ),
)  # fmt: skip
OTHER = Family("Other", (), "Metrics that the table does not know; the run that logged them does.")

_LAYER = re.compile(r"(.+)/(?:layer_)?(\d+)")


def family_of(name: str) -> Family:
    """Return the family of a metric."""
    return next((family for family in FAMILIES if name.startswith(family.prefixes)), OTHER)


def in_families(names: Iterable[str]) -> list[tuple[Family, list[str]]]:
    """Group names by family, both in their order; families without a name are left out."""
    found: dict[Family, list[str]] = {}
    for name in names:
        found.setdefault(family_of(name), []).append(name)
    return [(family, found[family]) for family in (*FAMILIES, OTHER) if family in found]


def layer_of(name: str) -> tuple[str, int] | None:
    """Return a metric's name without its layer, and the layer; None for a metric of the whole model."""
    found = _LAYER.fullmatch(name)
    return (found[1], int(found[2])) if found else None


def by_layer(names: Iterable[str]) -> tuple[list[str], dict[str, dict[int, str]]]:
    """Return the metrics of the whole model, and for each metric that layers have its names by layer."""
    whole: list[str] = []
    layers: dict[str, dict[int, str]] = {}
    for name in names:
        if found := layer_of(name):
            layers.setdefault(found[0], {})[found[1]] = name
        else:
            whole.append(name)
    return whole, {base: dict(sorted(of.items())) for base, of in layers.items()}
