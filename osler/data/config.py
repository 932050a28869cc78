"""What a run learns from, and the lengths of its rows. Torch-free."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from osler.config.schema import (
    TAGGED,
    Fraction,
    Ge,
    Le,
    Lt,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Without,
    config,
)
from osler.data.mixture import Mixture
from osler.tasks.config import AnyExam, Fold

FIRST_WINDOW_TOKENS = 1 << 23  # that a new run permutes before its first step; preparing so many takes seconds
FIRST_SHARD_TOKENS = 1 << 17  # the most in the first shard, so that a small source has several; the next may have twice as many
VALIDATION_TOKENS = 1 << 20  # tokens of a validation set, and one more document at most: no evaluation reads more
HUB = "the hub"  # the place of a source without local files
HoldoutFraction = Annotated[float, Ge(0), Lt(1)]


@config
class CleanConfig:
    """What is left out of a source before it is learned; the data card counts it by reason and shows examples."""

    min_words: NonNegativeInt = 5  # words of a text; this and the next three limits do not count for questions with answers
    max_words: PositiveInt | None = None  # words of a text; null: no limit
    max_symbols: Fraction = 0.5  # share of a text's characters that are neither letters, digits nor white space; 1: no limit
    max_repetition: Fraction = 0.5  # share of a text's sequences of 5 words that occur in it more than once; 1: no limit

    languages: tuple[str, ...] = ()  # languages that are kept, such as en; none: all are
    duplicates: Literal["keep", "exact", "near"] = "exact"  # copies to leave out; exact: equal but for case and spacing
    similarity: Annotated[float, Ge(0.5), Le(1)] = (
        0.8  # texts are near copies from this share of common sequences of 5 words on
    )
    duplicates_memory_mb: PositiveInt = 256  # for each source; copies are found among as many of its latest documents as fit

    # exams whose questions are looked for; what is found is recorded, and documents that contain a question are dropped or kept
    exams: tuple[Annotated[AnyExam, TAGGED], ...] = ()
    exam_questions: Literal["drop", "keep"] = "drop"  # what happens to documents that contain a question of these exams


@config
class Preparation:
    """How data are prepared for a run; in a mixture, for all of its sources together."""

    streaming: bool = False  # train on what is prepared while the rest is being prepared
    # with streaming: how much of the disk the folder of shards may take; null: all. Sources that do not fit are read once at most
    disk_budget_gb: PositiveFloat | None = None
    clean: CleanConfig | None = None  # what is left out; null: nothing, or in a source of a mixture what the mixture leaves out
    no_benchmark_contamination: bool = False  # refuse to start unless questions of exams are looked for and dropped


@config
class Source(Preparation):
    """What every source of data has."""

    name: str = ""  # for metrics and messages; empty: clinic, or the name of the path
    # share of a run's tokens, relative to the other sources of a mixture; share of its rows where documents are kept whole
    weight: PositiveFloat = 1.0
    licence: str = ""  # the texts' licence, for the data card

    def __post_init__(self) -> None:
        if self.name and self.name != _for_folders(self.name):
            raise ValueError(
                f"the name {self.name!r} has other characters than letters, digits, _ and -, and folders and metrics are named "
                f"after it; {_for_folders(self.name)} would do"
            )

    @property
    def title(self) -> str:
        """Return the name of the source in folders and metrics."""
        return self.name or _for_folders(Path(self.place).name.partition(".")[0])

    @property
    def place(self) -> str:
        """Return the folder or file that the source is read from; the clinic is in no file."""
        return str(getattr(self, "path", "clinic"))


def _for_folders(name: str) -> str:
    return re.sub(r"[^\w\-]+", "-", name).strip("-") or "data"


@config
class ClinicData(Source):
    """The built-in synthetic world: textbook prose, exam questions with reasoning, and drills of the form of the exam."""

    type: Literal["clinic"] = "clinic"
    seed: Seed = 0  # decides every text and question that is drawn
    passages: NonNegativeInt = 20_000  # passages of textbook prose
    examples: NonNegativeInt = 20_000  # exam questions with reasoning and answer
    cards: NonNegativeInt = 5_000  # exercises in matching a word with its partner: form, no fact
    drills: NonNegativeInt = 5_000  # multiple-choice questions about nothing but the options themselves: form, no fact
    reasoning: bool = True  # learn the reasoning between question and answer
    validation_passages: NonNegativeInt = 200  # passages of textbook prose, held out
    validation_examples: NonNegativeInt = 200  # exam questions, held out

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.passages + self.examples == 0:
            raise ValueError("the clinic gives nothing to learn from: set passages or examples above 0")


@config
class FilesData(Source):
    """Text of one's own."""

    type: Literal["files"] = "files"
    path: str  # a .parquet, .jsonl, .ndjson, .txt or .md file (all but parquet also .gz and .zst), or a folder of them
    field: str = "text"  # the column of text in tables
    holdout_fraction: HoldoutFraction = 0.05  # about this share of the documents is for validation, one at least; 0: none
    seed: Seed = 0  # decides the order in which the documents are written


@config
class TurnsData(Source):
    """Questions and answers of one's own, with or without the reasoning between them."""

    type: Literal["turns"] = "turns"
    path: str  # a .parquet, .jsonl or .ndjson file (also .jsonl.gz and the like), or a folder of them; one row is one example
    question_field: str = "question"  # the column with the question
    thinking_field: str | None = None  # the column with the reasoning between question and answer; null: there is none
    answer_field: str = "answer"  # the column with the answer
    holdout_fraction: HoldoutFraction = 0.05  # about this share of the examples is for validation, one at least; 0: none
    seed: Seed = 0  # decides the order in which the examples are written


@config
class HubData(Source):
    """A source that Osler knows by name: `osler data sources` lists them. It is read from the hub, or from local files."""

    type: Literal["hub"] = "hub"
    name: str  # as listed by `osler data sources`
    subset: str = ""  # one of its subsets; empty: the first
    split: str = ""  # one of its splits; empty: the first
    revision: str = "main"  # a commit, branch or tag of the hub's repository; the commit is kept with the shards
    path: str = ""  # a file or folder of the same schema, instead of the hub
    root: str = ""  # a folder with a folder or file of each source, called by its name; empty: the mixture's
    fold: Fold = "all"  # for an exam that the model also sits: train, or held-out (a fifth of its questions, by hash)
    reasoning: bool = True  # learn the reasoning between question and answer where rows have one
    holdout_fraction: HoldoutFraction = 0.001  # share of the documents kept for validation; 0: none
    seed: Seed = 0  # decides the order in which files are taken

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a source of the hub needs a name; `osler data sources` lists them")

    @property
    def title(self) -> str:
        """Return the name of the source with its subset and split where they are given."""
        return "-".join(filter(None, (self.name, *self.subset.split("/"), self.split))).replace(".", "-")

    @property
    def place(self) -> str:
        """Return the folder or file that the source is read from, or `HUB`."""
        return self.path or (str(Path(self.root, self.name)) if self.root else HUB)


AnySource = ClinicData | FilesData | TurnsData | HubData
Sources = tuple[Annotated[AnySource, TAGGED], ...]


@config
class MixtureData(Preparation):
    """Several sources, each with its share of the tokens of a run."""

    type: Literal["mixture"] = "mixture"
    sources: Sources  # at least one
    root: str = ""  # a folder that has a folder of local files for each source of the hub, by name; empty: the hub

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty: a mixture needs at least one")
        _refuse_same_titles("sources", self.sources)
        if any(source.streaming or source.disk_budget_gb is not None for source in self.sources):
            raise ValueError("streaming and disk_budget_gb are of the mixture and not of one of its sources: set data.streaming")
        Mixture([source.weight for source in self.sources], [source.title for source in self.sources])


TextData = AnySource | MixtureData  # what documents are read from


@config
class PreparedData:
    """Shards that `osler data prepare` wrote, with their tokenizer and their validation data."""

    type: Literal["prepared"] = "prepared"
    path: str  # the folder of shards; the run reads them there and makes no copy
    no_benchmark_contamination: bool = False  # refuse to start unless questions of exams were looked for and dropped


def wrong_weights(stage: int, weights: Iterable[str], sources: Iterable[str]) -> str:
    """Return what is wrong when a stage gives weights to other sources than there are, else nothing."""
    if set(weights) == set(sources):
        return ""
    return (
        f"curriculum, stage {stage}: its weights are of {', '.join(weights)}, the sources are {', '.join(sources)}; give every "
        "source one, 0 where it rests"
    )


def _refuse_same_titles(what: str, sources: Iterable[Source]) -> None:
    """Raise ValueError when two sources have the same title."""
    seen: set[str] = set()
    for source in sources:
        if source.title in seen:
            remedy = "subset or split, or list it once" if isinstance(source, HubData) else "`name`"
            raise ValueError(f"two {what} are named {source.title}; give one of them another {remedy}")
        seen.add(source.title)


ONLY_TO_LEARN_FROM = (
    "weight", "licence", "streaming", "disk_budget_gb", "clean", "no_benchmark_contamination", "holdout_fraction"
)  # fmt: skip
ValidationSets = Annotated[Sources, Without(ONLY_TO_LEARN_FROM)]


def check_validation(sets: Sources, data: TextData) -> None:
    """Raise ValueError for validation sets that are named alike, are learned from, or have fields that only data have."""
    _refuse_same_titles("validation sets", sets)
    learned = {_texts(source): title for title, source in sources_of(data).items()}
    for title, source in sets_of(sets, data).items():
        given = [name for name in ONLY_TO_LEARN_FROM if getattr(source, name, None) != getattr(type(source), name, None)]
        if given:
            raise ValueError(f"the validation set {title} has no {' or '.join(given)}: leave it out")
        if not isinstance(source, ClinicData) and _texts(source) in learned:  # the clinic has texts of its own for validation
            raise ValueError(
                f"the validation set {title} is the source {learned[_texts(source)]}, of which nothing would be left to learn: "
                "give it another path or split, or leave it out; a part of each source is held out then"
            )


def _texts(source: AnySource) -> tuple[str, str]:
    """Return a value that is equal for sources that read the same texts."""
    return source.place, f"{source.title} {source.fold}" if isinstance(source, HubData) else ""


def sources_of(data: TextData) -> dict[str, AnySource]:
    """Return the sources in a config by their titles, each with what it takes over from its mixture."""
    if not isinstance(data, MixtureData):
        return {data.title: data}
    claims = data.no_benchmark_contamination
    return {
        title: replace(
            source, clean=source.clean or data.clean, no_benchmark_contamination=source.no_benchmark_contamination or claims
        )
        for title, source in sets_of(data.sources, data).items()
    }


def sets_of(sources: Sources, data: TextData) -> dict[str, AnySource]:
    """Return validation sets (or sources) by their titles; those of the hub without a `root` get the data's."""
    root = getattr(data, "root", "")
    return {
        source.title: replace(source, root=root) if isinstance(source, HubData) and not source.root else source
        for source in sources
    }


@config
class CurriculumStage:
    """Part of a curriculum: rows of `seq_len` tokens until the run has seen `until_tokens`; the last stage runs to the end."""

    seq_len: PositiveInt  # tokens in a row
    until_tokens: PositiveInt | None = None  # counted from the start of the run; the step that crosses it is the stage's last
    batch_tokens: PositiveInt | None = None  # null: the run's; a batch is as many whole rows as fit
    weights: dict[str, NonNegativeFloat] | None = None  # weights of all sources by name, from this stage on; null: the data's

    def __post_init__(self) -> None:
        if self.weights is not None:
            Mixture(list(self.weights.values()), list(self.weights))
        if self.batch_tokens is not None and self.batch_tokens % self.seq_len:
            raise ValueError(f"batch_tokens={self.batch_tokens} is not a multiple of seq_len={self.seq_len}")
