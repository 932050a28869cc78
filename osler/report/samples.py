"""The samples section: the same question answered by several checkpoints, side by side, right and wrong marked."""

from __future__ import annotations

import html

from osler.report import format as fmt
from osler.report.read import Run, Sample, stage_rank
from osler.report.words import in_sentence, stage_colour, stage_title

MAX_STAGES = 3
OPEN_QUESTIONS = 4
MAX_QUESTIONS = 24
LONG_THINKING = 700  # characters; longer ones are folded away


def samples(run: Run) -> tuple[str, str]:
    """(lead, body) of the section, both HTML and empty when there are no samples."""
    stages = sorted(dict.fromkeys(s.stage for s in run.samples), key=lambda n: stage_rank(n, [s.name for s in run.stages]))
    stages = stages[-MAX_STAGES:]
    by_id: dict[str, dict[str, Sample]] = {}
    for sample in run.samples:
        if sample.stage in stages:
            by_id.setdefault(sample.id, {})[sample.stage] = sample
    if not by_id:
        return "", ""
    questions = list(by_id.values())
    lead = "Not picked: as the run drew them." if len(stages) < 2 else _changes(questions, stages)
    cards = [_question(question, stages) for question in questions[:MAX_QUESTIONS]]
    body = "".join(cards[:OPEN_QUESTIONS])
    if len(cards) > OPEN_QUESTIONS:
        rest = len(cards) - OPEN_QUESTIONS
        summary = f"<summary>{fmt.plural(rest, 'more question')}</summary>"
        body += f"<details>{summary}{''.join(cards[OPEN_QUESTIONS:])}</details>"
    return lead, body


def _changes(questions: list[dict[str, Sample]], stages: list[str]) -> str:
    """How many of the shown questions changed sides between the last two checkpoints."""
    before, after = stages[-2:]
    pairs = [(q[before].correct, q[after].correct) for q in questions if before in q and after in q]
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    first, second = (html.escape(in_sentence(stage_title(name))) for name in (before, after))
    return (
        f"The same questions after {first} and after {second}, not picked: of {len(pairs)}, {gained} turned right and "
        f"{lost} turned wrong. Too few to measure by; read them for how it answers."
    )


def _question(answers: dict[str, Sample], stages: list[str]) -> str:
    first = next(iter(answers.values()))
    options = "".join(_option(first, i, option) for i, option in enumerate(first.options))
    options = f'<ol class="options" type="A">{options}</ol>' if options else ""
    known = "" if first.options and "right-option" in options else first.correct_answer
    key = f'<p class="soft">Correct answer: <b>{html.escape(known)}</b></p>' if known else ""
    columns = "".join(_answer(answers[stage]) for stage in stages if stage in answers)
    question = f'<p class="question">{html.escape(first.question)}</p>'
    return f'<article class="card sample">{question}{options}{key}<div class="answers">{columns}</div></article>'


def _option(sample: Sample, position: int, option: str) -> str:
    letter, key = chr(ord("A") + position), sample.correct_answer.strip()
    right = key.casefold() in (letter.casefold(), option.strip().casefold()) or key.rstrip(".").endswith(f"({letter})")
    css, mark = (' class="right-option"', ' <span class="soft">(correct)</span>') if right else ("", "")
    return f"<li{css}>{html.escape(option)}{mark}</li>"


def _answer(sample: Sample) -> str:
    tone, word = {True: ("right", "✓ right"), False: ("wrong", "✗ wrong"), None: ("", "not marked")}[sample.correct]
    title = html.escape(stage_title(sample.stage))
    head = f'<h4><i class="c{stage_colour(sample.stage)}"></i>{title}<span>{word}</span></h4>'
    thinking = f'<p class="thinking">{html.escape(sample.thinking.strip())}</p>' if sample.thinking.strip() else ""
    if len(sample.thinking) > LONG_THINKING:
        thinking = f"<details><summary>Thinking, {fmt.count(len(sample.thinking))} characters</summary>{thinking}</details>"
    answer = html.escape(sample.answer.strip()) or '<span class="soft">(no answer)</span>'
    return f'<div class="answer {tone}">{head}{thinking}<p class="said">{answer}</p></div>'
