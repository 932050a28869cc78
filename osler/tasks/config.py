"""The exams in files that a config can name, each in the schema of its dataset on the Hugging Face hub. Torch-free.

Models are examined with one split of each, whose size is published (``SCHEMAS`` in ``exam_files.py``).
"""

from typing import Literal

from osler.config.schema import NonNegativeInt, PositiveInt, Seed, config

HELD_OUT_SHARE = 0.2  # the share of an exam's questions in the fold held-out
# train is four fifths of the questions and held-out the others, whatever the file and its order; all is every question
Fold = Literal["all", "train", "held-out"]
MEDICAL_SUBJECTS = (
    "anatomy", "clinical_knowledge", "college_biology", "college_medicine", "medical_genetics", "professional_medicine",
)  # fmt: skip


@config
class ExamFile:
    """An exam in a file."""

    type: str  # which exam
    path: str  # a .parquet, .jsonl or .ndjson file (also .jsonl.gz and the like), or a folder of them
    split: str = ""  # a name for the file in tables and metrics
    fold: Fold = "all"  # train, or held-out (a fifth of the questions, by hash), for a file to learn from and to ask
    limit: PositiveInt | None = None  # questions to take; null: all
    seed: Seed | None = None  # draws the questions at random; a larger limit draws the same and more; null: the first ones
    shots: NonNegativeInt = 0  # solved examples before each question, the first of shots_path; 0: zero-shot
    shots_path: str = ""  # a file of the same schema, with other questions

    def __post_init__(self) -> None:
        if self.shots and not self.shots_path:
            raise ValueError(f"shots={self.shots} needs shots_path, a file of the same schema that the examples come from")

    @property
    def exam(self) -> str:
        """The name of the exam, whatever file it is in."""
        return self.type


@config
class MedqaTask(ExamFile):
    """USMLE questions with four or five options, in the schema of GBaker/MedQA-USMLE-4-options or of the authors' files."""

    type: Literal["medqa"] = "medqa"


@config
class MedmcqaTask(ExamFile):
    """Indian medical entrance questions, in the schema of openlifescienceai/medmcqa."""

    type: Literal["medmcqa"] = "medmcqa"
    first_option: Literal[0, 1] = 0  # the number of option A in the file: 0 in the hub's files, 1 in the authors' original


@config
class PubmedqaTask(ExamFile):
    """Yes, no or maybe from an abstract, in the schema of qiaojin/PubMedQA."""

    type: Literal["pubmedqa"] = "pubmedqa"
    ids: str | None = None  # a JSON file of the ids to take, as the authors' test_ground_truth.json has; null: all


@config
class MmluTask(ExamFile):
    """The medical part of MMLU, in the schema of cais/mmlu."""

    type: Literal["mmlu"] = "mmlu"
    subjects: tuple[str, ...] = MEDICAL_SUBJECTS  # those to take from the file


@config
class Gsm8kTask(ExamFile):
    """Grade-school arithmetic with a numeric answer, in the schema of openai/gsm8k."""

    type: Literal["gsm8k"] = "gsm8k"


@config
class HumanevalTask(ExamFile):
    """Python functions to complete, in the schema of openai/openai_humaneval. The programs that a model writes are run."""

    type: Literal["humaneval"] = "humaneval"


@config
class HellaswagTask(ExamFile):
    """Stories to end, in the schema of Rowan/hellaswag."""

    type: Literal["hellaswag"] = "hellaswag"


@config
class TriviaqaTask(ExamFile):
    """Trivia whose answer has several spellings, in the schema of mandarjoshi/trivia_qa."""

    type: Literal["trivia_qa"] = "trivia_qa"


@config
class QuestionsTask(ExamFile):
    """Questions of one's own: with options of which the answer names one, or with an answer that is a text or number."""

    type: Literal["questions"] = "questions"
    question_field: str = "question"  # the column with the question
    options_field: str = "options"  # the column with a list of texts, or texts by letter; questions without it have none
    answer_field: str = "answer"  # the column with a letter, the text or the number of an option; or a text, or several
    first_option: Literal[0, 1] = 0  # the number of the first option, where answers are numbers


@config
class HubExam(ExamFile):
    """An exam that Osler knows by name, in the split that models are examined with; from the hub, or from local files."""

    type: Literal["hub"] = "hub"
    name: str  # medqa, medmcqa, pubmedqa, mmlu, gsm8k, humaneval, hellaswag or trivia_qa
    revision: str = "main"  # a commit, branch or tag of the hub's repository; shards that were cleaned of it keep the commit
    path: str = ""  # a file or folder of the same schema, instead of the hub
    root: str = ""  # a folder with a file or folder of each exam, called by its name; empty: the root of the data

    @property
    def exam(self) -> str:
        return self.name


AnyExam = (
    MedqaTask
    | MedmcqaTask
    | PubmedqaTask
    | MmluTask
    | Gsm8kTask
    | HumanevalTask
    | HellaswagTask
    | TriviaqaTask
    | QuestionsTask
    | HubExam
)
