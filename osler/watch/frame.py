"""One frame of `osler watch` as lines of text: a function of the run's state, the time, and the terminal's size.

Curves are columns of eighth blocks, which every terminal font has.
"""

import math
import textwrap
from typing import NamedTuple

import numpy as np

from osler.records.jsonl import LIFETIME
from osler.records.values import as_text
from osler.report.charts import Family, by_layer, by_row, in_families, inner, kind_of
from osler.report.curves import Floats, Series
from osler.report.svg import averaged, value_range
from osler.report.words import group_events
from osler.runtime import format as fmt
from osler.watch.state import WatchedFolder, WatchedRun

BLOCKS = " ▁▂▃▄▅▆▇█"
FULL, EMPTY = "━", "─"
PANELS = (  # row of METRICS, title, whether the axis starts at zero
    ("train/loss", "loss", False), ("eval/loss", "held-out loss", False), ("reward", "reward", False),
    ("eval/<split>_accuracy", "accuracy", False), ("train/grad_norm", "gradient norm", False),
    ("perf/tokens_per_second", "tokens/s", True), ("perf/rollout_tokens_per_second", "sampled tokens/s", True),
    ("train/lr", "learning rate", True),
)  # fmt: skip
PANEL_WIDTH, GAP = 36, 3
HEIGHTS = (8, 6, 5, 4, 3, 2, 1)  # heights of a curve in lines; the first at which all fits is used
PLAIN_HEIGHT = 4
EVENTS, CHECKPOINTS = 5, 4  # how many of each are shown
SHOWN_OF_ROW = 6  # metrics shown of one METRICS row, such as the metrics of each data source
EVENT_STYLES = {"incident": "bad", "rollback": "bad", "alert": "warn"}
STATE_STYLES = {"running": "good", "finished": "good", "dead": "bad", "failed": "bad", "stopped": "warn"}


class Text(NamedTuple):
    """A line and its style: title, chart, good, warn, bad, dim, or plain."""

    text: str
    style: str = ""


def frame(watched: WatchedFolder, now: float, width: int, height: int | None = None) -> list[Text]:
    """Return at most `height` lines, or all of them for None; no line is longer than `width`."""
    run = watched.current
    top = [*_header(watched, run, now, width), *_stages(watched, run)]
    below = [*_happened(run, now), *_values(run)]
    wrap = textwrap.TextWrapper(width, subsequent_indent="  " if width > 20 else "", break_on_hyphens=False).wrap
    lines: list[Text] = []
    for rows in HEIGHTS if height is not None else (PLAIN_HEIGHT,):
        whole = [*top, *_panels(run, width, rows), *below]
        lines = [Text(part, style) for text, style in whole for part in wrap(clean(text)) or [""]]
        if height is None or len(lines) <= height:
            break
    return lines[:height]


def clean(text: str) -> str:
    """Return text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)


def _header(watched: WatchedFolder, run: WatchedRun, now: float, width: int) -> list[Text]:
    """Return lines on the run's name, its machine, its progress and the time left."""
    facts = [str(watched.root.folder.root), *dict.fromkeys((watched.root.kind, run.kind or run.name))]
    facts += [f"{fmt.count(run.model.num_parameters)} parameters"] if run.model else []
    facts += [as_text(run.machine.get(key)) for key in ("device", "dtype")]
    state = run.state(now)
    lines = [Text(" · ".join(filter(None, facts)), "title"), Text(state.words, STATE_STYLES.get(state.kind, "dim"))]
    if not run.has_lines:
        return lines
    done, total, unit = run.progress
    of_total = {unit: f" of {fmt.count(total)}"} if math.isfinite(total) else {}
    told = [f"step {run.last_step:,}{of_total.get('steps', '')}", f"{fmt.count(run.tokens)}{of_total.get('tokens', '')} tokens"]
    told.append(f"{fmt.duration(np.nan_to_num(run.seconds))} so far")
    left = max(run.newest("perf/eta_seconds") - (now - run.newest_sign), 0.0)
    if state.kind == "running" and math.isfinite(left):
        told.append(f"{fmt.duration(left)} to go")
    lines.append(Text(" · ".join(told)))
    if total > 0:
        share = min(1.0, max(0.0, done / total))
        size = max(10, min(width, 100) - 7)
        full = int(share * size)
        lines.append(Text(f"{FULL * full}{EMPTY * (size - full)} {fmt.percent(share)}", "chart"))
    return lines


def _stages(watched: WatchedFolder, current: WatchedRun) -> list[Text]:
    """Return the stages of a pipeline in a row, with an arrow at the one that is shown."""
    told = {name: f"{name} to come" for name in watched.names()}
    for name, stage in watched.stages.items():
        told[name] = f"{name} to step {stage.last_step:,}" if stage.has_lines else f"{name} begun"
    told |= {name: f"{name} {fmt.duration(seconds)}" for name, seconds in watched.finished.items() if name in told}
    told |= {current.name: f"▶ {current.name}"} if current.name in told else {}
    return [Text("   ".join(told.values()), "dim")] if told else []


def _panels(run: WatchedRun, width: int, rows: int) -> list[Text]:
    """Return the curves, as many side by side as the width allows."""
    found = by_row(sorted(name for name in run.curves if np.isfinite(run.curves[name].values).any()))
    every = [(row, title, name, zero) for row, title, zero in PANELS for name in found.get(row, [])]
    shown = [(title if row == name else f"{inner(row, name)} {title}", name, zero) for row, title, name, zero in every]
    side_by_side = max(1, min(len(shown), (width + GAP) // (PANEL_WIDTH + GAP)))
    size = (width - GAP * (side_by_side - 1)) // side_by_side
    panels = [_panel(title, run.curves[name], name, zero, size, rows) for title, name, zero in shown]
    beside = (zip(*panels[start : start + side_by_side], strict=True) for start in range(0, len(panels), side_by_side))
    return [Text((" " * GAP).join(parts), "chart" if i else "title") for lines in beside for i, parts in enumerate(lines)]


def _panel(title: str, curve: Series, name: str, zero: bool, width: int, rows: int) -> list[str]:
    """Return a curve under its title, newest value and range."""
    known = curve.finite().values
    head = f"{title} {_show(name, curve.values[-1])}"
    span = f"{_show(name, known.min())} to {_show(name, known.max())}"
    head = f"{head}  {span:>{max(0, width - len(head) - 2)}}" if len(head) + len(span) + 2 <= width else head
    return [f"{head[:width]:<{width}}", *blocks(columns(curve, width), rows, zero=zero)]


def columns(curve: Series, width: int) -> Floats:
    """Return `width` values of a curve at even distances, each a mean of the points around it; NaN in its gaps."""
    return np.interp(np.linspace(curve.steps[0], curve.steps[-1], width), *averaged(curve.steps, curve.values, width))


def blocks(values: Floats, rows: int, *, zero: bool = False) -> list[str]:
    """Return values as columns of blocks, the highest line first; a rare spike is cut off, NaN is left blank."""
    known = np.isfinite(values)
    if not known.any():
        return [" " * len(values)] * rows
    low, high, _ = value_range(values[known], zero)
    steps = 8 * rows - 1  # the lowest value is one eighth high, so that it differs from no value
    heights = np.where(known, 1 + np.rint(steps * np.minimum(1.0, (values - low) / (high - low))), 0)
    return ["".join(BLOCKS[int(n)] for n in np.clip(heights - 8 * row, 0, 8)) for row in reversed(range(rows))]


def _values(run: WatchedRun) -> list[Text]:
    """Return the newest value of every metric, by family; of a metric by layer, the range and the layer with the most."""
    newest = {name: float(curve.values[-1]) for name, curve in run.curves.items()}
    lines = []
    for family, names in in_families(newest):
        whole, layers = by_layer(names)
        told = []
        for row, some in by_row(whole).items():
            told += [f"{_short(name, family)} {_show(name, newest[name])}" for name in some[:SHOWN_OF_ROW]]
            told += [f"and {len(some) - SHOWN_OF_ROW} more of {_short(row, family)}"] if len(some) > SHOWN_OF_ROW else []
        for base, name_of_layer in layers.items():
            value_of_layer = {layer: newest[name] for layer, name in name_of_layer.items()}
            low, high = (pick(value_of_layer, key=value_of_layer.__getitem__) for pick in (min, max))
            least, most = _show(name_of_layer[low], value_of_layer[low]), _show(name_of_layer[high], value_of_layer[high])
            told.append(f"{_short(base, family)} {least}" + (f" to {most} (most in layer {high})" if most != least else ""))
        lines.append(Text(f"{family.title}: {' · '.join(told)}"))
    return lines


def _happened(run: WatchedRun, now: float) -> list[Text]:
    """Return the newest events and checkpoints; the run's state tells of its start and its end."""
    groups = group_events([event for event in run.events if event.kind not in LIFETIME])
    lines = [Text(group.in_words, EVENT_STYLES.get(group.weight, "")) for group in groups[:EVENTS]]
    best = run.best.step if run.best else None
    told = [f"{c.step:,}{' (best)' if c.step == best else ''}" for c in run.checkpoints[:CHECKPOINTS]]
    ago = fmt.duration(max(0.0, now - run.saved_at))
    return [*lines, Text(f"checkpoints: step {', '.join(told)}; the newest {ago} ago", "dim")] if told else lines


def _show(name: str, value: float) -> str:
    return "not finite" if math.isnan(value) else fmt.value(value, kind_of(name))


def _short(name: str, family: Family) -> str:
    """Return a name without its area, when its family has no other area."""
    area, slash, rest = name.partition("/")
    return rest if slash and family.prefixes == (f"{area}/",) else name
