"""``osler eval``: let a checkpoint take exams, or measure how well it predicts a text.

Scores go into the run folder's ``exams.json``, where the report finds them, and answers into ``answers/`` as they come, so the
same command resumes after an interruption (``records/answers.py``).
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from math import isnan
from pathlib import Path
from typing import Any

from osler.checkpoint.folders import MANIFEST
from osler.config.schema import decode, encode
from osler.data.documents import Document
from osler.data.exams import ExamsInData
from osler.data.named import SOURCES, check_task, load_task, open_hub
from osler.data.prepared import held_out_so_far
from osler.data.readers import TextFiles
from osler.data.shard_set import ShardSet
from osler.eval.clean import clean_subset, tell_checked
from osler.eval.config import CLINIC_EXAM, EvalConfig, ExamSettings, config_of
from osler.eval.exams import Form, Normalise, presentations, score_by_generation, score_by_likelihood
from osler.eval.likelihood import TextScore, batches, describe_text, measure, windows
from osler.eval.score import TOO_LONG, ScoredExam, describe_cut, describe_too_long
from osler.inference.engine import InferenceEngine
from osler.inference.load import LoadedModel, open_model
from osler.inference.rows import warn_of_untrained
from osler.ops.sampling_params import SamplingParams
from osler.records.answers import AnswerLog, answers_file, ids_asked
from osler.records.results import ExamScore, add_exams
from osler.runtime import format as fmt
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, fingerprint, write_json
from osler.runtime.log import Progress
from osler.tasks.answers import PUBLISHED, published_reading
from osler.tasks.item import ExamItem
from osler.tasks.needle import cells_in
from osler.tasks.registry import MadeExam, NeedleTask
from osler.tokenizer.round_trip import Losses, refuse_missing_bytes

logger = logging.getLogger(__name__)

ROUND_TRIPS = 256  # documents whose start is encoded and decoded again, to see what the tokenizer loses
FORMS: dict[str, Form] = {"likelihood": "answer", "letters": "letters", "cloze": "cloze"}  # what each method scores


def run(
    checkpoint: str,
    overrides: Sequence[str] = (),
    json_file: str | None = None,
    harness: str | None = None,
    needle: bool = False,
) -> int:
    """Run the command ``eval`` and return the process's exit code."""
    if needle and any(text.startswith(("task=", "tasks")) for text in overrides):
        raise UserError("--needle is an exam, and another is given: name both, as in task=needle,medqa:FILE.")
    config = config_of([*(["task.type=needle"] if needle else []), *overrides])
    if harness is not None:
        if json_file or replace(config, device="auto", which="newest", rows=EvalConfig.rows) != EvalConfig():
            raise UserError("--harness goes with device=, which= and rows= only; give all else in its own options.")
        from osler.eval import harness as harness_command  # needs the extra "harness"

        return harness_command.run(harness, checkpoint=checkpoint, device=config.device, which=config.which, rows=config.rows)
    for number, task in enumerate(config.exams):
        check_task(task, "task" if config.task else f"tasks[{number}]", config.root)
    if json_file is not None and not Path(json_file).parent.is_dir():
        raise UserError(f"--json {json_file}: there is no folder {Path(json_file).parent}.")
    ready = open_model(checkpoint, device=config.device, which=config.which)
    logger.info(ready.describe())
    config, held_out = complete(config, ready)
    name = label(config, ready, checkpoint)
    scores: list[ScoredExam] = []
    texts: dict[str, TextScore] = {}
    if config.exams:
        scores = sit(config, ready, name, ready.run)
        print(table(scores))
        if ready.run is not None and (kept := [score for score in scores if score.is_kept]):
            save_scores(ready.run, name, kept, last=ready.kind)  # rows of earlier steps come before the run's own
            logger.info(f"Saved to {ready.run.exams}; `osler report {ready.run.root}` shows it.")
        elif ready.run is None:
            logger.info(f"Scores and answers are not saved: {ready.path} is in no run folder, which has a config.yaml.")
    if config.text is not None:
        files = TextFiles(config.text, config.text_field, path_key="text", field_key="text_field")
        texts[config.text] = measured(config.text, lambda: files, config, ready)
    if config.source is not None:
        splits = SOURCES[config.source.name].splits if config.source.name in SOURCES else ("",)
        root = config.source.root or config.root
        source = replace(config.source, split=config.source.split or splits[-1], root=root)
        texts[source.title] = measured(source.title, open_hub(source, "source").documents, config, ready)
    for title, shards in held_out.items():
        title = "the run's held-out text" if len(held_out) == 1 else title
        texts[title] = text_score(config, ready, shards.documents(), shards.num_documents, shards.num_bytes)
    for title, cost in texts.items():
        print(describe_text(title, cost, config.seq_len or ready.model.usable_seq_len))
    if json_file is not None:
        told = {"checkpoint": str(ready.path), "label": name, "config": encode(config)}
        rows = [{field: getattr(score, field) for field in ExamScore.__dataclass_fields__} for score in scores]
        costs = {title: {**asdict(cost), "loss": cost.loss, "bits_per_byte": cost.bits_per_byte} for title, cost in texts.items()}
        write_json(json_file, {**told, "scores": [{**row, "label": name} for row in rows], "texts": costs})
    return 0


def complete(config: EvalConfig, ready: LoadedModel) -> tuple[EvalConfig, Mapping[str, ShardSet]]:
    """Fill in what to measure where nothing was asked for: the clinic's exam, the training's exam, or the held-out text."""
    if config.exams or config.text is not None or config.source is not None:
        return config, {}
    if ready.knows_clinic:
        return replace(config, task=CLINIC_EXAM), {}
    if ready.training.get("eval_task"):
        return decode(EvalConfig, {**encode(config), "task": ready.training["eval_task"]}), {}
    data = ready.shards
    if data is not None and data.is_dir() and not ready.answers_questions and (held_out := held_out_so_far(data)):
        if next(iter(held_out.values())).tokenizer_fingerprint != ready.tokenizer.fingerprint:
            raise UserError(f"{data} was prepared with another tokenizer than the model's; prepare it again.")
        return config, held_out
    raise UserError(
        f"What shall {ready.path} be examined on? Give an exam (task=medqa:FILE, or task=clinic) or a text "
        "that it was not trained on (text=FILE or FOLDER)."
    )


def sit(
    config: ExamSettings, ready: LoadedModel, name: str, run: RunFolder | None, *, takes_full: bool = False
) -> list[ScoredExam]:
    """Let the model take every part of the exams with every requested method; ``name`` labels its answers in ``run``.

    The folder of the run keeps the answers, so that an interrupted exam goes on; without a ``run`` they are kept in memory. With
    ``takes_full`` a part that was finished is not asked again.
    """
    named = parts(config)
    new_tokens = config.max_new_tokens if config.method in ("generation", "both") else 0
    context = ready.context(new_tokens, template=uses_template(config, ready))
    exams = {split: load_task(task, split, config.root, context) for split, task in named.items()}
    if empty := [split for split, items in exams.items() if not items]:
        raise UserError(f"The exam {empty[0]} has no items.")
    kinds = {split: (all(item.options for item in items), isinstance(named[split], NeedleTask)) for split, items in exams.items()}
    ways = {kind: methods(config, ready, *kind) for kind in set(kinds.values())}
    known = ExamsInData.from_files(ready.files)
    scores: list[ScoredExam] = []
    for split, items in exams.items():
        tell_checked(split, ids := {item.id for item in items}, known)
        shown = list(presentations(items, config.permutations, config.seed))
        for method in ways[kinds[split]]:
            head = {"label": name, "exam": split, "method": method}
            place = run if takes_full or run is None or may_replace(run, head, ready, ids) else None
            for score in scores_of(method, config, ready, shown, head, place, takes_full=takes_full):
                score = replace(score, is_kept=run is None or place is not None)
                scores += [score, *clean_subset(score, known)]
    return scores


def scores_of(
    method: str,
    config: ExamSettings,
    ready: LoadedModel,
    shown: Sequence[ExamItem],
    head: Mapping[str, str],
    run: RunFolder | None,
    *,
    takes_full: bool = False,
) -> Iterator[ScoredExam]:
    """Yield the scores on the items that are shown.

    Letters and generation have one score. Another method has one by ``normalise`` and, unless that is none, a raw one. Written
    solutions that end in a number, after a plain prompt, have two more, read as lm-evaluation-harness reads them.
    """
    template = uses_template(config, ready)
    settings: dict[str, Any] = {"permutations": config.permutations, "template": template}
    if method == "generation":
        shown = [item for item in shown for _ in range(config.samples)]
        sampling = SamplingParams(max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=config.seed)
        reasoning = ready.reasons if config.reasoning is None else config.reasoning
        settings |= {**encode(sampling), "samples": config.samples, "reasoning": reasoning}
    else:
        divisors: list[Normalise] = ["none"] if method == "letters" else list(dict.fromkeys((config.normalise, "none")))
        settings["normalise"] = divisors[0]
    with Progress(len(shown), "questions asked", label=head["exam"]) as progress:
        answers = AnswerLog(tell=progress.update)
        if run is not None:
            first = {**head, "checkpoint": ready.path.name, "settings": settings, "asked": len(shown)}
            first["identity"] = identity_of(ready, shown, settings)
            answers = AnswerLog(answers_file(run.answers, head), first, progress.update, takes_full=takes_full)
        if method == "generation":
            engine = InferenceEngine(ready.model, max_rows=config.rows)
            how: dict[str, Any] = {"reasoning": reasoning, "template": template, "answers": answers}
            written = partial(score_by_generation, engine, ready.tokenizer, shown, sampling, **how)
            yield replace(written(), split=head["exam"], method=method, settings=settings)
            is_worked = all(item.thinking and not item.options for item in shown)
            for rule in PUBLISHED if is_worked and not template else ():
                score = written(read=partial(published_reading, rule))
                yield replace(score, split=head["exam"], method=f"{method}, {rule}", settings=settings)
            return
        likely = partial(score_by_likelihood, ready.model, ready.tokenizer, shown, form=FORMS[method], template=template)
        for divisor in divisors:
            name = method if divisor == divisors[0] else f"{method}, raw"
            score = likely(normalise=divisor, answers=answers)
            yield replace(score, split=head["exam"], method=name, settings=settings)


def may_replace(run: RunFolder, head: Mapping[str, str], ready: LoadedModel, ids: Set[str]) -> bool:
    """Return whether answers may be saved: not if the run has some of this checkpoint to all of the questions and to more.

    Says what is kept or replaced.
    """
    known = ids_asked(file := answers_file(run.answers, head), ready.path.name)
    name, more = f"{head['exam']}, {head['method']}", f"the run's answers of this checkpoint to {len(known):,}"
    if ids < known:
        logger.info(f"{name}: {len(ids):,} questions are asked and not saved, to keep {more}. To replace those, delete {file}.")
    elif len(ids) < len(known):
        logger.info(f"{name}: {len(ids):,} questions replace {more}. For a file task.split=NAME would keep both.")
    return not ids < known


def identity_of(ready: LoadedModel, shown: Sequence[ExamItem], settings: Mapping[str, Any]) -> str:
    """Return a hash of the checkpoint, the questions as they are shown, and the settings."""
    manifest = hashlib.sha256((ready.path / MANIFEST).read_bytes()).hexdigest()
    return fingerprint([manifest, [asdict(item) for item in shown], settings])


def parts(config: ExamSettings) -> dict[str, Any]:
    """Return the exams by the name they are shown under; each split of a ``MadeExam`` is a separate exam.

    A second exam of the same name gets its file in its name. Raises UserError when that does not tell them apart.
    """
    named: dict[str, Any] = {}
    exams: Sequence[Any] = config.exams
    for task in exams:
        if config.subset is not None:
            draws = {} if isinstance(task, MadeExam) else {"seed": config.seed}  # the questions of these are drawn anyway
            task = replace(task, limit=config.subset, **draws)
        if isinstance(task, MadeExam):
            for split in map(str.strip, task.split.split(",")):
                if split in named:
                    raise UserError(f"The split {split} of the exam {task.exam} is given twice: leave one out.")
                named[split] = replace(task, split=split)
            continue
        name = f"{task.exam} {task.split}".strip() + (f", {task.fold}" if task.fold != "all" else "")
        name += (f", {task.shots} shots" if task.shots else "") + (", plain prompt" if config.prompt == "plain" else "")
        if name in named and (name := f"{name} {task.path}") in named:
            raise UserError(
                f"The exam {name.strip()} is given twice: leave one out, or give each file its own split=NAME, which tables show."
            )
        named[name] = task
    return named


def uses_template(config: ExamSettings, ready: LoadedModel) -> bool:
    """Return whether questions are asked in the template; a model that did not learn it gets a plain prompt."""
    return ready.answers_questions and config.prompt == "taught"


def methods(config: ExamSettings, ready: LoadedModel, has_options: bool, is_needle: bool = False) -> list[str]:
    """Return how an exam is taken: as requested, or as the model's training and the kind of questions suggest.

    A needle test is taken by ``cloze`` unless something else is requested: it shows a small model best and writes no answer.
    """
    if config.method in ("likelihood", "letters", "cloze", "both") and not has_options:
        raise UserError("These questions have no options to compare the likelihoods of; use method=generation.")
    template = uses_template(config, ready)
    likelihood = ["likelihood"] if template else ["cloze", "letters"]
    if config.method != "auto" or is_needle:
        ways = {"auto": ["cloze"], "likelihood": likelihood, "both": ["generation", *likelihood]}
        return ways.get(config.method, [config.method])
    if template:
        return ["generation"]
    if ready.answers_questions:
        return likelihood if has_options else ["generation"]
    if not has_options:
        logger.warning("This model was trained on plain text alone and never learned to answer; many answers cannot be read.")
        return ["generation"]
    logger.info(
        "This model was trained on plain text alone and never learned to answer, so the option it finds most likely counts "
        "(method=likelihood), by its text and by its letter; `osler sft` teaches it to answer."
    )
    return likelihood


def table(scores: Sequence[ScoredExam]) -> str:
    """Return the scores next to their baselines, further measures, the letters answered, and remarks."""
    titles = ("exam", "method", "accuracy", "95 % interval", "questions", "chance", "one letter", "unparsed", "cut", "too long")
    rows: list[tuple[str, ...]] = [titles]
    more: list[tuple[str, ...]] = [("exam", "method", "measure", "value", "95 % interval", "of")]
    letters: list[str] = []
    grids: list[str] = []
    notes: list[str] = []
    for score in scores:
        times = score.presentations // score.n
        whose = (score.split, score.method)
        for name, found in score.measures.items():
            ends = fmt.MISSING if isnan(found["interval"][0]) else " – ".join(f"{end:.1%}" for end in found["interval"])
            more.append((*whose, name, f"{found['value']:.1%}", ends, f"{found['n']:,}"))
        rows.append((
            *whose,
            f"{score.accuracy:.1%}",
            f"{score.low:.1%} – {score.high:.1%}",
            f"{score.n:,}" if times == 1 else f"{score.n:,} × {times}",
            f"{score.chance:.1%}" if score.chance else "–",
            f"{score.constant_letter_baseline:.1%} ({score.constant_letter})" if score.constant_letter else "–",
            *(f"{count:,}" for count in (score.unparsed, score.cut, score.too_long)),
        ))  # fmt: skip
        if any(score.letters.values()):
            counts = "  ".join(f"{letter} {count:,}" for letter, count in score.letters.items())
            letters.append(f"  {score.split}, {score.method}: {counts}")
        notes += remarks(score)
        grids += grid(score)
    tables = [fmt.table(rows, left=2), *(["", fmt.table(more, left=3)] if len(more) > 1 else [])]
    answered = ["", "letters answered", *letters] if letters else []
    return "\n".join([*tables, *answered, *grids, *([""] if notes else []), *notes])


def grid(score: ScoredExam) -> Iterator[str]:
    """Yield the accuracy of a needle test as a table, a row for each length and a column for each depth."""
    if cells := cells_in(score.groups):
        depths = sorted({depth for _, depth in cells})
        rows = [("tokens", *(f"{depth}% deep" for depth in depths))]
        for length in dict.fromkeys(length for length, _ in cells):
            rows.append((f"{length:,}", *(f"{cells[length, depth]['accuracy']:.0%}" for depth in depths)))
        yield from ("", f"{score.split}, {score.method}: accuracy by length and depth", fmt.table(rows))


def remarks(score: ScoredExam) -> Iterator[str]:
    """Yield remarks that the reader of a score should not overlook."""
    name = f"{score.split}, {score.method}"
    baseline = max(score.chance, score.constant_letter_baseline)
    if score.too_long == score.presentations:
        pass  # no question was asked, and the cause is all that there is to say
    elif score.constant_letter and score.high < baseline:
        yield f"{name}: worse than the better of guessing and always answering {score.constant_letter}."
    elif score.constant_letter and score.low <= baseline:
        yield f"{name}: not told apart from guessing or always answering {score.constant_letter}."
    if cut := describe_cut(score):
        yield f"{name}: {cut}"
    if unfit := describe_too_long(score):
        hint = " A smaller max_new_tokens=N leaves the question more room." if score.method == "generation" else ""
        first = next(result.item.id for result in score.results if result.status == TOO_LONG)
        yield f"{name}: {unfit} The first is {first}.{hint}"


def label(config: EvalConfig, ready: LoadedModel, checkpoint: str) -> str:
    """Return the name of the checkpoint in the report: its kind of training, and its step unless the newest of a run is meant."""
    kind = ready.kind or "model"
    stands_for_run = ready.run is not None and config.which == "newest" and Path(checkpoint).resolve() != ready.path.resolve()
    return kind if stands_for_run else f"{kind}, step {ready.state.get('step', 0):,}"


def save_scores(run: RunFolder, name: str, scores: Sequence[ScoredExam], last: str = "") -> None:
    """Add a checkpoint's scores to the ``exams.json`` of a run; the checkpoint labelled ``last`` comes last there."""
    rows = {score.split if score.method == "generation" else f"{score.split}, {score.method}": score for score in scores}
    add_exams(run.exams, name, rows, last=last)


def measured(name: str, read: Callable[[], Iterable[Document]], config: EvalConfig, ready: LoadedModel) -> TextScore:
    """Measure the documents of a text. The text is read twice, and its first documents are read a third time."""

    def texts() -> Iterator[str]:
        return islice((document.text for document in read() if not document.is_empty), config.documents)

    count = num_bytes = words = 0
    for text in texts():
        count, num_bytes, words = count + 1, num_bytes + len(text.encode("utf-8")), words + len(text.split())
    if not count:
        raise UserError(f"{name} holds no text: there is nothing to measure.")
    losses = Losses()
    losses.look(ready.tokenizer, islice(texts(), ROUND_TRIPS))
    losses.warn()
    ids = ([*ready.tokenizer.encode(text), ready.tokenizer.eos_id] for text in texts())
    return replace(text_score(config, ready, ids, count, num_bytes), words=words)


def text_score(config: EvalConfig, ready: LoadedModel, documents: Iterator[list[int]], count: int, num_bytes: int) -> TextScore:
    """Measure documents, whose ids end with the end-of-text token, in windows."""
    refuse_missing_bytes(ready.tokenizer)
    longest, seq_len = ready.model.config.max_seq_len, config.seq_len or ready.model.usable_seq_len
    if seq_len > longest:
        raise UserError(f"seq_len {seq_len} is longer than the {longest} tokens (max_seq_len) that the model allows.")
    warn_of_untrained(ready.model.usable_seq_len, seq_len)
    with Progress(count, "documents", label="text") as progress:

        def counted() -> Iterator[list[int]]:
            for done, ids in enumerate(documents, 1):
                yield ids
                progress.update(done)

        rows = windows(counted(), seq_len=seq_len, start_id=ready.tokenizer.eos_id)
        return measure(ready.model, batches(rows), num_bytes)
