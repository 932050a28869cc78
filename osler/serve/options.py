"""How likely a model finds each option of a pasted question, at once or after its own thinking: ``POST /v1/options``.

The options' log-likelihoods are those of an exam by likelihood (``option_rows`` in ``eval/exams.py``), not divided by length, and
are shared out to the sum of 1.
"""

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


def score_options(ready: LoadedModel, decoder: Decoder, question: str, thinking: str | None = None) -> dict[str, Any]:
    """Return the options of a question, as a person pasted it, with their probabilities, and the prompt that the model is asked.

    ``thinking``: what the model is to have thought before. Raises UserError for a question without options, and for one that does
    not fit into the model's ``max_seq_len``.
    """
    stem, options = read_pasted(question)
    item = ExamItem("pasted", stem, options, answer_index=0)  # which option is right is not known, and not asked
    template, longest = ready.answers_questions, ready.model.config.max_seq_len
    form: Form = "answer" if template else "letters"
    rows = option_rows(ready.tokenizer, item, form, template=template, max_seq_len=longest, thinking=thinking)
    if rows is None:
        parts = "Question, options and thinking" if thinking else "Question and options"
        raise UserError(f"{parts} together do not fit into the {longest} tokens that the model reads: shorten them.")
    sums = [total for total, _ in sum_logprobs(decoder, [ids for ids, _ in rows], rows[0][1])]
    shares = [exp(total - max(sums)) for total in sums]
    return {
        "prompt": render_question(item) if template else render_plain(item, form),
        "options": [
            {"letter": letter, "text": text, "probability": share / sum(shares)}
            for letter, text, share in zip(LETTERS, options, shares, strict=False)
        ],
    }


def example_of(ready: LoadedModel) -> str | None:
    """Return a question of the exam of the clinic that a model was not taught; None for a model that learned another exam."""
    if not (ready.answers_questions and ready.knows_clinic):
        return None
    item = load_clinic(split="new_findings", limit=1)[0]
    return "\n".join([item.question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, item.options, strict=False))])
