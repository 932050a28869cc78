"""The parts of the page, top to bottom: functions from the run to HTML, empty text when there is nothing to show."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from osler.report import diary, svg
from osler.report import format as fmt
from osler.report.charts import Chart, charts_of, legend_value, unit_of
from osler.report.findings import findings, next_steps
from osler.report.read import Comparison, ExamScore, Run
from osler.report.words import (
    difference_in_words,
    headline,
    headline_score,
    in_sentence,
    model_of,
    score_in_words,
    scores_on,
    stage_colour,
    stage_seconds,
    stage_title,
    teachers,
    total_seconds,
    total_tokens,
)
from osler.yaml12 import dump_yaml

MARKED = ("Loss", "Reward")  # the charts that show when things happened


def e(text: object) -> str:
    """Escape text for HTML, quotes included."""
    return html.escape(str(text))


def section(anchor: str, title: str, lead: str, body: str) -> str:
    """A titled section; lead is HTML."""
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section id="{anchor}"><header><h2>{e(title)}</h2>{lead}</header>{body}</section>' if body else ""


def hero(run: Run) -> str:
    """The headline, the score in plain words, and all checkpoints on one axis."""
    start, number, end = headline(run)
    score = headline_score(run)
    model, parameters = model_of(run)
    what = []
    if math.isfinite(parameters):
        shape = f" ({model['num_layers']} layers of width {model['hidden_size']})" if model else ""
        what.append(f"A model of {fmt.count(parameters)} parameters{e(shape)}")
    tokens = total_tokens(run)
    if math.isfinite(tokens):
        what.append(f"{'trained' if what else 'Trained'} on {fmt.count(tokens)} tokens")
    said = (", ".join(what) + "." if what else "") + (f" {e(score_in_words(score))}" if score else "")
    picture = ""
    if score:
        rows = [
            (stage_title(s.label), s.low, s.accuracy, s.high, stage_colour(s.label, i))
            for i, s in enumerate(scores_on(run, score.split))
        ]
        marks = [(score.chance, "chance", "guessing"), (score.constant, "constant", "one letter")]
        title = f"Accuracy on {score.split}: " + "; ".join(
            f"{label} {fmt.percent(v)} ({fmt.percent(a)} to {fmt.percent(b)})" for label, a, v, b, _ in rows
        )
        caption = f"Accuracy on <b>{e(score.split)}</b> after each stage; the bar is the 95% interval."
        picture = f"<figure>{svg.ladder(rows, marks, title)}<figcaption>{caption}</figcaption></figure>"
    watch = findings(run)
    alert = f'<p class="alert"><a href="#watch">{fmt.plural(len(watch), "thing")} to watch</a></p>' if watch else ""
    title = f"<h1>{e(start)}<em>{e(number)}</em>{e(end)}</h1>"
    return f'<section class="hero"><div>{title}<p class="lead">{said}</p>{alert}</div>{picture}</section>'


def strip(run: Run) -> str:
    """The key numbers in a row."""
    score = headline_score(run)
    together = "all stages" if len(run.stages) > 1 or len(run.runs) > 1 else ""
    tiles: list[tuple[str, str, str]] = []
    if score:
        tiles.append(("Score", fmt.percent(score.accuracy), _interval(score.low, score.high)))
    _, parameters = model_of(run)
    if math.isfinite(parameters):
        tiles.append(("Parameters", fmt.count(parameters), ""))
    if math.isfinite(total_tokens(run)):
        tiles.append(("Tokens seen", fmt.count(total_tokens(run)), together))
    if math.isfinite(total_seconds(run)):
        tiles.append(("Time", fmt.duration(total_seconds(run)), together))
    for metric, label in (("eval/loss", "Held-out loss"), ("perf/tokens_per_second", "Tokens/s"), ("reward", "Reward")):
        for stage in run.runs:
            known = stage.finite(metric).values
            if len(known):
                per_second = metric.startswith("perf/")
                shown = fmt.count(np.sort(known)[len(known) // 2]) if per_second else fmt.number(known[-1])
                tiles.append((label, shown, f"{stage_title(stage.name)}, {'median' if per_second else 'at the end'}"))
                break
    if not tiles:
        return ""
    cells = "".join(f"<div><dt>{e(a)}</dt><dd>{b}</dd>" + (f"<dd>{e(c)}</dd>" if c else "") + "</div>" for a, b, c in tiles)
    return f'<dl class="strip">{cells}</dl>'


def exams(run: Run) -> str:
    """Every score, by split: accuracy, interval with its baselines, letters, unparsed."""
    body = ""
    for split in dict.fromkeys(score.split for score in run.exams):
        rows = scores_on(run, split)
        body += f'<tbody><tr class="split"><th colspan="6" scope="rowgroup">{e(split)}</th></tr>'
        body += "".join(_exam_row(score, i) for i, score in enumerate(rows)) + "</tbody>"
    if not body:
        return ""
    head = "".join(
        f'<th scope="col">{h}</th>' for h in ("Checkpoint", "Accuracy", "95% interval", "Right", "Letters", "Unparsed")
    )
    meanings = (
        ("key-band", "95% interval"),
        ("key-mark chance", "guessing"),
        ("key-mark constant", "always the same letter"),
        ("key-even", "equal use of letters"),
    )
    key = "".join(f'<span><b class="{css}"></b>{words}</span>' for css, words in meanings)
    key = f'<p class="key">{key}</p>'
    methods = " ".join(dict.fromkeys(score.method for score in run.exams if score.method))
    method = f'<p class="note">How it was asked: {e(methods)}</p>' if methods else ""
    lead = "Good: the whole bar lies to the right of both marks, every letter is used, and nothing is left unparsed."
    table = f'<table class="exams"><thead><tr>{head}</tr></thead>{body}</table>'
    return section("exams", "Exams", lead, key + table + method)


def _exam_row(score: ExamScore, position: int) -> str:
    marks = [
        (score.chance, "chance", f"guessing {fmt.percent(score.chance)}"),
        (score.constant, "constant", f"always the same letter {fmt.percent(score.constant)}"),
    ]
    said = f"{fmt.percent(score.accuracy)}, {_interval(score.low, score.high)}; {marks[0][2]}, {marks[1][2]}"
    colour = stage_colour(score.label, position)
    bar = svg.interval_bar(score.low, score.accuracy, score.high, marks=marks, title=said, colour=colour)
    letters = "Letters: " + ", ".join(f"{k} {fmt.count(v)}" for k, v in score.letters.items())
    cells = (
        ("Accuracy", "num strong", fmt.percent(score.accuracy)),
        ("95% interval", "bar", f"{bar}<small>{_interval(score.low, score.high)}</small>"),
        ("Right", "num", f"{fmt.count(score.correct)} of {fmt.count(score.presentations)}"),
        ("Letters", "", svg.histogram(score.letters, letters) or fmt.MISSING),
        ("Unparsed", "num", fmt.count(score.unparsed)),
    )
    name = f'<th scope="row"><i class="c{colour}"></i>{e(stage_title(score.label))}</th>'
    return f"<tr>{name}" + "".join(f'<td class="{css}" data-label="{label}">{v}</td>' for label, css, v in cells) + "</tr>"


def comparison(run: Run) -> str:
    """Before and after, question by question: the paired difference with its interval on an axis around zero."""
    if not run.comparisons:
        return ""
    reach = max((abs(v) for c in run.comparisons for v in (c.low, c.high, c.difference) if math.isfinite(v)), default=0.1)
    reach = max(0.05, math.ceil(20 * reach) / 20)
    grpo = any("grpo" in c.after_label.lower() for c in run.comparisons)
    head = "".join(f'<th scope="col">{h}</th>' for h in ("Split", "Before → after", "Difference", "95% interval", "Questions"))
    rows = "".join(_comparison_row(c, reach) for c in run.comparisons)
    axis = f"The axis runs from {fmt.points(-reach, 0)} to {fmt.points(reach, 0)} points; its middle is no change."
    lead = "The same questions, asked before and after. Good: the bar lies wholly to the right of zero."
    table = f'<table class="compare"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table><p class="note">{axis}</p>'
    return section("grpo", "Before and after GRPO" if grpo else "Before and after", lead, table)


def _comparison_row(c: Comparison, reach: float) -> str:
    colour = stage_colour(c.after_label)
    said = f"difference {fmt.points(c.difference)} points, from {fmt.points(c.low)} to {fmt.points(c.high)}"
    zero = [(0.0, "zero", "no change")]
    bar = svg.interval_bar(c.low, c.difference, c.high, marks=zero, range_=(-reach, reach), title=said, colour=colour)
    labels = f"{stage_title(c.before_label)} → {stage_title(c.after_label)}" if c.before_label or c.after_label else ""
    change = f"{fmt.percent(c.before)} → <b>{fmt.percent(c.after)}</b>"
    interval = f"{fmt.points(c.low)} to {fmt.points(c.high)}"
    tone = "good" if c.low > 0 else "bad" if c.high < 0 else "even"
    return (
        f'<tr><th scope="row">{e(c.split)}<small>{e(labels)}</small></th>'
        f'<td class="num" data-label="Before → after"><span>{change}</span></td>'
        f'<td class="num strong {tone}" data-label="Difference">{fmt.points(c.difference)} points</td>'
        f'<td class="bar" data-label="95% interval">{bar}<small>{interval}. {e(difference_in_words(c))}</small></td>'
        f'<td class="num" data-label="Questions">{fmt.count(c.n)}</td></tr>'
    )


def cost(run: Run) -> str:
    """Where the time went, and what each teacher gave for it."""
    stages = [(s.name, s.seconds, s.what) for s in run.stages] or [(r.name, r.seconds, "") for r in run.runs if r.seconds > 0]
    known = [(name, seconds, stage_colour(name, i)) for i, (name, seconds, _) in enumerate(stages)]
    total = sum(seconds for _, seconds, _ in known if seconds > 0)
    if len(known) < 2 or not total > 0:
        return ""
    told = "; ".join(f"{stage_title(n)} {fmt.duration(s)}" for n, s, _ in known)
    bar = svg.stacked_bar([(stage_title(n), s, c) for n, s, c in known], f"Time per stage: {told}")
    rows = "".join(
        f'<li><i class="c{c}"></i><b>{e(stage_title(n))}</b> <span class="num">{fmt.duration(s)}</span> '
        f'<span class="num soft">{fmt.percent(s / total, 0)}</span> <span class="soft">{e(what)}</span></li>'
        for (n, s, c), (_, _, what) in zip(known, stages, strict=True)
    )
    honest = teachers(run)
    honest = f'<p class="honest">{e(honest)}</p>' if honest else ""
    lead = f"{fmt.duration(total)} in all."
    return section("time", "Where the time went", lead, f'{bar}<ul class="stages">{rows}</ul>{honest}')


def curves(run: Run) -> str:
    """All curves, stage by stage: first those that tell how it went, then what else was logged, by family."""
    body = ""
    for position, stage in enumerate(run.runs):
        colour = stage_colour(stage.name, position)
        main, rest = charts_of(stage, colour)
        drawn = grid(main, diary.marks_of(stage.events))
        for family, charts in rest:
            if more := grid(charts):
                title = f"{family.title}: {fmt.plural(more.count('<figure'), 'more curve')}"
                drawn += f'<details><summary>{title}</summary><p class="note">{e(family.good)}</p>{more}</details>'
        if not drawn:
            continue
        seconds = stage_seconds(run, stage.name.lower()) if stage.name else stage.seconds
        facts = [fmt.plural(stage.last_step, "step")]
        facts += [f"{fmt.count(stage.tokens)} tokens"] if math.isfinite(stage.tokens) else []
        facts += [fmt.duration(seconds)] if math.isfinite(seconds) else []
        body += f'<h3><i class="c{colour}"></i>{e(stage_title(stage.name))}<small>{" · ".join(facts)}</small></h3>{drawn}'
    lead = (
        "The faint line is what was logged, the strong one is smoothed; short curves are drawn as they are. Point at a "
        "curve, or select it and use the arrow keys, to read values."
    )
    return section("curves", "Curves", lead, body)


def grid(charts: Iterable[Chart], marks: Sequence[tuple[float, str, str]] = ()) -> str:
    """Charts as cards side by side; marks go into those of `MARKED`."""
    out = ""
    for spec, lines, band in charts:
        own = marks if spec.title in MARKED else ()
        drawing = svg.line_chart(lines, title=spec.title, kind=spec.kind, zero=spec.zero, over=spec.over, marks=own, band=band)
        if not drawing:
            continue
        legend = "".join(
            f'<span><i class="c{line.colour}"></i>{e(line.label)} <b>{legend_value(spec, line)}</b></span>' for line in lines
        )
        unit = unit_of(spec.lines)
        unit = f" <small>{e(unit)}</small>" if unit else ""
        head = f'<div class="chart-head"><h4>{e(spec.title)}{unit}</h4><p class="legend">{legend}</p></div>'
        out += f'<figure class="card">{head}{drawing}<figcaption>{e(spec.good)}</figcaption></figure>'
    return f'<div class="grid-2">{out}</div>' if out else ""


def happened(run: Run) -> str:
    """The diaries of all stages, as tables."""
    body = ""
    for position, stage in enumerate(run.runs):
        if rows := diary.rows(stage.events):
            if len(run.runs) > 1:
                body += f'<h3><i class="c{stage_colour(stage.name, position)}"></i>{e(stage_title(stage.name))}</h3>'
            head = "".join(f'<th scope="col">{h}</th>' for h in ("Event", "When", "What"))
            body += f'<table class="events"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    lead = "What the run wrote into its diary, the newest first; the upright lines in the curves of loss and reward are these."
    return section("happened", "What happened", lead, body)


def watch(run: Run) -> str:
    """Warnings and incidents, then what the run itself noted."""
    found = [f'<li class="warn">{e(text)}</li>' for text in findings(run)]
    noted = [f"<li>{e(text)}</li>" for text in run.notes]
    lead = "" if found else "Nothing stands out: no value that was not finite, no pause, no sign of a known failure."
    if not found and not noted and not any(r.curves for r in run.runs) and not run.exams:
        return ""
    body = f'<ul class="findings">{"".join(found + noted)}</ul>' if found or noted else " "
    return section("watch", "To watch", lead, body)


def what_next(run: Run) -> str:
    """Advice, most pressing first."""
    items = "".join(
        f"<li>{e(text)}{f'<pre><code>{e(command)}</code></pre>' if command else ''}</li>" for text, command in next_steps(run)
    )
    return section("next", "What to do next", "", f'<ol class="next">{items}</ol>')


def record(run: Run) -> str:
    """What it takes to do it again: configuration, versions, machine, fingerprints."""
    body = _configuration("Configuration", run.config_text, run.config, run.model)
    for stage in run.runs:
        if stage.config_text:
            title = f"Configuration of {in_sentence(stage_title(stage.name))}"
            body += _configuration(title, stage.config_text, stage.config, stage.model)
    groups = {**run.groups, **({"versions": run.versions} if run.versions else {})}
    tables = ""
    for name, table in groups.items():
        rows = "".join(f'<tr><th scope="row">{e(k)}</th><td>{e(_fact(k, v))}</td></tr>' for k, v in table.items())
        tables += f"<div><h4>{e(name[:1].upper() + name[1:])}</h4><table>{rows}</table></div>"
    body += f'<div class="facts">{tables}</div>' if tables else ""
    return section("record", "The record", "All it takes to do it again.", body)


def _configuration(title: str, text: str, config: dict[str, Any], model: dict[str, Any]) -> str:
    """A config.yaml to unfold; where the model came from a checkpoint, what it was."""
    told = ""
    if start := config.get("init_from"):
        told = f'<p class="note">Started from {e(start)}: its model and tokenizer take the place of any given above.</p>'
        told += f"<pre><code>{e(dump_yaml({'model': model}))}</code></pre>" if model else ""
    return f"<details><summary>{e(title)}</summary><pre><code>{e(text)}</code></pre>{told}</details>"


def _fact(key: str, text: str) -> str:
    """A value of versions.json as people read it: bytes in GiB."""
    return f"{int(text) / 2**30:.1f} GiB" if key.endswith("_bytes") and text.isdecimal() else text


def _interval(low: float, high: float) -> str:
    return f"{fmt.percent(low)} to {fmt.percent(high)}" if math.isfinite(low) and math.isfinite(high) else "no interval"
