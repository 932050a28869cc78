"""The few lines a run prints when it ends: the same numbers and the same words as the page."""

from __future__ import annotations

from pathlib import Path

from osler.report import format as fmt
from osler.report.attention import attention
from osler.report.read import RunRecord, read_run
from osler.report.words import (
    difference_in_words,
    headline,
    headline_score,
    interval,
    score_in_words,
    stage_title,
    teachers,
    total_seconds,
)
from osler.runtime.files import RunFolder


def summary_text(run_folder: str | Path | RunRecord, page: Path | None = None) -> str:
    """Return a summary for the terminal, without colour or a last newline; raises UserError when it is not a run folder.

    page: where the report was written when it is not in the run folder.
    """
    run = read_run(run_folder)
    lines = ["".join(headline(run))]
    score = headline_score(run)
    if score:
        lines.append(score_in_words(score))
    if run.exams:
        width = max(len(stage_title(s.label)) for s in run.exams)
        wide = max(len(s.split) for s in run.exams)
        for s in run.exams:
            name = f"{stage_title(s.label):<{width}}  {s.split:<{wide}}"
            lines.append(f"  {name}  {fmt.percent(s.accuracy):>6}  ({interval(s)}, n = {fmt.count(s.n)})")
    for c in run.comparisons:
        gain = f"{fmt.points(c.difference)} points ({fmt.points(c.low)} to {fmt.points(c.high)})"
        lines.append(f"{stage_title(c.after_label)} on {c.split}: {gain}. {difference_in_words(c)}")
    if teachers(run):
        lines.append(teachers(run))
    if run.stages:
        stages = ", ".join(f"{stage_title(s.name)} {fmt.duration(s.seconds)}" for s in run.stages)
        lines.append(f"Time: {fmt.duration(total_seconds(run))} ({stages})")
    found = attention(run)
    lines += [f"Watch: {text}" for text in found[:3]]
    if len(found) > 3:
        lines.append(f"Watch: {len(found) - 3} more on the page")
    page = page or RunFolder(run.path).report
    if page.is_file():
        lines.append(f"Report: {page}")
    return "\n".join(lines)
