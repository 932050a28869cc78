"""Score exams, by what a model writes or by which option it finds most likely.

``presentations`` yields the items that the model is shown. ``score_by_generation`` lets it think and answer, ``grade``
reads each answer as the rewards read it (``tasks/answers.py``), and ``summarise`` (``score.py``) counts them.
``score_by_likelihood`` needs no form of answer, so it also suits base models.

No score depends on which questions are asked together. A likelihood is computed for one question at a time, so it is the same to
the bit. Samples are drawn with random numbers that belong to the question. Rows that decode together round differently in the
last bits, so a written answer is the same unless the probabilities of two tokens agree to about six digits.
"""

import hashlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from math import exp
from typing import Literal

from osler.eval.likelihood import sum_logprobs
from osler.eval.score import ANSWERED, CUT, TOO_LONG, UNPARSED, Result, ScoredExam, summarise
from osler.inference.engine import InferenceEngine
from osler.inference.rows import Request
from osler.model.decoder import Decoder
from osler.model.layers import Layout
from osler.model.transformer import Transformer
from osler.ops.sampling_params import SamplingParams
from osler.records.answers import AnswerLog
from osler.runtime.errors import UserError
from osler.runtime.stop import AskedToStop, asked
from osler.runtime.world import World
from osler.tasks.answers import Reading, read_answer
from osler.tasks.item import ExamItem, Form, answer_texts, bare, permute, render_plain, render_question, reorder
from osler.tokenizer.bpe import ANSWER, Tokenizer
from osler.tokenizer.chat import Completion, encode_prompt, parse_completion

Normalise = Literal["bytes", "characters", "tokens", "none"]
Read = Callable[[ExamItem, Completion], Reading]
STOPS = ("Question:", "</s>", "<|im_end|>")  # what ends a written answer to a plain prompt
ITEM_ROWS = 256  # rows of hidden states of one item, roughly, for which the weights are laid out


def greedy(max_new_tokens: int) -> SamplingParams:
    """Return the usual sampling of an exam: always the likeliest token, with ``max_new_tokens`` for thinking and answer."""
    return SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)


def score_by_generation(
    engine: InferenceEngine,
    tokenizer: Tokenizer,
    shown: Sequence[ExamItem],
    sampling: SamplingParams,
    *,
    reasoning: bool = True,
    template: bool = True,
    read: Read = read_answer,
    answers: AnswerLog | None = None,
) -> ScoredExam:
    """Let the model write an answer to every item that is shown and score it; ``answers`` may already hold some answers.

    Without ``template`` the prompt is ``render_plain``. The answer then ends before the first of ``STOPS``, and for an item with
    options or aliases also at the end of its line; other answers may be solutions or programs.

    Prompt and completion must fit the model's ``max_seq_len``. A context passage is shortened from its front to fit. A question
    is not, and one that does not fit counts as wrong. Raises UserError when ``max_new_tokens`` leaves no room for a question.
    """
    answers = AnswerLog() if answers is None else answers
    longest = engine.model.config.max_seq_len
    room = longest - sampling.max_new_tokens
    if room < 1:
        raise UserError(
            f"max_new_tokens is {sampling.max_new_tokens}, which leaves no room for a question in the model's "
            f"{longest} tokens: ask for shorter answers."
        )

    def encode(item: ExamItem) -> list[int]:
        if not template:
            return tokenizer.encode(render_plain(item, "letters"))
        return encode_prompt(tokenizer, render_question(item), reasoning=reasoning)

    def keep(number: int, ids: list[int]) -> None:
        item = shown[number]
        if template:
            completion = parse_completion(tokenizer, ids, reasoning=reasoning)
        else:
            completion = parse_text(tokenizer, ids, (*STOPS, "\n") if item.options or item.aliases else STOPS)
        results[number] = grade(item, completion, read)
        answers.add(number, ids, results[number].sample(""))

    results = [Result(item, TOO_LONG, right=False) for item in shown]
    waiting: list[tuple[int, Request]] = []
    sampling = replace(sampling, stop_ids=(tokenizer.eos_id,))
    visits = Counter[str]()
    for number, item in enumerate(shown):
        fitted = fitting(item, encode, room)
        if fitted is None:
            answers.add(number, [], results[number].sample(""))
        elif number in answers.outputs:
            keep(number, answers.outputs[number])
        else:
            waiting.append((number, Request(tuple(encode(fitted)), sampling, _row_number(item, visits[item.id]))))
        visits[item.id] += 1
    waiting.sort(key=lambda pair: -len(pair[1].prompt))
    for index, continuation in engine.complete([request for _, request in waiting]):
        keep(waiting[index][0], continuation.ids)
        if asked():  # a trainer asks all ranks whether to stop, and then discards this score
            break
    return summarise(results, max_seq_len=longest)


def parse_text(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str]) -> Completion:
    """Return what the model wrote up to the end-of-text token or the first of ``stops``, as the answer of a completion."""
    body = list(takewhile(lambda token: token != tokenizer.eos_id, ids))
    whole = tokenizer.decode(body, skip_special=True)
    end = min((whole.index(stop) for stop in stops if stop in whole), default=len(whole))
    return Completion("", whole[:end], finished=end < len(whole) or len(body) < len(ids), well_formed=False)


def _row_number(item: ExamItem, visit: int) -> int:
    """Return the ``Request.number`` for showing an item for the time ``visit`` (0, 1 ...); it depends on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{visit}:{item.id}".encode()).digest()[:4], "big")


def shared_exam(
    score: Callable[[Sequence[ExamItem]], ScoredExam],
    items: Sequence[ExamItem],
    world: World,
    *,
    permutations: int = 1,
    seed: int = 0,
) -> tuple[float, float]:
    """Return two fractions of the answers: of those that are right, and of those that are unparsed, cut or too long.

    Each rank scores a part of the items. Raises UserError when there are no items, and AskedToStop when training is to end.
    """
    own = items[world.rank :: world.size]
    counts = (0.0, 0.0, 0.0)
    if own or not items:  # without any item ``score`` raises UserError
        found = score(list(presentations(own, permutations, seed)))
        counts = (found.correct, found.unparsed + found.cut + found.too_long, found.presentations)
    right, unread, shown, left = world.all_reduce_sum(*counts, asked())
    if left:
        raise AskedToStop
    return right / shown, unread / shown


def presentations(items: Iterable[ExamItem], permutations: int, seed: int) -> Iterator[ExamItem]:
    """Yield every item in ``permutations`` option orders: as it is, then its rotations, then rotations of shuffled orders.

    An item whose options point at each other is shown ``permutations`` times as it is, so that all items weigh the same. An item
    without options is shown once.
    """
    for item in items:
        if item.keeps_order:
            yield from [item] * permutations
            continue
        n = len(item.options)
        for visit in range(permutations if n else 1):
            base = item if visit < n or n == 0 else permute(item, seed, visit // n)
            yield reorder(base, [(visit + k) % n for k in range(n)])


def grade(item: ExamItem, completion: Completion, read: Read = read_answer) -> Result:
    """Read the completion's answer and compare it with the item's."""
    reading = read(item, completion)
    status = ANSWERED if reading.readable else UNPARSED if completion.finished else CUT
    return Result(item, status, reading.right, reading.choice, completion.answer or "", completion.thinking)


def score_by_likelihood(
    model: Transformer,
    tokenizer: Tokenizer,
    shown: Sequence[ExamItem],
    *,
    form: Form = "answer",
    template: bool = True,
    normalise: Normalise = "bytes",
    answers: AnswerLog | None = None,
) -> ScoredExam:
    """Choose the option whose ``form`` is most likely after the prompt; ``answers`` may already hold some answers.

    With ``template`` the prompt is the chat template up to the answer, with no thinking; without it, ``render_plain``. The form
    "cloze" lists no options in the prompt. Raises ValueError for an item without options.

    The log-likelihood is divided by the UTF-8 bytes of what is scored, by its characters (lm-evaluation-harness's ``acc_norm``),
    by its tokens, or by nothing (the harness's ``acc``, where short options win). Of equal scores the earlier option wins.
    Without a divisor the scores are log-probabilities, and the results say how sure the model is.
    """
    answers = AnswerLog() if answers is None else answers
    longest = model.config.max_seq_len
    decoder: Decoder | None = None
    results: list[Result] = []
    for number, item in enumerate(shown):
        output = answers.outputs.get(number)  # sum, bytes and tokens of every option; empty where they do not fit
        if output is None:
            rows = option_rows(tokenizer, item, form, template=template, max_seq_len=longest) or []
            decoder = decoder or Decoder(model, Layout(model.compute_dtype, ITEM_ROWS))
            sums = sum_logprobs(decoder, [ids for ids, _ in rows], rows[0][1]) if rows else []
            sizes = [len(text.encode()) for text in answer_texts(item, form)]
            output = [[total, size, len(ids) - start] for (total, _), size, (ids, start) in zip(sums, sizes, rows, strict=False)]
        results.append(_likeliest(item, form, output, normalise))
        answers.add(number, output, results[-1].sample(""))
        if asked():  # a signal came; a trainer discards this partial score as well
            break
    return summarise(results, max_seq_len=longest)


def _likeliest(item: ExamItem, form: Form, output: Sequence[Sequence[float]], normalise: Normalise) -> Result:
    if not output:
        return Result(item, TOO_LONG, right=False)
    scores = [
        total / {"bytes": size, "characters": len(text), "tokens": tokens, "none": 1}[normalise]
        for (total, size, tokens), text in zip(output, answer_texts(item, form), strict=True)
    ]
    best = scores.index(max(scores))
    confidence = 1 / sum(exp(score - scores[best]) for score in scores) if normalise == "none" else None
    return Result(item, ANSWERED, item.is_right(best), best, item.options[best], confidence=confidence)


def option_rows(
    tokenizer: Tokenizer, item: ExamItem, form: Form, *, template: bool, max_seq_len: int, thinking: str | None = None
) -> list[tuple[list[int], int]] | None:
    """Return for every option a row of ids, prompt and option together, and where scoring starts; None when they do not fit.

    In the template a special token is the border between prompt and option, and ``thinking`` may stand before it. Plain text is
    tokenised as a whole, because a merge may straddle the border. Scoring then starts at the first place where the rows differ
    from each other or from the prompt alone, which is one place for all options.
    """
    if not item.options:
        raise ValueError(f"item {item.id} has no options to compare")
    texts = answer_texts(item, form)
    if template:
        continuations = [tokenizer.encode(text) for text in texts]

        def encode(item: ExamItem) -> list[int]:
            ids = encode_prompt(tokenizer, render_question(item), reasoning=thinking is not None)
            return ids if thinking is None else [*ids, *tokenizer.encode(thinking), tokenizer.special_id(ANSWER)]

        listed = bare(item) if form == "cloze" else item
        fitted = fitting(listed, encode, max_seq_len - max(map(len, continuations)))
        prompt = [] if fitted is None else encode(fitted)
        return [(prompt + continuation, len(prompt)) for continuation in continuations] if prompt else None
    longest = max(len(tokenizer.encode(f" {text}")) for text in texts) + 1
    fitted = fitting(item, lambda item: tokenizer.encode(render_plain(item, form)), max_seq_len - longest)
    if fitted is None:
        return None
    stem = render_plain(fitted, form)
    together = [tokenizer.encode(f"{stem} {text}") for text in texts]
    columns = zip(tokenizer.encode(stem), *together, strict=False)
    start = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    fits = max(map(len, together)) <= max_seq_len and start > 0
    return [(ids, start) for ids in together] if fits else None


def fitting(item: ExamItem, encode: Callable[[ExamItem], list[int]], room: int) -> ExamItem | None:
    """Return the item, its context cut at the front to fit ``room`` tokens; None if not even the rest fits.

    The end of a context is kept because an abstract ends with its results.
    """
    if len(encode(item)) <= room:
        return item
    words = item.context.split()

    def shortened(kept: int) -> ExamItem:
        return replace(item, context=" ".join(words[len(words) - kept :]))

    too_many = bisect_left(range(len(words)), True, key=lambda kept: len(encode(shortened(kept))) > room)
    return shortened(too_many - 1) if too_many else None
