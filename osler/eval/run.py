"""``osler eval``: let a checkpoint take an exam, or measure how well it predicts a text.

A score goes into the run folder's ``exams.json``, where the report finds it. An interrupted evaluation leaves nothing behind.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from math import exp
from pathlib import Path
from typing import Any

from osler.config.recipe import override
from osler.config.schema import decode, encode
from osler.data.exams import ExamsInData
from osler.data.readers import TextFiles
from osler.data.shard_set import ShardSet, open_validation_sets
from osler.eval.config import CLINIC_EXAM, EvalConfig
from osler.eval.exams import score_by_generation, score_by_likelihood
from osler.eval.likelihood import batches, measure, windows
from osler.eval.score import ScoredExam, describe_too_long, summarise
from osler.inference.engine import InferenceEngine
from osler.inference.load import LoadedModel, open_model
from osler.ops.sampling_params import SamplingParams
from osler.records.results import add_exams
from osler.runtime import format as fmt
from osler.runtime.errors import UserError
from osler.runtime.log import Progress
from osler.tasks.item import ExamItem
from osler.tasks.registry import ClinicTask, check_task, load_task
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.round_trip import RoundTrip, refuse_missing_bytes

logger = logging.getLogger(__name__)

CLEAN = ", clean"  # after the name of an exam: its questions that are not in the model's data
LOOKED_AT = 256  # documents whose start is decoded again, to see what the tokenizer loses


def run(checkpoint: str, overrides: Sequence[str] = ()) -> int:
    """Run the command ``eval`` and return the process's exit code."""
    config = config_of(overrides)
    check_task(config.task, "task")
    ready = open_model(checkpoint, device=config.device, which=config.which)
    logger.info(ready.describe())
    config, held_out = complete(config, ready)
    if config.task is not None:
        scores = sit(config, ready)
        print(table(scores))
        save_scores(ready, label(config, ready, checkpoint), scores)
    if config.text is not None:
        print(describe_text(config.text, config, ready, *documents_at(config.text, config.text_field, ready.tokenizer)))
    for name, shards in held_out.items():
        title = "the run's held-out text" if len(held_out) == 1 else name
        print(describe_text(title, config, ready, shards.documents(), shards.num_documents, shards.num_bytes))
    return 0


def config_of(overrides: Sequence[str]) -> EvalConfig:
    """Return the config that the overrides describe; a task without type and path is the clinic's exam with changed fields."""
    given = override({}, overrides)
    task = given.get("task")
    if isinstance(task, dict) and "path" not in task and task.get("type", CLINIC_EXAM.type) == CLINIC_EXAM.type:
        given["task"] = {**encode(CLINIC_EXAM), **task}
    return decode(EvalConfig, given)


def complete(config: EvalConfig, ready: LoadedModel) -> tuple[EvalConfig, Mapping[str, ShardSet]]:
    """Fill in what to measure where nothing was asked for: the clinic's exam, that of the training, or the held-out text."""
    if config.task is not None or config.text is not None:
        return config, {}
    if ready.knows_clinic:
        return replace(config, task=CLINIC_EXAM), {}
    if ready.training.get("eval_task"):
        return decode(EvalConfig, {**encode(config), "task": ready.training["eval_task"]}), {}
    data = ready.shards
    if data is not None and data.is_dir() and not ready.answers_questions and (held_out := open_validation_sets(data)):
        if next(iter(held_out.values())).tokenizer_fingerprint != ready.tokenizer.fingerprint:
            raise UserError(f"{data} was prepared with another tokenizer than the model's; prepare it anew.")
        return config, held_out
    raise UserError(
        f"What shall {ready.path} be examined on? Give an exam (task.type=medqa task.path=FILE, or task.type=clinic) or a text "
        "that it was not trained on (text=FILE or FOLDER)."
    )


def sit(config: EvalConfig, ready: LoadedModel) -> list[ScoredExam]:
    """Let the model take every part of the exam with every requested method."""
    exams = {name: load_task(task) for name, task in parts(config.task).items()}
    for name, items in exams.items():
        if not items:
            raise UserError(f"The exam {name} has no items.")
    ways = methods(config, ready, [item for items in exams.values() for item in items])
    scores = []
    for name, items in exams.items():
        for method in ways:
            with Progress(len(items) * config.permutations, "questions asked", label=name) as progress:
                if method == "generation":
                    score = score_by_generation(
                        InferenceEngine(ready.model, max_rows=config.rows),
                        ready.tokenizer,
                        items,
                        SamplingParams(max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=config.seed),
                        reasoning=ready.reasons if config.reasoning is None else config.reasoning,
                        permutations=config.permutations,
                        progress=progress.update,
                    )
                else:
                    score = score_by_likelihood(
                        ready.model,
                        ready.tokenizer,
                        items,
                        template=ready.answers_questions,
                        normalise=config.normalise,
                        permutations=config.permutations,
                        seed=config.seed,
                        progress=progress.update,
                    )
            scores.append(replace(score, split=name, method=method))
            clean = clean_subset(scores[-1], ExamsInData.from_files(ready.files))
            scores += [] if clean is None else [clean]
    return scores


def clean_subset(score: ScoredExam, known: ExamsInData) -> ScoredExam | None:
    """Return the score on the questions that are known not to be in the model's data; None when these are all or none."""
    ids = {result.item.id for result in score.results}
    checked, found, title = len(ids & known.checked), len(ids & known.found), f"{score.split}{CLEAN}"
    clean = [result for result in score.results if result.item.id in known.clean]
    if not checked:
        return None
    logger.info(
        f"{score.split}: the model's data were checked for {checked:,} of its {len(ids):,} questions. {found:,} were found in "
        "them, or in what was dropped from them."
        + (f' "{title}" is the score on those that were not.' if found and clean else "")
    )
    if not found or not clean:
        return None
    subset = summarise(clean, max_seq_len=int(score.max_seq_len))
    return replace(subset, split=title, method=score.method)


def parts(task: Any) -> dict[str, Any]:
    """Return the exams of a task config by the name they are shown under; each split of the clinic is a separate exam."""
    if isinstance(task, ClinicTask):
        splits = [split.strip() for split in task.split.split(",")]
        return {split: replace(task, split=split) for split in splits}
    return {f"{task.type} {task.split}".strip(): task}


def methods(config: EvalConfig, ready: LoadedModel, items: Sequence[ExamItem]) -> list[str]:
    """Return how the exam is taken: as requested, or as the model's training and the kind of questions suggest."""
    has_options = all(item.options for item in items)
    if config.method in ("likelihood", "both") and not has_options:
        raise UserError("These questions have no options to compare the likelihoods of; use method=generation.")
    if config.method == "both":
        return ["generation", "likelihood"]
    if config.method != "auto":
        return [config.method]
    if ready.answers_questions:
        return ["generation"]
    if not has_options:
        logger.warning("This model was trained on plain text alone and never learned to answer; many answers cannot be read.")
        return ["generation"]
    logger.info(
        "This model was trained on plain text alone and never learned to answer, so the option it finds most likely counts "
        "(method=likelihood); `osler sft` teaches it to answer."
    )
    return ["likelihood"]


def table(scores: Sequence[ScoredExam]) -> str:
    """Return the scores next to their baselines, the letters answered, and remarks."""
    titles = ("exam", "method", "accuracy", "95 % interval", "questions", "chance", "one letter", "unparsed", "cut", "too long")
    rows: list[tuple[str, ...]] = [titles]
    letters: list[str] = []
    notes: list[str] = []
    for score in scores:
        orders = score.presentations // score.n
        rows.append((
            score.split,
            score.method,
            f"{score.accuracy:.1%}",
            f"{score.low:.1%} – {score.high:.1%}",
            f"{score.n:,}" if orders == 1 else f"{score.n:,} × {orders}",
            f"{score.chance:.1%}" if score.chance else "–",
            f"{score.constant_letter_baseline:.1%} ({score.constant_letter})" if score.constant_letter else "–",
            *(f"{count:,}" for count in (score.unparsed, score.cut, score.too_long)),
        ))  # fmt: skip
        if any(score.letters.values()):
            counts = "  ".join(f"{letter} {count:,}" for letter, count in score.letters.items())
            letters.append(f"  {score.split}, {score.method}: {counts}")
        notes += remarks(score)
    below = [*(["", "letters answered", *letters] if letters else []), *([""] if notes else []), *notes]
    return "\n".join([fmt.table(rows, left=2), *below])


def remarks(score: ScoredExam) -> Iterator[str]:
    """Yield remarks that the reader of a score should not overlook."""
    name, baseline = f"{score.split}, {score.method}", max(score.chance, score.constant_letter_baseline)
    if score.constant_letter and score.high < baseline:
        yield f"{name}: below guessing and always answering {score.constant_letter}."
    elif score.constant_letter and score.low <= baseline:
        yield f"{name}: not told apart from guessing or always answering {score.constant_letter}."
    if score.cut * 20 > score.presentations:
        yield f"{name}: {score.cut:,} of {score.presentations:,} answers were cut; max_new_tokens=N gives more room."
    if unfit := describe_too_long(score):
        hint = " A smaller max_new_tokens=N leaves the question more room." if score.method == "generation" else ""
        yield f"{name}: {unfit}{hint}"


def label(config: EvalConfig, ready: LoadedModel, checkpoint: str) -> str:
    """Return the name of the checkpoint in the report: its kind of training, with its step unless it is the run's newest."""
    kind = ready.kind or "model"
    stands_for_run = ready.run is not None and config.which == "newest" and Path(checkpoint).resolve() != ready.path.resolve()
    return kind if stands_for_run else f"{kind}, step {ready.state.get('step', 0):,}"


def save_scores(ready: LoadedModel, name: str, scores: Sequence[ScoredExam]) -> None:
    """Add scores to the run folder's ``exams.json``, next to those of other checkpoints and other exams."""
    if ready.run is None:
        return
    rows = {score.split if score.method == "generation" else f"{score.split}, {score.method}": score for score in scores}
    add_exams(ready.run.exams, name, rows, last=ready.kind)  # the run itself comes last, not an earlier step
    logger.info(f"Saved to {ready.run.exams}; `osler report {ready.run.root}` shows it.")


def documents_at(path: str, field: str, tokenizer: Tokenizer) -> tuple[Iterator[list[int]], int, int]:
    """Return the documents in files, their number and their bytes, for which they are read once more."""
    source = TextFiles(path, field, path_key="text", field_key="text_field")
    sizes = [len(document.text.encode("utf-8")) for document in source if not document.is_empty]
    if not sizes:
        raise UserError(f"{path} holds no text: there is nothing to measure.")
    round_trip = RoundTrip(tokenizer)
    round_trip.look(document.text for document in islice(source, LOOKED_AT))
    round_trip.losses.warn()
    documents = ([*tokenizer.encode(document.text), tokenizer.eos_id] for document in source if not document.is_empty)
    return documents, len(sizes), sum(sizes)


def describe_text(
    name: str, config: EvalConfig, ready: LoadedModel, documents: Iterator[list[int]], count: int, num_bytes: int
) -> str:
    """Measure documents, whose ids end with the end-of-text token, in windows; return their score in a line.

    Only bits per byte can be compared between models of several tokenizers.
    """
    refuse_missing_bytes(ready.tokenizer)
    longest, seq_len = ready.model.config.max_seq_len, config.seq_len or ready.seq_len
    if seq_len > longest:
        raise UserError(f"seq_len {seq_len} is longer than the {longest} tokens (max_seq_len) that the model allows.")
    with Progress(count, "documents", label="text") as progress:

        def counted() -> Iterator[list[int]]:
            for done, ids in enumerate(documents, 1):
                yield ids
                progress.update(done)

        rows = windows(counted(), seq_len=seq_len, start_id=ready.tokenizer.eos_id)
        cost = measure(ready.model, batches(rows), num_bytes)
    return (
        f"{name}: {cost.bits_per_byte:.4f} bits per byte ({cost.bytes:,} bytes; {cost.tokens:,} tokens at {cost.loss:.4f} nats, "
        f"perplexity {exp(cost.loss):.1f}; read {seq_len} tokens at a time)"
    )
