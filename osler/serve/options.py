"""How likely a model finds each option of a pasted question, at once or after its own thinking: ``POST /v1/options``.

The options' log-likelihoods are those of an exam by likelihood (``option_rows`` in ``eval/exams.py``), not divided by length.
Their softmax gives the probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

from osler.eval.exams import option_rows
from osler.eval.likelihood import sum_logprobs
from osler.inference.load import LoadedModel
from osler.model.decoder import Decoder
from osler.runtime.errors import UserError
from osler.tasks.item import LETTERS, ExamItem, Form, render_plain, render_question
from osler.tasks.pasted import read_pasted
from osler.tasks.registry import load_clinic


@dataclass(frozen=True)
class AskedOptions:
    """A question that is ready to be scored: its prompt as text, and a row of ids for each option, scored from ``start``."""

    prompt: str
    options: tuple[str, ...]
    rows: list[list[int]]
    start: int

    def probabilities(self, decoder: Decoder) -> list[float]:
        """Return the probability of each option; they sum to 1."""
        sums = [total for total, _ in sum_logprobs(decoder, self.rows, self.start)]
        shares = [exp(total - max(sums)) for total in sums]
        return [share / sum(shares) for share in shares]

    def described(self, probabilities: Sequence[float]) -> dict[str, Any]:
        """Return the JSON object that the client gets."""
        rows = zip(LETTERS, self.options, probabilities, strict=False)
        options = [{"letter": letter, "text": text, "probability": share} for letter, text, share in rows]
        return {"prompt": self.prompt, "options": options}


def read_options(ready: LoadedModel, question: str, thinking: str | None = None) -> AskedOptions:
    """Read a question as a person pasted it, and put it into the form that the model knows.

    ``thinking`` is put before the answer, as if the model had thought it. Raises UserError for a question without options, and
    for one that does not fit into the model's ``max_seq_len``.
    """
    stem, options = read_pasted(question)
    item = ExamItem("pasted", stem, options, answer_index=0)  # nobody knows which option is right; scoring does not need it
    template, longest = ready.answers_questions, ready.model.config.max_seq_len
    form: Form = "answer" if template else "letters"
    rows = option_rows(ready.tokenizer, item, form, template=template, max_seq_len=longest, thinking=thinking)
    if rows is None:
        parts = "Question, options and thinking" if thinking else "Question and options"
        raise UserError(f"{parts} together do not fit into the {longest} tokens that the model reads: shorten them.")
    prompt = render_question(item) if template else render_plain(item, form)
    return AskedOptions(prompt, options, [ids for ids, _ in rows], rows[0][1])


def example_of(ready: LoadedModel) -> str | None:
    """Return a question of the clinic's exam that a model has not seen in training, but in the form of its training.

    None for a model that learned another exam.
    """
    if not (ready.answers_questions and ready.knows_clinic):
        return None
    return render_question(load_clinic(split="new_findings", limit=1)[0])
