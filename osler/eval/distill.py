"""``osler distill``: a teacher answers questions, and its right answers become examples for another model to learn from.

The teacher gives several answers to each question. Of those that an exam counts as right (``grade``) and that follow the
template, the command keeps a few for each question, and each reasoning once. This is rejection sampling (STaR, arXiv 2203.14465;
arXiv 2308.01825). The options of a question are permuted for each answer. The command also writes, beside the rows in OUT.jsonl:

- ``OUT.answers.jsonl``: every answer as it is drawn, so the same command goes on after an interruption;
- ``OUT.summary.json``: the teacher, the exam, the settings, and for every question how many answers were right and how many kept.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from osler.checkpoint.folders import fingerprint_of
from osler.config.schema import encode
from osler.data.named import check_task, load_task
from osler.eval.config import DistillConfig, distill_config_of
from osler.eval.exams import score_by_generation
from osler.eval.score import Result
from osler.inference.engine import InferenceEngine
from osler.inference.load import open_model
from osler.ops.sampling_params import SamplingParams
from osler.records import jsonl
from osler.records.answers import AnswerLog
from osler.runtime.errors import UserError
from osler.runtime.files import fingerprint, locked, write_atomic, write_json
from osler.runtime.log import Progress
from osler.runtime.world import require_one_process
from osler.tasks.item import permute, plain, render_question
from osler.tasks.registry import MadeExam
from osler.tokenizer.chat import Completion, parse_completion

logger = logging.getLogger(__name__)


def run(checkpoint: str, out: str, overrides: Sequence[str] = ()) -> str:
    """Run the command ``distill``; return a summary of the answers. Raises UserError when no answer can be learned from."""
    require_one_process("distill")
    config = distill_config_of(overrides)
    rows_file = Path(out)
    check_task(config.task, "task")
    if rows_file.suffix != ".jsonl" or not rows_file.absolute().parent.is_dir():
        raise UserError(f"--out {out}: give a file that ends with .jsonl, in a folder that exists.")
    if rows_file.exists() and not rows_file.with_suffix(".summary.json").exists():
        raise UserError(f"--out {out} exists, and no `osler distill` wrote it: give a file of another name.")
    ready = open_model(checkpoint, device=config.device, which=config.which)
    if not ready.answers_questions:
        raise UserError(f"{ready.path} was trained on text alone and never learned to answer: `osler sft` teaches it first.")
    logger.info(ready.describe())
    exam, is_for_training = questions_of(config.task)
    if not is_for_training:
        remedy = (
            "Questions for training are those of task=clinic:train, or of a file whose split says so."
            if isinstance(config.task, MadeExam)
            else "If it is for training, let its split say so: task.type=TYPE task.path=FILE task.split=train."
        )
        logger.warning(
            f"{exam} does not say that it is for training, and a model that learns these rows can no longer be examined on it. "
            f"{remedy}"
        )
    items = load_task(config.task, context=ready.context(config.max_new_tokens))
    shown = [permute(item, config.seed, visit) for item in items for visit in range(config.samples)]
    reasoning = ready.reasons if config.reasoning is None else config.reasoning
    sampling = SamplingParams(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p, seed=config.seed
    )
    teacher = {"teacher": str(ready.path), "fingerprint": fingerprint_of(ready.path)}
    # A hash of everything that the answers depend on. The teacher's path is left out, because a teacher may be moved.
    identity = fingerprint([teacher["fingerprint"], [asdict(item) for item in shown], encode(sampling), reasoning])
    head = {"exam": exam, "asked": len(shown), "identity": identity}
    answers_file = rows_file.with_suffix(".answers.jsonl")
    try:
        with Progress(len(shown), "answers", label="distill") as progress:
            answers = AnswerLog(answers_file, head, progress.update, lasting=True)
            engine = InferenceEngine(ready.model, max_rows=config.rows)
            with locked(answers_file, "--out"):
                score = score_by_generation(engine, ready.tokenizer, shown, sampling, reasoning=reasoning, answers=answers)
    except KeyboardInterrupt:
        logger.info(f"The answers so far stay in {answers_file}; the same command goes on from there.")
        raise
    completions = [parse_completion(ready.tokenizer, answers.outputs[n], reasoning=reasoning) for n in range(len(shown))]
    rows, questions, fates = select(score.results, completions, config, exam, reasoning=reasoning)
    write_json(
        rows_file.with_suffix(".summary.json"),
        {**teacher, "exam": exam, "config": encode(config), "answers": dict(fates), "questions": questions},
    )
    summary = describe(exam, questions, fates, config)
    if not rows:
        raise UserError(f"{summary} So there is nothing to learn from: take easier questions, more samples, or a better teacher.")
    write_atomic(rows_file, "".join(map(jsonl.to_line, rows)))
    thinking = " data.thinking_field=thinking" if reasoning else ""
    return f"{summary}\n{rows_file}: `osler sft init_from=RUN data.type=turns data.path={rows_file}{thinking}` learns them."


def questions_of(task: Any) -> tuple[str, bool]:
    """Return a name for the questions of a task, with their split, and whether the name says that they are for training."""
    if isinstance(task, MadeExam):
        return f"{task.exam} {task.split}", task.split in ("train", "drill")
    name = task.split or Path(task.path).name or "as examined"  # an exam by name is its official split
    fold = "" if task.fold == "all" else f", {task.fold} fold"
    return f"{task.exam} {name}{fold}", "train" in name.lower() or task.fold == "train"


def select(
    results: Sequence[Result], completions: Sequence[Completion], config: DistillConfig, exam: str, *, reasoning: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Counter[str]]:
    """Return the rows to learn from, a record of each question, and how many answers had which fate.

    ``results`` and ``completions`` have ``config.samples`` answers to each question, one question after another. A fate is
    "kept", "wrong", "malformed", "duplicate" (reasoning that is kept already) or "spare" (more than ``config.keep``).
    """
    rows: list[dict[str, Any]] = []
    questions, fates = [], Counter[str]()
    for start in range(0, len(results), config.samples):
        known = set[tuple[str, str]]()
        found = Counter[str]()
        for result, completion in zip(results[start:][: config.samples], completions[start:], strict=False):
            item, thinking, answer = result.item, completion.thinking, completion.answer or ""
            # The right option has another letter in each order, but the same text.
            key = plain(thinking), "" if item.options else plain(answer)
            fate = "kept"
            if not result.right:
                fate = "wrong"
            elif not completion.well_formed or (reasoning and not thinking):
                fate = "malformed"
            elif key in known:
                fate = "duplicate"
            elif len(known) >= config.keep:
                fate = "spare"
            else:
                known.add(key)
                turn = {"question": render_question(item), **({"thinking": thinking} if reasoning else {}), "answer": answer}
                rows.append({**turn, "id": item.id, "exam": exam})
            found[fate] += 1
        right = config.samples - found["wrong"]
        counts = {"question": results[start].item.question, "samples": config.samples, "right": right, "kept": found["kept"]}
        questions.append({"id": results[start].item.id, **counts})
        fates += found
    return rows, questions, fates


def describe(exam: str, questions: Sequence[dict[str, Any]], fates: Counter[str], config: DistillConfig) -> str:
    """Return how often the teacher was right on the questions, and how many of its answers are kept."""
    passed = Counter(question["right"] for question in questions)
    by_right = ", ".join(f"{right}: {passed[right]:,}" for right in sorted(passed))
    rate = fmean(question["right"] / config.samples for question in questions)
    return (
        f"{exam}: {len(questions):,} questions, {config.samples} answers to each, {rate:.1%} of them right "
        f"(questions by right answers: {by_right}). Kept: {fates['kept']:,} answers, at most {config.keep} of a question; "
        f"right but left out: {fates['duplicate']:,} duplicates, {fates['spare']:,} above that number, "
        f"{fates['malformed']:,} not in the template."
    )
