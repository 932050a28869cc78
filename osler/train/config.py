"""The configuration of pretraining and fine-tuning. Torch-free.

Time is tokens seen: schedules and intervals are in tokens, and only the interval of metrics is in steps. Defaults run on a
laptop's CPU with the built-in clinic.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from osler.config.schema import TAGGED, Fraction, Ge, Le, NonNegativeInt, PositiveFloat, PositiveInt, Seed, config
from osler.data.config import (
    FIRST_SHARD_TOKENS,
    VALIDATION_TOKENS,
    AnySource,
    ClinicData,
    CurriculumStage,
    PreparedData,
    TextData,
    ValidationSets,
    check_validation,
    sources_of,
    wrong_weights,
)
from osler.data.curriculum import Timeline, check_shares, lay_out, rows_per_micro_batch
from osler.model.config import ContextConfig, ModelConfig, SparseAttentionConfig
from osler.optim.schedule import LinearConfig, ScheduleConfig, warmup_of
from osler.parallel.config import COMPILE_MIN_STEPS, NoParallelConfig, ParallelConfig
from osler.runs.config import CheckpointConfig, RunConfig
from osler.runtime.errors import UserError
from osler.tasks.registry import TaskConfig
from osler.tokenizer.config import SMALLEST_VOCABULARY, BPEConfig, TokenizerConfig

DataConfig = Annotated[TextData | PreparedData, TAGGED]
UNTRIED_WITH_DEEPSPEED = "{} was never tried with parallel.type=deepspeed: use parallel.type=ddp or fsdp"
INDEXER_SHAPE = ("index_heads", "index_head_dim")  # fields of sparse attention that its weights are made for
# An evaluation reads at most this share of the tokens that a run learns; reading a token takes a third as long as learning it.
EVALUATED_SHARE = 0.2
PLANNED_SHARE = 0.97  # share of max_minutes that training takes; the rest is for the last checkpoint and evaluation


@config
class ExamProbe:
    """A small exam during training: the clinic's questions, or exams of one's own choice."""

    every_tokens: NonNegativeInt = 0  # tokens between two exams; 0: never
    # splits of the clinic's exam: train, validation, validation_questions, new_findings, new_questions
    splits: tuple[str, ...] = ("validation",)
    items: PositiveInt = 200  # questions of each of these splits
    tasks: tuple[TaskConfig, ...] = ()  # exams instead of the clinic's; a small limit keeps each short
    # as in `osler eval`; auto: by generation on the clinic and in sft, else by cloze where questions have options
    method: Literal["auto", "generation", "letters", "cloze"] = "auto"
    reasoning: bool = True  # think before the answer
    max_new_tokens: PositiveInt = 64  # thinking and answer together

    def __post_init__(self) -> None:
        if not self.splits:
            raise ValueError("splits is empty: an exam needs at least one")
        if len({(task.exam, task.split) for task in self.tasks}) < len(self.tasks):
            raise ValueError("tasks has two exams of one type and split; give each a split of its own, which names its metric")


@config
class TokenCheckpoints(CheckpointConfig):
    """When checkpoints are saved, how, and which are kept."""

    every_tokens: PositiveInt = 2_048_000  # tokens between two checkpoints
    keep_every_tokens: NonNegativeInt = 0  # tokens between two milestones, which are checkpoints kept for good; 0: none


@config
class TeacherConfig:
    """Distillation: the loss is (1 - weight) x cross-entropy + weight x temperature² x KL(teacher || model)."""

    path: str  # run folder or checkpoint of the teacher, a model with the same tokenizer
    weight: Fraction = 0.5  # share of the KL in the loss; 0 learns the text alone, 1 the teacher alone
    temperature: Annotated[float, Ge(0.01), Le(100)] = 1.0  # divides the logits of both; above 1, unlikely words count for more


@config
class TrainConfig(RunConfig):
    """One supervised stage: ``pretrain`` learns every token, ``sft`` learns what the model must answer."""

    kind: Literal["pretrain", "sft"] = "pretrain"  # pretrain learns every token, sft only what the model must answer
    seed: Seed = 0  # decides the weights and the order of the data
    # run folder or checkpoint to start from; its model and tokenizer replace those given here, except a sparse model.attention
    init_from: str | None = None
    model: ModelConfig = ModelConfig()
    context: ContextConfig | None = None  # a longer context for the model of init_from; null: it stays as it is
    # all weights, or the indexers of sparse attention alone: they warm up on dense attention before they choose its keys
    trains: Literal["all", "indexers"] = "all"
    tokenizer: TokenizerConfig = BPEConfig()
    # a model to learn from besides the data; a run without init_from, shards and tokenizer.path takes its tokenizer; null: none
    teacher: TeacherConfig | None = None
    data: DataConfig = ClinicData()
    # sets that the run is evaluated on, each by itself and all together; none: what is held out of each source of data. All sets
    # together take a fifth of the tokens learned until the next evaluation, but each set takes 131,072 to a million tokens
    validation: ValidationSets = ()
    # stream cuts documents anywhere, and the next row goes on there; whole keeps them whole and pads; auto: whole for sft
    packing: Literal["auto", "stream", "whole"] = "auto"
    # what to do when an answer does not fit into a row with its question (sft, packing whole): refuse to start, or drop it
    too_long: Literal["refuse", "drop"] = "refuse"
    # whether attention stays inside a document; takes seq_len² bytes a row, and on a GPU more (`osler plan` says how much)
    document_mask: bool = False
    # tokens in a row; with a curriculum, in its longest rows and in rows of held-out text. One process computes a whole row
    seq_len: PositiveInt = 128
    batch_tokens: PositiveInt = 8_192  # tokens per optimizer step
    micro_batch_tokens: PositiveInt | None = None  # tokens per forward pass of one process; null: its whole batch at once
    curriculum: tuple[CurriculumStage, ...] = ()  # stages of shorter rows and other batches; none: the same throughout
    total_tokens: PositiveInt = 8_192_000  # tokens to train on, repeats included
    max_minutes: PositiveFloat | None = None  # end by the clock if that comes before total_tokens; the schedule is fitted to it
    schedule: ScheduleConfig = LinearConfig(warmup_tokens=None)
    # bf16 computes in bf16 from fp32 weights, fp8 also multiplies in FP8; pure-bf16 keeps weights and moments in bf16 too;
    # auto: bf16 where it is faster than fp32 here
    precision: Literal["auto", "bf16", "fp32", "pure-bf16", "fp8"] = "auto"
    # with torch.compile; auto: where it works and the run is long enough to pay
    compile: Literal["auto", "always", "never"] = "auto"
    # how several processes share the rows of a batch; a row is never split over them (no context parallelism)
    parallel: ParallelConfig = NoParallelConfig()
    loader_workers: NonNegativeInt = 1  # threads that prepare batches ahead; 0: none; changes no batch
    log_every_steps: PositiveInt = 10  # optimizer steps between two lines of metrics
    # tokens between two evaluations, which read 131,072 to a million tokens of each set; null: 4 to 50 evaluations in a run, or
    # fewer, down to one, if these would read more than a fifth as many tokens as the run learns
    eval_every_tokens: PositiveInt | None = None
    exam: ExamProbe = ExamProbe()
    checkpoint: TokenCheckpoints = TokenCheckpoints()

    def __post_init__(self) -> None:
        if self.batch_tokens % self.seq_len:
            raise ValueError(f"batch_tokens {self.batch_tokens} is not a multiple of seq_len {self.seq_len}")
        if self.init_from is None:  # the model of init_from has a shape of its own and is checked when it is loaded
            self.model.check_attention()
        if self.context and self.init_from is None:
            raise ValueError(
                "context extends the model of init_from=RUN and goes with that, not with a branch; a new model has "
                "model.max_seq_len tokens of context"
            )
        if self.init_from is None and self.seq_len > self.model.max_seq_len:
            raise ValueError(f"seq_len {self.seq_len} is longer than model.max_seq_len {self.model.max_seq_len}")
        if self.context and self.seq_len > self.context.max_seq_len:
            raise ValueError(f"seq_len {self.seq_len} is longer than context.max_seq_len {self.context.max_seq_len}")
        micro = self.micro_batch_tokens
        if micro is not None and (micro % self.seq_len or self.batch_tokens % micro):
            raise ValueError(
                f"micro_batch_tokens {micro} must be a multiple of seq_len {self.seq_len} that divides "
                f"batch_tokens {self.batch_tokens}"
            )
        if self.curriculum and self.packs_whole:
            raise ValueError(
                f"curriculum cuts one stream of tokens into rows of several lengths, but packing={self.packing} (kind="
                f"{self.kind}) keeps documents whole, in rows of one length; set packing=stream, or leave the curriculum out"
            )
        _ = self.timeline  # raises ValueError for stages that contradict each other
        for number, stage in enumerate(self.curriculum, start=1):  # prepared shards name their sources only when they are opened
            if stage.weights and self.sources and (problem := wrong_weights(number, stage.weights, self.sources)):
                raise ValueError(problem)
        brings_tokenizer = any((self.tokenizer.path, self.init_from, self.teacher, self.text is None))
        if not brings_tokenizer and self.tokenizer.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"tokenizer.vocab_size {self.tokenizer.vocab_size} is larger than model.vocab_size {self.model.vocab_size}; "
                f"set model.vocab_size={self.tokenizer.vocab_size}"
                + (f", or tokenizer.vocab_size={self.model.vocab_size}" if self.model.vocab_size >= SMALLEST_VOCABULARY else "")
            )
        if not isinstance(self.data, PreparedData):
            check_validation(self.validation, self.data)
            streaming = self.data.streaming
            if streaming and self.kind == "sft" and self.packs_whole and self.too_long == "refuse":
                raise ValueError(
                    "data.streaming begins before all examples are known, so it cannot refuse those that are too long: set "
                    "too_long=drop, or data.streaming=false"
                )
            if self.data.disk_budget_gb is not None and (not streaming or self.packs_whole):
                needed = "packing=stream" if streaming else "data.streaming=true"
                raise ValueError(f"data.disk_budget_gb deletes shards that training has done with, which needs {needed}")
        elif self.validation:
            raise ValueError(f"{self.data.path} has its validation sets; give others to `osler data prepare` as validation=[...]")
        is_sparse = isinstance(self.model.attention, SparseAttentionConfig)
        untried = "a teacher" if self.teacher else "sparse attention" if is_sparse or self.trains == "indexers" else ""
        if untried and self.parallel.type == "deepspeed":
            raise ValueError(UNTRIED_WITH_DEEPSPEED.format(untried))
        if self.trains == "indexers" and self.init_from is None and self.branch_from is None:
            raise ValueError(
                "trains=indexers teaches indexers what the attention of a trained model looks at: give that model with init_from"
            )
        if self.trains == "indexers" and self.teacher:
            raise ValueError("trains=indexers leaves the model as it is, so a teacher has nothing to teach: leave teacher out")
        if self.trains == "indexers" and self.precision == "pure-bf16":
            raise ValueError(
                "precision=pure-bf16 keeps all weights in bf16, which would round those that trains=indexers leaves as they are: "
                "use precision=bf16"
            )
        if self.precision == "pure-bf16" and self.optim.type != "adamw":
            raise ValueError(
                f"precision=pure-bf16 rounds inside its own AdamW; with optim.type={self.optim.type} use precision=bf16"
            )

    @property
    def text(self) -> TextData | None:
        """What the run prepares its data from; None when they are given as shards."""
        return None if isinstance(self.data, PreparedData) else self.data

    @property
    def sources(self) -> dict[str, AnySource]:
        """The sources of the text by name; none when the data are given as shards."""
        return {} if self.text is None else sources_of(self.text)

    @property
    def streams(self) -> bool:
        """Whether the run may train on data that are still being prepared."""
        return self.text is not None and self.text.streaming

    @property
    def packs_whole(self) -> bool:
        """Whether documents are kept whole and padded, rather than cut anywhere."""
        return self.packing == "whole" or (self.packing == "auto" and self.kind == "sft")

    @property
    def drops_torn(self) -> bool:
        """Whether examples that are longer than a row are left out of the data."""
        return self.kind == "sft" and self.too_long == "drop"

    @property
    def timeline(self) -> Timeline:
        """Row length, batch and step of every token; raises ValueError for a curriculum that contradicts itself."""
        return lay_out(self.curriculum, seq_len=self.seq_len, batch_tokens=self.batch_tokens)

    @property
    def total_steps(self) -> int:
        """Optimizer steps that cover ``total_tokens``, the last one rounded up."""
        return self.timeline.steps_for(self.total_tokens)

    @property
    def steps_to_compile_for(self) -> int:
        """Steps by which a run decides whether to compile. By the clock it takes all it can: compiling pays from a minute on."""
        return self.total_steps if self.max_minutes is None else int(self.max_minutes * COMPILE_MIN_STEPS)

    @property
    def evaluation_tokens(self) -> int:
        """Tokens between two evaluations."""
        if self.eval_every_tokens is not None:
            return self.eval_every_tokens
        num_sets = len(self.validation) or len(self.sources) or 1
        of_each = int(self.total_tokens * EVALUATED_SHARE) // num_sets
        count = min(max(4, of_each // VALIDATION_TOKENS), 50, max(1, of_each // FIRST_SHARD_TOKENS))
        return -(-self.total_tokens // count)

    def evaluated_tokens(self, num_sets: int) -> int:
        """Return how many tokens an evaluation reads of each of ``num_sets`` sets: whole shards, and at least one."""
        share = int(min(self.evaluation_tokens, self.total_tokens) * EVALUATED_SHARE)
        return min(max(share // num_sets, FIRST_SHARD_TOKENS), VALIDATION_TOKENS)

    @property
    def length(self) -> str:
        """The length of the run in words."""
        tokens = f"{self.total_tokens:,} tokens"
        return tokens if self.max_minutes is None else f"{self.max_minutes:g} minutes (at most {tokens})"

    def model_from(self, model: ModelConfig, trained_seq_len: int) -> ModelConfig:
        try:
            model = self._with_attention(model if self.context is None else self.context.extend(model, trained_seq_len))
        except ValueError as error:
            raise UserError(f"The model to start from cannot have this model.attention and context: {error}.") from error
        self.check_rows(model)
        return model

    def trained_after(self, trained_seq_len: int) -> int:
        return max(trained_seq_len, self.seq_len) if self.trains == "all" else trained_seq_len

    def check_rows(self, model: ModelConfig) -> None:
        """Raise UserError if the rows are longer than ``model``, which this run starts from, reads."""
        if self.seq_len > model.max_seq_len:
            raise UserError(
                f"seq_len {self.seq_len} is longer than the {model.max_seq_len} tokens (max_seq_len) that the model to start "
                f"from reads: context.max_seq_len={self.seq_len} extends it in a new run with init_from."
            )

    def check_processes(self, processes: int) -> None:
        """Raise UserError if this number of processes cannot share the batches, or cuts up parameters that are needed whole."""
        strategy = self.parallel.type
        optimizer = "pure-bf16" if self.precision == "pure-bf16" else self.optim.type
        if processes > 1 and (strategy, optimizer) in (("fsdp", "pure-bf16"), ("deepspeed", "pure-bf16"), ("deepspeed", "muon")):
            name = "precision=pure-bf16" if optimizer == "pure-bf16" else f"optim.type={optimizer}"
            raise UserError(
                f"{name} does not work with parallel.type={strategy}, which cuts parameters up: use parallel.type=ddp."
            )
        check_shares(self.timeline, processes)

    def _with_attention(self, start: ModelConfig) -> ModelConfig:
        """Return the model of a run that begins with the weights of ``start``, with sparse attention if it is given here."""
        given, there = self.model.attention, start.attention
        if not isinstance(given, SparseAttentionConfig):
            given = there
        if not isinstance(given, SparseAttentionConfig):
            if self.trains == "indexers":
                raise UserError(
                    "trains=indexers needs a sparse model, and the one to start from is dense: set model.attention.type=sparse."
                )
            return start
        if not isinstance(there, SparseAttentionConfig):
            if self.trains == "all":
                raise UserError(
                    "model.attention is sparse, and the model to start from has no indexers. New ones would choose keys by "
                    "chance, so they warm up first: make a run with trains=indexers optim.lr=1e-3, then start from that run."
                )
        elif any(getattr(given, name) != getattr(there, name) for name in INDEXER_SHAPE):
            sizes = " and ".join(f"{name} {getattr(there, name)}" for name in INDEXER_SHAPE)
            raise UserError(f"The indexers of the model to start from have {sizes}: set the same in model.attention.")
        if self.parallel.type == "deepspeed":
            raise UserError(f"The model to start from is sparse: {UNTRIED_WITH_DEEPSPEED.format('sparse attention')}.")
        model = replace(start, attention=given)
        model.check_attention()
        return model

    def training_flops(self, model: ModelConfig) -> int:
        """FLOPs of the whole run on this model, each stage at its own row length."""
        return sum(tokens * model.flops_per_token(span.seq_len) for span, tokens in self.timeline.shares(self.total_tokens))

    def numbers(self, model: ModelConfig | None = None) -> dict[str, str]:
        at_most = "" if self.max_minutes is None else "at most "
        stages = {}
        for span, tokens in self.timeline.shares(self.total_tokens) if self.curriculum else ():
            micro = rows_per_micro_batch(span.rows_per_batch, span.seq_len, self.micro_batch_tokens)
            stages[f"stage {span.number}"] = (
                f"from {span.first_token:,} tokens: {-(-tokens // span.batch_tokens):,} steps of {span.rows_per_batch:,} rows of "
                f"{span.seq_len:,} tokens, {micro:,} rows at once"
            )
        steps = f"{at_most}{self.total_steps:,}" + ("" if stages else f" of {self.batch_tokens:,} tokens")
        numbers = {"steps": steps, **stages, "length": self.length}
        numbers["warm-up"] = f"{warmup_of(self.schedule, self.total_tokens):,} tokens"
        numbers["evaluations"] = f"every {self.evaluation_tokens:,} tokens"
        if model is None and self.init_from is not None:
            numbers["model"] = "that of init_from, with model.attention if that is sparse here; all else of model is unused"
        model = self.model if model is None and self.init_from is None else model
        if model is not None:
            more = ", and the teacher's forward passes" if self.teacher else ""
            numbers |= {"parameters": f"{model.num_parameters:,}", "FLOPs": f"{at_most}{self.training_flops(model):.3g}{more}"}
            numbers |= model.consequences()
        return numbers
