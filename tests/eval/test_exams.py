"""Exams scored end to end: a real tokenizer, a real small model that has learnt its answers, the real engine."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from osler.eval.exams import Form, grade, greedy, option_rows, presentations, score_by_generation, score_by_likelihood
from osler.eval.likelihood import pad_rows, sum_logprobs
from osler.inference.engine import InferenceEngine
from osler.model.decoder import Decoder
from osler.model.layers import Layout
from osler.model.transformer import Transformer
from osler.ops.cross_entropy import linear_cross_entropy
from osler.ops.sampling_params import SamplingParams
from osler.records.answers import AnswerLog
from osler.runtime.errors import UserError
from osler.tasks.item import ExamItem, render_answer, render_question
from osler.tasks.rewards import correct
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.chat import Completion, Turn, encode_examples, encode_prompt
from tests.models import tiny_model

DRUGS = ("penicillin", "amoxicillin", "vancomycin", "doxycycline")
SIGNS = ("fever and cough", "rash and fever", "joint pain", "salty skin", "slow pulse", "night sweats")
ITEMS = [
    ExamItem(
        id=f"e{k}",
        question=f"A man has {sign}. Which drug?",
        options=DRUGS[k % 4 :] + DRUGS[: k % 4],
        answer_index=(1, 0, 3, 2, 1, 0)[k],
        thinking=f"{sign} needs it.",
        group="drug",
        cluster=f"drug/{k}",
    )
    for k, sign in enumerate(SIGNS)
]
NUMBER = ExamItem(id="sum", question="What is 6 x 7?", options=(), answer_index=-1, thinking="six sevens", answer="42")


def turn(item: ExamItem) -> Turn:
    return Turn(render_question(item), item.thinking, render_answer(item))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([f"{turn(item)}" for item in ITEMS], 360)


def build(tokenizer: Tokenizer, **changes: str) -> Transformer:
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "max_seq_len": 128}
    return tiny_model(**shape, vocab_size=tokenizer.vocab_size, **changes)


@pytest.fixture(scope="module")
def scholar(tokenizer: Tokenizer) -> Transformer:
    """A model that has learnt the six items and the sum by heart, with and without thinking."""
    torch.manual_seed(0)
    model = build(tokenizer)
    turns = [turn(item) for item in [*ITEMS, NUMBER]]
    examples = encode_examples(tokenizer, [replace(t, thinking=thinking) for t in turns for thinking in (t.thinking, None)])
    rows = [(ids[:-1], [one if learned else -100 for one, learned in zip(ids, mask, strict=True)][1:]) for ids, mask in examples]
    ids_BT, labels_BT = pad_rows(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    count = int((labels_BT != -100).sum())
    for _ in range(50):
        features, weight = model.head(model(ids_BT))
        loss = linear_cross_entropy(features, weight, labels_BT.flatten(), vocab_size=tokenizer.vocab_size) / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    return model


def test_what_was_learnt_is_scored_right(scholar: Transformer, tokenizer: Tokenizer) -> None:
    done: list[int] = []
    engine = InferenceEngine(scholar, max_rows=3)
    score = score_by_generation(engine, tokenizer, [*ITEMS, NUMBER], greedy(40), answers=AnswerLog(tell=done.append))
    assert (score.n, score.correct, score.unparsed, score.cut, score.too_long) == (7, 7, 0, 0, 0)
    assert score.letters == {"A": 2, "B": 2, "C": 1, "D": 1} and done == [1, 2, 3, 4, 5, 6, 7]
    assert score.results[1].text == render_answer(ITEMS[1]) and score.results[6].text == "42"
    assert score.groups["drug"]["n"] == 6
    without = score_by_generation(InferenceEngine(scholar), tokenizer, ITEMS, greedy(20), reasoning=False)
    assert without.accuracy == 1.0


def test_length_limits_are_counted_and_never_right(scholar: Transformer, tokenizer: Tokenizer) -> None:
    cut = score_by_generation(InferenceEngine(scholar), tokenizer, ITEMS, greedy(2))
    assert (cut.correct, cut.cut, cut.unparsed) == (0, 6, 0)
    tight = score_by_generation(InferenceEngine(scholar), tokenizer, ITEMS, greedy(118))
    assert (tight.n, tight.correct, tight.too_long) == (6, 0, 6)
    with pytest.raises(UserError, match="no room"):
        score_by_generation(InferenceEngine(scholar), tokenizer, ITEMS, greedy(128))


def test_a_long_context_is_shortened_from_its_front(scholar: Transformer, tokenizer: Tokenizer) -> None:
    long = replace(ITEMS[0], context=" ".join(f"word{k}" for k in range(500)))
    score = score_by_generation(InferenceEngine(scholar), tokenizer, [long], greedy(20))
    assert score.too_long == 0
    rows = option_rows(tokenizer, long, "answer", template=True, max_seq_len=100)
    assert rows is not None
    text = tokenizer.decode(rows[0][0])
    assert max(len(ids) for ids, _ in rows) <= 100 and "word499\nA man has" in text and "word400" not in text


def test_permutations_show_the_right_option_in_every_place_once() -> None:
    shown = list(presentations([ITEMS[0], NUMBER], 4, seed=0))
    assert [item.id for item in shown] == ["e0"] * 4 + ["sum"]
    assert shown[0] == ITEMS[0] and sorted(item.answer_index for item in shown[:4]) == [0, 1, 2, 3]
    eight = list(presentations([ITEMS[0]], 8, seed=0))
    assert sorted(item.answer_index for item in eight) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {item.options[item.answer_index] for item in eight} == {"amoxicillin"}


def test_options_that_point_at_options_stay_where_they_are() -> None:
    pointing = replace(ITEMS[0], options=("ears", "eyes", "A and B", "None of the above"))
    assert list(presentations([pointing, ITEMS[1]], 4, seed=0))[:4] == [pointing] * 4


def test_equal_options_are_right_together(tokenizer: Tokenizer) -> None:
    ignorant = build(tokenizer, head_init="zero")  # all words equally likely: the first option always wins
    items = [replace(item, options=("aa", "bb", "aa", "cc"), answer_index=2) for item in ITEMS]
    score = score_by_likelihood(ignorant, tokenizer, items, normalise="tokens")
    assert (score.accuracy, score.chance, score.constant_letter_baseline) == (1.0, 0.5, 1.0)


def test_a_model_that_knows_one_letter_is_at_chance_over_permutations(tokenizer: Tokenizer) -> None:
    ignorant = build(tokenizer, head_init="zero")
    items = [replace(item, options=("aa", "bb", "cc", "dd"), answer_index=0) for item in ITEMS]
    assert score_by_likelihood(ignorant, tokenizer, items, normalise="tokens").accuracy == 1.0
    score = score_by_likelihood(ignorant, tokenizer, list(presentations(items, 4, seed=0)), normalise="tokens")
    assert (score.n, score.presentations, score.accuracy) == (6, 24, 0.25)
    assert score.letters == {"A": 24, "B": 0, "C": 0, "D": 0} and score.constant_letter_baseline == 0.25
    assert score.interval[1] > 0.5  # six items, not twenty-four
    assert score.measures["right in all orders"]["value"] == 0 and score.measures["right in all orders"]["n"] == 6


def test_likelihood_finds_what_was_learnt(scholar: Transformer, tokenizer: Tokenizer) -> None:
    for normalise in ("bytes", "tokens", "none"):
        score = score_by_likelihood(scholar, tokenizer, ITEMS, normalise=normalise)  # type: ignore[arg-type]
        assert score.accuracy == 1.0 and score.unparsed == 0
    for form in ("letters", "cloze"):
        assert score_by_likelihood(scholar, tokenizer, ITEMS, form=form, template=False).n == 6  # type: ignore[arg-type]
    sure = score_by_likelihood(scholar, tokenizer, ITEMS, normalise="none")
    assert sure.measures["accuracy at 50% coverage"]["value"] == 1 and sure.measures["right when 90–100% sure"]["n"] == 6
    assert sure.measures["expected calibration error"]["value"] < 0.1
    with pytest.raises(ValueError, match="no options"):
        score_by_likelihood(scholar, tokenizer, [NUMBER])
    huge = replace(ITEMS[0], question="word " * 400)
    assert score_by_likelihood(scholar, tokenizer, [huge], form="cloze", template=False).too_long == 1
    assert score_by_likelihood(scholar, tokenizer, [huge]).too_long == 1


def one_by_one(model: Transformer, ids: list[int], start: int) -> tuple[float, bool]:
    """The log-likelihood of ids[start:] and whether they are likeliest, one prefix at a time, nothing batched."""
    with torch.no_grad():
        logits = [model.logits(model(torch.tensor([ids[:t]])))[0, -1].double() for t in range(start, len(ids))]
    total = sum(row.log_softmax(-1)[ids[t]].item() for t, row in enumerate(logits, start=start))
    return total, [int(row.argmax()) for row in logits] == ids[start:]


def check_sums(decoder: Decoder, model: Transformer, rows: list[list[int]], start: int) -> None:
    (sums, greedy), (expected, expected_greedy) = (
        zip(*pairs, strict=True)
        for pairs in (sum_logprobs(decoder, rows, start), [one_by_one(model, ids, start) for ids in rows])
    )
    assert sums == pytest.approx(expected, abs=1e-4) and greedy == expected_greedy


FORMS = [("answer", True), ("letters", True), ("cloze", True), ("letters", False), ("cloze", False)]


@pytest.mark.parametrize(("form", "template"), FORMS)
def test_likelihood_equals_brute_force(tokenizer: Tokenizer, form: Form, template: bool) -> None:
    model = build(tokenizer)
    decoder = Decoder(model, Layout(torch.float32, 16))
    for item in ITEMS:
        rows = option_rows(tokenizer, item, form, template=template, max_seq_len=128) or []
        check_sums(decoder, model, [ids for ids, _ in rows], rows[0][1])
    best = int(model.logits(model(torch.tensor([[5]])))[0, -1].argmax())
    check_sums(decoder, model, [[5, best, best], [5, best], [5, 8]], 1)  # scored from the second token on; the second is greedy


@pytest.mark.parametrize(("form", "template"), FORMS)
def test_likelihoods_are_the_same_to_the_bit_whatever_else_is_asked(tokenizer: Tokenizer, form: Form, template: bool) -> None:
    model = build(tokenizer)

    def asked(items: Sequence[ExamItem]) -> dict[str, list[list[float]]]:
        answers = AnswerLog()
        score_by_likelihood(model, tokenizer, items, form=form, template=template, answers=answers)
        return {items[number].id: output for number, output in answers.outputs.items()}

    alone = asked(ITEMS[:1]) | asked(ITEMS[1:2]) | asked(ITEMS[2:])
    assert asked(ITEMS) == asked(ITEMS[::-1]) == alone


def test_what_is_written_depends_on_the_question_and_not_on_the_batch(scholar: Transformer, tokenizer: Tokenizer) -> None:
    def written(items: Sequence[ExamItem], rows: int, temperature: float = 0.0) -> dict[int, list[int]]:
        answers, sampling = AnswerLog(), SamplingParams(max_new_tokens=24, temperature=temperature, seed=3)
        score_by_generation(InferenceEngine(scholar, max_rows=rows), tokenizer, items, sampling, answers=answers)
        return answers.outputs

    greedy_answers = written(ITEMS, 1)
    assert written(ITEMS, 4) == written(ITEMS, 256) == greedy_answers
    several = written([item for item in ITEMS for _ in range(3)], 256, temperature=2.0)
    assert len(set(map(tuple, several.values()))) > len(ITEMS)  # samples differ
    assert written([ITEMS[4]] * 3, 2, temperature=2.0) == {number: several[12 + number] for number in range(3)}


def test_the_letters_and_the_cloze_of_plain_text(tokenizer: Tokenizer) -> None:
    stem = f"Question: {ITEMS[0].question}\n"
    listed = "A. penicillin\nB. amoxicillin\nC. vancomycin\nD. doxycycline\n"
    for form, prompt, scored in (("letters", f"{stem}{listed}Answer:", "ABCD"), ("cloze", f"{stem}Answer:", DRUGS)):
        rows = option_rows(tokenizer, ITEMS[0], form, template=False, max_seq_len=128)  # type: ignore[arg-type]
        assert rows is not None and [tokenizer.decode(ids) for ids, _ in rows] == [f"{prompt} {text}" for text in scored]


@pytest.mark.parametrize("template", [True, False])
def test_likelihood_chooses_as_lm_evaluation_harness_does(tokenizer: Tokenizer, template: bool) -> None:
    """The harness's acc and acc_norm, written out as its ``process_results`` has them, one prefix at a time."""
    model = build(tokenizer)
    options = ("no", "fever and cough, a rash, joint pain", "rash", "night sweats and a slow pulse", "skin", "salty skin")
    items = [replace(item, options=options[k:] + options[:k], answer_index=0) for k, item in enumerate(ITEMS)]
    by_text_alone, acc, acc_norm = [], [], []
    for item in items:
        question = render_question(item)
        if template:
            context = encode_prompt(tokenizer, question, reasoning=False)
            choices = [f"{option} ({letter})" for option, letter in zip(item.options, "ABCDEF", strict=True)]
            rows = [(context, tokenizer.encode(choice)) for choice in choices]
        else:
            context = tokenizer.encode(f"Question: {item.question}\nAnswer:")
            choices = list(item.options)
            rows = [(context, tokenizer.encode(f" {choice}")) for choice in choices]
        lls = [one_by_one(model, ids + continuation, len(ids))[0] for ids, continuation in rows]
        completion_len = np.array([float(len(choice)) for choice in choices])
        acc.append(int(np.argmax(lls)))
        acc_norm.append(int(np.argmax(np.array(lls) / completion_len)))
        by_text_alone.append(int(np.argmax(np.array(lls) / np.array([len(option) for option in item.options]))))
    for normalise, expected in (("none", acc), ("bytes", acc_norm), ("characters", acc_norm)):
        form: Form = "answer" if template else "cloze"
        score = score_by_likelihood(model, tokenizer, items, form=form, template=template, normalise=normalise)  # type: ignore[arg-type]
        assert [result.predicted for result in score.results] == expected
    assert acc != acc_norm and (by_text_alone != acc_norm) == template  # the rules differ on these items


def test_options_are_tokenised_jointly_with_their_prompt(tokenizer: Tokenizer) -> None:
    item = ITEMS[2]
    rows = option_rows(tokenizer, item, "cloze", template=False, max_seq_len=128)
    assert rows is not None
    for (ids, start), option in zip(rows, item.options, strict=True):
        assert ids == tokenizer.encode(f"Question: {item.question}\nAnswer: {option}")
        assert tokenizer.decode(ids[start:]).endswith(option) and ids[:start] == rows[0][0][:start]
    chat = option_rows(tokenizer, item, "answer", template=True, max_seq_len=128)
    assert chat is not None
    for index, (ids, start) in enumerate(chat):
        answer = render_answer(replace(item, answer_index=index))
        [(whole, mask)] = encode_examples(tokenizer, [Turn(render_question(item), None, answer)])
        assert [*ids, tokenizer.eos_id] == whole and start == mask.index(1)
        assert ids[:start] == encode_prompt(tokenizer, render_question(item), reasoning=False)


def test_the_options_of_a_story_go_on_with_its_text(tokenizer: Tokenizer) -> None:
    story = ExamItem("s", "A man has fever. He", ("coughs.", "sings."), 0, context="Rest", is_story=True)
    rows = option_rows(tokenizer, story, "cloze", template=False, max_seq_len=128)
    assert rows is not None and [tokenizer.decode(ids) for ids, _ in rows] == [
        "Rest: A man has fever. He coughs.", "Rest: A man has fever. He sings."
    ]  # fmt: skip


def test_a_merge_across_the_border_is_scored_from_before_it() -> None:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # words may grow together
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["Answer: rest", "Answer: reset"] * 20, trainer)
    joined = Tokenizer(backend)
    item = ExamItem(id="m", question="What helps?", options=("rest", "reset", "zinc"), answer_index=0)
    stem = joined.encode("Question: What helps?\nAnswer:")
    rows = option_rows(joined, item, "cloze", template=False, max_seq_len=64)
    assert rows is not None and rows[0][0][: len(stem)] != stem  # the last token of the prompt is swallowed
    start = rows[0][1]
    assert start < len(stem)
    for (ids, begin), option in zip(rows, item.options, strict=True):
        assert begin == start and ids[:start] == stem[:start]
        assert joined.decode(ids) == f"Question: What helps?\nAnswer: {option}"


@pytest.mark.parametrize(
    ("item", "text", "finished", "status", "right"),
    [
        (replace(NUMBER, answer="lobar pneumonia"), "Lobar  pneumonia.", True, "answered", True),
        (replace(NUMBER, answer="lobar pneumonia"), "asthma", True, "answered", False),
        (replace(NUMBER, answer="lobar pneumonia"), "", True, "unparsed", False),
        (replace(NUMBER, answer="10"), "10", False, "cut", False),  # perhaps within a word or a number
        (ITEMS[0], "amoxicillin", False, "cut", False),
        (ITEMS[0], "amoxicillin (B)", False, "answered", True),
    ],
)
def test_how_an_answer_is_marked(item: ExamItem, text: str, finished: bool, status: str, right: bool) -> None:
    completion = Completion(thinking="x", answer=text, finished=finished, well_formed=finished)
    result = grade(item, completion)
    assert (result.status, result.right, correct(item, completion)) == (status, right, float(right))
