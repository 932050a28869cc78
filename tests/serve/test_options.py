"""The probabilities of a pasted question's options are those of the exam by likelihood, and those of the training template."""

import http.client
import json
from dataclasses import replace
from math import exp

import pytest
import torch

from osler.eval.exams import score_by_likelihood
from osler.eval.likelihood import label_logprobs, pad_rows
from osler.inference.load import LoadedModel
from osler.model.decoder import Decoder
from osler.model.layers import Layout
from osler.ops.labels import IGNORED
from osler.runtime.errors import UserError
from osler.serve.options import example_of, read_options
from osler.tasks.item import LETTERS, ExamItem, render_option, render_plain, render_question
from osler.tasks.pasted import read_pasted
from osler.tasks.registry import load_clinic
from osler.tokenizer.chat import Turn, encode_examples

ITEM = ExamItem("x", "Who is ill?", ("the dog", "the old cat", "nobody"), answer_index=0)
PASTED = "Who is ill?\nA) the dog\nB) the old cat\nC) nobody"


def options_of(ready: LoadedModel, question: str = PASTED, thinking: str | None = None) -> tuple[list[float], str]:
    asked = read_options(ready, question, thinking)
    assert asked.options == ITEM.options
    return asked.probabilities(Decoder(ready.model, Layout(ready.model.compute_dtype, 8))), asked.prompt


@pytest.mark.parametrize("name", ["asked", "text"])
def test_at_once_they_are_those_of_the_exam(name, models):
    ready = models[name]
    shares, prompt = options_of(ready)
    form = "answer" if name == "asked" else "letters"
    (result,) = score_by_likelihood(
        ready.model, ready.tokenizer, [ITEM], form=form, template=name == "asked", normalise="none"
    ).results
    assert sum(shares) == pytest.approx(1)
    assert (max(shares), shares.index(max(shares))) == (pytest.approx(result.confidence, rel=1e-6), result.predicted)
    assert prompt == (render_question(ITEM) if name == "asked" else render_plain(ITEM, form))


def test_after_thinking_they_are_those_of_the_training_template(models):
    sft = models["asked"]
    thinking = "The cat coughs. "
    turns = [Turn(render_question(ITEM), thinking, render_option(text, LETTERS[k])) for k, text in enumerate(ITEM.options)]
    sums = []
    for (ids, mask), turn in zip(encode_examples(sft.tokenizer, turns), turns, strict=True):
        answer = len(sft.tokenizer.encode(turn.answer))
        labels = [IGNORED] * len(ids)
        labels[-answer - 2 : -2] = ids[-answer - 1 : -1]  # without the end of the text
        assert mask[-answer - 1 :] == [1] * (answer + 1)
        with torch.no_grad():
            _, logp_N, *_ = label_logprobs(sft.model, *pad_rows([(ids, labels)]))
        sums.append(logp_N.double().sum().item())
    wanted = [exp(total) / sum(map(exp, sums)) for total in sums]
    assert options_of(sft, thinking=thinking)[0] == pytest.approx(wanted, rel=1e-4)
    assert options_of(sft)[0] != pytest.approx(wanted, rel=1e-2)


def test_what_cannot_be_scored_is_refused(models):
    sft = models["asked"]
    with pytest.raises(UserError, match="no options"):
        options_of(sft, "Who is ill?")
    with pytest.raises(UserError, match="Question and options together do not fit into the 256 tokens"):
        options_of(sft, "Who " * 300 + PASTED)
    with pytest.raises(UserError, match="Question, options and thinking together"):
        options_of(sft, thinking="why " * 300)


def test_the_example_is_of_the_exam_that_the_model_learned(models):
    ready = replace(models["asked"], training={"data": {"type": "clinic"}})
    item = load_clinic(split="new_findings", limit=1)[0]
    assert read_pasted(example_of(ready)) == (item.question, item.options)
    assert example_of(models["asked"]) is None
    assert example_of(replace(ready, state={"kind": "pretrain"})) is None, "it was not taught to answer"


def test_over_http(server):
    def post(**body: object) -> tuple[int, dict]:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=20)
        connection.request("POST", "/v1/options", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    status, found = post(model="text", question=PASTED)
    shares, _ = options_of(server.served[1].ready)
    assert (status, found["model"], [option["letter"] for option in found["options"]]) == (200, "text", ["A", "B", "C"])
    assert [option["probability"] for option in found["options"]] == pytest.approx(shares, rel=1e-4)
    _, thought = post(model="asked", question=PASTED, reasoning_content="The cat coughs.")
    shares, _ = options_of(server.served[0].ready, thinking="The cat coughs.")
    assert [option["probability"] for option in thought["options"]] == pytest.approx(shares, rel=1e-4)
    status, found = post(question="Who is ill?")
    assert (status, found["error"]["param"]) == (400, "question") and "no options" in found["error"]["message"]
    assert post(question=PASTED, thinking="x")[0] == 400, "an unknown parameter is named"
    assert all(served.outstanding == 0 for served in server.served)
