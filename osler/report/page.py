"""The report: one self-contained HTML page about a run, written into its folder as `report.html`. Only this module uses Jinja2.

Whatever a run wrote is escaped. A page fetches nothing: style, script and charts are in it, the fonts are the reader's, and a
content policy forbids the browser to load anything. The whole page can be read without the script, which adds read-outs on the
curves and the switch between light and dark.
"""

import math
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from osler.config.recipe import dump_yaml
from osler.config.schema import encode
from osler.monitor.metrics import declared_name
from osler.plan.actual import HEAD, Part, compare
from osler.records.answers import AnswerSheet
from osler.records.results import ExamScore, SampledAnswer
from osler.records.values import as_dict, as_list, as_number
from osler.report import charts, svg, words
from osler.report.curves import Series
from osler.report.read import RunRecord, StageLog, read_run, stage_rank
from osler.report.words import stage_colour, stage_title
from osler.runtime import format as fmt
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, write_atomic

MOST_STAGES, MOST_QUESTIONS = 3, 24  # stages and questions whose answers are shown
MOST_EVALUATIONS = 8  # rows in the table of validation sets


def report(path: str, out: str | None) -> str:
    """Run the command ``report``: write the page, and return a summary."""
    run = read_run(path)
    return words.summary_text(run, build_report(run, out))


def build_report(run_folder: str | Path | RunRecord, out: str | Path | None = None) -> Path:
    """Write the page, into the run folder unless `out` names a file, and return its path.

    Raises UserError when the folder holds no run, or when the file cannot be written.
    """
    run = read_run(run_folder)
    ends = [abs(v) for pair in run.comparisons for v in (*pair.interval, pair.difference) if math.isfinite(v)]
    about_grpo = any("grpo" in pair.after_label.lower() for pair in run.comparisons)
    return write_page(
        RunFolder(run.path).report if out is None else Path(out),
        "report.html",
        {"name": run.path.resolve().name, "what": "Osler run report", "made_of": "the files of this run"},
        run=run,
        summary=_summary(run),
        tiles=[tile for tile in _tiles(run) if tile[1] != fmt.MISSING],
        comparison_title="Before and after GRPO" if about_grpo else "Before and after",
        reach=max(0.05, math.ceil(20 * max(ends, default=0.1)) / 20),  # ends of the axis of differences, on both sides of zero
        questions=_questions(run),
        answers=[(f"{stage_title(sheet.label)}, {sheet.name}", _wrong_first(sheet)) for sheet in run.answers],
        details=[(score, list(_details(score))) for score in run.exams if score.measures],
        maps=charts.heat_maps((stage_title(score.label), stage_colour(score.label), score) for score in run.exams),
        times=_times(run),
        stages=[_stage(run, stage, position) for position, stage in enumerate(run.runs)],
        facts={**run.groups, "versions": run.versions},
    )


def write_page(path: Path, template: str, about: Mapping[str, str], **values: Any) -> Path:
    """Fill the sections of a template with values, put them into a page that links to them, write it, and return its path.

    ``about``: the page's name, what it is and what it was made of. Raises UserError when the page cannot be written.
    """
    body = Markup(PAGES.get_template(template).render(values))
    links = [(anchor, Markup(title)) for anchor, title in re.findall('<section id="([^"]+)"><header><h2>([^<]+)', body)]
    folder = resources.files("osler.report")
    style, script = (
        Markup("".join(folder.joinpath(file).read_text(encoding="utf-8") for file in files))
        for files in (("house.css", "style.css"), ("theme.js", "script.js"))
    )
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    text = PAGES.get_template("page.html").render(about, body=body, made=made, links=links, style=style, script=script)
    try:
        write_atomic(path, text)
    except OSError as error:
        elsewhere = "`osler report RUN --out FILE`, or `osler compare` with --out FILE, writes it elsewhere."
        raise UserError(f"The page cannot be written to {path}: {error.strerror}. {elsewhere}") from error
    return path


def _stage(run: RunRecord, log: StageLog, position: int) -> dict[str, Any]:
    """Return the values of one stage's log that the page shows."""
    colour = stage_colour(log.name, position)
    groups = words.group_events(log.events)
    main, families = charts.charts_of(log, colour, words.marks_of(groups))
    seconds = words.seconds_of(run, log.name.lower()) if log.name else log.seconds
    facts = (fmt.plural(log.last_step, "step"), f"{fmt.count(log.tokens)} tokens", fmt.duration(seconds))
    return {
        "title": stage_title(log.name), "colour": colour, "main": main, "families": families, "groups": groups,
        "sets": _sets(log), "plan": _plan(log),
        "facts": [fact for fact in facts if not fact.startswith(fmt.MISSING)],
    }  # fmt: skip


def _plan(log: StageLog) -> list[Part]:
    """Return plan against actual of a stage; nothing where its folder lacks what a plan is made of."""
    try:
        return compare(log.folder)
    except (UserError, OSError, KeyError):
        return []


def _sets(log: StageLog) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the titles of a table of validation sets over time, and its rows: a step, and two values of each set."""
    for what in ("bits_per_byte", "loss"):  # where only answers are learned, there is a loss alone
        names = [name.split("/")[1] for name in log.curves if declared_name(name) == f"eval/<set>/{what}"]
        if names:
            break

    def values(name: str, what: str) -> dict[int, float]:
        series = log.curves.get(f"eval/{name}/{what}", Series())
        return dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))

    sets = {name: (values(name, what), values(name, "token_accuracy")) for name in names}
    steps = sorted({step for by_step, _ in sets.values() for step in by_step})
    some = dict.fromkeys(steps[place] for place in np.linspace(0, len(steps) - 1, MOST_EVALUATIONS).round().astype(int) if steps)
    rows = []
    for step in some:
        pairs = [(bits.get(step, math.nan), right.get(step, math.nan)) for bits, right in sets.values()]
        rows.append((step, [f"{fmt.number(value)}, {fmt.percent(share)}" for value, share in pairs]))
    return [f"Step ({what.replace('_', ' ')}, token accuracy)", *sets], rows


def _summary(run: RunRecord) -> str:
    """Return a summary in plain words: the model, the amount of data, and the score."""
    score, tokens = words.headline_score(run), words.total_tokens(run)
    what = []
    if model := words.model_of(run):
        shape = f"{model.num_layers} layers of width {model.hidden_size}"
        what.append(f"A model of {fmt.count(model.num_parameters)} parameters ({shape})")
    if math.isfinite(tokens):
        what.append(f"{'trained' if what else 'Trained'} on {fmt.count(tokens)} tokens")
    return (", ".join(what) + "." if what else "") + (f" {words.score_in_words(score)}" if score else "")


def _tiles(run: RunRecord) -> Iterator[tuple[str, str, str]]:
    """Yield the key numbers: label, value, and a remark on the value."""
    together = "all stages" if len(run.stages) > 1 or len(run.runs) > 1 else ""
    if score := words.headline_score(run):
        yield "Score", fmt.percent(score.accuracy), words.interval(score)
    if model := words.model_of(run):
        yield "Parameters", fmt.count(model.num_parameters), ""
    yield "Tokens seen", fmt.count(words.total_tokens(run)), together
    yield "Time", fmt.duration(words.seconds_of(run)), together
    for metric, label in (("eval/loss", "Held-out loss"), ("perf/tokens_per_second", "Tokens/s"), ("reward", "Reward")):
        if stage := next((stage for stage in run.runs if len(stage.finite(metric))), None):
            known = stage.finite(metric).values
            is_speed = metric.startswith("perf/")
            shown = fmt.count(np.median(known)) if is_speed else fmt.number(known[-1])
            yield label, shown, f"{stage_title(stage.name)}, {'median' if is_speed else 'at the end'}"


def _times(run: RunRecord) -> list[tuple[str, float, int, str]]:
    """Return title, seconds, colour and words of each stage; nothing for fewer than two stages."""
    known = [(s.name, s.seconds, s.what) for s in run.stages] or [(r.name, r.seconds, "") for r in run.runs]
    times = [(stage_title(n), s, stage_colour(n, i), what) for i, (n, s, what) in enumerate(known) if s > 0]
    return times if len(times) > 1 else []


def _questions(run: RunRecord) -> list[dict[str, SampledAnswer]]:
    """Return each question's answers by stage, from the last stages that were asked."""
    names = [stage.name for stage in run.stages]
    stages = sorted(dict.fromkeys(sample.stage for sample in run.samples), key=lambda name: stage_rank(name, names))
    stages = stages[-MOST_STAGES:]
    by_id: dict[str, dict[str, SampledAnswer]] = {}
    for sample in run.samples:
        if sample.stage in stages:
            by_id.setdefault(sample.id, {})[sample.stage] = sample
    return [{stage: answers[stage] for stage in stages if stage in answers} for answers in by_id.values()][:MOST_QUESTIONS]


def _wrong_first(sheet: AnswerSheet) -> list[dict[str, SampledAnswer]]:
    """Return an answer to each question of an exam, as ``_questions`` does: wrong answers come first, the surest leading."""
    by_id: dict[str, SampledAnswer] = {}
    for answer in sorted(sheet.answers, key=lambda answer: (bool(answer.correct), -np.nan_to_num(answer.confidence))):
        by_id.setdefault(answer.id, answer)
    return [{sheet.label: answer} for answer in list(by_id.values())[:MOST_QUESTIONS]]


def _details(score: ExamScore) -> Iterator[tuple[str, float, float, float, float, float]]:
    """Yield name, value, the ends of its interval, the number of cases, and the confidence that the value should have."""
    for name, measure in score.measures.items():
        found = as_dict(measure)
        low, high = (*map(as_number, as_list(found.get("interval"))), math.nan, math.nan)[:2]
        yield name, as_number(found.get("value")), low, high, as_number(found.get("n")), as_number(found.get("confidence"))


def place(value: float, start: float = 0.0, end: float = 1.0) -> float:
    """Return where a value lies between two ends, in percent; a value outside lands on the end."""
    return round(100 * min(max((value - start) / (end - start), 0.0), 1.0), 2)


PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("osler.report"), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
PAGES.globals |= {"fmt": fmt, "svg": svg, "words": words, "dump_yaml": dump_yaml, "encode": encode}
PAGES.globals |= {"isfinite": math.isfinite, "place": place, "plan_head": HEAD}
PAGES.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
