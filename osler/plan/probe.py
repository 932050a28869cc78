"""``osler plan --probe``: a short run, made here, whose time and memory take the place of a plan's assumptions.

The run itself is made, in a process of its own and a temporary folder, by the command that would train it: the same loop, loader,
measurements, checkpoint and evaluation. It is shorter in three ways. Each stage has some seconds of steps. A batch of many passes
has two, and the time of the others is added. And only the clinic and small files are prepared as the run would do it: in place of
other texts are random words, so that a probe neither needs them nor waits for them, and their preparation is not measured. A run
that starts from another model starts from random weights of the same shape. GRPO needs the model that it starts from, because the
length of its answers is what takes the time. Torch-free.
"""

from __future__ import annotations

import json
import logging
import random
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from osler.config.recipe import dump_yaml
from osler.config.schema import encode
from osler.data.config import ClinicData, CurriculumStage, FilesData, TurnsData
from osler.data.curriculum import rows_per_micro_batch
from osler.model.config import ModelConfig
from osler.monitor.config import MonitorConfig
from osler.optim.schedule import ConstantConfig
from osler.parallel.config import NoParallelConfig
from osler.plan.estimate import Estimate
from osler.plan.grpo import EXAM_QUESTIONS
from osler.plan.plan import Measured, Plan
from osler.plan.training import arithmetic_of
from osler.records.jsonl import START, MetricsLine, read_events, read_metrics
from osler.records.values import as_number
from osler.rl.config import EngineRollout, GrpoConfig
from osler.runtime import child
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, read_json
from osler.tokenizer.config import BPEConfig
from osler.train.config import DataConfig, ExamProbe, TrainConfig

logger = logging.getLogger(__name__)

STAGE_SECONDS = 20.0  # that the steps of a stage should take, by the plan
FEWEST_STEPS, MOST_STEPS = 6, 200  # of a stage; only the later half counts, because a run is slower in its first seconds
PASSES = 2  # of a step: the second adds to gradients, so memory is that of more passes
FEWEST_GRPO_STEPS, MOST_GRPO_STEPS = 4, 20
VOCABULARY = 512  # of the tokenizer for random words; the model keeps its own
SMALL_BYTES = 32 << 20  # files of so many bytes together are prepared as they are
WORDS, DOCUMENT_WORDS, EXAMPLE_WORDS = 90_000, 300, 40  # of the stand-in text, of a document, of a question and of an answer
LOOSENESS = Estimate(0.97, 1.0, 1.08)  # of the memory: data that are there in earnest take some
GRPO_LOOSENESS = Estimate(0.97, 1.08, 1.3)  # answers get longer: six runs of the clinic took 0.99 to 1.23 of their probes
CACHE = "TORCHINDUCTOR_CACHE_DIR"


def measure(config: TrainConfig | GrpoConfig, plan: Plan, model: ModelConfig | None = None) -> Measured:
    """Make a short run of this config here and return what it took. ``plan`` tells how long a step may take.

    ``model`` is that of a run that starts from another one. Raises UserError for what a probe cannot make, and for a run that
    fails.
    """
    with tempfile.TemporaryDirectory(prefix="osler-probe-") as place:
        folder = Path(place)
        if isinstance(config, GrpoConfig):
            short: TrainConfig | GrpoConfig = shortened_grpo(config, plan)
        else:
            short = shortened(config, model or config.model, folder, steps_of(config, plan))
            short = replace(short, compile="always" if arithmetic_of(config, plan.where.device).compiled else "never")
        run = make_run(short, folder)
        lines = list(read_metrics(run.metrics))
        began = next(event for event in read_events(run.events) if event.kind == START)
        start = lines[0].time - began.time + as_number(began.details.get("preparing_seconds"))
        peak = max(line.values.get("perf/memory_peak_bytes", 0.0) for line in lines)
        looseness = GRPO_LOOSENESS if isinstance(config, GrpoConfig) else LOOSENESS
        memory = looseness.through(lambda share: share * peak, "measured here") if peak else None
        evaluated = [line.values["eval/seconds"] for line in lines if "eval/seconds" in line.values]
        if isinstance(short, GrpoConfig):
            assert isinstance(config, GrpoConfig)
            seconds = [line.values["perf/step_seconds"] for line in lines if "perf/step_seconds" in line.values]
            is_exam = "eval/seconds" in lines[0].values  # there is one before the first step
            start -= lines[0].values["eval/seconds"] if is_exam else seconds[0]
            return Measured(
                step_seconds={1: spread(seconds[len(seconds) // 2 :])},
                memory_bytes=memory,
                start_seconds=Estimate(0.8 * start, start, 1.2 * start, "measured here"),
                evaluation_seconds=scaled(evaluated, exam_share(config, short)),
            )
        assert isinstance(config, TrainConfig)
        times = step_times(config, short, lines)
        return Measured(
            step_seconds=times,
            memory_bytes=memory,
            start_seconds=started(config, start - times[1].value),
            evaluation_seconds=scaled(evaluated, evaluation_share(config, short, run)),
        )


# -- the short run -------------------------------------------------------------------------------------------------------------


def steps_of(config: TrainConfig, plan: Plan) -> list[int]:
    """Return the steps that are made of each stage."""
    counts = []
    for span, stretch in zip(config.timeline.spans, plan.pace.stretches, strict=True):
        shorter = passes_of(config, span.rows_per_batch, span.seq_len)
        expected = stretch.seconds.value * min(PASSES, shorter) / shorter
        counts.append(min(MOST_STEPS, max(FEWEST_STEPS, int(STAGE_SECONDS / expected))))
    return counts


def passes_of(config: TrainConfig, rows: int, seq_len: int) -> int:
    """Return how many forward passes a step of one process makes."""
    return rows // rows_per_micro_batch(rows, seq_len, config.micro_batch_tokens)


def shortened(config: TrainConfig, model: ModelConfig, folder: Path, steps: Sequence[int]) -> TrainConfig:
    """Return the config of a short run that takes the same time a step and the same memory, and write its text."""
    if config.teacher is not None or config.trains != "all":
        what = "a teacher" if config.teacher is not None else "trains=indexers"
        raise UserError(f"--probe does not make runs with {what}: leave --probe out")
    stages, until = [], 0
    for span, count in zip(config.timeline.spans, steps, strict=True):
        rows = span.rows_per_batch
        if (passes := passes_of(config, rows, span.seq_len)) > PASSES:
            rows = rows // passes * PASSES
        until += count * rows * span.seq_len
        stages.append(CurriculumStage(seq_len=span.seq_len, batch_tokens=rows * span.seq_len, until_tokens=until))
    last = stages[-1]
    assert last.batch_tokens is not None
    whole = is_prepared_whole(config)
    small, half = BPEConfig(vocab_size=min(VOCABULARY, model.vocab_size)), until // 2
    return replace(
        config,
        init_from=None,
        branch_from=None,
        context=None,
        model=model,
        tokenizer=config.tokenizer if whole and config.init_from is None else small,
        data=config.data if whole else stand_in(config.kind, folder),
        validation=config.validation if whole else (),
        too_long="drop",
        batch_tokens=config.batch_tokens if config.curriculum else last.batch_tokens,
        curriculum=(*stages[:-1], replace(last, until_tokens=None)) if config.curriculum else (),
        total_tokens=until,
        max_minutes=None,
        schedule=ConstantConfig(),
        parallel=NoParallelConfig(),
        log_every_steps=1,
        eval_every_tokens=half,
        exam=ExamProbe(),
        checkpoint=replace(
            config.checkpoint,
            every_tokens=half if config.checkpoint.every_tokens < config.total_tokens else until,
            keep_every_tokens=0,
        ),
        early_stopping_patience=None,
        monitor=monitored(config.monitor),
    )


def shortened_grpo(config: GrpoConfig, plan: Plan) -> GrpoConfig:
    """Return the config of a short run of GRPO; ``plan`` tells how long a step may take."""
    if not isinstance(config.rollout, EngineRollout):
        raise UserError("--probe makes no runs with rollout servers: leave --probe out")
    fitting = int(STAGE_SECONDS / plan.pace.stretches[0].seconds.value)
    steps = min(MOST_GRPO_STEPS, config.steps, max(FEWEST_GRPO_STEPS, fitting))
    exam = config.eval_task
    if exam is not None:  # as many answers as are drawn together, if that is quick
        drawn = plan.time["sampling"].value / config.steps / config.algorithm.completions_per_step
        answers = min(config.rollout_rows, STAGE_SECONDS / drawn)
        items = max(1, int(answers / config.eval_permutations))
        exam = replace(exam, limit=min(items, exam.limit or items))
    half = -(-steps // 2)
    return replace(
        config,
        eval_task=exam,
        steps=steps,
        eval_every_steps=half,
        checkpoint=replace(
            config.checkpoint, every_steps=half if config.checkpoint.every_steps < config.steps else steps, keep_every_steps=0
        ),
        preflight="off",
        parallel=NoParallelConfig(),
        early_stopping_patience=None,
        schedule=ConstantConfig(),
        monitor=monitored(config.monitor),
    )


def is_prepared_whole(config: TrainConfig) -> bool:
    """Return whether the short run prepares the data of the run itself: the clinic, or files that are there and small."""
    total = 0
    for source in (*config.sources.values(), *config.validation):
        if isinstance(source, ClinicData):
            continue
        path = Path(source.place)
        if not isinstance(source, (FilesData, TurnsData)) or not source.place or not path.exists():
            return False
        total += sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    return bool(config.sources) and total <= SMALL_BYTES


def monitored(config: MonitorConfig) -> MonitorConfig:
    """Return what a short run measures of itself: what the run would, but without trackers, and never less than its parts."""
    return MonitorConfig(level="full" if config.level == "full" else "basic", full_every_steps=config.full_every_steps)


def stand_in(kind: str, folder: Path) -> DataConfig:
    """Write random words, or questions and answers of them; return them as the data of a run, half of them held out."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(4000)]

    def rows() -> Iterator[dict[str, str]]:
        size = DOCUMENT_WORDS if kind == "pretrain" else 2 * EXAMPLE_WORDS
        for _ in range(WORDS // size):
            drawn = rng.choices(words, k=size)
            if kind == "pretrain":
                yield {"text": " ".join(drawn)}
            else:
                yield {"question": " ".join(drawn[:EXAMPLE_WORDS]), "answer": " ".join(drawn[EXAMPLE_WORDS:])}

    path = folder / "words.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    if kind == "pretrain":
        return FilesData(path=str(path), holdout_fraction=0.5)
    return TurnsData(path=str(path), holdout_fraction=0.5)


def make_run(config: TrainConfig | GrpoConfig, folder: Path) -> RunFolder:
    """Make a run in a process of its own and return its folder; raises UserError when it fails."""
    recipe, log, run = folder / "recipe.yaml", folder / "probe.log", RunFolder(folder / "run")
    recipe.write_text(dump_yaml(encode(config)), encoding="utf-8")
    # A run that compiles finds no code of the probe, as the probe finds none of earlier runs.
    environment = {CACHE: str(folder / "compiled")}
    with log.open("wb") as output:
        process = child.start(
            "osler.cli", config.kind, str(recipe), "--run", str(run.root), env=environment, stdout=output, stderr=output
        )
        try:
            code = process.wait()
        finally:
            process.kill()
    if code:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = [line.removeprefix("osler: ") for line in said if line.startswith("osler: ")] or said or [f"exit code {code}"]
        raise UserError(f"the probe could not make its steps: {last[-1]}")
    return run


# -- what it took --------------------------------------------------------------------------------------------------------------


def step_times(config: TrainConfig, short: TrainConfig, lines: Sequence[MetricsLine]) -> dict[int, Estimate]:
    """Return the time of a step of each stage, by the later half of its steps.

    The first step of a stage compiles and has no speed in its line. Those that follow it are slow while memory is new and
    compilers end.
    """
    times = {}
    for span, own in zip(config.timeline.spans, short.timeline.spans, strict=True):
        more = passes_of(config, span.rows_per_batch, span.seq_len) / passes_of(short, own.rows_per_batch, own.seq_len)
        seconds = [
            own.batch_tokens / line.values["perf/tokens_per_second"] + (more - 1) * seconds_of_passes(line.values)
            for line in lines
            if "perf/tokens_per_second" in line.values and short.timeline.at_step(line.step - 1).number == own.number
        ]
        times[span.number] = spread(seconds[len(seconds) // 2 :])
    return times


def seconds_of_passes(values: Mapping[str, float]) -> float:
    """Return the seconds of a step that more passes would repeat."""
    return sum(values[f"perf/{part}_ms"] for part in ("data", "forward", "backward")) / 1000


def spread(seconds: Sequence[float]) -> Estimate:
    """Return the median of some measurements, with an interval that has them all."""
    return Estimate(min(seconds), statistics.median(seconds), max(seconds), f"measured here, {len(seconds)} times")


def scaled(seconds: Sequence[float], share: float) -> Estimate | None:
    """Return the time of a whole evaluation, of which a share was measured."""
    return spread(seconds).times(1 / share) if seconds else None


def evaluation_share(config: TrainConfig, short: TrainConfig, run: RunFolder) -> float:
    """Return the share of an evaluation's tokens that the short run reads, by what it holds out."""
    manifest = read_json(run.root / "data" / "manifest.json")
    places = [*(manifest["validation"] or manifest["sources"]).values()]
    sets = [split for place in places if (split := place["splits"].get("validation")) and split["documents"]]
    read = sum(min(one["tokens"], short.evaluated_tokens(len(sets))) for one in sets)
    if is_prepared_whole(config):
        return read / sum(min(one["tokens"], config.evaluated_tokens(len(sets))) for one in sets) if read else 1.0
    count = max(1, len(config.validation) or len(config.sources))
    return read / (count * config.evaluated_tokens(count))


def exam_share(config: GrpoConfig, short: GrpoConfig) -> float:
    """Return the share of an exam's questions that the short run asks."""
    if config.eval_task is None or short.eval_task is None:
        return 1.0
    return (short.eval_task.limit or 1) / (config.eval_task.limit or EXAM_QUESTIONS)


def started(config: TrainConfig, seconds: float) -> Estimate:
    """Return the time until the first step; the preparation of data for which there were random words comes on top."""
    if is_prepared_whole(config):
        return Estimate(0.8 * seconds, seconds, 1.2 * seconds, "measured here, compilation included")
    return Estimate(0.8 * seconds, seconds, 2 * seconds, "measured here, compilation included, without preparing the data")
